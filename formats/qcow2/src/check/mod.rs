// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Comparing reference counts with references, and repairing them.

pub(crate) mod compare;
pub(crate) mod references;
mod walk;

use crate::header::Header;
use crate::image::Qcow2;
use crate::shape::read_sparse;
use crate::{geometry, repair};
use references::References;
use std::collections::HashSet;
use tranship_block::{BlockDevice, CheckReport, Error, Repair, Result, Storage};

/// Entries with a wrong COPIED flag that are mended in one go.
pub(crate) const MOST_FLAGS: usize = 1 << 20;

/// Counts every reference in the image in `storage`, compares with its reference counts and
/// mends what `repair` allows. Nothing else may have it open for writing.
///
/// With [`Repair::Leaks`] counts that are too high are lowered. [`Repair::All`] also raises
/// those that are too low, rebuilds counts that are missing and corrects COPIED flags; the
/// marks for an unclean shutdown and for corruption go if nothing is left. References that
/// cannot be followed are left, and no count is lowered beside them.
///
/// # Errors
///
/// What keeps the image's header from being read, [`tranship_block::ErrorKind::Usage`] for a
/// repair of read-only storage, and I/O errors.
pub fn check(storage: &dyn Storage, repair: Repair) -> Result<CheckReport> {
    let before = examine(storage)?;
    if repair == Repair::Nothing {
        return Ok(before.report);
    }
    if storage.is_read_only() {
        return Err(Error::usage("image cannot be repaired: its file is open for reading only"));
    }
    let is_marked = before.header.is_dirty() || before.header.is_marked_corrupt();
    if before.report.is_clean() && !(is_marked && repair == Repair::All) {
        return Ok(before.report);
    }
    let before = repair::repair(storage, before, repair)?;
    let mut after = examine(storage)?;
    repair::unmark(storage, &after, repair)?;
    let fixed = |was: u64, is: u64| was.saturating_sub(is);
    after.report.corruptions_fixed = fixed(before.corruptions, after.report.corruptions);
    after.report.leaks_fixed = fixed(before.leaks, after.report.leaks);
    let details = std::mem::take(&mut after.report.details);
    let left: HashSet<&String> = details.iter().collect();
    for detail in before.details {
        let mended = detail.strip_prefix("ERROR ").or_else(|| detail.strip_prefix("Leaked "));
        match mended {
            Some(mended) if !left.contains(&detail) => {
                after.report.note(|| format!("Repairing {mended}"));
            }
            _ => {}
        }
    }
    for detail in details {
        after.report.note(|| detail);
    }
    Ok(after.report)
}

/// As [`check`] with [`Repair::Nothing`], for a file that is no storage.
///
/// # Errors
///
/// As [`check`].
pub fn check_read_only(file: &dyn BlockDevice) -> Result<CheckReport> {
    examine(file).map(|found| found.report)
}

/// What was found in an image.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) header: Header,
    pub(crate) report: CheckReport,
    pub(crate) references: References,
    /// Some references could not be followed.
    pub(crate) is_incomplete: bool,
    /// All refcount blocks are where they can be written.
    pub(crate) blocks_are_sound: bool,
    /// The refcount table.
    pub(crate) table: Vec<u64>,
}

/// Looks at the whole image, and changes nothing.
pub(crate) fn examine(file: &dyn BlockDevice) -> Result<Found> {
    let header = Header::read(file)?;
    let table = refcount_table(file, &header)?;
    let mut walk = walk::Walk::new(file, &header);
    walk.contents(&header)?;
    walk.counts(&header, &table)?;
    walk.compare(&table, |report, cluster, count, references| {
        let text = || format!("cluster {cluster} refcount={count} reference={references}");
        if count > references {
            report.leak(1, || format!("Leaked {}", text()));
        } else {
            report.corruption(|| format!("ERROR {}", text()));
        }
    })?;
    walk.copied(&header, &table, |_, _| {})?;
    Ok(Found {
        report: walk.report,
        references: walk.references,
        is_incomplete: walk.is_incomplete,
        blocks_are_sound: walk.blocks_are_sound,
        header,
        table,
    })
}

/// References from everything but the structures that hold the counts.
pub(crate) fn contents(file: &dyn BlockDevice, header: &Header) -> Result<References> {
    let mut walk = walk::Walk::new(file, header);
    walk.contents(header)?;
    Ok(walk.references)
}

/// Entries with a wrong COPIED flag by the counts that the image has.
pub(crate) fn wrong_flags(file: &dyn BlockDevice, header: &Header) -> Result<Vec<(u64, u64)>> {
    let table = refcount_table(file, header)?;
    let mut flags = Vec::new();
    walk::Walk::new(file, header).copied(header, &table, |at, entry| {
        if flags.len() < MOST_FLAGS {
            flags.push((at, entry));
        }
    })?;
    Ok(flags)
}

pub(crate) fn refcount_table(file: &dyn BlockDevice, header: &Header) -> Result<Vec<u64>> {
    let bytes = header.geometry().offset(u64::from(header.refcount_table_clusters));
    read_sparse(
        file,
        header.refcount_table_offset,
        geometry::to_u64(geometry::to_usize(bytes)?) / 8,
    )
}

impl Qcow2 {
    /// Checks the image's reference counts, after a flush if it is writable.
    ///
    /// # Errors
    ///
    /// I/O errors.
    pub fn check(&self) -> Result<CheckReport> {
        self.flush_all()?;
        check_read_only(&self.file)
    }
}
