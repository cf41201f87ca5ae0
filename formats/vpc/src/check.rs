// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking an image's metadata, and mending what can be mended.

use crate::commit::write_footers;
use crate::footer::{Found, Kind, find};
use crate::geometry::{SECTOR, whole_sectors};
use crate::header::Header;
use crate::open::{check_metadata, check_size, limit, metadata};
use crate::table::{ABSENT, Layout, Table, survey};
use tranship_block::{CheckReport, Repair, Result, Storage};

/// Compares the image in `storage` with itself. Clusters in the report are blocks.
///
/// [`Repair::All`] writes both copies of the footer again if one of them is damaged;
/// [`Repair::Leaks`] cuts off what nothing refers to at the end of the file. Free places
/// between blocks are no leak, since new blocks go there.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Corrupt`] if there is no footer at all,
/// [`tranship_block::ErrorKind::Usage`] for a repair of read-only storage, and I/O errors.
pub fn check(storage: &dyn Storage, repair: Repair) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let found = find(storage, false)?;
    if found.is_stale {
        let text = found.warnings.first().cloned().unwrap_or_default();
        report.corruption(|| text);
    }
    let end = if found.footer.kind == Kind::Fixed {
        fixed(&found, &mut report);
        return Ok(report);
    } else {
        tables(storage, &found, &mut report)?
    };
    let Some(end) = end else { return Ok(report) };
    let mut footer_at = found.end;
    if repair == Repair::All && found.is_stale {
        let had = storage.size();
        footer_at = Some(write_footers(storage, &found.footer, found.end, end)?);
        report.corruptions = report.corruptions.saturating_sub(1);
        report.corruptions_fixed = report.corruptions_fixed.saturating_add(1);
        if storage.size() < had {
            fixed_leaks(&mut report);
        }
    }
    if repair != Repair::Nothing
        && report.leaks > 0
        && let Some(footer_at) = footer_at
        && end < footer_at
    {
        storage.write_at(&found.footer.to_bytes(), end)?;
        storage.flush()?;
        storage.set_len(end.saturating_add(SECTOR))?;
        storage.flush()?;
        fixed_leaks(&mut report);
    }
    Ok(report)
}

fn fixed_leaks(report: &mut CheckReport) {
    report.leaks_fixed = report.leaks_fixed.saturating_add(report.leaks);
    report.leaks = 0;
}

fn fixed(found: &Found, report: &mut CheckReport) {
    let size = found.footer.virtual_size(None);
    let stored = found.end.unwrap_or(0);
    if stored < size {
        report.corruption(|| {
            format!("fixed disk of {size} bytes has only {stored} in front of its footer")
        });
    }
    // As many clusters as a dynamic disk would have.
    report.total_clusters = size.div_ceil(2 << 20);
    report.allocated_clusters = report.total_clusters;
    report.image_end_offset = stored.saturating_add(SECTOR);
}

/// Looks at header, table and blocks. Returns where blocks end, if that is known.
fn tables(storage: &dyn Storage, found: &Found, report: &mut CheckReport) -> Result<Option<u64>> {
    let size = found.footer.virtual_size(None);
    let header = Header::read(storage, &found.footer, false).and_then(|header| {
        check_size(size)?;
        header.check(storage.size(), size, false)?;
        check_metadata(&metadata(storage.size(), &header, &found.footer))?;
        Ok(header)
    });
    let header = match header {
        Ok(header) => header,
        Err(error) if error.kind() == tranship_block::ErrorKind::Corrupt => {
            report.corruption(|| error.to_string());
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let layout = Layout::new(&header, found.footer.data_offset);
    let table = Table::read(storage, &header, size)?;
    let metadata = metadata(storage.size(), &header, &found.footer);
    let limit = limit(storage, found);
    let occupied = survey(&table, &layout, size, &metadata, limit);
    for fault in &occupied.faults {
        report.corruption(|| fault.text.clone());
    }
    report.total_clusters = header.entries_for(size);
    let mut before = None;
    for entry in table.entries().iter().copied().filter(|entry| *entry != ABSENT) {
        report.allocated_clusters = report.allocated_clusters.saturating_add(1);
        // Up to a page of padding lies between neighbours whose data is aligned.
        let start = Layout::bitmap_at(entry);
        let follows = before.is_none_or(|before: u64| start.wrapping_sub(before) < 4096);
        report.fragmented_clusters = report.fragmented_clusters.saturating_add(u64::from(!follows));
        before = Some(start.saturating_add(layout.slot()));
    }
    let end = whole_sectors(occupied.end);
    report.image_end_offset = end.saturating_add(SECTOR);
    if !occupied.faults.is_empty() {
        return Ok(None);
    }
    let unused = limit.saturating_sub(end).checked_div(layout.slot()).unwrap_or(0);
    if unused > 0 {
        report.leak(unused, || format!("{unused} blocks at the end of the file belong to nothing"));
    }
    Ok(Some(end))
}
