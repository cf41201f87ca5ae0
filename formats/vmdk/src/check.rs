// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking a disk's metadata, and mending from the second copy what is damaged.

use crate::check_extent::Checker;
use crate::extents::ExtentFiles;
use crate::line::{Access, ExtentLine, ExtentType};
use crate::open::{File, file_kind, not_a_disk, read_head, read_text};
use crate::{cowd, header, line, sesparse};
use tranship_block::{BlockDevice, CheckReport, Error, ErrorKind, Repair, Result, Storage};

/// Checks the disk whose first or only file is `storage`; its other files come from
/// `files`. Payload is not read, except for the markers in front of compressed grains.
///
/// A snapshot is checked without its parent. Nothing is written unless `repair` says so:
/// [`Repair::All`] rewrites damaged directories and tables from their other copy,
/// [`Repair::Leaks`] gives back grains that nothing refers to. Leaks are looked for only
/// in extents whose tables can be trusted.
///
/// # Errors
///
/// Headers and descriptors without which nothing can be looked at, and I/O errors while
/// mending.
pub fn check(
    storage: &dyn Storage,
    files: &dyn ExtentFiles,
    repair: Repair,
) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    if file_kind(&read_head(&storage)?) == Some(File::Text) {
        let descriptor = read_text(&storage)?;
        if let Err(error) = line::check_apart(&descriptor.extents) {
            report.corruption(|| error.to_string());
        }
        for line in &descriptor.extents {
            match check_line(files, line, repair, &mut report) {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                    report.corruption(|| error.in_file(&line.name).to_string());
                }
                Err(error) => return Err(error.in_file(&line.name)),
            }
        }
    } else {
        check_file(storage, repair, &mut report)?;
    }
    Ok(report)
}

fn check_line(
    files: &dyn ExtentFiles,
    line: &ExtentLine,
    repair: Repair,
    report: &mut CheckReport,
) -> Result<()> {
    match line.kind {
        _ if line.access == Access::None => Ok(()),
        ExtentType::Zero => Ok(()),
        ExtentType::VmfsRdm | ExtentType::VmfsRaw => {
            report.check_errors = report.check_errors.saturating_add(1);
            report.note(|| format!("{:?} is a mapped LUN and not looked at", line.name));
            Ok(())
        }
        ExtentType::Sparse | ExtentType::VmfsSparse | ExtentType::SeSparse => {
            let file = files.open(&line.name, repair != Repair::Nothing)?;
            let capacity = check_file(&*file, repair, report)?;
            if capacity < line.len {
                return Err(Error::corrupt(format!(
                    "sparse extent of {capacity} bytes, the descriptor says {}",
                    line.len
                )));
            }
            Ok(())
        }
        ExtentType::Flat | ExtentType::Vmfs => {
            let file = files.open(&line.name, false)?;
            let end = line.offset.saturating_add(line.len);
            if file.size() < end {
                return Err(Error::corrupt(format!(
                    "flat extent of {} bytes ends past the file's size of {} bytes",
                    line.len,
                    file.size()
                ))
                .at(line.offset));
            }
            report.image_end_offset = report.image_end_offset.max(end);
            Ok(())
        }
    }
}

/// Checks one sparse file; returns its capacity in bytes.
fn check_file(storage: &dyn Storage, repair: Repair, report: &mut CheckReport) -> Result<u64> {
    let layout = match file_kind(&read_head(&storage)?) {
        Some(File::Hosted) => header::read(&storage)?,
        Some(File::Cowd) => cowd::read(&storage)?,
        Some(File::SeSparse) => sesparse::read(&storage, false)?,
        Some(File::Text) | None => return Err(not_a_disk()),
    };
    let capacity = layout.capacity;
    if repair != Repair::Nothing && storage.is_read_only() {
        return Err(Error::usage("the file is read-only and cannot be mended"));
    }
    Checker::new(storage, layout, repair, report).run()?;
    Ok(capacity)
}
