// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The target's definition for libvirt: the source's machine with virtio devices.

use crate::libvirt::{
    Bus, Clock, Connection, Disk, Domain, Drive, DriveKind, Firmware, Nic, Topology, osinfo_url,
};
use crate::survey::Survey;
use crate::{Error, ErrorKind, NetworkType, Request, Result, machine};
use std::path::{Path, PathBuf};
use tranship_source::{RemovableKind, Source};

/// Describes the converted guest; `disks` are its target files in order.
pub(crate) fn describe(
    request: &Request,
    source: &Source,
    survey: &Survey,
    name: &str,
    disks: &[PathBuf],
) -> Result<Domain> {
    let mut domain = Domain::new(name, source.memory_bytes >> 10, source.vcpus);
    domain.genid.clone_from(&source.genid);
    domain.osinfo = survey.facts.os.osinfo.as_deref().and_then(osinfo_url);
    domain.topology = source.cpu_topology.map(|found| Topology {
        sockets: found.sockets,
        cores: found.cores_per_socket,
        threads: 1,
    });
    domain.firmware = match machine::firmware(source, survey) {
        tranship_linux::Firmware::Bios => Firmware::Bios,
        tranship_linux::Firmware::Uefi => Firmware::Uefi { secure_boot: source.secure_boot },
    };
    // Linux keeps the hardware clock as /etc/adjtime says.
    domain.clock = match survey.facts.clock {
        tranship_inspect::Clock::Local => Clock::Localtime,
        tranship_inspect::Clock::Utc => Clock::Utc,
    };
    for (index, path) in disks.iter().enumerate() {
        domain.disks.push(Disk {
            path: absolute(path)?,
            format: request.format.name().into(),
            target: Bus::Virtio.target(index),
            bus: Bus::Virtio,
            boot_order: u32::try_from(index + 1).ok(),
        });
    }
    let mut cdroms = 0;
    let mut floppies = 0;
    for removable in &source.removables {
        let (kind, bus, index) = match removable.kind {
            RemovableKind::Cdrom => (DriveKind::Cdrom, Bus::Sata, &mut cdroms),
            RemovableKind::Floppy => (DriveKind::Floppy, Bus::Fdc, &mut floppies),
        };
        domain.drives.push(Drive { kind, target: bus.target(*index), bus });
        *index += 1;
    }
    for nic in &source.nics {
        let (kind, to) = machine::connection(nic.mac.as_deref(), &nic.network, request);
        domain.nics.push(Nic {
            mac: nic.mac.clone(),
            connection: match kind {
                NetworkType::Network => Connection::Network(to),
                NetworkType::Bridge => Connection::Bridge(to),
            },
            model: "virtio".into(),
        });
    }
    domain.sound.clone_from(&source.sound);
    Ok(domain)
}

/// The description as libvirt reads it.
pub(crate) fn render(
    request: &Request,
    source: &Source,
    survey: &Survey,
    name: &str,
    disks: &[PathBuf],
) -> Result<String> {
    describe(request, source, survey, name, disks)?.to_xml()
}

/// libvirt wants absolute paths; the file itself need not exist yet.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| {
        Error::new(ErrorKind::Usage, format!("{}: no absolute path", path.display())).because(error)
    })
}
