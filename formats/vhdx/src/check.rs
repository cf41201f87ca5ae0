// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finding contradictions in the metadata, and mending those that leave no choice.

use crate::Guid;
use crate::bat::{Bat, Subject};
use crate::bytes::MIB;
use crate::header::Headers;
use crate::overlay::Overlay;
use crate::replay;
use crate::structure::{Rules, Start, Structure};
use tranship_block::{BlockDevice, CheckReport, Error, Repair, Result, Span, Storage};

/// Checks the image in `storage`; [`Repair::Nothing`] writes nothing.
///
/// Changes that wait in the log are no fault: they are taken into account, and put in
/// place by every repair. [`Repair::All`] also rewrites damaged headers and region tables
/// from their copies. [`Repair::Leaks`] cuts off space behind the last structure of the file,
/// which is what an interrupted writer leaves; fixed disks keep theirs.
///
/// # Errors
///
/// As [`crate::Vhdx::open`], for images that are too damaged to be looked at, and
/// [`tranship_block::ErrorKind::Usage`] for a repair of read-only storage.
pub fn check(storage: &dyn Storage, repair: Repair) -> Result<CheckReport> {
    if repair != Repair::Nothing && storage.is_read_only() {
        return Err(Error::usage("image cannot be repaired: its file is open for reading only"));
    }
    let mut report = CheckReport::default();
    let mut ignored = Vec::new();
    let mut start = Start::read(storage, false, &mut ignored)?;
    let damaged = start.headers.damage.clone();
    for damage in &damaged {
        report.corruption(|| damage.clone());
    }
    let mut overlay = Overlay::new(storage, 0);
    if let Some(replay) = start.replay.take() {
        report.note(|| {
            format!(
                "log {} holds {} changes that are not in place yet",
                start.headers.current.log_guid,
                replay.changes.len()
            )
        });
        if repair == Repair::Nothing {
            overlay = Overlay::new(storage, replay.last);
            replay.changes.into_iter().for_each(|change| overlay.apply(change));
        } else {
            // Whatever else is mended, the log would overwrite it later.
            replay::apply(storage, &replay)?;
            write_headers(storage, &mut start.headers)?;
            fixed(&mut report, damaged.len());
            overlay = Overlay::new(storage, 0);
        }
    }
    // An emptied log has mended both copies already.
    if !start.headers.damage.is_empty() && repair == Repair::All {
        write_headers(storage, &mut start.headers)?;
        fixed(&mut report, damaged.len());
    }
    let structure = check_regions(storage, &overlay, &start.headers, repair, &mut report)?;
    let rules = Rules {
        geometry: structure.geometry,
        size: structure.metadata.size,
        file_len: overlay.size(),
        reserved: structure.reserved(),
    };
    let bat = structure.read_bat(&overlay)?;
    check_blocks(&bat, &rules, &mut report);
    let end = report.image_end_offset;
    let block = rules.geometry.block();
    let behind = overlay.size().saturating_sub(end);
    if behind >= MIB && !structure.metadata.leave_allocated {
        let blocks = behind.div_ceil(block);
        report.leak(blocks, || format!("{behind} bytes at {end:#x} belong to nothing"));
        // With contradictions left, the end may be another one.
        if repair != Repair::Nothing && report.corruptions == 0 {
            storage.set_len(end)?;
            storage.flush()?;
            report.leaks = report.leaks.saturating_sub(blocks);
            report.leaks_fixed = report.leaks_fixed.saturating_add(blocks);
        }
    }
    Ok(report)
}

fn fixed(report: &mut CheckReport, count: usize) {
    let count = crate::bytes::to_u64(count);
    report.corruptions = report.corruptions.saturating_sub(count);
    report.corruptions_fixed = report.corruptions_fixed.saturating_add(count);
}

fn write_headers(storage: &dyn Storage, headers: &mut Headers) -> Result<()> {
    let file_write = Guid::random()?;
    headers.update(storage, |header| {
        header.log_guid = Guid::NIL;
        header.file_write = file_write;
    })
}

fn check_regions(
    storage: &dyn Storage,
    overlay: &Overlay<&dyn Storage>,
    headers: &Headers,
    repair: Repair,
    report: &mut CheckReport,
) -> Result<Structure> {
    let mut ignored = Vec::new();
    let structure = Structure::read(overlay, headers, &mut ignored)?;
    if !structure.log.is_empty() || !headers.current.log_guid.is_nil() {
        let len = overlay.size();
        if let Err(error) = replay::check_place(&headers.current, len) {
            report.corruption(|| error.to_string());
        }
    }
    let differing = structure.regions.sectors(overlay)?;
    if differing.is_empty() {
        return Ok(structure);
    }
    let damage = structure.regions.damage.first().cloned();
    report.corruption(|| damage.unwrap_or_else(|| "the region tables differ".to_owned()));
    if repair == Repair::All {
        for sector in differing {
            storage.write_at(sector.bytes.as_slice(), sector.at)?;
        }
        storage.flush()?;
        fixed(report, 1);
    }
    Ok(structure)
}

/// Every entry by itself, then whether any two share bytes.
fn check_blocks(bat: &Bat, rules: &Rules, report: &mut CheckReport) {
    let geometry = rules.geometry;
    report.total_clusters = geometry.blocks(rules.size);
    let mut places: Vec<Span> = Vec::new();
    let mut expected = None;
    for (index, entry) in bat.entries(geometry.entries(rules.size)) {
        let at = bat.region.start.saturating_add(index.saturating_mul(8));
        if let Err(error) = rules.check(bat, index, entry) {
            report.corruption(|| error.at(at).to_string());
            continue;
        }
        let Some(place) = rules.place(index, entry) else { continue };
        places.push(place);
        if let Subject::Block(_) = geometry.subject(index) {
            report.allocated_clusters = report.allocated_clusters.saturating_add(1);
            if expected.is_some_and(|expected| expected != place.start) {
                report.fragmented_clusters = report.fragmented_clusters.saturating_add(1);
            }
            expected = Some(place.end());
        }
    }
    places.sort_unstable_by_key(|span| span.start);
    for (before, after) in places.iter().zip(places.iter().skip(1)) {
        if before.end() > after.start {
            report.corruption(|| {
                format!("the blocks at {:#x} and {:#x} share bytes", before.start, after.start)
            });
        }
    }
    let last = places.last().into_iter().chain(rules.reserved.last());
    report.image_end_offset = last.copied().map(|span| span.end()).max().unwrap_or(0);
}
