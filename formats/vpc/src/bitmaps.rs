// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sector bitmaps: which sectors of a block are there. The first sector is the highest
//! bit of the first byte.
//!
//! A bitmap belongs to a place in the file, not to a block of the disk: a place is not
//! used again before every reader that knew its old bitmap is done.

use crate::geometry::SECTOR;
use crate::table::Layout;
use std::collections::{HashMap, HashSet};
use std::mem;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tranship_block::{BlockDevice, Result};

/// Bytes of bitmaps in each of the two generations of the cache.
const GENERATION: usize = 2 << 20;
/// Bytes of changed bitmaps that are worth a flush.
const MOST_DIRTY: usize = 4 << 20;
/// Places that are remembered as full.
const MOST_FULL: usize = 1 << 20;

/// What a bitmap says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    /// All sectors are there.
    Full,
    /// The sectors whose bits are set are there.
    Some(Arc<[u8]>),
}

#[derive(Debug, Default)]
struct State {
    full: HashSet<u32>,
    young: HashMap<u32, Arc<[u8]>>,
    old: HashMap<u32, Arc<[u8]>>,
    /// Newer than the file. What is here counts, whatever else is in the cache.
    dirty: HashMap<u32, Arc<[u8]>>,
    /// Counts changes, so that nobody caches what was read before one.
    changes: u64,
}

impl State {
    fn get(&mut self, entry: u32, bitmap: u64) -> Option<Bits> {
        if let Some(bits) = self.dirty.get(&entry).or_else(|| self.young.get(&entry)) {
            return Some(Bits::Some(Arc::clone(bits)));
        }
        if self.full.contains(&entry) {
            return Some(Bits::Full);
        }
        let bits = self.old.remove(&entry)?;
        self.keep(entry, Arc::clone(&bits), bitmap);
        Some(Bits::Some(bits))
    }

    fn keep(&mut self, entry: u32, bits: Arc<[u8]>, bitmap: u64) {
        let each = usize::try_from(bitmap).unwrap_or(usize::MAX).max(1);
        if self.young.len().saturating_mul(each) >= GENERATION {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(entry, bits);
    }

    fn keep_full(&mut self, entry: u32) {
        if self.full.len() >= MOST_FULL {
            self.full.clear();
        }
        self.full.insert(entry);
    }
}

/// All bitmaps of an image.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps {
    state: Mutex<State>,
    /// Held by whoever changes bits, from reading a sector's state to setting it.
    edits: Mutex<()>,
    /// Whether clear bits are taken for set ones.
    ignored: bool,
}

/// The right to change bits.
#[derive(Debug)]
pub(crate) struct Edit<'a> {
    bitmaps: &'a Bitmaps,
    _guard: MutexGuard<'a, ()>,
}

impl Bitmaps {
    pub(crate) fn new(ignored: bool) -> Self {
        Self { ignored, ..Self::default() }
    }

    pub(crate) fn is_ignored(&self) -> bool {
        self.ignored
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bits of the block with `entry`.
    pub(crate) fn get(&self, file: &dyn BlockDevice, layout: &Layout, entry: u32) -> Result<Bits> {
        if self.ignored { Ok(Bits::Full) } else { self.load(file, layout, entry) }
    }

    fn load(&self, file: &dyn BlockDevice, layout: &Layout, entry: u32) -> Result<Bits> {
        let before = {
            let mut state = self.state();
            if let Some(bits) = state.get(entry, layout.bitmap) {
                return Ok(bits);
            }
            state.changes
        };
        let mut bytes = vec![0; usize::try_from(layout.bitmap).unwrap_or(0)];
        file.read_at(&mut bytes, Layout::bitmap_at(entry))?;
        let is_full = is_full(&bytes, layout);
        let bits: Arc<[u8]> = bytes.into();
        let mut state = self.state();
        if state.changes == before {
            if is_full {
                state.keep_full(entry);
            } else {
                state.keep(entry, Arc::clone(&bits), layout.bitmap);
            }
        }
        Ok(if is_full { Bits::Full } else { Bits::Some(bits) })
    }

    /// Waits for the right to change bits.
    pub(crate) fn edit(&self) -> Edit<'_> {
        let guard = self.edits.lock().unwrap_or_else(PoisonError::into_inner);
        Edit { bitmaps: self, _guard: guard }
    }

    /// Notes the bitmap that was just written for a new block.
    pub(crate) fn created(&self, layout: &Layout, entry: u32, is_full: bool) {
        let mut state = self.state();
        state.changes = state.changes.wrapping_add(1);
        if is_full {
            state.keep_full(entry);
        } else {
            let len = usize::try_from(layout.bitmap).unwrap_or(0);
            state.keep(entry, vec![0; len].into(), layout.bitmap);
        }
    }

    /// Forgets a place of the file before it is used again.
    pub(crate) fn forget(&self, entry: u32) {
        let mut state = self.state();
        state.changes = state.changes.wrapping_add(1);
        state.full.remove(&entry);
        state.young.remove(&entry);
        state.old.remove(&entry);
        state.dirty.remove(&entry);
    }

    /// Whether so much is only in memory that it should be written.
    pub(crate) fn wants_flush(&self, layout: &Layout) -> bool {
        let each = usize::try_from(layout.bitmap).unwrap_or(usize::MAX);
        self.state().dirty.len().saturating_mul(each) > MOST_DIRTY
    }

    pub(crate) fn is_changed(&self) -> bool {
        !self.state().dirty.is_empty()
    }

    /// The bitmaps that are newer than the file.
    pub(crate) fn dirty(&self) -> Vec<(u32, Arc<[u8]>)> {
        self.state().dirty.iter().map(|(entry, bits)| (*entry, Arc::clone(bits))).collect()
    }

    /// Notes that `written` is in the file now; what has changed since then stays dirty.
    pub(crate) fn clean(&self, layout: &Layout, written: Vec<(u32, Arc<[u8]>)>) {
        let mut state = self.state();
        for (entry, bits) in written {
            if state.dirty.get(&entry).is_some_and(|now| Arc::ptr_eq(now, &bits)) {
                state.dirty.remove(&entry);
                if is_full(&bits, layout) {
                    state.young.remove(&entry);
                    state.old.remove(&entry);
                    state.keep_full(entry);
                } else {
                    state.keep(entry, bits, layout.bitmap);
                }
            }
        }
    }
}

impl Edit<'_> {
    /// Sets the bits of `sectors` in the block with `entry`: their data is in the file.
    pub(crate) fn set(
        &self,
        file: &dyn BlockDevice,
        layout: &Layout,
        entry: u32,
        sectors: Range<u64>,
    ) -> Result<()> {
        let Bits::Some(bits) = self.bitmaps.load(file, layout, entry)? else { return Ok(()) };
        if run(&bits, sectors.start, sectors.end) == (true, sectors.end) {
            return Ok(());
        }
        let mut bytes = bits.to_vec();
        for sector in sectors {
            let (byte, bit) = place(sector);
            if let Some(byte) = bytes.get_mut(byte) {
                *byte |= bit;
            }
        }
        let mut state = self.bitmaps.state();
        state.changes = state.changes.wrapping_add(1);
        state.young.remove(&entry);
        state.old.remove(&entry);
        state.dirty.insert(entry, bytes.into());
        Ok(())
    }
}

fn place(sector: u64) -> (usize, u8) {
    let shift = u32::try_from(sector % 8).unwrap_or(0);
    (usize::try_from(sector / 8).unwrap_or(usize::MAX), 0x80_u8.checked_shr(shift).unwrap_or(0))
}

/// Whether `sector` is there, and the first sector before `end` for which that is not so.
pub(crate) fn run(bits: &[u8], sector: u64, end: u64) -> (bool, u64) {
    let is_set = |sector: u64| {
        let (byte, bit) = place(sector);
        bits.get(byte).is_some_and(|byte| byte & bit != 0)
    };
    let first = is_set(sector);
    let same = if first { 0xff } else { 0 };
    let mut next = sector.saturating_add(1);
    while next < end {
        let (byte, bit) = place(next);
        if bit == 0x80 && bits.get(byte) == Some(&same) {
            next = next.saturating_add(8);
        } else if is_set(next) == first {
            next = next.saturating_add(1);
        } else {
            break;
        }
    }
    (first, next.min(end))
}

fn is_full(bits: &[u8], layout: &Layout) -> bool {
    let sectors = layout.block / SECTOR;
    run(bits, 0, sectors) == (true, sectors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    const LAYOUT: Layout = Layout { block: 16_384, bitmap: 512, table_offset: 0, header_offset: 0 };

    #[test]
    fn runs_begin_with_the_highest_bit() {
        let bits = [0b1110_0000, 0, 0xff, 0x01];
        let cases = [
            (0, (true, 3)),
            (2, (true, 3)),
            (3, (false, 16)),
            (16, (true, 24)),
            (24, (false, 31)),
            (31, (true, 32)),
        ];
        for (sector, expected) in cases {
            assert_eq!(run(&bits, sector, 32), expected, "{sector}");
        }
        assert_eq!(run(&bits, 17, 20), (true, 20));
        assert_eq!(run(&[0xff; 4], 0, 30), (true, 30));
    }

    #[test]
    fn changed_bits_stay_dirty_until_they_are_written() {
        let file = MemoryDevice::new(vec![0; 4096]);
        let bitmaps = Bitmaps::new(false);
        bitmaps.edit().set(&file, &LAYOUT, 2, 1..3).unwrap();
        let first = bitmaps.dirty();
        assert_eq!(first[0].1[0], 0x60);
        bitmaps.edit().set(&file, &LAYOUT, 2, 0..32).unwrap();
        // What was written is older than what is in memory.
        bitmaps.clean(&LAYOUT, first);
        let second = bitmaps.dirty();
        assert_eq!(second.len(), 1);
        bitmaps.clean(&LAYOUT, second);
        assert_eq!(bitmaps.dirty(), []);
        assert_eq!(bitmaps.get(&file, &LAYOUT, 2).unwrap(), Bits::Full);
        bitmaps.forget(2);
        assert!(matches!(bitmaps.get(&file, &LAYOUT, 2).unwrap(), Bits::Some(_)));
    }

    #[test]
    fn ignored_bitmaps_are_full() {
        let file = MemoryDevice::new(vec![0; 4096]);
        assert_eq!(Bitmaps::new(true).get(&file, &LAYOUT, 0).unwrap(), Bits::Full);
    }
}
