// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Names of disks before and after the move.

use crate::machine::{Disk, MachineFacts, Volume};
use std::ops::Range;
use tranship_inspect::kernel_name;

/// What a device name in a configuration file stands for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Named<'a> {
    /// A disk of the machine that gets another name, or a partition of it.
    Moves(Moves<'a>),
    /// A disk's name that belongs to no disk of the machine, or could be any of several.
    Lost,
    /// Something that the move does not touch.
    Stays,
}

/// A disk that gets another name, or a partition of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moves<'a> {
    disk: &'a Disk,
    partition: Option<u32>,
}

impl<'a> Moves<'a> {
    fn volume(&self) -> Option<&'a Volume> {
        self.disk.volumes.iter().find(|volume| volume.partition == self.partition)
    }

    /// The kernel's new name, with `/dev/`.
    pub(crate) fn new_name(&self) -> String {
        let disk = &self.disk.target_name;
        match self.partition {
            None => format!("/dev/{disk}"),
            Some(number) if disk.ends_with(|c: char| c.is_ascii_digit()) => {
                format!("/dev/{disk}p{number}")
            }
            Some(number) => format!("/dev/{disk}{number}"),
        }
    }

    /// `UUID=` where it is known, which holds for ever; otherwise the new name.
    pub(crate) fn stable_name(&self) -> String {
        match self.volume().and_then(|volume| volume.uuid.as_ref()) {
            Some(uuid) => format!("UUID={uuid}"),
            None => self.new_name(),
        }
    }

    /// A name that the kernel itself finds, without an initramfs.
    pub(crate) fn kernel_known_name(&self) -> String {
        match self.volume().and_then(|volume| volume.partuuid.as_ref()) {
            Some(partuuid) => format!("PARTUUID={partuuid}"),
            None => self.new_name(),
        }
    }
}

/// Finds what `name`, with `/dev/`, stands for.
pub(crate) fn named<'a>(name: &str, machine: &'a MachineFacts) -> Named<'a> {
    let Some(name) = name.strip_prefix("/dev/") else { return Named::Stays };
    if let Some(link) = name.strip_prefix("disk/by-") {
        return linked(link, machine);
    }
    for disk in &machine.disks {
        if let Some(partition) = partition_of(name, &disk.source_name) {
            return moves(disk, partition);
        }
    }
    match kernel_name(name) {
        // Xen's own names, whatever name the source's description gave the disk.
        Some((index, partition)) if name.starts_with("xvd") => {
            machine.disks.get(index).map_or(Named::Lost, |disk| moves(disk, partition))
        }
        // A name that is already the new one is right; any other has no disk.
        Some(_) if machine.disks.iter().any(|d| partition_of(name, &d.target_name).is_some()) => {
            Named::Stays
        }
        Some(_) => Named::Lost,
        None => Named::Stays,
    }
}

fn moves(disk: &Disk, partition: Option<u32>) -> Named<'_> {
    if disk.source_name == disk.target_name {
        return Named::Stays;
    }
    Named::Moves(Moves { disk, partition })
}

/// `by-path` and `by-id` links hold the old hardware; the others name contents.
fn linked<'a>(link: &str, machine: &'a MachineFacts) -> Named<'a> {
    let hardware = link.strip_prefix("path/").or_else(|| link.strip_prefix("id/"));
    let Some(hardware) = hardware else { return Named::Stays };
    if ["dm-", "lvm-", "md-", "usb-"].iter().any(|prefix| hardware.starts_with(prefix)) {
        return Named::Stays;
    }
    let partition = match hardware.rsplit_once("-part") {
        Some((_, number)) => match number.parse() {
            Ok(number) => Some(number),
            Err(_) => return Named::Lost,
        },
        None => None,
    };
    match machine.disks.as_slice() {
        [only] => Named::Moves(Moves { disk: only, partition }),
        _ => Named::Lost,
    }
}

/// The partition that `name` is of `disk`: `sda3` of `sda`, `nvme0n1p3` of `nvme0n1`.
#[expect(clippy::option_option, reason = "outside: no such disk; inside: the whole disk")]
fn partition_of(name: &str, disk: &str) -> Option<Option<u32>> {
    let rest = name.strip_prefix(disk)?;
    if rest.is_empty() {
        return Some(None);
    }
    let digits =
        if disk.ends_with(|c: char| c.is_ascii_digit()) { rest.strip_prefix('p')? } else { rest };
    if !digits.chars().all(|c| c.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().map(Some)
}

/// Replaces byte ranges, which must not overlap and be in order; all else stays.
pub(crate) fn replaced(content: &[u8], edits: &[(Range<usize>, String)]) -> Vec<u8> {
    let mut new = Vec::with_capacity(content.len());
    let mut at = 0;
    for (range, text) in edits {
        new.extend_from_slice(content.get(at..range.start).unwrap_or_default());
        new.extend_from_slice(text.as_bytes());
        at = range.end;
    }
    new.extend_from_slice(content.get(at..).unwrap_or_default());
    new
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn disk(source: &str, target: &str, uuids: &[(u32, &str)]) -> Disk {
        Disk {
            source_name: source.to_owned(),
            target_name: target.to_owned(),
            volumes: uuids
                .iter()
                .map(|(partition, uuid)| Volume {
                    partition: Some(*partition),
                    uuid: Some((*uuid).to_owned()),
                    label: None,
                    partuuid: Some(format!("part-{uuid}")),
                })
                .collect(),
        }
    }

    #[test]
    fn names_are_looked_up_by_disk_and_partition() {
        let two = MachineFacts {
            disks: vec![disk("sda", "vda", &[(1, "u1")]), disk("nvme0n1", "vdb", &[(2, "u2")])],
            ..MachineFacts::default()
        };
        let one = MachineFacts {
            disks: vec![disk("sda", "vda", &[(1, "u1")])],
            ..MachineFacts::default()
        };
        for (machine, name, want) in [
            (&two, "/dev/sda1", "UUID=u1 PARTUUID=part-u1 /dev/vda1"),
            (&two, "/dev/sda7", "/dev/vda7 /dev/vda7 /dev/vda7"),
            (&two, "/dev/sda", "/dev/vda /dev/vda /dev/vda"),
            (&two, "/dev/nvme0n1p2", "UUID=u2 PARTUUID=part-u2 /dev/vdb2"),
            (&two, "/dev/xvda1", "UUID=u1 PARTUUID=part-u1 /dev/vda1"),
            (&two, "/dev/sdaa1", "lost"),
            (&two, "/dev/sdc1", "lost"),
            (&two, "/dev/vda1", "stays"),
            (&two, "/dev/mapper/vg-root", "stays"),
            (&two, "/dev/sr0", "stays"),
            (&two, "UUID=x", "stays"),
            (&two, "/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part1", "lost"),
            (
                &one,
                "/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part1",
                "UUID=u1 PARTUUID=part-u1 /dev/vda1",
            ),
            (&one, "/dev/disk/by-id/ata-VMware_Virtual_1", "/dev/vda /dev/vda /dev/vda"),
            (&one, "/dev/disk/by-id/dm-name-vg-root", "stays"),
            (&one, "/dev/disk/by-uuid/u1", "stays"),
        ] {
            let found = match named(name, machine) {
                Named::Moves(m) => {
                    format!("{} {} {}", m.stable_name(), m.kernel_known_name(), m.new_name())
                }
                Named::Lost => "lost".to_owned(),
                Named::Stays => "stays".to_owned(),
            };
            assert_eq!(found, want, "{name}");
        }
    }
}
