// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a source says about its guest, for people: `--print-source`.

use std::fmt::Write;
use tranship_source::{Controller, Firmware, NetworkKind, Source};

/// The description, one fact a line.
pub(crate) fn render(source: &Source) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:>20}: {value}");
    };
    line("source name", source.name.clone());
    line("memory", format!("{} (bytes)", source.memory_bytes));
    line("vcpus", source.vcpus.to_string());
    if let Some(topology) = &source.cpu_topology {
        let (sockets, cores) = (topology.sockets, topology.cores_per_socket);
        line("cpu topology", format!("{sockets} sockets, {cores} cores per socket"));
    }
    let firmware = match source.firmware {
        Firmware::Bios => "bios",
        Firmware::Uefi if source.secure_boot => "uefi, secure boot",
        Firmware::Uefi => "uefi",
        Firmware::Unknown => "unknown, the disks will tell",
    };
    line("firmware", firmware.to_owned());
    if let Some(guest) = &source.guest_os {
        line("guest", guest.clone());
    }
    if let Some(sound) = &source.sound {
        line("sound", sound.clone());
    }
    for disk in &source.disks {
        let place = place(&disk.controller, disk.unit);
        line("disk", format!("{} ({}) [{place}]", disk.name, disk.format));
    }
    for removable in &source.removables {
        let place = place(&removable.controller, removable.unit);
        line("removable media", format!("{:?} [{place}]", removable.kind).to_lowercase());
    }
    for nic in &source.nics {
        let network = match &nic.network {
            NetworkKind::Bridge(name) => format!("bridge {name:?}"),
            NetworkKind::Network(name) => format!("network {name:?}"),
        };
        let mac = nic.mac.as_deref().map(|mac| format!(" mac {mac}")).unwrap_or_default();
        let model = nic.model.as_deref().map(|model| format!(" [{model}]")).unwrap_or_default();
        line("nic", format!("{network}{mac}{model}"));
    }
    text
}

fn place(controller: &Controller, unit: Option<u32>) -> String {
    let controller = match controller {
        Controller::Ide => "ide".to_owned(),
        Controller::Scsi(None) => "scsi".to_owned(),
        Controller::Scsi(Some(model)) => format!("scsi {model}"),
        Controller::Sata => "sata".to_owned(),
        Controller::Nvme => "nvme".to_owned(),
        Controller::Unknown => "unknown".to_owned(),
    };
    match unit {
        Some(unit) => format!("{controller} {unit}"),
        None => controller,
    }
}
