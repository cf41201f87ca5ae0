// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finding the operating system among a guest's disks and mounting it as it mounts itself.

use crate::files::GuestFiles;
use crate::{Error, ErrorKind, Event, Key, Reporter, Result, RootChoice};
use tranship_appliance::Guest;
use tranship_inspect::{
    Facts, Filesystem, RootCheck, inspect_root, is_root, kernel_name, resolve_mounts,
};
use tranship_linux::Blocker;
use tranship_protocol::{GuestPath, Volume, VolumeKind};

/// Filesystems that can hold a Linux system.
const ROOT_TYPES: &[&str] = &["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "reiserfs"];

/// GPT partition types (UEFI specification, table 5-7; GRUB's BIOS boot partition).
const EFI_SYSTEM: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
const BIOS_BOOT: &str = "21686148-6449-6e6f-744e-656564454649";

/// What was found on a guest's disks, which are mounted as the guest would mount them.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Everything that may hold a filesystem.
    pub volumes: Vec<Volume>,
    /// The device of the root filesystem.
    pub root: String,
    /// What the operating system is.
    pub facts: Facts,
    /// Devices and mountpoints, root first.
    pub mounted: Vec<(String, GuestPath)>,
    /// Filesystems whose check found damage, as blockers.
    pub damage: Vec<Blocker>,
    /// Whether the partitions are those of a machine that starts by UEFI.
    pub has_efi_system: bool,
}

fn failed(what: &str) -> impl FnOnce(tranship_appliance::Error) -> Error {
    let what = what.to_owned();
    move |error| from_appliance(what, error)
}

/// The same failure as one of a conversion.
pub(crate) fn from_appliance(what: String, error: tranship_appliance::Error) -> Error {
    use tranship_appliance::ErrorKind as From;
    let kind = match error.kind() {
        From::Cancelled => ErrorKind::Interrupted,
        From::NoBackend => ErrorKind::Blocked,
        From::Launch | From::Lost | From::Io => ErrorKind::Transient,
        _ => ErrorKind::Conversion,
    };
    let remedy = error.remedy().map(str::to_owned);
    let outer = Error::new(kind, what).because(error);
    match remedy {
        Some(remedy) => outer.with_remedy(remedy),
        None => outer,
    }
}

/// The same failure as one of a conversion.
pub(crate) fn from_inspection(what: &str, error: tranship_inspect::Error) -> Error {
    let kind = match error.kind() {
        tranship_inspect::ErrorKind::Appliance => ErrorKind::Transient,
        _ => ErrorKind::Conversion,
    };
    Error::new(kind, what).because(error)
}

/// Looks at all disks of a launched guest and mounts the operating system.
///
/// # Errors
///
/// [`ErrorKind::Input`] if there is no operating system, with a line per volume that says
/// what was seen there; [`ErrorKind::Usage`] if there are several and none was chosen.
pub fn survey(
    guest: &Guest,
    choice: &RootChoice,
    keys: &[Key],
    reporter: &dyn Reporter,
) -> Result<Survey> {
    let mut volumes = guest.volumes().map_err(failed("listing what is on the disks"))?;
    if unlock(guest, &volumes, keys, reporter)? {
        volumes = guest.volumes().map_err(failed("listing what is on the disks"))?;
    }
    let (root, subvolume) = find_root(guest, &volumes, choice)?;
    let mut damage = Vec::new();
    check(guest, &volumes, &root, &mut damage)?;
    mount(guest, &volumes, &root, &subvolume, &GuestPath::of("/"))?;
    let files = GuestFiles(guest);
    let inspected = match inspect_root(&files) {
        // What is damaged may not be readable: then the damage is what has to be remedied.
        Err(_) if !damage.is_empty() => return Err(Error::blocked(damage)),
        inspected => inspected,
    };
    let facts = inspected
        .map_err(|error| from_inspection("inspecting the operating system", error))?
        .ok_or_else(|| Error::new(ErrorKind::Conversion, format!("{root}: not a root any more")))?;
    let mut mounted = vec![(root.clone(), GuestPath::of("/"))];
    for resolved in resolve_mounts(&facts.mounts, &filesystems(&volumes)) {
        let point = GuestPath::of(resolved.mount.mountpoint.as_bytes());
        if point == GuestPath::of("/") || resolved.mount.fstype == "swap" {
            continue;
        }
        let Some(device) = resolved.device else {
            if let Some(note) = resolved.note {
                let text = format!("{} is not mounted: {note}", resolved.mount.mountpoint);
                reporter.report(&Event::info("inspect.mount", text));
            }
            continue;
        };
        if !resolved.mount.mountpoint.starts_with('/') || mounted.iter().any(|(_, at)| *at == point)
        {
            continue;
        }
        check(guest, &volumes, &device, &mut damage)?;
        let subvolume = subvolume_of(&resolved.mount.options);
        match mount(guest, &volumes, &device, subvolume, &point) {
            Ok(()) => mounted.push((device, point)),
            Err(error) if error.kind() == ErrorKind::Conversion => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                let text = format!("{error}: {}", cause.unwrap_or_default());
                reporter.report(&Event::warning("inspect.mount", text).with("device", &device));
            }
            Err(error) => return Err(error),
        }
    }
    let has_type = |wanted: &str| {
        volumes.iter().any(|volume| {
            volume.tag("PART_ENTRY_SCHEME") == Some("gpt")
                && volume
                    .tag("PART_ENTRY_TYPE")
                    .is_some_and(|found| found.eq_ignore_ascii_case(wanted))
        })
    };
    let has_efi_system = has_type(EFI_SYSTEM) && !has_type(BIOS_BOOT);
    Ok(Survey { volumes, root, facts, mounted, damage, has_efi_system })
}

fn filesystem_type<'a>(volumes: &'a [Volume], device: &str) -> &'a str {
    volumes
        .iter()
        .find(|volume| volume.device == device)
        .and_then(|volume| volume.tag("TYPE"))
        .unwrap_or_default()
}

/// The option that names a subvolume of btrfs, out of a line of fstab; empty if none does.
pub fn subvolume_of(options: &str) -> &str {
    options
        .split(',')
        .find(|option| option.starts_with("subvol=") || option.starts_with("subvolid="))
        .unwrap_or_default()
}

fn mount(
    guest: &Guest,
    volumes: &[Volume],
    device: &str,
    subvolume: &str,
    point: &GuestPath,
) -> Result<()> {
    let fstype = filesystem_type(volumes, device);
    let fstype = (!fstype.is_empty()).then_some(fstype);
    guest
        .mount(device, point, subvolume, fstype)
        .map_err(failed(&format!("mounting {device} on {point}")))
}

/// Opens every encrypted volume for which there is a key; whether any was opened.
fn unlock(
    guest: &Guest,
    volumes: &[Volume],
    keys: &[Key],
    reporter: &dyn Reporter,
) -> Result<bool> {
    let mut opened = false;
    let encrypted = volumes
        .iter()
        .filter(|volume| matches!(volume.tag("TYPE"), Some("crypto_LUKS" | "BitLocker")));
    for volume in encrypted {
        let uuid = volume.tag("UUID").unwrap_or_default();
        let mut fitting = keys
            .iter()
            .filter(|key| key.id == volume.device || key.id == uuid || key.id == "all")
            .peekable();
        if fitting.peek().is_none() {
            let text = format!("{} is encrypted and no --key fits it", volume.device);
            reporter.report(&Event::warning("inspect.encrypted", text).with("uuid", uuid));
            continue;
        }
        let name = format!("luks-{uuid}");
        let mut last = None;
        for key in fitting {
            match guest.open_encrypted(&volume.device, &name, &key.secret) {
                Ok(()) => {
                    last = None;
                    opened = true;
                    break;
                }
                Err(error) if error.kind() == tranship_appliance::ErrorKind::Call => {
                    last = Some(error);
                }
                Err(error) => return Err(failed("opening an encrypted volume")(error)),
            }
        }
        if let Some(error) = last {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{}: none of the given keys opens it", volume.device),
            )
            .because(error));
        }
    }
    Ok(opened)
}

/// Where installers put the root of a btrfs filesystem: its default subvolume, Debian's and
/// Ubuntu's.
const BTRFS_ROOTS: &[&str] = &["", "subvol=@rootfs", "subvol=@"];

/// The device of the root filesystem that the user wants, and the option that names its
/// subvolume.
fn find_root(guest: &Guest, volumes: &[Volume], choice: &RootChoice) -> Result<(String, String)> {
    let mut roots = Vec::new();
    let mut seen = Vec::new();
    for volume in volumes {
        let fstype = volume.tag("TYPE").unwrap_or_default();
        if !ROOT_TYPES.contains(&fstype) {
            seen.push(format!("{}: {}", volume.device, describe(volume)));
            continue;
        }
        let places: &[&str] = if fstype == "btrfs" { BTRFS_ROOTS } else { &[""] };
        let mut why = String::new();
        for subvolume in places {
            match look(guest, volumes, &volume.device, subvolume)? {
                RootCheck::Root => {
                    roots.push((volume.device.clone(), (*subvolume).to_owned()));
                    why.clear();
                    break;
                }
                // The default subvolume says most about what the filesystem is.
                RootCheck::Rejected(reason) if why.is_empty() => why = reason,
                RootCheck::Rejected(_) => {}
            }
        }
        if !why.is_empty() {
            seen.push(format!("{}: {fstype} filesystem, {why}", volume.device));
        }
    }
    match (choice, roots.as_slice()) {
        (_, []) => Err(Error::new(
            ErrorKind::Input,
            format!("no operating system was found on the disks: {}", seen.join("; ")),
        )
        .with_remedy(
            "if these are data disks of another guest, give all disks of the guest together; \
             if a volume is encrypted, give its key with --key",
        )),
        (RootChoice::Device(wanted), roots) => {
            roots.iter().find(|(root, _)| root == wanted).cloned().ok_or_else(|| {
                let found = devices(roots);
                Error::new(
                    ErrorKind::Usage,
                    format!("--root {wanted}: no operating system is there"),
                )
                .with_remedy(format!("operating systems were found on {found}"))
            })
        }
        (RootChoice::First, [first, ..]) | (RootChoice::Single, [first]) => Ok(first.clone()),
        (RootChoice::Single, several) => Err(Error::new(
            ErrorKind::Usage,
            format!("several operating systems were found, on {}", devices(several)),
        )
        .with_remedy("say which one is to be converted, for example with --root /dev/sda1")),
    }
}

fn devices(roots: &[(String, String)]) -> String {
    let devices: Vec<&str> = roots.iter().map(|(device, _)| device.as_str()).collect();
    devices.join(", ")
}

/// Whether the root of an operating system is on this device, in this subvolume.
fn look(guest: &Guest, volumes: &[Volume], device: &str, subvolume: &str) -> Result<RootCheck> {
    let root = GuestPath::of("/");
    if let Err(error) = mount(guest, volumes, device, subvolume, &root) {
        if error.kind() != ErrorKind::Conversion {
            return Err(error);
        }
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        return Ok(RootCheck::Rejected(cause.unwrap_or_default()));
    }
    let found = is_root(&GuestFiles(guest));
    guest.unmount(&root).map_err(failed(&format!("unmounting {device}")))?;
    found.map_err(|error| from_inspection("looking for an operating system", error))
}

fn describe(volume: &Volume) -> String {
    if let Some(found) = volume.tag("TYPE") {
        return found.to_owned();
    }
    match (volume.tag("PTTYPE"), volume.kind) {
        (Some(table), _) => format!("{table} partition table"),
        (None, VolumeKind::Disk) => "no partition table and no filesystem".to_owned(),
        (None, _) => "no filesystem".to_owned(),
    }
}

/// Checks a filesystem before it is mounted for good; damage becomes a blocker.
fn check(guest: &Guest, volumes: &[Volume], device: &str, damage: &mut Vec<Blocker>) -> Result<()> {
    let fstype = filesystem_type(volumes, device);
    let found = guest
        .check_filesystem(device, fstype)
        .map_err(failed(&format!("checking the filesystem of {device}")))?;
    if !found.clean {
        let text: Vec<&str> = found.text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        let end = text.len().saturating_sub(4);
        damage.push(Blocker {
            code: "filesystem-damaged",
            what: format!(
                "the {fstype} filesystem on {device} is damaged: {}",
                text.get(end..).unwrap_or_default().join("; ")
            ),
            remedy: "start the guest where it comes from, let it check its filesystems, shut it \
                     down cleanly and export it again"
                .to_owned(),
        });
    }
    Ok(())
}

/// Disk and partition that an API name such as `/dev/sda1` stands for.
pub(crate) fn place(device: &str) -> Option<(usize, Option<u32>)> {
    kernel_name(device.strip_prefix("/dev/")?)
}

/// What inspection has to know of the volumes to find the lines of fstab.
pub fn filesystems(volumes: &[Volume]) -> Vec<Filesystem> {
    let tag = |volume: &Volume, name: &str| volume.tag(name).map(str::to_owned);
    volumes
        .iter()
        .filter(|volume| volume.tag("TYPE").is_some())
        .map(|volume| {
            let on_disk = matches!(volume.kind, VolumeKind::Disk | VolumeKind::Partition);
            let (disk, partition) = on_disk
                .then(|| place(&volume.device))
                .flatten()
                .map_or((None, None), |(d, p)| (Some(d), p));
            let logical = (volume.kind == VolumeKind::LogicalVolume)
                .then(|| volume.device.strip_prefix("/dev/")?.split_once('/'))
                .flatten();
            Filesystem {
                device: volume.device.clone(),
                fstype: tag(volume, "TYPE").unwrap_or_default(),
                label: tag(volume, "LABEL"),
                uuid: tag(volume, "UUID"),
                partuuid: tag(volume, "PART_ENTRY_UUID"),
                partlabel: tag(volume, "PART_ENTRY_NAME"),
                disk,
                partition,
                volume: logical.map(|(group, name)| (group.to_owned(), name.to_owned())),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_subvolume_of_a_line_is_kept() {
        for (options, wanted) in [
            ("defaults,subvol=@home,noatime", "subvol=@home"),
            ("rw,subvolid=256", "subvolid=256"),
            ("defaults", ""),
        ] {
            assert_eq!(subvolume_of(options), wanted);
        }
    }

    #[test]
    fn partitions_have_a_disk_and_a_number() {
        assert_eq!(place("/dev/sdb3"), Some((1, Some(3))));
        assert_eq!(place("/dev/vg/root"), None);
    }

    #[test]
    fn volumes_keep_their_places() {
        let volume = |device: &str, kind| Volume {
            device: device.into(),
            kind,
            size: 0,
            start: None,
            number: None,
            tags: vec![("TYPE".into(), "ext4".into()), ("UUID".into(), "u".into())],
        };
        let volumes = [
            volume("/dev/sdb2", VolumeKind::Partition),
            volume("/dev/vg/sda", VolumeKind::LogicalVolume),
        ];
        let all = filesystems(&volumes);
        let found = &all[0];
        assert_eq!((found.disk, found.partition), (Some(1), Some(2)));
        assert_eq!((found.fstype.as_str(), found.uuid.as_deref()), ("ext4", Some("u")));
        let found = &all[1];
        assert_eq!(found.volume, Some(("vg".into(), "sda".into())));
        assert_eq!((found.disk, found.partition), (None, None));
    }
}
