// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The block allocation table (MS-VHDX 2.5).

use crate::bytes::{MIB, SECTOR, SECTOR_BYTES, to_u64, to_usize};
use crate::log::Sector;
use std::collections::BTreeSet;
use tranship_block::{BlockDevice, Error, Result, Span};

/// Entries in a sector of 4 KiB, the unit in which the table changes.
const PER_PAGE: u64 = SECTOR_BYTES / 8;
/// How much of the table is read at once.
const PIECE: usize = 1 << 20;

/// What an entry says about its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The parent decides; zeroes without one.
    NotPresent,
    /// Not the parent's bytes: zeroes.
    Undefined,
    Zero,
    /// Discarded: zeroes.
    Unmapped,
    Full,
    /// The sector bitmap says which sectors are here and which the parent's.
    Partial,
    /// No number that the specification knows.
    Invalid,
}

/// An entry: state and place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry(pub(crate) u64);

impl Entry {
    pub(crate) fn new(state: State, offset: u64) -> Self {
        let number = match state {
            State::NotPresent => 0,
            State::Undefined => 1,
            State::Zero => 2,
            State::Unmapped => 3,
            State::Invalid => 4,
            State::Full => 6,
            State::Partial => 7,
        };
        Self(offset & !(MIB.wrapping_sub(1)) | number)
    }

    pub(crate) fn state(self) -> State {
        match self.0 & 7 {
            0 => State::NotPresent,
            1 => State::Undefined,
            2 => State::Zero,
            // 5 was the number of unmapped blocks before the format was released.
            3 | 5 => State::Unmapped,
            6 => State::Full,
            7 => State::Partial,
            _ => State::Invalid,
        }
    }

    /// Where the block is in the file, or was before it was dropped.
    pub(crate) fn offset(self) -> u64 {
        self.0 & !(MIB.wrapping_sub(1))
    }

    /// Whether bytes of the guest are stored there.
    pub(crate) fn is_stored(self) -> bool {
        matches!(self.state(), State::Full | State::Partial)
    }
}

/// Sizes that follow from the metadata; all of them are powers of two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    block_bits: u32,
    sector_bits: u32,
    pub(crate) has_parent: bool,
}

impl Geometry {
    pub(crate) fn new(block_size: u32, logical_sector: u32, has_parent: bool) -> Self {
        Self {
            block_bits: block_size.trailing_zeros(),
            sector_bits: logical_sector.trailing_zeros(),
            has_parent,
        }
    }

    /// Bytes in a block.
    pub(crate) fn block(self) -> u64 {
        1_u64.wrapping_shl(self.block_bits)
    }

    /// Bytes in a logical sector.
    pub(crate) fn sector(self) -> u64 {
        1_u64.wrapping_shl(self.sector_bits)
    }

    /// The block that holds byte `offset`.
    pub(crate) fn index(self, offset: u64) -> u64 {
        offset.wrapping_shr(self.block_bits)
    }

    /// Guest offset of `block`.
    pub(crate) fn offset(self, block: u64) -> u64 {
        block.saturating_mul(self.block())
    }

    /// Bytes between the start of the block and `offset`.
    pub(crate) fn within(self, offset: u64) -> u64 {
        offset & self.block().wrapping_sub(1)
    }

    /// Blocks of a disk of `size` bytes.
    pub(crate) fn blocks(self, size: u64) -> u64 {
        size.div_ceil(self.block())
    }

    /// Sectors in a block.
    pub(crate) fn sectors(self) -> u64 {
        self.block().wrapping_shr(self.sector_bits)
    }

    /// Sectors in `bytes`, rounded down.
    pub(crate) fn sectors_in(self, bytes: u64) -> u64 {
        bytes.wrapping_shr(self.sector_bits)
    }

    /// Blocks that share a sector bitmap: 2^23 sectors have one.
    fn ratio_bits(self) -> u32 {
        self.sector_bits.saturating_add(23).saturating_sub(self.block_bits)
    }

    fn ratio(self) -> u64 {
        1_u64.wrapping_shl(self.ratio_bits())
    }

    /// The group of blocks with one sector bitmap that `block` belongs to.
    pub(crate) fn chunk(self, block: u64) -> u64 {
        block.wrapping_shr(self.ratio_bits())
    }

    /// Number of the bitmap's bit for the first sector of `block`.
    pub(crate) fn first_bit(self, block: u64) -> u64 {
        (block & self.ratio().wrapping_sub(1)).saturating_mul(self.sectors())
    }

    /// Entry of `block`.
    pub(crate) fn payload_entry(self, block: u64) -> u64 {
        block.saturating_add(self.chunk(block))
    }

    /// Entry of the sector bitmap of `chunk`.
    pub(crate) fn bitmap_entry(self, chunk: u64) -> u64 {
        chunk.saturating_mul(self.ratio().saturating_add(1)).saturating_add(self.ratio())
    }

    /// The block or chunk that entry `index` is about.
    pub(crate) fn subject(self, index: u64) -> Subject {
        let group = self.ratio().saturating_add(1);
        let chunk = index.checked_div(group).unwrap_or(0);
        let rest = index.checked_rem(group).unwrap_or(0);
        if rest == self.ratio() {
            Subject::Bitmap(chunk)
        } else {
            Subject::Block(chunk.wrapping_shl(self.ratio_bits()).saturating_add(rest))
        }
    }

    /// The first block whose entry is `index` or later.
    pub(crate) fn block_from(self, index: u64) -> u64 {
        match self.subject(index) {
            Subject::Block(block) => block,
            Subject::Bitmap(chunk) => chunk.saturating_add(1).wrapping_shl(self.ratio_bits()),
        }
    }

    /// Entries of a disk of `size` bytes.
    pub(crate) fn entries(self, size: u64) -> u64 {
        let blocks = self.blocks(size);
        let Some(last) = blocks.checked_sub(1) else { return 0 };
        if self.has_parent {
            self.bitmap_entry(self.chunk(last)).saturating_add(1)
        } else {
            self.payload_entry(last).saturating_add(1)
        }
    }
}

/// What an entry is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    Block(u64),
    Bitmap(u64),
}

/// The table in memory. A page that is all zero takes no space, however large the disk.
#[derive(Debug)]
pub(crate) struct Bat {
    pub(crate) region: Span,
    pages: Vec<Option<Box<[u64]>>>,
    changed: BTreeSet<usize>,
}

impl Bat {
    /// Reads the first `entries` entries.
    pub(crate) fn read(file: &dyn BlockDevice, region: Span, entries: u64) -> Result<Self> {
        let needed = entries.saturating_mul(8);
        if needed > region.len {
            return Err(Error::corrupt(format!(
                "BAT region has {} bytes, expected at least {needed} for the disk's size",
                region.len
            ))
            .at(region.start));
        }
        let len = entries.div_ceil(PER_PAGE).saturating_mul(SECTOR_BYTES);
        let mut pages = Vec::new();
        pages.resize_with(to_usize(entries.div_ceil(PER_PAGE))?, || None);
        let mut bat = Self { region, pages, changed: BTreeSet::new() };
        let mut buf = vec![0; to_usize(len)?.min(PIECE)];
        let mut at = 0;
        while at < len {
            let place = region.start.saturating_add(at);
            let extent = file.extent_at(place)?;
            let whole = extent.len & !SECTOR_BYTES.wrapping_sub(1);
            if extent.kind.reads_zero() && whole > 0 {
                at = at.saturating_add(whole);
                continue;
            }
            let count = len.saturating_sub(at).min(to_u64(buf.len()));
            let piece = buf.get_mut(..to_usize(count)?).unwrap_or_default();
            file.read_at(piece, place)?;
            bat.fill(at / SECTOR_BYTES, piece)?;
            at = at.saturating_add(count);
        }
        Ok(bat)
    }

    /// A table of unchanged pages that holds nothing yet.
    pub(crate) fn empty(region: Span, entries: u64) -> Result<Self> {
        let mut bat = Self { region, pages: Vec::new(), changed: BTreeSet::new() };
        bat.resize(entries)?;
        Ok(bat)
    }

    fn fill(&mut self, first: u64, piece: &[u8]) -> Result<()> {
        let pages = self.pages.get_mut(to_usize(first)?..).unwrap_or_default();
        for (page, bytes) in pages.iter_mut().zip(piece.chunks(SECTOR)) {
            if !tranship_block::is_zero(bytes) {
                let numbers = bytes.as_chunks::<8>().0.iter();
                *page = Some(numbers.map(|number| u64::from_le_bytes(*number)).collect());
            }
        }
        Ok(())
    }

    /// Makes room for `entries` entries, or drops those behind.
    pub(crate) fn resize(&mut self, entries: u64) -> Result<()> {
        let pages = to_usize(entries.div_ceil(PER_PAGE))?;
        self.pages.resize_with(pages, || None);
        self.changed.split_off(&pages);
        Ok(())
    }

    pub(crate) fn get(&self, index: u64) -> Entry {
        let (page, within) = place(index);
        let page = self.pages.get(page).and_then(Option::as_ref);
        Entry(page.and_then(|page| page.get(within)).copied().unwrap_or(0))
    }

    pub(crate) fn set(&mut self, index: u64, entry: Entry) {
        let (number, within) = place(index);
        let Some(page) = self.pages.get_mut(number) else { return };
        let page = page.get_or_insert_with(|| vec![0; SECTOR / 8].into_boxed_slice());
        if let Some(place) = page.get_mut(within).filter(|old| **old != entry.0) {
            *place = entry.0;
            self.changed.insert(number);
        }
    }

    /// First entry from `index` on that may be other than zero.
    pub(crate) fn skip_empty(&self, index: u64) -> u64 {
        let (page, _) = place(index);
        let rest = self.pages.get(page..).unwrap_or_default();
        let empty = rest.iter().take_while(|page| page.is_none()).count();
        if empty == 0 {
            return index;
        }
        to_u64(page).saturating_add(to_u64(empty)).saturating_mul(PER_PAGE)
    }

    /// Every entry below `end` that is not zero.
    pub(crate) fn entries(&self, end: u64) -> impl Iterator<Item = (u64, Entry)> + '_ {
        let numbered = (0_u64..).step_by(SECTOR / 8).zip(&self.pages);
        let stored = numbered.filter_map(|(first, page)| Some((first, page.as_ref()?)));
        stored
            .flat_map(|(first, page)| {
                (first..).zip(page.iter()).map(|(index, number)| (index, Entry(*number)))
            })
            .filter(move |(index, entry)| *index < end && entry.0 != 0)
    }

    /// The sectors that have changed, the last one first: a block that is partially
    /// present is never on disk before the entry of its sector bitmap, which comes later
    /// in the table.
    pub(crate) fn take_changed(&mut self) -> Vec<Sector> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().rev().filter_map(|page| self.sector(page)).collect()
    }

    /// Every sector that is not all zero, where it belongs in `region`.
    pub(crate) fn all(&self) -> impl Iterator<Item = Sector> + '_ {
        (0..self.pages.len())
            .filter(|page| matches!(self.pages.get(*page), Some(Some(_))))
            .filter_map(|page| self.sector(page))
    }

    fn sector(&self, number: usize) -> Option<Sector> {
        let page = self.pages.get(number)?;
        let mut bytes = Box::new([0; SECTOR]);
        let places = bytes.as_chunks_mut::<8>().0.iter_mut();
        for (place, entry) in places.zip(page.iter().flat_map(|page| page.iter())) {
            *place = entry.to_le_bytes();
        }
        let at = self.region.start.saturating_add(to_u64(number).saturating_mul(SECTOR_BYTES));
        Some(Sector { at, bytes })
    }
}

/// Page and place in it of entry `index`.
fn place(index: u64) -> (usize, usize) {
    let page = usize::try_from(index / PER_PAGE).unwrap_or(usize::MAX);
    (page, usize::try_from(index % PER_PAGE).unwrap_or(0))
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    #[test]
    fn entries_and_blocks_count_past_the_bitmaps() {
        for block_size in (20..=28).map(|bits| 1_u32 << bits) {
            for (sector, has_parent) in [(512, false), (512, true), (4096, true)] {
                let geometry = Geometry::new(block_size, sector, has_parent);
                let ratio = (u64::from(sector) << 23) / u64::from(block_size);
                for block in [0, 1, ratio - 1, ratio, ratio + 1, 5 * ratio - 1, 5 * ratio] {
                    let index = geometry.payload_entry(block);
                    assert_eq!(index, block + block / ratio);
                    assert_eq!(geometry.subject(index), Subject::Block(block));
                    let chunk = geometry.chunk(block);
                    assert_eq!(chunk, block / ratio);
                    let bitmap = geometry.bitmap_entry(chunk);
                    assert_eq!(geometry.subject(bitmap), Subject::Bitmap(chunk));
                    assert!(bitmap > index);
                    let size = (block + 1) * u64::from(block_size);
                    let entries = if has_parent { bitmap + 1 } else { index + 1 };
                    assert_eq!(geometry.entries(size), entries);
                    assert_eq!(geometry.entries(size - 1), entries);
                }
                assert_eq!(geometry.entries(0), 0);
            }
        }
    }

    #[test]
    fn pages_that_change_come_last_first() {
        let device = MemoryDevice::new(vec![0; 3 << 20]);
        device.write_at(&0x0030_0006_u64.to_le_bytes(), (1 << 20) + 8 * 600).unwrap();
        let mut bat = Bat::read(&device, Span::new(1 << 20, 1 << 20), 2000).unwrap();
        assert_eq!(bat.get(600), Entry::new(State::Full, 3 << 20));
        assert_eq!(
            (bat.skip_empty(0), bat.skip_empty(600), bat.skip_empty(1024)),
            (512, 600, 2048)
        );
        bat.set(600, bat.get(600));
        assert!(bat.take_changed().is_empty());
        bat.set(0, Entry(2));
        bat.set(1999, Entry::new(State::Zero, 0));
        let offsets: Vec<u64> = bat.take_changed().iter().map(|sector| sector.at).collect();
        assert_eq!(offsets, [(1 << 20) + 3 * 4096, 1 << 20]);
        let entries: Vec<u64> = bat.entries(1999).map(|(index, _)| index).collect();
        assert_eq!(entries, [0, 600]);
        assert!(Bat::read(&device, Span::new(1 << 20, 4096), 513).is_err());
    }
}
