// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copying the converted disks to the target, with checkpoints in the journal.

use crate::disks::{data_bytes, from_block, target};
use crate::work::{Journal, Work};
use crate::{Error, ErrorKind, Event, Reporter, Request, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tranship_appliance::CancelToken;
use tranship_block::{BlockDevice, CopyObserver, CopyOptions, copy};
use tranship_qcow2::Qcow2;

/// Bytes after which progress is made durable: a kill costs at most this much again.
const CHECKPOINT: u64 = 512 << 20;

/// Copies every disk that is not complete yet, each from where its last checkpoint stands.
pub(crate) fn copy_disks(
    request: &Request,
    work: &Work,
    journal: &mut Journal,
    overlays: &[Arc<Qcow2>],
    reporter: &dyn Reporter,
    cancel: &CancelToken,
) -> Result<()> {
    check_space(request, journal, overlays)?;
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
    for (index, overlay) in overlays.iter().enumerate() {
        let Some(disk) = journal.disks.get(index).cloned() else { break };
        if disk.complete {
            continue;
        }
        let fresh = disk.copied == 0;
        let meter = request.meter.disk("target", &disk.name);
        let (format, preallocated) = (request.format, request.preallocated);
        let device = target(work, &disk.name, disk.size, format, preallocated, fresh, &meter)?;
        let observer = DiskObserver {
            index,
            work,
            journal: Mutex::new(journal),
            told: Mutex::new(None),
            reporter,
            cancel,
        };
        let options = CopyOptions {
            start: disk.copied,
            threads,
            chunk: 2 << 20,
            target_is_zero: true,
            checkpoint_every: CHECKPOINT,
            ..CopyOptions::default()
        };
        let begun = Instant::now();
        let copied = copy(overlay.as_ref(), device.as_ref(), &options, &observer)
            .map_err(|error| from_copy(&disk.name, error))?;
        device
            .flush()
            .map_err(|error| from_block(format!("writing {}", disk.name), error, false))?;
        drop(device);
        meter.note_zeroes_skipped(copied.bytes_zero);
        if let Some(disk) = journal.disks.get_mut(index) {
            disk.complete = true;
        }
        work.store(journal)?;
        let text = format!(
            "{}: {} MiB copied, {} MiB left out, in {:.1} s",
            disk.name,
            copied.bytes_written >> 20,
            copied.bytes_zero >> 20,
            begun.elapsed().as_secs_f64()
        );
        reporter.report(
            &Event::info("copy.done", text)
                .of_disk(index)
                .with("bytes_read", copied.bytes_read)
                .with("bytes_written", copied.bytes_written)
                .with("bytes_zero", copied.bytes_zero),
        );
    }
    Ok(())
}

/// The source's own damage shows only when its data is read.
fn from_copy(name: &str, error: tranship_block::Error) -> Error {
    let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref());
    let kind = cause.map_or(error.kind(), tranship_block::Error::kind);
    let input =
        matches!(kind, tranship_block::ErrorKind::Corrupt | tranship_block::ErrorKind::Unsupported);
    if input {
        return Error::new(ErrorKind::Input, format!("copying {name}")).because(error);
    }
    from_block(format!("copying {name}"), error, false)
}

/// Refuses to begin a copy for which there is no room.
fn check_space(request: &Request, journal: &Journal, overlays: &[Arc<Qcow2>]) -> Result<()> {
    let mut needed: u64 = 0;
    for (disk, overlay) in journal.disks.iter().zip(overlays) {
        if disk.complete {
            continue;
        }
        let bytes = if request.preallocated { disk.size } else { data_bytes(overlay.as_ref())? };
        needed = needed.saturating_add(bytes.saturating_sub(disk.copied));
    }
    let free = rustix::fs::statvfs(&request.folder)
        .map(|found| found.f_bavail.saturating_mul(found.f_frsize))
        .map_err(|error| {
            Error::new(ErrorKind::Transient, format!("{}: free space", request.folder.display()))
                .because(std::io::Error::from(error))
        })?;
    if needed > free {
        return Err(Error::new(
            ErrorKind::Transient,
            format!(
                "{}: {} MiB are needed, {} MiB are free",
                request.folder.display(),
                needed >> 20,
                free >> 20
            ),
        )
        .with_remedy("make room and run the same command again: the conversion is kept"));
    }
    Ok(())
}

struct DiskObserver<'a> {
    index: usize,
    work: &'a Work,
    journal: Mutex<&'a mut Journal>,
    told: Mutex<Option<Instant>>,
    reporter: &'a dyn Reporter,
    cancel: &'a CancelToken,
}

impl CopyObserver for DiskObserver<'_> {
    fn progress(&self, done: u64, total: u64) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let due = told.is_none_or(|at| at.elapsed() > Duration::from_millis(100));
        if due || done == total {
            *told = Some(Instant::now());
            let event = Event::step("copy.progress", format!("copying disk {}", self.index + 1));
            self.reporter.report(&event.of_disk(self.index).at(done, total));
        }
    }

    fn checkpoint(&self, offset: u64) {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(disk) = journal.disks.get_mut(self.index) {
            disk.copied = offset;
        }
        if let Err(error) = self.work.store(&journal) {
            // The copy itself is fine; an interruption now would only cost more.
            tracing::warn!(%error, "the checkpoint could not be stored");
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }
}
