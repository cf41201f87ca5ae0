// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine that runs in QEMU.

use super::arguments::{Place, SLOTS, device, node};
use super::qmp::Qmp;
use crate::backend::{Machine, SnapshotFiles, SpecDisk};
use crate::process::Process;
use crate::{Error, ErrorKind, Result, core_file};
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time for what QEMU does at once, on a machine that is itself emulated and busy.
const SOON: Duration = Duration::from_secs(30);
/// Time for reading or writing a saved machine.
const TRANSFER: Duration = Duration::from_mins(1);
/// Time for writing all of the memory.
const DUMP: Duration = Duration::from_mins(10);
/// QEMU can read and write a saved machine by a file's name from this version on; before that
/// a descriptor was the way, which newer ones refuse.
const BY_NAME: (u64, u64) = (8, 2);
/// From this version on the memory can be kept page by page, where it is read without
/// looking at what there is no data for: half the time.
const BY_PAGE: (u64, u64) = (9, 0);

/// A disk in a machine.
#[derive(Debug)]
struct Plugged {
    /// QEMU's name of what is behind it.
    node: String,
    /// The slot, counted from 0.
    slot: usize,
}

/// QEMU with a machine in it.
#[derive(Debug)]
pub(super) struct QemuMachine {
    qmp: Qmp,
    process: Process,
    /// Where disks come from.
    disk_socket: String,
    /// The disks by their serial numbers.
    disks: Mutex<BTreeMap<String, Plugged>>,
}

impl QemuMachine {
    pub(super) fn new(process: Process, qmp: Qmp, disk_socket: String, disks: &[SpecDisk]) -> Self {
        let disks = disks.iter().enumerate().map(|(index, disk)| {
            let plugged = Plugged { node: disk.export.clone(), slot: index % SLOTS };
            (disk.serial.clone(), plugged)
        });
        let disks = Mutex::new(disks.collect());
        Self { qmp, process, disk_socket, disks }
    }

    /// Goes on with a machine that was saved.
    pub(super) fn restore(&self, files: &SnapshotFiles) -> Result<()> {
        self.transfer("migrate-incoming", &files.state, OFlags::RDONLY)
            .and_then(|()| self.go_on())
            .map_err(|error| {
                // QEMU says on its standard error what it does not like, and ends.
                let ended = self.process.wait(Duration::from_millis(200)).is_some();
                let said = if ended { self.process.console() } else { String::new() };
                if said.is_empty() { error } else { error.because(said) }
            })
    }

    /// Has a machine read from or written to `file`.
    fn transfer(&self, command: &str, file: &File, access: OFlags) -> Result<()> {
        let version = self.qmp.version(SOON)?;
        let capability = |name| json!({ "capability": name, "state": true });
        let mut capabilities = vec![capability("events")];
        if version >= BY_PAGE {
            capabilities.push(capability("mapped-ram"));
        }
        let capabilities = json!({ "capabilities": capabilities });
        self.qmp.command("migrate-set-capabilities", &capabilities, SOON)?;
        if access == OFlags::WRONLY {
            // The default is to be kind to a network.
            let no_limit = json!({ "max-bandwidth": 1_u64 << 40 });
            self.qmp.command("migrate-set-parameters", &no_limit, SOON)?;
        }
        let file = reopened(file, access)?;
        let uri = if version >= BY_NAME {
            // A set of descriptors has a name; QEMU takes the one with the right access.
            self.qmp.command_with("add-fd", &json!({ "fdset-id": 1 }), &file, SOON)?;
            "file:/dev/fdset/1"
        } else {
            self.qmp.command_with("getfd", &json!({ "fdname": "state" }), &file, SOON)?;
            "fd:state"
        };
        drop(file);
        self.qmp.command(command, &json!({ "uri": uri }), SOON)?;
        self.qmp.event(command, TRANSFER, |event| {
            match (event.name.as_str(), event.data["status"].as_str()) {
                ("MIGRATION", Some("completed")) => Some(Ok(())),
                ("MIGRATION", Some(status @ ("failed" | "cancelled"))) => {
                    let message = format!("QEMU: {command}: {status}");
                    Some(Err(Error::new(ErrorKind::Launch, message)))
                }
                _ => None,
            }
        })?;
        if version >= BY_NAME && access == OFlags::WRONLY {
            self.qmp.command("remove-fd", &json!({ "fdset-id": 1 }), SOON)?;
        }
        Ok(())
    }

    /// Lets the guest run. After a transfer QEMU has something left to do.
    fn go_on(&self) -> Result<()> {
        let begun = Instant::now();
        while self.status()? == "finish-migrate" && begun.elapsed() < SOON {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.qmp.command("cont", &json!({}), SOON).map(drop)
    }

    fn status(&self) -> Result<String> {
        let status = self.qmp.command("query-status", &json!({}), SOON)?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }
}

/// The same file for nothing but `access`.
fn reopened(file: &File, access: OFlags) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty()).map_err(|error| {
        Error::new(ErrorKind::Io, "opening the file of a saved machine again").because(error)
    })
}

fn refused(what: String) -> Error {
    Error::new(ErrorKind::Launch, what)
}

impl Machine for QemuMachine {
    fn ended(&self) -> Option<String> {
        let ended = self.process.exit_status().map(|status| format!("QEMU ended with {status}"));
        ended.or_else(|| self.qmp.shutdown().map(|why| format!("the machine ended: {why}")))
    }

    fn wait(&self, limit: Duration) -> bool {
        let begun = Instant::now();
        if !self.qmp.wait_for_end(limit) {
            return self.process.exit_status().is_some();
        }
        if self.qmp.shutdown().is_some() {
            // The answer comes after QEMU has written out what it was given.
            let _ = self.status();
            return true;
        }
        self.process.wait(limit.saturating_sub(begun.elapsed())).is_some()
    }

    fn kill(&self) {
        self.process.kill();
    }

    fn console(&self) -> String {
        self.process.console()
    }

    fn add_disk(&self, disk: &SpecDisk) -> Result<()> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |slot: &usize| disks.values().all(|plugged| plugged.slot != *slot);
        let slot = (0..SLOTS)
            .find(free)
            .ok_or_else(|| refused(format!("all {SLOTS} places for disks are taken")))?;
        self.qmp.command("blockdev-add", &node(disk, &self.disk_socket), SOON)?;
        let place = Place::whole_slot(slot);
        if let Err(error) = self.qmp.command("device_add", &device(disk, place), SOON) {
            let _ = self.qmp.command("blockdev-del", &json!({ "node-name": disk.export }), SOON);
            return Err(error);
        }
        disks.insert(disk.serial.clone(), Plugged { node: disk.export.clone(), slot });
        Ok(())
    }

    fn remove_disk(&self, serial: &str) -> Result<()> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let Plugged { node, slot } = disks
            .get(serial)
            .ok_or_else(|| refused(format!("the machine has no disk {serial:?}")))?;
        if disks.values().filter(|other| other.slot == *slot).count() > 1 {
            return Err(refused(format!("the disk {serial:?} shares its slot with another one")));
        }
        self.qmp.command("device_del", &json!({ "id": serial }), SOON)?;
        let mine = |data: &Value| data["device"] == serial;
        self.qmp.event("device_del", SOON, |event| match event.name.as_str() {
            "DEVICE_DELETED" if mine(&event.data) => Some(Ok(())),
            "DEVICE_UNPLUG_GUEST_ERROR" if mine(&event.data) => {
                Some(Err(refused(format!("the machine does not let go of the disk {serial:?}"))))
            }
            _ => None,
        })?;
        self.qmp.command("blockdev-del", &json!({ "node-name": node }), SOON)?;
        disks.remove(serial);
        Ok(())
    }

    fn save(&self, files: &SnapshotFiles) -> Result<()> {
        self.qmp.command("stop", &json!({}), SOON)?;
        let saved = self.transfer("migrate", &files.state, OFlags::WRONLY);
        if saved.is_err() {
            let _ = self.qmp.command("migrate_cancel", &json!({}), SOON);
        }
        let runs = self.go_on();
        saved.and(runs)
    }

    fn dump(&self, to: &File, vmcoreinfo: Option<(u64, u64)>) -> Result<()> {
        self.qmp.command_with("getfd", &json!({ "fdname": "core" }), to, SOON)?;
        let whole = json!({ "paging": false, "protocol": "fd:core" });
        self.qmp.command("dump-guest-memory", &whole, DUMP)?;
        let Some(place) = vmcoreinfo else { return Ok(()) };
        if let Err(error) = core_file::add_kernel_note(to, place) {
            // The memory is what counts.
            tracing::warn!(%error, "the core file has no note of the kernel's");
        }
        Ok(())
    }
}
