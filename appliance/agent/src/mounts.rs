// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mounting, checking and trimming the guest's filesystems.

use crate::failure::{Result, io, plain, system};
use crate::tools::GUEST_ROOT;
use crate::{files, ioctl, modules, programs, tools, volumes};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tranship_protocol::{FilesystemCheck, GuestPath};

/// Device, mountpoint in the guest and mountpoint in the appliance, oldest first.
static MOUNTS: Mutex<Vec<(String, GuestPath, String)>> = Mutex::new(Vec::new());

fn table() -> MutexGuard<'static, Vec<(String, GuestPath, String)>> {
    MOUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether something is mounted as the guest's root.
pub(crate) fn is_mounted_root() -> bool {
    table().iter().any(|(_, _, target)| target == GUEST_ROOT)
}

/// What is mounted, oldest first.
pub(crate) fn list() -> Vec<(String, GuestPath)> {
    table().iter().map(|(device, point, _)| (device.clone(), point.clone())).collect()
}

/// Splits mount options into the flags that the kernel wants as bits and the rest.
fn split_options(options: &str) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut rest = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        let flag = match option {
            "ro" => MountFlags::RDONLY,
            "nosuid" => MountFlags::NOSUID,
            "nodev" => MountFlags::NODEV,
            "noexec" => MountFlags::NOEXEC,
            "noatime" => MountFlags::NOATIME,
            "nodiratime" => MountFlags::NODIRATIME,
            "relatime" => MountFlags::RELATIME,
            "sync" => MountFlags::SYNCHRONOUS,
            "dirsync" => MountFlags::DIRSYNC,
            // mount(8) keeps these to itself.
            "rw" | "defaults" | "auto" | "noauto" | "user" | "users" | "nofail" | "_netdev" => {
                continue;
            }
            other => {
                rest.push(other);
                continue;
            }
        };
        flags |= flag;
    }
    (flags, rest.join(","))
}

/// The type of the filesystem on `device`.
fn filesystem_type(device: &str) -> Result<String> {
    let output = programs::capture(&["blkid", "-p", "-o", "value", "-s", "TYPE", "--", device])?;
    let found = output.text().trim().to_owned();
    if found.is_empty() {
        return Err(plain(format!("{device}: no filesystem was recognised")));
    }
    Ok(found)
}

/// Mounts a device of the guest.
pub(crate) fn mount_guest(
    device: &str,
    point: &GuestPath,
    options: &str,
    fstype: Option<&str>,
) -> Result<()> {
    tools::ensure()?;
    volumes::check_name(device)?;
    let found;
    let fstype = if let Some(given) = fstype {
        given
    } else {
        found = filesystem_type(device)?;
        &found
    };
    let target = if *point == GuestPath::of("/") {
        if is_mounted_root() {
            return Err(plain("something is mounted on / already"));
        }
        GUEST_ROOT.to_owned()
    } else {
        programs::check_guest_is_mounted()?;
        files::directory_for_mount(point)?
    };
    let (flags, rest) = split_options(options);
    if fstype == "ntfs" && !has_driver("ntfs3") {
        mount_ntfs(device, &target, options)?;
    } else {
        modules::load_filesystem(fstype)?;
        if fstype == "vfat" {
            for module in ["nls_cp437", "nls_iso8859_1", "nls_utf8", "nls_ascii"] {
                modules::load(module)?;
            }
        }
        let kind = if fstype == "ntfs" { "ntfs3" } else { fstype };
        let data = CString::new(rest)
            .map_err(|_| plain(format!("{device}: mount options hold a NUL byte")))?;
        mount(
            device,
            &target,
            kind,
            flags | MountFlags::NODEV | MountFlags::NOSUID,
            data.as_c_str(),
        )
        .map_err(|error| system(format_args!("mount {device} on {point}"), error))?;
    }
    table().push((device.to_owned(), point.clone(), target));
    Ok(())
}

fn has_driver(name: &str) -> bool {
    let _ = modules::load(name);
    std::fs::read_to_string("/proc/filesystems")
        .is_ok_and(|list| list.lines().any(|line| line.trim_start_matches("nodev").trim() == name))
}

fn mount_ntfs(device: &str, target: &str, options: &str) -> Result<()> {
    modules::load("fuse")?;
    let options = if options.is_empty() { "rw" } else { options };
    let output = programs::capture(&["ntfs-3g", "-o", options, "--", device, target])?;
    if output.status == 0 {
        Ok(())
    } else {
        Err(plain(format!("mount {device}: {}", output.text().trim())))
    }
}

/// Unmounts what was mounted last at `point`.
pub(crate) fn unmount_guest(point: &GuestPath) -> Result<()> {
    let mut table = table();
    let at = table
        .iter()
        .rposition(|(_, mounted, _)| mounted == point)
        .ok_or_else(|| plain(format!("{point}: nothing is mounted there")))?;
    if let Some((device, _, target)) = table.get(at) {
        unmount(target.as_str(), UnmountFlags::empty())
            .map_err(|error| system(format_args!("umount {device} from {point}"), error))?;
    }
    table.remove(at);
    Ok(())
}

/// Unmounts everything, newest first.
pub(crate) fn unmount_all() -> Result<()> {
    let points: Vec<GuestPath> = table().iter().rev().map(|(_, point, _)| point.clone()).collect();
    points.iter().try_for_each(unmount_guest)
}

/// Checks an unmounted filesystem without changing it.
pub(crate) fn check(device: &str, fstype: &str) -> Result<FilesystemCheck> {
    tools::ensure()?;
    volumes::check_name(device)?;
    let arguments: &[&str] = match fstype {
        "ext2" | "ext3" | "ext4" => &["e2fsck", "-n", device],
        "xfs" => &["xfs_repair", "-n", device],
        _ => {
            return Ok(FilesystemCheck { clean: true, checked: false, text: String::new() });
        }
    };
    let output = programs::capture(arguments)?;
    Ok(FilesystemCheck { clean: output.status == 0, checked: true, text: output.text() })
}

/// Discards the unused blocks of a mounted filesystem.
pub(crate) fn trim(point: &GuestPath) -> Result<u64> {
    let directory = files::open(point, OFlags::RDONLY | OFlags::DIRECTORY)?;
    ioctl::trim(&directory).map_err(|error| system(format_args!("fstrim {point}"), error))
}

/// Writes everything out.
pub(crate) fn sync() -> Result<()> {
    rustix::fs::sync();
    if is_mounted_root() {
        let root = std::fs::File::open(GUEST_ROOT).map_err(|error| io(GUEST_ROOT, &error))?;
        rustix::fs::syncfs(&root).map_err(|error| system("syncing the guest", error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_data_are_told_apart() {
        let (flags, rest) = split_options("defaults,ro,subvol=@,noatime,errors=remount-ro");
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOATIME);
        assert_eq!(rest, "subvol=@,errors=remount-ro");
    }
}
