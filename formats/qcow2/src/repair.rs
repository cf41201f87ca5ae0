// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making reference counts agree with references.
//!
//! Every step leaves a valid image if it is the last one: counts are raised before others
//! are lowered, and rebuilt ones are written elsewhere until one write of the header puts
//! them in force.

use crate::check::{self, Found, references::PAGE, references::References};
use crate::first_cluster::{FirstCluster, field};
use crate::geometry::{Geometry, OFFSET, to_u64, to_usize};
use crate::header::{CORRUPT, DIRTY, Header, LARGEST_REFCOUNT_TABLE};
use crate::layout;
use crate::refcounts::{count_at, set_count, to_bytes};
use std::collections::{BTreeSet, HashSet};
use tranship_block::{CheckReport, Error, Repair, Result, Storage};

/// Rounds of mending COPIED flags; each takes a million.
const MOST_ROUNDS: usize = 1000;

/// Frees the clusters of the image in `storage` that nothing references; returns how many
/// counts were lowered.
///
/// A writer that is killed leaves such leaks behind: clusters are counted before anything
/// refers to them. Nothing else may have the image open.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Corrupt`] if the image has more than leaks: then nothing is
/// changed. I/O errors.
pub fn repair_leaks(storage: &dyn Storage) -> Result<u64> {
    let found = check::examine(storage)?;
    refuse_corruptions(&found.report)?;
    if found.report.leaks == 0 {
        return Ok(0);
    }
    repair(storage, found, Repair::Leaks).map(|before| before.leaks)
}

/// Counts all references of the image in `storage` anew, and takes the mark of an unclean
/// shutdown away. Nothing else may have the image open.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Corrupt`] if something is left that cannot be mended; the
/// image stays marked then. I/O errors.
pub fn rebuild_refcounts(storage: &dyn Storage) -> Result<()> {
    refuse_corruptions(&check::check(storage, Repair::All)?)
}

/// An error for a report with corruptions.
pub(crate) fn refuse_corruptions(report: &CheckReport) -> Result<()> {
    if report.corruptions == 0 {
        return Ok(());
    }
    let is_about = |detail: &&String| detail.starts_with("ERROR ");
    let first = report.details.iter().find(is_about).map_or("", String::as_str);
    Err(Error::corrupt(format!(
        "the image has {} corruptions, the first one: {first}",
        report.corruptions
    )))
}

/// Mends what `level` allows; returns what had been found before.
pub(crate) fn repair(storage: &dyn Storage, found: Found, level: Repair) -> Result<CheckReport> {
    let may_lower = !found.is_incomplete && found.blocks_are_sound;
    if level == Repair::Leaks {
        if may_lower && found.report.leaks > 0 {
            let alone = adjust(storage, &found, u64::min)?;
            // What has just become the only reference has to say so. All other flags are left
            // alone if something else is wrong: their counts may be.
            let is_sound = found.report.corruptions == 0;
            let may_mend = |cluster: &u64| is_sound || alone.contains(cluster);
            mend_flags_of(storage, &found.header, may_mend)?;
        }
        return Ok(found.report);
    }
    if found.blocks_are_sound && !lacks_blocks(&found)? {
        adjust(storage, &found, u64::max)?;
        if may_lower {
            adjust(storage, &found, u64::min)?;
        }
    } else {
        rebuild(storage, &found)?;
    }
    let header = Header::read(storage)?;
    mend_flags(storage, &header)?;
    Ok(found.report)
}

/// Takes the marks away that a repaired image no longer deserves.
pub(crate) fn unmark(storage: &dyn Storage, after: &Found, level: Repair) -> Result<()> {
    let is_marked = after.header.incompatible_features & (DIRTY | CORRUPT) != 0;
    if level != Repair::All || !is_marked || !after.report.is_clean() {
        return Ok(());
    }
    let mut first = FirstCluster::read(storage, &after.header)?;
    let features = first.u64(field::INCOMPATIBLE) & !(DIRTY | CORRUPT);
    first.set_u64(field::INCOMPATIBLE, features);
    first.write(storage)
}

/// Whether a cluster is referenced for which no block exists.
fn lacks_blocks(found: &Found) -> Result<bool> {
    let per_block = found.header.geometry().per_block();
    for page in found.references.pages() {
        for cluster in page..page.saturating_add(PAGE) {
            let number = to_usize(cluster.checked_div(per_block).unwrap_or(0))?;
            let has_block = found.table.get(number).is_some_and(|entry| *entry != 0);
            if !has_block && found.references.get(cluster) > 0 {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Gives each cluster the count that `choose` makes of its count and its references, in
/// the blocks that exist; durable when this returns. The result are the clusters that had
/// a higher count than 1 and have it now.
fn adjust(
    storage: &dyn Storage,
    found: &Found,
    choose: impl Fn(u64, u64) -> u64,
) -> Result<HashSet<u64>> {
    let geometry = found.header.geometry();
    let (per_block, order) = (geometry.per_block(), geometry.refcount_order);
    let file_end = geometry.clusters_for(storage.size());
    let mut counts = check::compare::Counts::new(storage, &found.table, geometry);
    let mut alone = HashSet::new();
    for number in 0..to_u64(found.table.len()) {
        let first = number.saturating_mul(per_block);
        if first >= file_end {
            break;
        }
        let Some((offset, block)) = counts.block(number)? else { continue };
        let mut is_changed = false;
        for index in 0..per_block.min(file_end.saturating_sub(first)) {
            let cluster = first.saturating_add(index);
            let references = found.references.get(cluster);
            let count = count_at(block, index, order);
            let wanted = choose(count, references);
            // A count that is too narrow stays wrong, and is reported.
            if wanted != count && wanted <= geometry.refcount_max() {
                set_count(block, index, order, wanted);
                is_changed = true;
                if wanted == 1 && count > 1 {
                    alone.insert(cluster);
                }
            }
        }
        if is_changed {
            storage.write_at(block, offset)?;
        }
    }
    storage.flush()?;
    Ok(alone)
}

/// Writes all counts anew at the end of the file, with a new table.
fn rebuild(storage: &dyn Storage, found: &Found) -> Result<()> {
    let mut references = check::contents(storage, &found.header)?;
    if found.is_incomplete {
        keep_counts(storage, found, &mut references)?;
    }
    recount(storage, &found.header, references, found.header.refcount_order)
}

/// Writes `references`, which must not contain the structures that hold counts, at the end
/// of the file as counts of the width `order`; the header refers to them afterwards.
///
/// A count that is too narrow stays wrong, and is found by the next check.
pub(crate) fn recount(
    storage: &dyn Storage,
    header: &Header,
    mut references: References,
    order: u32,
) -> Result<()> {
    let geometry = Geometry { refcount_order: order, ..header.geometry() };
    let per_block = geometry.per_block();
    let file_end = geometry.clusters_for(storage.size());
    let start = references.last().saturating_add(1).max(file_end);
    let mut blocks = BTreeSet::new();
    for page in references.pages() {
        for cluster in page..page.saturating_add(PAGE) {
            if references.get(cluster) > 0 {
                blocks.insert(cluster.checked_div(per_block).unwrap_or(0));
            }
        }
    }
    // The new structures count themselves, which may need more of them.
    let (table_len, end) = loop {
        let last = blocks.last().copied().unwrap_or(0);
        let table_clusters = geometry.clusters_for(last.saturating_add(1).saturating_mul(8));
        let count = to_u64(blocks.len());
        let end = start.saturating_add(count).saturating_add(table_clusters);
        let own = start.checked_div(per_block).unwrap_or(0)..end.div_ceil(per_block);
        blocks.extend(own);
        if to_u64(blocks.len()) == count {
            if geometry.offset(table_clusters) > LARGEST_REFCOUNT_TABLE {
                return Err(Error::unsupported(format!(
                    "rebuilt refcount table would need more than {LARGEST_REFCOUNT_TABLE} bytes"
                )));
            }
            break (table_clusters, end);
        }
    };
    for cluster in start..end {
        references.add(cluster, 1)?;
    }
    storage.set_len(geometry.offset(end).max(storage.size()))?;
    let mut table = vec![0; to_usize(table_len.saturating_mul(geometry.cluster() / 8))?];
    let mut block = vec![0; geometry.cluster_len()];
    for (place, number) in (start..).zip(&blocks) {
        block.fill(0);
        for index in 0..per_block {
            let cluster = number.saturating_mul(per_block).saturating_add(index);
            let count = references.get(cluster).min(geometry.refcount_max());
            if count > 0 {
                set_count(&mut block, index, order, count);
            }
        }
        storage.write_at(&block, geometry.offset(place))?;
        if let Some(entry) = table.get_mut(to_usize(*number)?) {
            *entry = geometry.offset(place);
        }
    }
    let table_offset = geometry.offset(start.saturating_add(to_u64(blocks.len())));
    storage.write_at(&to_bytes(&table), table_offset)?;
    storage.flush()?;
    let mut first = FirstCluster::read(storage, header)?;
    first.set_u64(field::REFCOUNT_TABLE_OFFSET, table_offset);
    let clusters = u32::try_from(table_len).unwrap_or(u32::MAX);
    first.set_u32(field::REFCOUNT_TABLE_CLUSTERS, clusters);
    if header.version >= 3 {
        first.set_u32(field::REFCOUNT_ORDER, order);
    }
    first.write(storage)
}

/// Where something may be in use without having been found, a count is as good as a
/// reference.
fn keep_counts(storage: &dyn Storage, found: &Found, references: &mut References) -> Result<()> {
    let geometry = found.header.geometry();
    let file_end = geometry.clusters_for(storage.size());
    let mut counts = check::compare::Counts::new(storage, &found.table, geometry);
    let per_block = geometry.per_block();
    for number in 0..to_u64(found.table.len()) {
        let first = number.saturating_mul(per_block);
        let Some((_, block)) = counts.block(number)? else { continue };
        if first >= file_end || tranship_block::is_zero(block) {
            continue;
        }
        for index in 0..per_block.min(file_end.saturating_sub(first)) {
            let cluster = first.saturating_add(index);
            let more = count_at(block, index, geometry.refcount_order)
                .saturating_sub(references.get(cluster));
            if more > 0 {
                references.add(cluster, more)?;
            }
        }
    }
    Ok(())
}

/// Makes COPIED say what the counts say; durable when this returns.
pub(crate) fn mend_flags(storage: &dyn Storage, header: &Header) -> Result<()> {
    mend_flags_of(storage, header, |_| true)
}

/// The same in entries for the clusters that `may_mend` accepts.
fn mend_flags_of(
    storage: &dyn Storage,
    header: &Header,
    may_mend: impl Fn(&u64) -> bool,
) -> Result<()> {
    let geometry = header.geometry();
    let metadata: HashSet<u64> = layout::metadata(storage, header)?
        .into_iter()
        .filter(|piece| piece.what != layout::What::ActiveL1)
        .flat_map(|piece| piece.run.first..piece.run.end())
        .collect();
    let l1_bytes = u64::from(header.l1_size).saturating_mul(8);
    let l1 = header.l1_table_offset..header.l1_table_offset.saturating_add(l1_bytes);
    let l1_clusters = geometry.index(l1.start)..geometry.clusters_for(l1.end);
    let mut left = usize::MAX;
    for _ in 0..MOST_ROUNDS {
        let mut flags = check::wrong_flags(storage, header)?;
        // A table that lies over other metadata is left as it is.
        flags.retain(|(at, entry)| {
            if !may_mend(&geometry.index(entry & OFFSET)) {
                return false;
            }
            let cluster = geometry.index(*at);
            let in_l1 = l1.contains(at);
            !metadata.contains(&cluster) && (in_l1 || !l1_clusters.contains(&cluster))
        });
        if flags.is_empty() || flags.len() >= left {
            break;
        }
        left = if flags.len() < check::MOST_FLAGS { flags.len() } else { usize::MAX };
        flags.sort_unstable();
        for group in flags.chunk_by(|a, b| geometry.index(a.0) == geometry.index(b.0)) {
            let start = geometry.offset(group.first().map_or(0, |(at, _)| geometry.index(*at)));
            let len = geometry.cluster().min(storage.size().saturating_sub(start));
            let mut bytes = vec![0; to_usize(len)?];
            storage.read_at(&mut bytes, start)?;
            for (at, entry) in group {
                let at = to_usize(at.saturating_sub(start))?;
                if let Some(slot) = bytes.get_mut(at..at.saturating_add(8)) {
                    slot.copy_from_slice(&entry.to_be_bytes());
                }
            }
            storage.write_at(&bytes, start)?;
        }
        storage.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refcounts::read_table;
    use crate::{CreateOptions, OpenOptions, Qcow2, check, create};
    use std::sync::Arc;
    use tranship_block::{BlockDevice, ErrorKind, MemoryDevice};

    /// An image with data in its first clusters, and where the first refcount block lies.
    fn image() -> (Arc<MemoryDevice>, u64) {
        let storage = Arc::new(MemoryDevice::new(Vec::new()));
        create(&*storage, &CreateOptions::new(8 << 20)).unwrap();
        let options = OpenOptions::default();
        let disk = Qcow2::open(storage.clone(), options).unwrap();
        disk.write_at(&vec![7; 300_000], 1000).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let header = Header::read(&*storage).unwrap();
        let table = read_table(&*storage, header.refcount_table_offset, 1).unwrap();
        (storage, header.geometry().block_offset(table[0]).unwrap())
    }

    #[test]
    fn leaked_clusters_are_free_again_and_data_stays() {
        let (storage, block) = image();
        assert_eq!(repair_leaks(&*storage).unwrap(), 0);
        storage.set_len(201 << 16).unwrap();
        for cluster in [100, 101, 200] {
            storage.write_at(&1_u16.to_be_bytes(), block + cluster * 2).unwrap();
        }
        assert_eq!(check(&*storage, Repair::Nothing).unwrap().leaks, 3);
        assert_eq!(repair_leaks(&*storage).unwrap(), 3);
        let report = check(&*storage, Repair::Nothing).unwrap();
        assert_eq!((report.leaks, report.corruptions), (0, 0));
        let disk = Qcow2::open_read_only(storage, None).unwrap();
        let mut found = vec![0; 300_000];
        disk.read_at(&mut found, 1000).unwrap();
        assert!(found.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn what_has_become_the_only_reference_says_so_even_beside_corruptions() {
        let (storage, block) = image();
        let header = Header::read(&*storage).unwrap();
        let l1 = crate::shape::read_sparse(&*storage, header.l1_table_offset, 1).unwrap();
        let l2 = l1[0] & OFFSET;
        let entries = crate::shape::read_sparse(&*storage, l2, 3).unwrap();
        // The first cluster of data has a reference too many, and the second too few.
        for (number, count) in [(0, 2_u16), (1, 0)] {
            let cluster = header.geometry().index(entries[number] & OFFSET);
            storage.write_at(&count.to_be_bytes(), block + cluster * 2).unwrap();
        }
        storage.write_at(&(entries[0] & OFFSET).to_be_bytes(), l2).unwrap();
        let before = check(&*storage, Repair::Nothing).unwrap();
        assert_eq!(before.leaks, 1, "{before:?}");
        let after = check(&*storage, Repair::Leaks).unwrap();
        assert_eq!((after.leaks, after.leaks_fixed), (0, 1), "{after:?}");
        assert_eq!(after.corruptions, before.corruptions, "{after:?}");
        assert_eq!(crate::shape::read_sparse(&*storage, l2, 3).unwrap(), entries);
    }

    #[test]
    fn a_corrupt_image_is_left_alone() {
        let (storage, block) = image();
        // The header's own cluster is no longer counted.
        storage.write_at(&0_u16.to_be_bytes(), block).unwrap();
        storage.write_at(&1_u16.to_be_bytes(), block + 200).unwrap();
        let before = storage.snapshot();
        assert_eq!(repair_leaks(&*storage).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(storage.snapshot(), before);
    }
}
