// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Commands that mount, unmount, and look at mounted filesystems as a whole.

use super::session::Shell;
use super::table::Arguments;
use super::{Flow, Outcome, values};
use crate::args::MountArgument;
use crate::failure::Failure;
use tranship_convert::ErrorKind;
use tranship_protocol::{GuestPath, Space};

/// Mounts what `-m` says.
pub(super) fn from_option(
    shell: &Shell,
    mount: &MountArgument,
    read_only: bool,
) -> Result<(), Failure> {
    if !mount.mountpoint.starts_with('/') {
        return Err(Failure::usage(format!(
            "-m {}: the mountpoint {:?} does not start with /",
            mount.device, mount.mountpoint
        )));
    }
    let options = mount.options.as_deref().unwrap_or(if read_only { "ro" } else { "" });
    let device = values::device(&mount.device);
    let mountpoint = GuestPath::of(&mount.mountpoint);
    shell.guest.mount(&device, &mountpoint, options, mount.fstype.as_deref()).map_err(|error| {
        let mut failure = Failure::from(error);
        let volumes = shell.guest.volumes().unwrap_or_default();
        for volume in super::devices::filesystems(&volumes) {
            let kind = volume.tag("TYPE").unwrap_or("unknown");
            failure = failure.hint(format!("there is {} ({kind})", volume.device));
        }
        failure
    })
}

pub(super) fn mount(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    shell.guest.mount(arguments.text(0), arguments.path(1), "", None)?;
    Ok(Flow::Continue)
}

pub(super) fn mount_ro(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    shell.guest.mount(arguments.text(0), arguments.path(1), "ro", None)?;
    Ok(Flow::Continue)
}

pub(super) fn mount_options(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    shell.guest.mount(arguments.text(1), arguments.path(2), arguments.text(0), None)?;
    Ok(Flow::Continue)
}

pub(super) fn mount_vfs(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let fstype = Some(arguments.text(1)).filter(|fstype| !fstype.is_empty());
    shell.guest.mount(arguments.text(2), arguments.path(3), arguments.text(0), fstype)?;
    Ok(Flow::Continue)
}

pub(super) fn mounts(shell: &mut Shell, _: &Arguments) -> Outcome {
    let mounts = shell.guest.mounts()?;
    shell.print_lines(mounts.iter().map(|(device, _)| device))
}

pub(super) fn mountpoints(shell: &mut Shell, _: &Arguments) -> Outcome {
    let mounts = shell.guest.mounts()?;
    shell.print_lines(mounts.iter().map(|(device, path)| format!("{device}: {path}")))
}

pub(super) fn unmount(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let what = arguments.text(0);
    let device = values::device(what);
    let mounts = shell.guest.mounts()?;
    let mountpoint = match mounts.iter().find(|(mounted, _)| *mounted == device) {
        Some((_, mountpoint)) => mountpoint.clone(),
        None if what.starts_with('/') => GuestPath::of(what),
        None => return Err(Failure::usage("umount: path must start with a / character")),
    };
    shell.guest.unmount(&mountpoint)?;
    Ok(Flow::Continue)
}

pub(super) fn unmount_all(shell: &mut Shell, _: &Arguments) -> Outcome {
    shell.guest.unmount_all()?;
    Ok(Flow::Continue)
}

pub(super) fn trim(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let bytes = shell.guest.trim(arguments.path(0))?;
    tracing::info!(bytes, "discarded");
    Ok(Flow::Continue)
}

pub(super) fn sync(shell: &mut Shell, _: &Arguments) -> Outcome {
    shell.guest.sync()?;
    Ok(Flow::Continue)
}

pub(super) fn df(shell: &mut Shell, _: &Arguments) -> Outcome {
    let mounts = shell.guest.mounts()?;
    if mounts.is_empty() {
        return Err(Failure::new(
            ErrorKind::Conversion,
            "df: you must call 'mount' first to mount the root filesystem",
        ));
    }
    let mut text = format!(
        "{:<24} {:>12} {:>12} {:>12} Use% Mounted on\n",
        "Filesystem", "1K-blocks", "Used", "Available"
    );
    for (device, path) in &mounts {
        let space = shell.guest.space(path)?;
        text.push_str(&df_line(device, &space, path));
    }
    shell.print(&text)?;
    Ok(Flow::Continue)
}

fn df_line(device: &str, space: &Space, path: &GuestPath) -> String {
    let used = space.size.saturating_sub(space.free);
    let percent = (u128::from(used) * 100).div_ceil(u128::from(space.size).max(1));
    let [size, used, free] = [space.size, used, space.free].map(|bytes| bytes / 1024);
    format!("{device:<24} {size:>12} {used:>12} {free:>12} {percent:>3}% {path}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_space_is_rounded_up() {
        let space = Space { size: 4096, free: 1024, inodes: 0, free_inodes: 0, read_only: false };
        let line = df_line("/dev/sda1", &space, &GuestPath::of("/"));
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>(),
            ["/dev/sda1", "4", "3", "1", "75%", "/"]
        );
        let empty = Space { size: 0, free: 0, ..space };
        assert!(df_line("/dev/sda1", &empty, &GuestPath::of("/")).contains("  0% /"));
    }
}
