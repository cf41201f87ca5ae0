// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which parts of the file are free for blocks.

use crate::geometry::{SECTOR, whole_sectors};
use crate::table::{Layout, Occupied, touches};
use std::collections::VecDeque;
use tranship_block::{Error, ErrorKind, Result, Span};

/// Data of blocks starts at multiples of this, so that disks with large sectors need not
/// read to write.
const ALIGNMENT: u64 = 4096;

/// The free parts of a file, and where it ends.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Parts before `end` that nothing uses, not even the table on disk.
    free: VecDeque<Span>,
    /// Blocks that the table in memory has given up, but maybe not the one on disk.
    pub(crate) freed: Vec<u32>,
    /// The byte after the last one in use.
    pub(crate) end: u64,
    /// The byte after the last one of anything but blocks.
    floor: u64,
    /// Where the footer at the end is; none if it is lost.
    pub(crate) footer_at: Option<u64>,
    /// Whether blocks at the end were given up, so that the file can be shorter.
    pub(crate) has_shrunk: bool,
}

/// A place for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) start: u64,
    /// Whether the file has to grow for it, so that it reads as zero.
    pub(crate) is_new: bool,
}

impl Slot {
    /// The table's entry for it.
    pub(crate) fn entry(self) -> Result<u32> {
        let entry = u32::try_from(self.start / SECTOR).ok().filter(|entry| *entry != u32::MAX);
        entry.ok_or_else(|| {
            Error::new(ErrorKind::NoSpace, "the file is too long for the format's sector numbers")
                .at(self.start)
        })
    }
}

impl Space {
    pub(crate) fn new(
        occupied: &Occupied,
        layout: &Layout,
        metadata: &[(Span, &str)],
        footer_at: Option<u64>,
    ) -> Self {
        let mut free = VecDeque::new();
        let mut others: Vec<Span> = metadata.iter().map(|(span, _)| *span).collect();
        others.sort_unstable_by_key(|span| span.start);
        let mut before = 0;
        let mut gap = |start: u64, end: u64| {
            let span = Span::new(start, end.saturating_sub(start));
            // Gaps with metadata in them are left alone.
            let is_used = others.iter().any(|other| touches(*other, span));
            if span.len >= layout.slot() && !is_used {
                free.push_back(span);
            }
        };
        if let Some(first) = others.iter().map(Span::end).max()
            && let Some((entry, _)) = occupied.blocks.first()
        {
            gap(first, Layout::bitmap_at(*entry));
        }
        for (entry, _) in &occupied.blocks {
            let start = Layout::bitmap_at(*entry);
            if before != 0 {
                gap(before, start);
            }
            before = start.saturating_add(layout.slot());
        }
        Self {
            free,
            end: whole_sectors(occupied.end),
            floor: others.iter().map(Span::end).max().unwrap_or(0),
            footer_at,
            ..Self::default()
        }
    }

    /// Chooses a place for a block. The caller makes the file reach to its end.
    pub(crate) fn take(&mut self, layout: &Layout) -> Slot {
        while let Some(span) = self.free.pop_front() {
            let start = aligned(span.start, layout);
            let end = start.saturating_add(layout.slot());
            if end > span.end() {
                // A block of another writer that was given up: good for another one.
                if span.len >= layout.slot() {
                    return Slot { start: span.start, is_new: false };
                }
                continue;
            }
            let rest = Span::new(end, span.end().saturating_sub(end));
            if rest.len >= layout.slot() {
                self.free.push_front(rest);
            }
            return Slot { start, is_new: false };
        }
        let start = aligned(self.end, layout);
        // An unused tail may hold anything, and so may a file that has lost its footer.
        let is_new = self.footer_at.is_some_and(|footer| start >= footer);
        Slot { start, is_new }
    }

    /// Makes sure that no block gets a place in `region`.
    pub(crate) fn keep_out(&mut self, region: Span) {
        self.free.retain(|span| !touches(*span, region));
        self.end = self.end.max(region.end());
        self.floor = self.floor.max(region.end());
    }

    /// Whether a part of `span` may be given to a block.
    pub(crate) fn is_free(&self, span: Span) -> bool {
        self.free.iter().any(|free| touches(*free, span)) || self.end < span.end()
    }

    /// Gives a place back that no table and no reader knows any more.
    pub(crate) fn give_back(&mut self, start: u64, layout: &Layout) {
        self.free.push_back(Span::new(start, layout.slot()));
    }

    /// Brings free places in order, and forgets those at the end of the file.
    pub(crate) fn tidy(&mut self, layout: &Layout) {
        self.free.make_contiguous().sort_unstable_by_key(|span| span.start);
        // What lies between aligned neighbours is too small for anything.
        let padding = ALIGNMENT.min(layout.block);
        while let Some(last) = self.free.back().copied() {
            let gap = self.end.saturating_sub(last.end());
            if last.start < self.floor || gap >= padding {
                break;
            }
            self.free.pop_back();
            self.end = last.start;
            self.has_shrunk = true;
        }
    }
}

/// The first place from `start` on where a block's data is aligned.
fn aligned(start: u64, layout: &Layout) -> u64 {
    let step = ALIGNMENT.min(layout.block);
    let data = whole_sectors(start).saturating_add(layout.bitmap);
    data.checked_next_multiple_of(step).unwrap_or(u64::MAX).saturating_sub(layout.bitmap)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout =
        Layout { block: 4096, bitmap: 512, table_offset: 1536, header_offset: 512 };

    #[test]
    fn gaps_are_used_first_and_data_is_aligned() {
        let metadata = [(Span::new(0, 2048), "metadata")];
        // Blocks at sectors 7 and 32: room for one block between them that is aligned.
        let occupied =
            Occupied { blocks: vec![(7, 0), (32, 1)], end: 41 * 512, faults: Vec::new() };
        let mut space = Space::new(&occupied, &LAYOUT, &metadata, Some(41 * 512));
        let slot = space.take(&LAYOUT);
        assert_eq!(slot, Slot { start: 23 * 512, is_new: false });
        let slot = space.take(&LAYOUT);
        assert_eq!(slot, Slot { start: 47 * 512, is_new: true });
        space.give_back(7 * 512, &LAYOUT);
        assert_eq!(space.take(&LAYOUT), Slot { start: 7 * 512, is_new: false });
        // Unaligned, as QEMU places them, but of the right size.
        space.give_back(8 * 512, &LAYOUT);
        assert_eq!(space.take(&LAYOUT), Slot { start: 8 * 512, is_new: false });
    }

    #[test]
    fn free_places_at_the_end_are_forgotten_down_to_the_last_block() {
        let metadata = [(Span::new(0, 2048), "metadata")];
        // Blocks at sectors 7, 23 and 39, with padding between them.
        let blocks = vec![(7, 0), (23, 1), (39, 2)];
        let occupied = Occupied { blocks, end: 48 * 512, faults: Vec::new() };
        let mut space = Space::new(&occupied, &LAYOUT, &metadata, Some(48 * 512));
        space.give_back(7 * 512, &LAYOUT);
        space.give_back(39 * 512, &LAYOUT);
        space.tidy(&LAYOUT);
        assert_eq!((space.end, space.has_shrunk), (39 * 512, true));
        space.give_back(23 * 512, &LAYOUT);
        space.tidy(&LAYOUT);
        assert_eq!(space.end, 7 * 512);
    }

    #[test]
    fn sector_numbers_do_not_wrap() {
        let far = Slot { start: u64::from(u32::MAX) * 512, is_new: true };
        assert_eq!(far.entry().unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(Slot { start: far.start - 512, is_new: true }.entry().unwrap(), u32::MAX - 1);
    }
}
