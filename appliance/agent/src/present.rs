// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine that is saved and restored: what it has ready by then, and how it comes back to the
//! present.

use crate::failure::{Result, io, plain, system};
use crate::{ioctl, modules, tools};
use rustix::time::{ClockId, Timespec, clock_settime};
use std::fs::File;
use tranship_protocol::MOST_ENTROPY;

/// Filesystems and layers that hardly a guest is without. The driver of btrfs measures its host for
/// seconds while it is loaded, so it waits for a guest that needs it.
const USUAL_FILESYSTEMS: &[&str] = &["ext4", "xfs", "vfat"];
const USUAL_MODULES: &[&str] =
    &["fuse", "dm_mod", "nls_cp437", "nls_iso8859_1", "nls_utf8", "nls_ascii"];

/// Has the tools at hand and the usual drivers loaded, so that a restored machine has them.
pub(crate) fn prepare() -> Result<()> {
    tools::ensure()?;
    // What this kernel does not have, no guest will get from it later either.
    for kind in USUAL_FILESYSTEMS {
        let _ = modules::load_filesystem(kind);
    }
    for name in USUAL_MODULES {
        let _ = modules::load(name);
    }
    Ok(())
}

/// Sets the clock and stirs fresh bytes into the random pool, which is the same after each
/// restore.
pub(crate) fn wake(seconds: i64, nanoseconds: u32, entropy: &[u8]) -> Result<()> {
    if entropy.len() > MOST_ENTROPY {
        return Err(plain(format!("{} random bytes, at most {MOST_ENTROPY}", entropy.len())));
    }
    let random = File::options()
        .write(true)
        .open("/dev/urandom")
        .map_err(|error| io("/dev/urandom", &error))?;
    ioctl::add_entropy(&random, entropy)
        .map_err(|error| system("stirring the random pool", error))?;
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    clock_settime(ClockId::Realtime, time).map_err(|error| system("setting the clock", error))
}
