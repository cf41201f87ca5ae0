// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that come and go while the machine runs.

use crate::failure::{Result, io, plain, system};
use crate::volumes;
use rustix::fs::{Mode, OFlags};
use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Far more than the drivers need on the slowest machine for one disk.
const LIMIT: Duration = Duration::from_secs(10);

/// Waits until the disks with these serial numbers are there.
pub(crate) fn wait_for(serials: &[String]) -> Result<()> {
    let (mut last, mut appeared) = (Instant::now(), 0);
    let mut looked = false;
    loop {
        let found: HashSet<String> = volumes::serials().into_iter().collect();
        let Some(missing) = serials.iter().find(|serial| !found.contains(*serial)) else {
            return Ok(());
        };
        if found.len() > appeared {
            (last, appeared) = (Instant::now(), found.len());
        }
        if last.elapsed() > LIMIT {
            return Err(plain(format!("the disk {missing:?} was plugged in and did not appear")));
        }
        if looked {
            std::thread::sleep(Duration::from_millis(1));
        } else {
            // A machine without a controller for this tells nobody that something was plugged in.
            fs::write("/sys/bus/pci/rescan", "1")
                .map_err(|error| io("looking for new disks", &error))?;
            looked = true;
        }
    }
}

/// Lets go of a disk: afterwards the kernel does not know it any more.
pub(crate) fn let_go(serial: &str) -> Result<()> {
    let disk = volumes::disk(serial)
        .ok_or_else(|| plain(format!("there is no disk with the serial number {serial:?}")))?;
    for name in &disk.nodes {
        // The kernel says so if anything is mounted from it or built on it.
        rustix::fs::open(name, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| system(name, error))?;
    }
    // The device below the virtio device is the PCI function.
    let function = Path::new("/sys/block").join(&disk.kernel_name).join("device/../remove");
    fs::write(&function, "1").map_err(|error| io(function.display(), &error))?;
    for name in &disk.nodes {
        let _ = fs::remove_file(name);
    }
    Ok(())
}
