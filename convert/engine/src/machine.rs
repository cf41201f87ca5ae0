// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The machine that the guest leaves, and the one it moves to.

use crate::survey::{Survey, place};
use crate::{NetworkRule, NetworkType, Request};
use tranship_linux::{Disk, Firmware, MachineFacts, Nic, Volume};
use tranship_protocol::{VolumeKind, disk_name};
use tranship_source::{Controller, NetworkKind, Source, SourceDisk};

/// Linux' name of a source disk: by controller, lettered in the order of the disks.
fn source_name(disk: &SourceDisk) -> String {
    match disk.controller {
        Controller::Nvme => format!("nvme{}n1", disk.index),
        _ => disk_name(disk.index),
    }
}

/// Linux' name of a disk on virtio.
pub(crate) fn target_name(index: usize) -> String {
    let name = disk_name(index);
    name.strip_prefix('s').map_or(name.clone(), |rest| format!("v{rest}"))
}

/// What the planner has to know of both machines.
pub(crate) fn facts(source: &Source, survey: &Survey) -> MachineFacts {
    let disks = source
        .disks
        .iter()
        .map(|disk| Disk {
            source_name: source_name(disk),
            target_name: target_name(disk.index),
            volumes: survey
                .volumes
                .iter()
                .filter(|volume| matches!(volume.kind, VolumeKind::Disk | VolumeKind::Partition))
                .filter_map(|volume| {
                    let (index, partition) = place(&volume.device)?;
                    let tag = |name: &str| volume.tag(name).map(str::to_owned);
                    (index == disk.index).then(|| Volume {
                        partition,
                        uuid: tag("UUID"),
                        label: tag("LABEL"),
                        partuuid: tag("PART_ENTRY_UUID"),
                    })
                })
                .collect(),
        })
        .collect();
    let nics = source
        .nics
        .iter()
        .filter_map(|nic| Some(Nic { mac: nic.mac.clone()?, slot: nic.slot }))
        .collect();
    MachineFacts { disks, nics, firmware: firmware(source, survey) }
}

/// How the guest starts: as the source says, else as its partitions tell.
pub(crate) fn firmware(source: &Source, survey: &Survey) -> Firmware {
    match source.firmware {
        tranship_source::Firmware::Uefi => Firmware::Uefi,
        tranship_source::Firmware::Unknown if survey.has_efi_system => Firmware::Uefi,
        tranship_source::Firmware::Bios | tranship_source::Firmware::Unknown => Firmware::Bios,
    }
}

/// Where a NIC is connected in the target, by the rules of the request: its MAC address
/// first, then its network's own name, then the default for that kind of name.
pub(crate) fn connection(
    mac: Option<&str>,
    network: &NetworkKind,
    request: &Request,
) -> (NetworkType, String) {
    let by_mac = request.networks.iter().find_map(|rule| match rule {
        NetworkRule::Mac { mac: wanted, kind, to } if mac == Some(wanted.as_str()) => {
            Some((*kind, to.clone()))
        }
        _ => None,
    });
    let (kind, name) = match network {
        NetworkKind::Bridge(name) => (NetworkType::Bridge, name),
        NetworkKind::Network(name) => (NetworkType::Network, name),
    };
    let by_name = |wanted: Option<&String>| {
        request.networks.iter().find_map(|rule| match rule {
            NetworkRule::Name { kind: of, from, to } if *of == kind && from.as_ref() == wanted => {
                Some((kind, to.clone()))
            }
            _ => None,
        })
    };
    by_mac
        .or_else(|| by_name(Some(name)))
        .or_else(|| by_name(None))
        .unwrap_or_else(|| (kind, name.clone()))
}
