// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sector bitmaps of differencing disks (MS-VHDX 2.4): which sectors of a block are here
//! and which the parent's. The first sector is the lowest bit of the first byte.

use crate::bytes::{SECTOR, SECTOR_BYTES};
use crate::log::Sector;
use std::collections::{BTreeMap, BTreeSet};
use tranship_block::{BlockDevice, Result, Span};

/// Bits in a sector of the bitmap.
const PER_PAGE: u64 = SECTOR_BYTES * 8;
/// Pages that are kept though they have not changed: bits for 64 GiB.
const MOST_PAGES: usize = 4096;

/// A run of bits of the bitmap that lies at byte `bitmap` of the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bits {
    pub(crate) bitmap: u64,
    pub(crate) first: u64,
    pub(crate) count: u64,
}

/// Pages of sector bitmaps in memory.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps {
    /// By their offset in the file.
    pages: BTreeMap<u64, Box<[u8; SECTOR]>>,
    changed: BTreeSet<u64>,
}

impl Bitmaps {
    fn page(&mut self, file: &dyn BlockDevice, at: u64) -> Result<&mut [u8; SECTOR]> {
        if self.pages.len() >= MOST_PAGES && !self.pages.contains_key(&at) {
            let changed = &self.changed;
            self.pages.retain(|at, _| changed.contains(at));
        }
        Ok(match self.pages.entry(at) {
            std::collections::btree_map::Entry::Occupied(page) => page.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                let mut bytes = Box::new([0; SECTOR]);
                file.read_at(bytes.as_mut_slice(), at)?;
                place.insert(bytes)
            }
        })
    }

    /// Value of the first of `bits`, and how many of them from there on have it.
    pub(crate) fn run(&mut self, file: &dyn BlockDevice, bits: Bits) -> Result<(bool, u64)> {
        let mut value = None;
        let mut done = 0;
        while done < bits.count {
            let bit = bits.first.saturating_add(done);
            let here = PER_PAGE.saturating_sub(bit % PER_PAGE).min(bits.count.saturating_sub(done));
            let page = self.page(file, page_of(bits.bitmap, bit))?;
            let (found, run) = run_in(page, bit % PER_PAGE, here);
            if *value.get_or_insert(found) != found {
                break;
            }
            done = done.saturating_add(run);
            if run < here {
                break;
            }
        }
        Ok((value.unwrap_or(false), done))
    }

    /// Gives all of `bits` this value.
    pub(crate) fn set(&mut self, file: &dyn BlockDevice, bits: Bits, value: bool) -> Result<()> {
        let mut done = 0;
        while done < bits.count {
            let bit = bits.first.saturating_add(done);
            let here = PER_PAGE.saturating_sub(bit % PER_PAGE).min(bits.count.saturating_sub(done));
            let at = page_of(bits.bitmap, bit);
            let page = self.page(file, at)?;
            let mut is_changed = false;
            for bit in (bit % PER_PAGE)..(bit % PER_PAGE).saturating_add(here) {
                let mask = 1_u8.wrapping_shl(u32::try_from(bit % 8).unwrap_or(0));
                let byte = usize::try_from(bit / 8).ok().and_then(|byte| page.get_mut(byte));
                if let Some(byte) = byte.filter(|byte| (**byte & mask != 0) != value) {
                    *byte ^= mask;
                    is_changed = true;
                }
            }
            if is_changed {
                self.changed.insert(at);
            }
            done = done.saturating_add(here);
        }
        Ok(())
    }

    /// The pages that have changed.
    pub(crate) fn take_changed(&mut self) -> Vec<Sector> {
        let changed = std::mem::take(&mut self.changed);
        let sector = |at: u64| Some(Sector { at, bytes: self.pages.get(&at)?.clone() });
        changed.into_iter().filter_map(sector).collect()
    }

    /// Drops what is known about a part of the file.
    pub(crate) fn forget(&mut self, span: Span) {
        self.pages.retain(|at, _| !(span.start..span.end()).contains(at));
        self.changed.retain(|at| !(span.start..span.end()).contains(at));
    }
}

fn page_of(bitmap: u64, bit: u64) -> u64 {
    bitmap.saturating_add((bit / PER_PAGE).saturating_mul(SECTOR_BYTES))
}

/// Value of bit `first`, and how many of the `count` bits from there on have it.
fn run_in(page: &[u8; SECTOR], first: u64, count: u64) -> (bool, u64) {
    let bit = |number: u64| {
        let byte = usize::try_from(number / 8).ok().and_then(|byte| page.get(byte));
        let mask = 1_u8.wrapping_shl(u32::try_from(number % 8).unwrap_or(0));
        byte.is_some_and(|byte| byte & mask != 0)
    };
    let value = bit(first);
    let all = if value { 0xff } else { 0 };
    let end = first.saturating_add(count);
    let mut next = first;
    while next < end {
        let byte = usize::try_from(next / 8).ok().and_then(|byte| page.get(byte));
        if next.is_multiple_of(8) && byte == Some(&all) {
            next = next.saturating_add(8);
        } else if bit(next) == value {
            next = next.saturating_add(1);
        } else {
            break;
        }
    }
    (value, next.min(end).saturating_sub(first))
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    #[test]
    fn the_first_sector_is_the_lowest_bit() {
        let device = MemoryDevice::new(vec![0; 3 << 20]);
        device.write_at(&[0b0000_0110, 0xff], 1 << 20).unwrap();
        let mut bitmaps = Bitmaps::default();
        let bits = |first, count| Bits { bitmap: 1 << 20, first, count };
        for (first, count, expected) in [
            (0, 100, (false, 1)),
            (1, 100, (true, 2)),
            (1, 1, (true, 1)),
            (3, 100, (false, 5)),
            (8, 100, (true, 8)),
            (16, 1 << 22, (false, 1 << 22)),
        ] {
            assert_eq!(bitmaps.run(&device, bits(first, count)).unwrap(), expected, "{first}");
        }
        bitmaps.set(&device, bits(16, 32_760), true).unwrap();
        assert_eq!(bitmaps.run(&device, bits(8, 1 << 20)).unwrap(), (true, 32_768));
        bitmaps.set(&device, bits(10, 1), false).unwrap();
        bitmaps.set(&device, bits(100_000, 5), false).unwrap();
        let changed = bitmaps.take_changed();
        assert_eq!(
            changed.iter().map(|sector| sector.at).collect::<Vec<_>>(),
            [1 << 20, (1 << 20) + 4096]
        );
        assert_eq!(changed[0].bytes[..3], [0b0000_0110, 0b1111_1011, 0xff]);
        assert_eq!(changed[1].bytes[..2], [0xff, 0]);
        assert!(bitmaps.take_changed().is_empty());
    }
}
