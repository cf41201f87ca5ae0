// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The disk with filesystem tools and further kernel modules, mounted when first needed.

use crate::failure::{Result, io, plain, system};
use crate::volumes;
use rustix::mount::{MountFlags, mount, mount_move};
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use tranship_protocol::TOOLS_SERIAL;

/// Where the guest's filesystems are mounted.
pub(crate) const GUEST_ROOT: &str = "/run/guest";

static MOUNTED: Mutex<bool> = Mutex::new(false);

/// Makes the tools disk the root of this process, once.
///
/// The initramfs is left behind as it is: it is small, and freeing it takes longer than
/// keeping it.
pub(crate) fn ensure() -> Result<()> {
    let mut mounted = MOUNTED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if *mounted {
        return Ok(());
    }
    let disk = volumes::disk_with_serial(TOOLS_SERIAL)
        .ok_or_else(|| plain("the appliance has no disk with tools"))?;
    let device = Path::new("/dev").join(disk);
    fs::create_dir_all("/tools").map_err(|error| io("/tools", &error))?;
    mount(&device, "/tools", c"squashfs", MountFlags::RDONLY, None)
        .map_err(|error| system("mounting the tools disk", error))?;
    for name in ["run", "tmp"] {
        let target = Path::new("/tools").join(name);
        mount(c"tmpfs", &target, c"tmpfs", MountFlags::empty(), None)
            .map_err(|error| system(target.display(), error))?;
    }
    for name in ["dev", "proc", "sys"] {
        let from = Path::new("/").join(name);
        let to = Path::new("/tools").join(name);
        mount_move(&from, &to).map_err(|error| system(to.display(), error))?;
    }
    let failed = |error| system("entering the tools disk", error);
    rustix::process::chdir("/tools").map_err(failed)?;
    mount_move(".", "/").map_err(failed)?;
    rustix::process::chroot(".").map_err(failed)?;
    rustix::process::chdir("/").map_err(failed)?;
    fs::create_dir_all(GUEST_ROOT).map_err(|error| io(GUEST_ROOT, &error))?;
    *mounted = true;
    Ok(())
}
