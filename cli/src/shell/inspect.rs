// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Commands about operating systems, and `-i`.

use super::devices::filesystems;
use super::session::Shell;
use super::table::Arguments;
use super::{Flow, Outcome};
use crate::failure::Failure;
use tranship_convert::{ErrorKind, GuestFiles, subvolume_of};
use tranship_inspect::{Facts, ResolvedMount, inspect_root, resolve_mounts};
use tranship_protocol::{GuestPath, Volume};

fn failed(message: impl Into<String>) -> Failure {
    Failure::new(ErrorKind::Conversion, message)
}

/// Every filesystem's device and, if it is the root of one, its operating system.
fn find_roots(shell: &mut Shell) -> Result<(), Failure> {
    shell.guest.unmount_all()?;
    shell.roots.clear();
    let root = GuestPath::of("/");
    let volumes = shell.guest.volumes()?;
    for volume in filesystems(&volumes) {
        let fstype = volume.tag("TYPE").unwrap_or_default();
        if fstype.is_empty() || fstype == "swap" {
            continue;
        }
        if let Err(error) = shell.guest.mount(&volume.device, &root, "ro", None) {
            if error.kind() != tranship_appliance::ErrorKind::Call {
                return Err(error.into());
            }
            // Damaged, or of a kind that the appliance cannot mount: not a root for us.
            tracing::info!(device = volume.device, %error, "not mounted");
            continue;
        }
        let facts = inspect_root(&GuestFiles(&shell.guest));
        shell.guest.unmount_all()?;
        let facts = facts.map_err(|error| {
            failed(format!("inspect_os: {}: {error}", volume.device)).because(&error)
        })?;
        shell.roots.extend(facts.map(|facts| (volume.device.clone(), facts)));
    }
    Ok(())
}

pub(super) fn inspect_os(shell: &mut Shell, _: &Arguments) -> Outcome {
    find_roots(shell)?;
    let roots: Vec<String> = shell.roots.iter().map(|(device, _)| device.clone()).collect();
    shell.print_lines(roots)
}

/// Opens every encrypted volume for which there is a key.
fn unlock(shell: &Shell) -> Result<(), Failure> {
    for volume in shell.guest.volumes()? {
        if volume.tag("TYPE") != Some("crypto_LUKS") {
            continue;
        }
        let uuid = volume.tag("UUID").unwrap_or_default();
        let name = format!("luks-{uuid}");
        let keys = shell.keys.iter().filter(|key| {
            key.id == "all" || key.id == uuid || super::values::device(&key.id) == volume.device
        });
        let mut opened = Err(failed(format!("there is no key for it, its UUID is {uuid}")));
        for key in keys {
            opened = shell
                .guest
                .open_encrypted(&volume.device, &name, &key.secret)
                .map_err(Failure::from);
            if opened.is_ok() {
                break;
            }
        }
        if let Err(failure) = opened {
            shell.warn(&format!("{} stays locked: {}", volume.device, failure.message()));
        }
    }
    Ok(())
}

/// Finds the one operating system and mounts all of it: `-i`.
pub(super) fn mount_all(shell: &mut Shell) -> Result<(), Failure> {
    unlock(shell)?;
    find_roots(shell)?;
    let (device, facts) = match shell.roots.as_slice() {
        [] => {
            return Err(failed("no operating system was found on these disks")
                .hint("leave -i out, and look with list-filesystems and mount"));
        }
        [only] => only.clone(),
        several => {
            let devices: Vec<&str> = several.iter().map(|(device, _)| device.as_str()).collect();
            return Err(failed(format!(
                "there are several operating systems: {}",
                devices.join(", ")
            ))
            .hint("leave -i out, and mount one of them with -m"));
        }
    };
    let options = if shell.read_only { "ro" } else { "" };
    shell.guest.mount(&device, &GuestPath::of("/"), options, None)?;
    let volumes = shell.guest.volumes()?;
    for mount in mounts_of(&facts, &volumes) {
        let (Some(device), mountpoint) = (&mount.device, &mount.mount.mountpoint) else {
            continue;
        };
        if !mountpoint.starts_with('/') || mountpoint == "/" {
            continue;
        }
        let path = GuestPath::of(mountpoint);
        let subvolume = subvolume_of(&mount.mount.options);
        let both = [options, subvolume].join(",");
        if let Err(error) = shell.guest.mount(device, &path, &both, None) {
            shell.warn(&format!("{device} was not mounted at {mountpoint}: {error}"));
        }
    }
    Ok(())
}

fn mounts_of(facts: &Facts, volumes: &[Volume]) -> Vec<ResolvedMount> {
    resolve_mounts(&facts.mounts, &tranship_convert::filesystems(volumes))
}

fn facts<'a>(shell: &'a Shell, root: &str) -> Result<&'a Facts, Failure> {
    if shell.roots.is_empty() {
        return Err(failed("no inspection data: call inspect-os first"));
    }
    let found = shell.roots.iter().find(|(device, _)| device == root);
    found.map(|(_, facts)| facts).ok_or_else(|| {
        failed(format!(
            "{root}: root device not found: only call this function with a root \
                        device previously returned by inspect-os"
        ))
    })
}

/// Prints one fact; what is not known is called so.
fn fact(shell: &mut Shell, arguments: &Arguments, of: fn(&Facts) -> Option<String>) -> Outcome {
    let value = of(facts(shell, arguments.text(0))?);
    shell.print(&format!("{}\n", value.as_deref().unwrap_or("unknown")))?;
    Ok(Flow::Continue)
}

pub(super) fn kind(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    fact(shell, arguments, |_| Some("linux".to_owned()))
}

pub(super) fn distro(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    fact(shell, arguments, |facts| Some(facts.os.distro.clone()))
}

pub(super) fn product_name(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    fact(shell, arguments, |facts| facts.os.product_name.clone())
}

pub(super) fn hostname(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    fact(shell, arguments, |facts| facts.os.hostname.clone())
}

pub(super) fn arch(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    fact(shell, arguments, |facts| facts.os.arch.clone())
}

pub(super) fn osinfo(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    fact(shell, arguments, |facts| facts.os.osinfo.clone())
}

pub(super) fn major(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    fact(shell, arguments, |facts| Some(facts.os.version.map_or(0, |(major, _)| major).to_string()))
}

pub(super) fn minor(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    fact(shell, arguments, |facts| Some(facts.os.version.map_or(0, |(_, minor)| minor).to_string()))
}

pub(super) fn mountpoints(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let root = arguments.text(0);
    let volumes = shell.guest.volumes()?;
    let resolved = mounts_of(facts(shell, root)?, &volumes);
    let mut lines = vec![format!("/: {root}")];
    for ResolvedMount { mount, device, .. } in &resolved {
        let below_root = mount.mountpoint.starts_with('/') && mount.mountpoint != "/";
        if let Some(device) = device.as_ref().filter(|_| below_root) {
            lines.push(format!("{}: {device}", mount.mountpoint));
        }
    }
    shell.print_lines(lines)
}
