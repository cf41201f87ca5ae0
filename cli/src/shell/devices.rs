// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Commands about disks, partitions and what is in them.

use super::session::Shell;
use super::table::Arguments;
use super::{Flow, Outcome};
use crate::failure::Failure;
use std::path::Path;
use tranship_convert::ErrorKind;
use tranship_protocol::{Volume, VolumeKind, disk_name};

pub(super) fn add(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let format = arguments.optional_text("format").map(ToOwned::to_owned);
    let path = Path::new(arguments.text(0));
    shell.add(path, format.as_deref(), arguments.flag("readonly"))?;
    Ok(Flow::Continue)
}

pub(super) fn remove(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let device = arguments.text(0);
    let index = (0..shell.guest.drives())
        .find(|index| format!("/dev/{}", disk_name(*index)) == device)
        .ok_or_else(|| {
            let message = format!("remove_drive: {device}: no such disk was added");
            Failure::new(ErrorKind::Conversion, message)
        })?;
    shell.guest.remove_drive(index)?;
    Ok(Flow::Continue)
}

pub(super) fn launch(shell: &mut Shell, _: &Arguments) -> Outcome {
    shell.launch()?;
    Ok(Flow::Continue)
}

pub(super) fn shutdown(shell: &mut Shell, _: &Arguments) -> Outcome {
    shell.end()?;
    Ok(Flow::Continue)
}

pub(super) fn list_devices(shell: &mut Shell, _: &Arguments) -> Outcome {
    let devices = shell.guest.list_devices()?;
    shell.print_lines(devices)
}

fn of_kind(shell: &mut Shell, kind: VolumeKind) -> Outcome {
    let volumes = shell.guest.volumes()?;
    let devices = volumes.iter().filter(|volume| volume.kind == kind);
    shell.print_lines(devices.map(|volume| volume.device.as_str()))
}

pub(super) fn list_partitions(shell: &mut Shell, _: &Arguments) -> Outcome {
    of_kind(shell, VolumeKind::Partition)
}

pub(super) fn logical_volumes(shell: &mut Shell, _: &Arguments) -> Outcome {
    of_kind(shell, VolumeKind::LogicalVolume)
}

pub(super) fn list_filesystems(shell: &mut Shell, _: &Arguments) -> Outcome {
    let volumes = shell.guest.volumes()?;
    shell.print_lines(
        filesystems(&volumes).map(|volume| {
            format!("{}: {}", volume.device, volume.tag("TYPE").unwrap_or("unknown"))
        }),
    )
}

/// What may be a filesystem: neither a disk with partitions, nor an extended partition, nor
/// a part of something larger, nor something that is locked.
pub(super) fn filesystems(volumes: &[Volume]) -> impl Iterator<Item = &Volume> {
    let partitioned = |disk: &Volume| {
        disk.tag("PTTYPE").is_some()
            || volumes.iter().any(|volume| {
                volume.kind == VolumeKind::Partition
                    && volume.device.strip_prefix(&disk.device).is_some_and(|rest| {
                        rest.bytes().all(|byte| byte == b'p' || byte.is_ascii_digit())
                    })
            })
    };
    let extended = |volume: &Volume| {
        matches!(volume.tag("PART_ENTRY_TYPE"), Some("0x5" | "0xf" | "0x85"))
            && volume.tag("PART_ENTRY_SCHEME") == Some("dos")
    };
    let hidden = |kind: &str| kind.ends_with("_member") || kind == "crypto_LUKS";
    volumes.iter().filter(move |volume| {
        let whole = volume.kind == VolumeKind::Disk && volume.tag("TYPE").is_none();
        let is_part_of_something = extended(volume) || volume.tag("TYPE").is_some_and(hidden);
        !(is_part_of_something || whole && partitioned(volume))
    })
}

fn volume(shell: &Shell, call: &str, device: &str) -> Result<Volume, Failure> {
    let found = shell.guest.volumes()?.into_iter().find(|volume| volume.device == device);
    found.ok_or_else(|| {
        let message = format!("{call}: {device}: No such file or directory");
        Failure::new(ErrorKind::Conversion, message)
    })
}

pub(super) fn size(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let volume = volume(shell, "blockdev_getsize64", arguments.text(0))?;
    shell.print(&format!("{}\n", volume.size))?;
    Ok(Flow::Continue)
}

fn tag(shell: &mut Shell, call: &str, arguments: &Arguments, tag: &str) -> Outcome {
    let volume = volume(shell, call, arguments.text(0))?;
    shell.print(&format!("{}\n", volume.tag(tag).unwrap_or_default()))?;
    Ok(Flow::Continue)
}

pub(super) fn vfs_type(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    tag(shell, "vfs_type", arguments, "TYPE")
}

pub(super) fn uuid(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    tag(shell, "vfs_uuid", arguments, "UUID")
}

pub(super) fn label(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    tag(shell, "vfs_label", arguments, "LABEL")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(device: &str, kind: VolumeKind, tags: &[(&str, &str)]) -> Volume {
        let tags = tags.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        Volume { device: device.into(), kind, size: 0, start: None, number: None, tags }
    }

    #[test]
    fn only_what_may_be_a_filesystem_is_listed() {
        use VolumeKind::{Disk, LogicalVolume, Partition};
        let volumes = [
            volume("/dev/sda", Disk, &[("PTTYPE", "dos")]),
            volume("/dev/sda1", Partition, &[("TYPE", "ext4")]),
            volume(
                "/dev/sda2",
                Partition,
                &[("PART_ENTRY_SCHEME", "dos"), ("PART_ENTRY_TYPE", "0x5")],
            ),
            volume("/dev/sda5", Partition, &[("TYPE", "LVM2_member")]),
            volume("/dev/sda6", Partition, &[]),
            volume("/dev/sdb", Disk, &[("TYPE", "xfs")]),
            volume("/dev/sdc", Disk, &[]),
            volume("/dev/sdd", Disk, &[]),
            volume("/dev/sdd1", Partition, &[("TYPE", "crypto_LUKS")]),
            volume("/dev/VG/LV", LogicalVolume, &[("TYPE", "swap")]),
        ];
        let names: Vec<&str> = filesystems(&volumes).map(|volume| volume.device.as_str()).collect();
        assert_eq!(names, ["/dev/sda1", "/dev/sda6", "/dev/sdb", "/dev/sdc", "/dev/VG/LV"]);
    }
}
