// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the guest's bytes are, and moving them out of the image.

use crate::bat::State;
use crate::bitmap::Bits;
use crate::bytes::{to_u64, to_usize};
use crate::image::{Table, Vhdx};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Result, Span};

/// Blocks that are looked at for one answer, so that asking about every part of a large
/// disk takes time that grows with its size and not faster. Empty pages are not counted.
const LONGEST_LOOK: u32 = 1 << 16;

/// Where some of the guest's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// The parent decides; zeroes without one.
    Absent,
    /// Zeroes, whatever the parent has.
    Zero,
    /// At this byte of the file.
    Data(u64),
}

impl Vhdx {
    /// Where the byte at `offset` is, and for how many of `len` bytes that goes on.
    pub(crate) fn run(&self, table: &mut Table, offset: u64, len: u64) -> Result<(Mapping, u64)> {
        let geometry = self.geometry;
        let first = geometry.index(offset);
        let within = geometry.within(offset);
        let entry = table.bat.get(geometry.payload_entry(first));
        let kind = |state| match state {
            State::NotPresent => Mapping::Absent,
            State::Full => Mapping::Data(0),
            _ => Mapping::Zero,
        };
        if entry.state() == State::Partial {
            let len = len.min(geometry.block().saturating_sub(within));
            return self.run_of_sectors(table, (first, within, entry.offset()), len);
        }
        let end = geometry.blocks(offset.saturating_add(len));
        let mut next = first.saturating_add(1);
        let mut looked_at = 0_u32;
        while next < end && looked_at < LONGEST_LOOK {
            let index = geometry.payload_entry(next);
            if kind(entry.state()) == Mapping::Absent {
                // Whole pages of absent blocks at once.
                let skipped = geometry.block_from(table.bat.skip_empty(index));
                if skipped > next {
                    next = skipped;
                    continue;
                }
            }
            let other = table.bat.get(index);
            looked_at = looked_at.saturating_add(1);
            let follows = geometry.offset(next.saturating_sub(first));
            let continues = match (entry.state(), other.state()) {
                (State::Full, State::Full) => {
                    other.offset() == entry.offset().saturating_add(follows)
                }
                (_, State::Full | State::Partial) | (State::Full, _) => false,
                (one, two) => kind(one) == kind(two),
            };
            if !continues {
                break;
            }
            next = next.saturating_add(1);
        }
        let len =
            geometry.offset(next.min(end).saturating_sub(first)).saturating_sub(within).min(len);
        Ok(match kind(entry.state()) {
            Mapping::Data(_) => (Mapping::Data(entry.offset().saturating_add(within)), len),
            other => (other, len),
        })
    }

    /// The same in a block that is partially present: number, offset in it, place.
    fn run_of_sectors(
        &self,
        table: &mut Table,
        (block, within, place): (u64, u64, u64),
        len: u64,
    ) -> Result<(Mapping, u64)> {
        let geometry = self.geometry;
        let first = geometry.sectors_in(within);
        let last = geometry.sectors_in(within.saturating_add(len.max(1)).saturating_sub(1));
        let count = last.saturating_sub(first).saturating_add(1);
        let bits = self.bits(table, block, first, count);
        let (is_here, run) = table.bitmaps.run(&self.file, bits)?;
        let end = first.saturating_add(run).saturating_mul(geometry.sector());
        let len = end.saturating_sub(within).min(len);
        let mapping =
            if is_here { Mapping::Data(place.saturating_add(within)) } else { Mapping::Absent };
        Ok((mapping, len))
    }

    /// The bits of `count` sectors of `block`, whose sector bitmap exists.
    pub(crate) fn bits(&self, table: &Table, block: u64, sector: u64, count: u64) -> Bits {
        let geometry = self.geometry;
        let bitmap = table.bat.get(geometry.bitmap_entry(geometry.chunk(block))).offset();
        Bits { bitmap, first: geometry.first_bit(block).saturating_add(sector), count }
    }

    /// Fills `buf`, whose range was checked and which the caller protects by `in_use`.
    pub(crate) fn read_payload(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let (mapping, len) = self.run(&mut self.lock(), offset, to_u64(buf.len()))?;
            let (now, rest) = buf
                .split_at_mut_checked(to_usize(len)?)
                .filter(|(now, _)| !now.is_empty())
                .ok_or_else(|| Error::corrupt("BAT maps no bytes").at(offset))?;
            match mapping {
                Mapping::Absent => self.read_parent(now, offset)?,
                Mapping::Zero => now.fill(0),
                Mapping::Data(at) => self.file.read_at(now, at)?,
            }
            buf = rest;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    /// What the parent has; zeroes where it is shorter than this disk.
    pub(crate) fn read_parent(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some((parent, left)) = self.parent_from(offset) else {
            buf.fill(0);
            return Ok(());
        };
        let there = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let (now, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        parent.read_at(now, offset)
    }

    /// Bytes that the parent has from `offset` on.
    fn parent_from(&self, offset: u64) -> Option<(&Arc<dyn BlockDevice>, u64)> {
        let parent = self.parent.as_ref()?;
        let left = parent.size().saturating_sub(offset);
        (left > 0).then_some((parent, left))
    }

    pub(crate) fn extent(&self, offset: u64) -> Result<Extent> {
        let left = self.size().saturating_sub(offset);
        let (mapping, len) = self.run(&mut self.lock(), offset, left)?;
        Ok(match mapping {
            Mapping::Absent => match self.parent_from(offset) {
                Some((parent, there)) => {
                    let below = parent.extent_at(offset)?.limited_to(len.min(there));
                    Extent { depth: below.depth.saturating_add(1), ..below }
                }
                None => Extent::new(ExtentKind::Hole, len),
            },
            Mapping::Zero => Extent::new(ExtentKind::Zero, len),
            Mapping::Data(at) => {
                let extent = Extent::new(ExtentKind::Data, len);
                if self.is_in_file(Span::new(at, len)) { extent.mapped_to(at) } else { extent }
            }
        })
    }
}
