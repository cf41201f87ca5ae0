// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The block allocation table: where each block of the disk is in the file.

use crate::geometry::SECTOR;
use crate::header::Header;
use std::collections::BTreeSet;
use tranship_block::{BlockDevice, Error, Result, Span};

/// The entry of a block that the image does not have.
pub(crate) const ABSENT: u32 = u32::MAX;
/// Entries of a sector: what is written at once.
pub(crate) const ENTRIES_PER_SECTOR: usize = 128;
/// Bytes of the table that one read brings in.
const READ_PIECE: usize = 1 << 20;

/// Sizes and places that follow from the headers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Bytes of a block's data, a power of two.
    pub(crate) block: u64,
    /// Bytes of the bitmap in front of it.
    pub(crate) bitmap: u64,
    pub(crate) table_offset: u64,
    pub(crate) header_offset: u64,
}

impl Layout {
    pub(crate) fn new(header: &Header, header_offset: u64) -> Self {
        let block = u64::from(header.block_size);
        let bitmap = (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
        Self { block, bitmap, table_offset: header.table_offset, header_offset }
    }

    /// Number of the block that byte `offset` of the disk is in, and the byte within it.
    pub(crate) fn split(&self, offset: u64) -> (usize, u64) {
        let shift = self.block.trailing_zeros();
        let index = offset.checked_shr(shift).unwrap_or(0);
        let within = offset & self.block.saturating_sub(1);
        (usize::try_from(index).unwrap_or(usize::MAX), within)
    }

    /// First byte of block `index` of the disk.
    pub(crate) fn first(&self, index: usize) -> u64 {
        u64::try_from(index).unwrap_or(u64::MAX).saturating_mul(self.block)
    }

    /// Bytes that a block takes in the file.
    pub(crate) fn slot(&self) -> u64 {
        self.block.saturating_add(self.bitmap)
    }

    /// Where in the file the bitmap of the block with `entry` is.
    pub(crate) fn bitmap_at(entry: u32) -> u64 {
        u64::from(entry).saturating_mul(SECTOR)
    }

    /// Where in the file the data of the block with `entry` is.
    pub(crate) fn data_at(&self, entry: u32) -> u64 {
        Self::bitmap_at(entry).saturating_add(self.bitmap)
    }

    /// Where the entry of block `index` is.
    pub(crate) fn entry_at(&self, index: usize) -> u64 {
        let index = u64::try_from(index).unwrap_or(u64::MAX);
        self.table_offset.saturating_add(index.saturating_mul(4))
    }

    /// Bytes of block `index` that a disk of `size` bytes uses.
    pub(crate) fn used(&self, index: usize, size: u64) -> u64 {
        size.saturating_sub(self.first(index)).min(self.block)
    }
}

/// The table in memory, with what of it is newer than the file.
#[derive(Debug)]
pub(crate) struct Table {
    entries: Vec<u32>,
    /// Blocks that each sector of entries has, so that empty ones are passed over at once.
    stored: Vec<u8>,
    /// Sectors' worth of entries that differ from the file.
    dirty: BTreeSet<usize>,
}

impl Table {
    /// Reads the entries that a disk of `size` bytes needs.
    pub(crate) fn read(file: &dyn BlockDevice, header: &Header, size: u64) -> Result<Self> {
        let needed = usize::try_from(header.entries_for(size))
            .map_err(|_| Error::unsupported("block allocation table does not fit into memory"))?;
        let mut entries = Vec::with_capacity(needed);
        let mut at = header.table_offset;
        let mut piece = vec![0; needed.saturating_mul(4).min(READ_PIECE)];
        while entries.len() < needed {
            let left = needed.saturating_sub(entries.len()).saturating_mul(4);
            let now = piece.get_mut(..left.min(READ_PIECE)).unwrap_or_default();
            file.read_at(now, at)?;
            at = at.saturating_add(u64::try_from(now.len()).unwrap_or(u64::MAX));
            entries.extend(now.as_chunks().0.iter().map(|entry| u32::from_be_bytes(*entry)));
        }
        Ok(Self::new(entries))
    }

    fn new(entries: Vec<u32>) -> Self {
        let count = |sector: &[u32]| {
            let stored = sector.iter().filter(|entry| **entry != ABSENT).count();
            u8::try_from(stored).unwrap_or(u8::MAX)
        };
        let stored = entries.chunks(ENTRIES_PER_SECTOR).map(count).collect();
        Self { entries, stored, dirty: BTreeSet::new() }
    }

    pub(crate) fn entries(&self) -> &[u32] {
        &self.entries
    }

    /// Where block `index` is; [`ABSENT`] past the end.
    pub(crate) fn get(&self, index: usize) -> u32 {
        self.entries.get(index).copied().unwrap_or(ABSENT)
    }

    pub(crate) fn set(&mut self, index: usize, entry: u32) {
        self.replace(index, entry);
        self.dirty.insert(index / ENTRIES_PER_SECTOR);
    }

    /// Forgets that block `index` is there, in memory alone: its entry is worthless.
    pub(crate) fn ignore(&mut self, index: usize) {
        self.replace(index, ABSENT);
    }

    fn replace(&mut self, index: usize, entry: u32) {
        let count = self.stored.get_mut(index / ENTRIES_PER_SECTOR);
        let (Some(place), Some(count)) = (self.entries.get_mut(index), count) else { return };
        if *place != ABSENT {
            *count = count.saturating_sub(1);
        }
        if entry != ABSENT {
            *count = count.saturating_add(1);
        }
        *place = entry;
    }

    /// Blocks from `index` on that are absent, at most `most`.
    pub(crate) fn absent_run(&self, index: usize, most: usize) -> usize {
        let end = index.saturating_add(most).min(self.entries.len());
        let mut next = index;
        while next < end {
            let sector = next / ENTRIES_PER_SECTOR;
            if self.stored.get(sector) == Some(&0) {
                next = sector.saturating_add(1).saturating_mul(ENTRIES_PER_SECTOR);
            } else if self.get(next) == ABSENT {
                next = next.saturating_add(1);
            } else {
                break;
            }
        }
        next.min(end).saturating_sub(index)
    }

    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// What has to be written: places in the file and bytes. Counts as written from now on.
    pub(crate) fn take_dirty(&mut self, layout: &Layout) -> Vec<(u64, Vec<u8>)> {
        let sectors = std::mem::take(&mut self.dirty);
        let piece = |sector: &usize| {
            let start = sector.saturating_mul(ENTRIES_PER_SECTOR);
            let end = start.saturating_add(ENTRIES_PER_SECTOR).min(self.entries.len());
            let entries = self.entries.get(start..end).unwrap_or_default();
            (layout.entry_at(start), entries.iter().flat_map(|entry| entry.to_be_bytes()).collect())
        };
        sectors.iter().map(piece).collect()
    }

    /// Makes all of `range` count as not written.
    pub(crate) fn mark_dirty(&mut self, places: &[(u64, Vec<u8>)], layout: &Layout) {
        for (at, _) in places {
            let index = at.saturating_sub(layout.table_offset) / 4;
            let index = usize::try_from(index).unwrap_or(usize::MAX);
            self.dirty.insert(index / ENTRIES_PER_SECTOR);
        }
    }

    /// Gives the table `len` entries; new ones are absent.
    pub(crate) fn resize(&mut self, len: usize) {
        let mut entries = std::mem::take(&mut self.entries);
        let mut dirty = std::mem::take(&mut self.dirty);
        entries.resize(len, ABSENT);
        let used = len.div_ceil(ENTRIES_PER_SECTOR);
        dirty.retain(|sector| *sector < used);
        *self = Self { dirty, ..Self::new(entries) };
    }
}

/// What is wrong with the entry of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) index: usize,
    pub(crate) text: String,
}

/// The blocks of a file that can be what they claim to be.
#[derive(Debug, Default)]
pub(crate) struct Occupied {
    /// Entries and numbers of blocks, in the order of the file.
    pub(crate) blocks: Vec<(u32, u32)>,
    /// The byte after the last one in use by anything but the footer at the end.
    pub(crate) end: u64,
    pub(crate) faults: Vec<Fault>,
}

/// What a block takes in the file, as far as a disk of `size` bytes uses it.
pub(crate) fn span_of(layout: &Layout, entry: u32, index: u32, size: u64) -> Span {
    let used = layout.used(usize::try_from(index).unwrap_or(usize::MAX), size);
    Span::new(Layout::bitmap_at(entry), layout.bitmap.saturating_add(used))
}

/// Compares the blocks of a disk of `size` bytes with each other, with `metadata` and
/// with `limit`, the end of the part of the file where blocks may be.
pub(crate) fn survey(
    table: &Table,
    layout: &Layout,
    size: u64,
    metadata: &[(Span, &str)],
    limit: u64,
) -> Occupied {
    let mut faults = Vec::new();
    let mut fault = |index: u32, entry: u32, text: String| {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        faults.push(Fault { index, text: format!("block {index} {text} (entry {entry:#x})") });
    };
    let mut blocks: Vec<(u32, u32)> = Vec::new();
    for (index, entry) in (0_u32..).zip(table.entries().iter().copied()) {
        if entry == ABSENT {
            continue;
        }
        let span = span_of(layout, entry, index, size);
        if let Some((_, what)) = metadata.iter().find(|(other, _)| touches(span, *other)) {
            fault(index, entry, format!("lies on the {what}"));
        } else if span.end() > limit {
            let end = span.end();
            fault(index, entry, format!("ends at {end:#x}, past the {limit:#x} bytes for blocks"));
        } else {
            blocks.push((entry, index));
        }
    }
    if !blocks.is_sorted() {
        blocks.sort_unstable();
    }
    let mut last: Option<(Span, u32)> = None;
    blocks.retain(|(entry, index)| {
        let span = span_of(layout, *entry, *index, size);
        if let Some((before, other)) = last
            && before.end() > span.start
        {
            fault(*index, *entry, format!("overlaps block {other}"));
            return false;
        }
        last = Some((span, *index));
        true
    });
    let ends = metadata.iter().map(|(span, _)| span.end());
    // The last block may be stored as a whole although the disk ends within it.
    let last = last.map(|(span, _)| span.start.saturating_add(layout.slot()).min(limit));
    let end = ends.chain(last).max().unwrap_or(0);
    Occupied { blocks, end, faults }
}

pub(crate) fn touches(one: Span, other: Span) -> bool {
    one.start < other.end() && other.start < one.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout { block: 4096, bitmap: 512, table_offset: 1536, header_offset: 512 }
    }

    fn table(entries: &[u32]) -> Table {
        Table::new(entries.to_vec())
    }

    #[test]
    fn overlaps_and_blocks_outside_are_found() {
        let metadata = [(Span::new(0, 2048), "metadata")];
        let limit = 100 * 512;
        let faults = |entries: &[u32]| {
            let size = u64::try_from(entries.len()).unwrap() * 4096;
            let found = survey(&table(entries), &layout(), size, &metadata, limit);
            found.faults.into_iter().map(|fault| fault.index).collect::<Vec<_>>()
        };
        assert!(faults(&[ABSENT, 4, 13, 22]).is_empty());
        assert!(faults(&[22, 4, 13]).is_empty());
        assert!(faults(&[91]).is_empty());
        assert_eq!(faults(&[92]), [0]);
        assert_eq!(faults(&[3]), [0]);
        assert_eq!(faults(&[0xffff_fffe]), [0]);
        assert_eq!(faults(&[4, 40, 4]), [2]);
        assert_eq!(faults(&[4, 12]), [1]);
        // Block 2 is judged by block 0, not by the one that overlaps it.
        assert_eq!(faults(&[4, 12, 13]), [1]);
    }

    #[test]
    fn the_last_block_has_to_hold_only_what_the_disk_uses() {
        let found = |size| survey(&table(&[4]), &layout(), size, &[], 6 * 512).faults.len();
        assert_eq!(found(512), 0);
        assert_eq!(found(513), 1);
    }

    #[test]
    fn changed_sectors_are_written_and_no_others() {
        let mut table = table(&[ABSENT; 300]);
        table.set(5, 9);
        table.set(299, 8);
        let dirty = table.take_dirty(&layout());
        let shape: Vec<_> = dirty.iter().map(|(at, bytes)| (*at, bytes.len())).collect();
        assert_eq!(shape, [(1536, 512), (1536 + 1024, 44 * 4)]);
        assert!(!table.is_dirty());
        table.mark_dirty(&dirty, &layout());
        assert_eq!(table.take_dirty(&layout()), dirty);
        assert_eq!(table.absent_run(6, 1000), 293);
        assert_eq!(table.absent_run(0, 3), 3);
        assert_eq!(table.absent_run(5, 3), 0);
        assert_eq!(table.absent_run(6, 200), 200);
        table.set(5, ABSENT);
        table.ignore(299);
        assert_eq!(table.absent_run(1, 1000), 299);
        table.resize(1000);
        table.set(900, 1);
        assert_eq!((table.absent_run(0, 1000), table.absent_run(901, 1000)), (900, 99));
    }
}
