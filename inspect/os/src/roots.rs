// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which filesystem is a root, and which device each line of its fstab means.

use crate::fstab::Mount;
use crate::reader::Reader;
use crate::{GuestTree, Result};
use serde::Serialize;

/// Whether a mounted filesystem is the root of an operating system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RootCheck {
    /// It is.
    Root,
    /// It is not, and this is why, in words.
    Rejected(String),
}

/// Looks whether the mounted filesystem is the root of a Linux system.
///
/// # Errors
///
/// The filesystem or the appliance failed.
pub fn is_root(tree: &dyn GuestTree) -> Result<RootCheck> {
    let reader = Reader::new(tree);
    let any = |paths: &[&str]| -> Result<bool> {
        for path in paths {
            let path = (*path).into();
            // A separate /usr leaves links that lead nowhere yet: the name is enough.
            if tree.lstat(&path)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    };
    let release = any(&[
        "/etc/os-release",
        "/usr/lib/os-release",
        "/etc/redhat-release",
        "/etc/debian_version",
        "/etc/SuSE-release",
        "/etc/alpine-release",
        "/etc/arch-release",
    ])?;
    let programs = any(&["/bin", "/usr/bin", "/sbin", "/usr/sbin"])?;
    let etc = reader.has_directory("/etc")?;
    if etc && programs && (release || reader.has_file("/etc/fstab")?) {
        return Ok(RootCheck::Root);
    }
    if any(&["/casper", "/live", "/LiveOS", "/isolinux"])? {
        return Ok(RootCheck::Rejected("an installation or live medium".to_owned()));
    }
    let mut missing = Vec::new();
    if !etc {
        missing.push("/etc");
    }
    if !release {
        missing.push("/etc/os-release");
    }
    if !programs {
        missing.push("/bin");
    }
    let mut names = reader.names("/")?;
    names.truncate(8);
    let holds = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
    Ok(RootCheck::Rejected(format!("no {}; it holds {holds}", missing.join(", no "))))
}

/// One filesystem or swap space of the machine, as the native readers found it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Filesystem {
    /// The name it can be mounted by where inspection runs.
    pub device: String,
    /// What kind: `ext4`, `xfs`, `swap`...; empty if unknown.
    pub fstype: String,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID, as `blkid` prints it.
    pub uuid: Option<String>,
    /// UUID of the partition that it fills.
    pub partuuid: Option<String>,
    /// Label of the partition that it fills.
    pub partlabel: Option<String>,
    /// Which disk of the machine it lies on, counted from 0; `None` for logical volumes.
    pub disk: Option<usize>,
    /// Partition number on that disk; `None` if it fills the whole disk.
    pub partition: Option<u32>,
    /// Volume group and logical volume, if it is one.
    pub volume: Option<(String, String)>,
}

/// What one line of fstab leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ResolvedMount {
    /// The line.
    pub mount: Mount,
    /// Name of the device in the list of filesystems; `None` if it was not found.
    pub device: Option<String>,
    /// Why it was not found, or is not needed.
    pub note: Option<String>,
}

/// Finds the filesystem that each line of fstab means, in the order to mount them.
///
/// Lines that are no filesystem on a disk of the machine, such as `tmpfs` and NFS, come
/// back without a device and with a note. Kernel names such as `/dev/sdb1` are taken by
/// the order of the disks, whatever their letters' prefix: `sdb`, `vdb`, `xvdb`, `nvme1n1`.
pub fn resolve_mounts(fstab: &[Mount], filesystems: &[Filesystem]) -> Vec<ResolvedMount> {
    let mut resolved: Vec<ResolvedMount> =
        fstab.iter().map(|mount| resolve(mount, filesystems)).collect();
    resolved.sort_by_key(|resolved| {
        let path = resolved.mount.mountpoint.trim_end_matches('/');
        (path.matches('/').count(), resolved.mount.line)
    });
    resolved
}

fn resolve(mount: &Mount, filesystems: &[Filesystem]) -> ResolvedMount {
    const VIRTUAL: &[&str] = &[
        "proc",
        "sysfs",
        "tmpfs",
        "devtmpfs",
        "devpts",
        "nfs",
        "nfs4",
        "cifs",
        "overlay",
        "cgroup",
        "cgroup2",
        "debugfs",
        "securityfs",
        "hugetlbfs",
        "fuse.sshfs",
        "9p",
        "virtiofs",
        "glusterfs",
    ];
    let answer = |device: Option<String>, note: Option<String>| ResolvedMount {
        mount: mount.clone(),
        device,
        note,
    };
    if VIRTUAL.contains(&mount.fstype.as_str()) {
        return answer(None, Some(format!("{} is not on a disk of this machine", mount.fstype)));
    }
    if mount.options.split(',').any(|option| option == "bind" || option == "rbind") {
        return answer(None, Some("a bind mount of another directory".to_owned()));
    }
    let spec = mount.spec.as_str();
    match find(spec, filesystems) {
        Some(filesystem) => answer(Some(filesystem.device.clone()), None),
        None => answer(None, Some(format!("no filesystem of this machine is {spec}"))),
    }
}

fn find<'a>(spec: &str, filesystems: &'a [Filesystem]) -> Option<&'a Filesystem> {
    let by = |field: fn(&Filesystem) -> Option<&String>, value: &str, fold: bool| {
        let value = value.trim_matches(['"', '\'']).to_owned();
        filesystems.iter().find(|filesystem| {
            field(filesystem).is_some_and(|known| {
                if fold { known.eq_ignore_ascii_case(&value) } else { *known == value }
            })
        })
    };
    let (kind, value) = match spec.split_once('=') {
        Some(pair) => pair,
        None => match spec.strip_prefix("/dev/disk/by-").and_then(|rest| rest.split_once('/')) {
            Some(pair) => pair,
            None => return find_device(spec, filesystems),
        },
    };
    match kind {
        "UUID" | "uuid" => by(|filesystem| filesystem.uuid.as_ref(), value, true),
        "LABEL" | "label" => by(|filesystem| filesystem.label.as_ref(), value, false),
        "PARTUUID" | "partuuid" => by(|filesystem| filesystem.partuuid.as_ref(), value, true),
        "PARTLABEL" | "partlabel" => by(|filesystem| filesystem.partlabel.as_ref(), value, false),
        _ => None,
    }
}

fn find_device<'a>(spec: &str, filesystems: &'a [Filesystem]) -> Option<&'a Filesystem> {
    let name = spec.strip_prefix("/dev/")?;
    let volume = match name.strip_prefix("mapper/") {
        Some(mapped) => mapper_name(mapped),
        None => name.split_once('/').map(|(group, volume)| (group.to_owned(), volume.to_owned())),
    };
    if let Some(volume) = volume {
        return filesystems.iter().find(|filesystem| filesystem.volume.as_ref() == Some(&volume));
    }
    let (disk, partition) = kernel_name(name)?;
    filesystems
        .iter()
        .find(|filesystem| filesystem.disk == Some(disk) && filesystem.partition == partition)
}

/// `vg--0-root`: hyphens inside a name are doubled, a single one separates.
fn mapper_name(mapped: &str) -> Option<(String, String)> {
    let marked = mapped.replace("--", "\0");
    let (group, volume) = marked.split_once('-')?;
    Some((group.replace('\0', "-"), volume.replace('\0', "-")))
}

/// Disk (from 0) and partition that a kernel name such as `sdb1` or `nvme0n1p2` stands for.
pub fn kernel_name(name: &str) -> Option<(usize, Option<u32>)> {
    let number =
        |text: &str| if text.is_empty() { Some(None) } else { text.parse().ok().map(Some) };
    if let Some(rest) = name.strip_prefix("nvme") {
        let (controller, rest) = rest.split_once("n1")?;
        let partition = if rest.is_empty() { "" } else { rest.strip_prefix('p')? };
        return Some((controller.parse().ok()?, number(partition)?));
    }
    let rest = ["xvd", "sd", "vd", "hd"].iter().find_map(|prefix| name.strip_prefix(prefix))?;
    let digits = rest.trim_start_matches(|c: char| c.is_ascii_lowercase());
    let letters = rest.strip_suffix(digits)?;
    if letters.is_empty() || letters.len() > 3 {
        return None;
    }
    let index = letters.bytes().fold(0_usize, |sum, letter| {
        let value = usize::from(letter.saturating_sub(b'a')).saturating_add(1);
        sum.saturating_mul(26).saturating_add(value)
    });
    Some((index.saturating_sub(1), number(digits)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::FolderTree;
    use crate::fstab::parse_fstab;
    use std::fs;

    #[test]
    fn kernel_names_give_disk_and_partition() {
        for (name, want) in [
            ("sda", Some((0, None))),
            ("sdb1", Some((1, Some(1)))),
            ("xvdc12", Some((2, Some(12)))),
            ("sdaa3", Some((26, Some(3)))),
            ("nvme1n1p2", Some((1, Some(2)))),
            ("nvme0n1", Some((0, None))),
            ("sd1", None),
            ("sr0", None),
            ("sda1x", None),
            ("dm-0", None),
        ] {
            assert_eq!(kernel_name(name), want, "{name}");
        }
    }

    #[test]
    fn every_way_of_naming_a_device_is_resolved() {
        let filesystems = [
            Filesystem {
                device: "/dev/vda1".into(),
                uuid: Some("ABCD-12".into()),
                label: Some("boot".into()),
                partuuid: Some("0-1".into()),
                disk: Some(0),
                partition: Some(1),
                ..Filesystem::default()
            },
            Filesystem {
                device: "/dev/vg-0/root".into(),
                volume: Some(("vg-0".into(), "root".into())),
                ..Filesystem::default()
            },
        ];
        for (spec, want) in [
            ("/dev/sda1", Some("/dev/vda1")),
            ("/dev/xvda1", Some("/dev/vda1")),
            ("UUID=abcd-12", Some("/dev/vda1")),
            ("UUID=\"ABCD-12\"", Some("/dev/vda1")),
            ("LABEL=boot", Some("/dev/vda1")),
            ("LABEL=Boot", None),
            ("PARTUUID=0-1", Some("/dev/vda1")),
            ("/dev/disk/by-uuid/ABCD-12", Some("/dev/vda1")),
            ("/dev/mapper/vg--0-root", Some("/dev/vg-0/root")),
            ("/dev/vg-0/root", Some("/dev/vg-0/root")),
            ("/dev/sdb1", None),
            ("server:/export", None),
        ] {
            let mounts = parse_fstab(format!("{spec} /x ext4").as_bytes());
            let resolved = resolve_mounts(&mounts, &filesystems);
            assert_eq!(resolved[0].device.as_deref(), want, "{spec}");
            assert_eq!(resolved[0].note.is_some(), want.is_none(), "{spec}");
        }
    }

    #[test]
    fn mounts_come_shortest_path_first_with_reasons_for_the_rest() {
        let mounts = parse_fstab(b"a:/b /srv/x/y nfs\n/dev/sda9 /home ext4\nUUID=1 / ext4\n");
        let resolved = resolve_mounts(&mounts, &[]);
        let order: Vec<_> = resolved
            .iter()
            .map(|r| (r.mount.mountpoint.as_str(), r.note.as_deref().unwrap_or_default()))
            .collect();
        assert_eq!(
            order,
            [
                ("/", "no filesystem of this machine is UUID=1"),
                ("/home", "no filesystem of this machine is /dev/sda9"),
                ("/srv/x/y", "nfs is not on a disk of this machine"),
            ]
        );
    }

    #[test]
    fn a_rejected_filesystem_says_what_was_missed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("photos")).unwrap();
        let tree = FolderTree::new(dir.path());
        let reason = "no /etc, no /etc/os-release, no /bin; it holds photos".to_owned();
        assert_eq!(is_root(&tree).unwrap(), RootCheck::Rejected(reason));
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        fs::create_dir_all(dir.path().join("usr/bin")).unwrap();
        fs::write(dir.path().join("etc/os-release"), "ID=debian\n").unwrap();
        assert_eq!(is_root(&tree).unwrap(), RootCheck::Root);
    }
}
