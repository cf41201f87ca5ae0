// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks on their way: the protected source, its overlay, the target.

use crate::work::Work;
use crate::{Error, ErrorKind, Result, TargetFormat};
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, DiskMeter, Meter, Span, Storage, Zeroing};
use tranship_qcow2::{CreateOptions, OpenOptions, Qcow2};
use tranship_raw::{Access, RawFile};
use tranship_source::Source;

/// The same failure as one of a conversion. `input` says whether the bytes come from the
/// user, so that damage is the input's fault.
pub(crate) fn from_block(what: String, error: tranship_block::Error, input: bool) -> Error {
    use tranship_block::ErrorKind as From;
    let kind = match error.kind() {
        From::Cancelled => ErrorKind::Interrupted,
        From::Corrupt | From::Unsupported | From::Denied | From::NotFound if input => {
            ErrorKind::Input
        }
        From::Usage => ErrorKind::Usage,
        _ => ErrorKind::Transient,
    };
    let full = error.kind() == From::NoSpace;
    let outer = Error::new(kind, what).because(error);
    if full {
        outer.with_remedy("make room and run the same command again: it goes on")
    } else {
        outer
    }
}

/// The same failure as one of a conversion.
pub(crate) fn from_source(what: String, error: tranship_source::Error) -> Error {
    use tranship_source::ErrorKind as From;
    let kind = match error.kind() {
        From::Usage => ErrorKind::Usage,
        From::Mismatch => ErrorKind::Mismatch,
        From::Io => ErrorKind::Transient,
        From::Cancelled => ErrorKind::Interrupted,
        _ => ErrorKind::Input,
    };
    Error::new(kind, what).because(error)
}

/// Opens all disks of the source for reading.
pub(crate) fn open_source(source: &Source, meter: &Meter) -> Result<Vec<Arc<dyn BlockDevice>>> {
    source
        .disks
        .iter()
        .map(|disk| {
            let device = disk.open();
            device
                .map(|device| meter.disk("source", &disk.name).device(device))
                .map_err(|error| from_source(format!("opening disk {}", disk.name), error))
        })
        .collect()
}

fn storage(path: &Path, fresh: bool) -> Result<Arc<RawFile>> {
    let file =
        if fresh { RawFile::create(path, 0) } else { RawFile::open(path, Access::ReadWrite) };
    file.map(Arc::new)
        .map_err(|error| from_block(format!("opening {}", path.display()), error, false))
}

/// An overlay in a file: writes go there, everything else is read from `base`, which is
/// never written to.
pub(crate) fn overlay(path: &Path, base: Arc<dyn BlockDevice>, fresh: bool) -> Result<Arc<Qcow2>> {
    let failed =
        |error| from_block(format!("opening the overlay {}", path.display()), error, false);
    let file = storage(path, fresh)?;
    if fresh {
        tranship_qcow2::create(&*file, &CreateOptions::new(base.size())).map_err(failed)?;
    }
    let options = OpenOptions { backing: Some(base), ..OpenOptions::default() };
    Qcow2::open(file, options).map(Arc::new).map_err(failed)
}

/// Name of the overlay of disk number `index` in the work directory.
pub(crate) fn overlay_name(index: usize) -> String {
    format!("overlay-{index}.qcow2")
}

/// Opens the unfinished target `name`, fresh or to go on with it; `meter` counts it.
#[allow(clippy::too_many_arguments, reason = "each is a fact of its own")]
pub(crate) fn target(
    work: &Work,
    name: &str,
    size: u64,
    format: TargetFormat,
    preallocated: bool,
    fresh: bool,
    meter: &DiskMeter,
) -> Result<Arc<dyn BlockDevice>> {
    let path = work.file(&part_name(name));
    let failed = |error| from_block(format!("writing {}", path.display()), error, false);
    if fresh && path.exists() {
        std::fs::remove_file(&path).map_err(|error| {
            Error::new(ErrorKind::Transient, format!("removing {}", path.display())).because(error)
        })?;
    }
    // It is told by the name that it gets in the end.
    let file = meter.file(Path::new(name)).storage(storage(&path, fresh)?);
    let device: Arc<dyn BlockDevice> = match format {
        TargetFormat::Raw => {
            if fresh {
                file.set_len(size).map_err(failed)?;
                if preallocated {
                    file.write_zeroes(Span::new(0, size), Zeroing::KeepAllocated)
                        .map_err(failed)?;
                }
            }
            file
        }
        TargetFormat::Qcow2 => {
            if fresh {
                tranship_qcow2::create(&*file, &CreateOptions::new(size)).map_err(failed)?;
            } else {
                // What the interrupted run had allocated and not yet put to use.
                let leaks = tranship_qcow2::repair_leaks(&*file).map_err(failed)?;
                tracing::debug!(leaks, "went on with {}", path.display());
            }
            let options = OpenOptions::default();
            Arc::new(Qcow2::open(file, options).map_err(failed)?)
        }
    };
    Ok(meter.device(device))
}

/// Name of an unfinished target in the work directory.
pub(crate) fn part_name(name: &str) -> String {
    format!("{name}.part")
}

/// Bytes that have to be read from `device` to copy it.
pub(crate) fn data_bytes(device: &dyn BlockDevice) -> Result<u64> {
    let mut sum: u64 = 0;
    for extent in tranship_block::Extents::new(device, Span::new(0, device.size())) {
        let (span, kind) = extent
            .map_err(|error| from_block("walking the disk's extents".to_owned(), error, true))?;
        if !kind.reads_zero() {
            sum = sum.saturating_add(span.len);
        }
    }
    Ok(sum)
}
