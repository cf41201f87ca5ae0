// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changing a disk of blocks: new blocks, bits of sectors, zeroes.

use crate::bitmaps::Bits;
use crate::footer::{FOOTER, Footer};
use crate::geometry::SECTOR;
use crate::space::Space;
use crate::sparse::{Sparse, length};
use crate::table::{ABSENT, Layout};
use std::sync::atomic::Ordering;
use tranship_block::{Result, Span, Storage, Zeroing};

/// Storage is given back in pieces of this size, the usual block of a file system.
const PAGE: u64 = 4096;

/// What the operations on a disk need besides the disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    pub(crate) storage: &'a dyn Storage,
    pub(crate) footer: &'a Footer,
    /// Bytes of the disk.
    pub(crate) size: u64,
}

impl Sparse {
    /// Stores `buf` from byte `offset` of the disk on.
    pub(crate) fn write(&self, to: Target<'_>, mut buf: &[u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let (index, within) = self.layout.split(offset);
            let left = self.layout.block.saturating_sub(within);
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            let (now, rest) = buf.split_at(len);
            self.write_in_block(to, index, within, now)?;
            offset = offset.saturating_add(length(now));
            buf = rest;
        }
        Ok(())
    }

    fn write_in_block(&self, to: Target<'_>, index: usize, within: u64, buf: &[u8]) -> Result<()> {
        let is_whole = within == 0 && length(buf) >= self.layout.used(index, to.size);
        let entry = self.allocated(to, index, is_whole)?;
        match self.bitmaps.get(&self.file, &self.layout, entry)? {
            Bits::Full => {
                to.storage.write_at(buf, self.layout.data_at(entry).saturating_add(within))?;
                if self.bitmaps.is_ignored() {
                    // Readers that honour the bitmap are to find what was written.
                    let all = 0..self.layout.block / SECTOR;
                    self.bitmaps.edit().set(&self.file, &self.layout, entry, all)?;
                }
                Ok(())
            }
            Bits::Some(_) => self.write_sectors(to, index, entry, within, buf),
        }
    }

    /// Writes into a block some of whose sectors may be missing. Bits are set after the
    /// data is written, and reach the file after it.
    fn write_sectors(
        &self,
        to: Target<'_>,
        index: usize,
        entry: u32,
        within: u64,
        buf: &[u8],
    ) -> Result<()> {
        let data = self.layout.data_at(entry);
        let end = within.saturating_add(length(buf));
        let piece = |from: u64, to: u64| {
            let start = usize::try_from(from.saturating_sub(within)).unwrap_or(usize::MAX);
            let len = usize::try_from(to.saturating_sub(from)).unwrap_or(usize::MAX);
            buf.get(start..).and_then(|tail| tail.get(..len)).unwrap_or_default()
        };
        let first = within.next_multiple_of(SECTOR).min(end);
        let last = (end / SECTOR).saturating_mul(SECTOR).max(first);
        if first < last {
            to.storage.write_at(piece(first, last), data.saturating_add(first))?;
            let sectors = first / SECTOR..last / SECTOR;
            self.bitmaps.edit().set(&self.file, &self.layout, entry, sectors)?;
        }
        for (from, until) in [(within, first), (last, end)] {
            if from < until {
                self.write_part(to, index, entry, from, piece(from, until))?;
            }
        }
        Ok(())
    }

    /// Writes a part of one sector; the rest comes from below if the sector is missing.
    fn write_part(
        &self,
        to: Target<'_>,
        index: usize,
        entry: u32,
        within: u64,
        buf: &[u8],
    ) -> Result<()> {
        let data = self.layout.data_at(entry);
        let number = within / SECTOR;
        let sector_at = number.saturating_mul(SECTOR);
        let edit = self.bitmaps.edit();
        let is_here = match self.bitmaps.get(&self.file, &self.layout, entry)? {
            Bits::Full => true,
            Bits::Some(bits) => crate::bitmaps::run(&bits, number, number.saturating_add(1)).0,
        };
        if is_here {
            return to.storage.write_at(buf, data.saturating_add(within));
        }
        let mut sector = [0; FOOTER];
        self.read_below(&mut sector, self.layout.first(index).saturating_add(sector_at))?;
        let start = usize::try_from(within.saturating_sub(sector_at)).unwrap_or(usize::MAX);
        let target = sector.get_mut(start..).and_then(|tail| tail.get_mut(..buf.len()));
        if let Some(target) = target {
            target.copy_from_slice(buf);
        }
        to.storage.write_at(&sector, data.saturating_add(sector_at))?;
        edit.set(&self.file, &self.layout, entry, number..number.saturating_add(1))
    }

    /// The entry of block `index`, which gets a place if it has none. With `is_whole` the
    /// caller is going to write all of it.
    fn allocated(&self, to: Target<'_>, index: usize, is_whole: bool) -> Result<u32> {
        let entry = self.table().get(index);
        if entry != ABSENT {
            return Ok(entry);
        }
        let mut space = self.space();
        let entry = self.table().get(index);
        if entry != ABSENT {
            return Ok(entry);
        }
        let entry = self.prepare(to, &mut space, is_whole)?;
        self.bitmaps.created(&self.layout, entry, !self.is_differencing);
        self.table_mut().set(index, entry);
        Ok(entry)
    }

    /// Reserves a place for a block and writes what the block is before anything is stored
    /// in it. With `is_whole` all of its data is going to be written.
    fn prepare(&self, to: Target<'_>, space: &mut Space, is_whole: bool) -> Result<u32> {
        let (entry, is_new) = self.reserve(to, space)?;
        let layout = &self.layout;
        let data = Span::new(layout.data_at(entry), layout.block);
        let fill = if self.is_differencing { 0 } else { 0xff };
        let bitmap = vec![fill; usize::try_from(layout.bitmap).unwrap_or(0)];
        // In a differencing disk the bits say that nothing is here.
        let made = if self.is_differencing || is_new && is_whole {
            Ok(())
        } else {
            to.storage.write_zeroes(data, Zeroing::MayUnmap)
        };
        match made.and_then(|()| to.storage.write_at(&bitmap, Layout::bitmap_at(entry))) {
            Ok(()) => Ok(entry),
            Err(error) => {
                space.give_back(Layout::bitmap_at(entry), layout);
                Err(error)
            }
        }
    }

    /// A place for a block that is copied from another one.
    pub(crate) fn new_place(&self, to: Target<'_>) -> Result<u32> {
        Ok(self.reserve(to, &mut self.space())?.0)
    }

    /// Takes a place out of what is free, within the file. The second answer is whether it
    /// reads as zero because the file has grown for it.
    fn reserve(&self, to: Target<'_>, space: &mut Space) -> Result<(u32, bool)> {
        let slot = space.take(&self.layout);
        let entry = slot.entry()?;
        let end = slot.start.saturating_add(self.layout.slot());
        if space.footer_at.is_none_or(|footer| end > footer) {
            // If the footer is lost, the place may be in the middle of the file.
            self.move_footer(to, space, end.max(space.end))?;
        }
        space.end = space.end.max(end);
        Ok((entry, slot.is_new))
    }

    /// Makes the file end with a footer at `end`. The old one is overwritten by what comes
    /// in front of `end`, so the new one is written first.
    pub(crate) fn move_footer(&self, to: Target<'_>, space: &mut Space, end: u64) -> Result<()> {
        to.storage.set_len(end.saturating_add(SECTOR))?;
        // If this fails, the footer is not where it has to be any more.
        self.is_stale.store(true, Ordering::Release);
        space.footer_at = None;
        to.storage.write_at(&to.footer.to_bytes(), end)?;
        self.is_stale.store(false, Ordering::Release);
        space.footer_at = Some(end);
        Ok(())
    }

    /// Gives up the place of block `index`: it reads as what is below.
    fn drop_block(&self, index: usize) {
        let mut space = self.space();
        let mut table = self.table_mut();
        let entry = table.get(index);
        if entry != ABSENT {
            table.set(index, ABSENT);
            space.freed.push(entry);
        }
    }

    /// Makes `span` of the disk read as zero.
    pub(crate) fn zero(&self, to: Target<'_>, span: Span, mode: Zeroing) -> Result<()> {
        let mut known = Span::new(0, 0);
        self.each_block(span, |index, within, len| {
            let piece = Span::new(self.layout.first(index).saturating_add(within), len);
            let is_zero_below = self.is_zero_below(piece, &mut known)?;
            let entry = self.table().get(index);
            let is_whole = within == 0 && len >= self.layout.used(index, to.size);
            if is_zero_below && entry == ABSENT {
                return Ok(());
            }
            if is_zero_below && is_whole && mode == Zeroing::MayUnmap {
                self.drop_block(index);
                return Ok(());
            }
            self.zero_in_block(to, index, within, len, mode)
        })
    }

    fn zero_in_block(
        &self,
        to: Target<'_>,
        index: usize,
        within: u64,
        len: u64,
        mode: Zeroing,
    ) -> Result<()> {
        let zeroes = [0; FOOTER];
        let edge = |from: u64, until: u64| {
            let len = usize::try_from(until.saturating_sub(from)).unwrap_or(FOOTER);
            self.write_in_block(to, index, from, zeroes.get(..len).unwrap_or(&zeroes))
        };
        let end = within.saturating_add(len);
        let first = within.next_multiple_of(SECTOR).min(end);
        let last = (end / SECTOR).saturating_mul(SECTOR).max(first);
        if within < first {
            edge(within, first)?;
        }
        if first < last {
            let entry = self.allocated(to, index, false)?;
            let at = self.layout.data_at(entry).saturating_add(first);
            to.storage.write_zeroes(Span::new(at, last.saturating_sub(first)), mode)?;
            let sectors = first / SECTOR..last / SECTOR;
            self.bitmaps.edit().set(&self.file, &self.layout, entry, sectors)?;
        }
        if last < end {
            edge(last, end)?;
        }
        Ok(())
    }

    /// Gives storage back where `span` has some.
    pub(crate) fn discard(&self, to: Target<'_>, span: Span) -> Result<()> {
        let mut known = Span::new(0, 0);
        self.each_block(span, |index, within, len| {
            let entry = self.table().get(index);
            if entry == ABSENT {
                return Ok(());
            }
            let piece = Span::new(self.layout.first(index).saturating_add(within), len);
            let is_whole = within == 0 && len >= self.layout.used(index, to.size);
            if is_whole && self.is_zero_below(piece, &mut known)? {
                self.drop_block(index);
                return Ok(());
            }
            let at = self.layout.data_at(entry).saturating_add(within);
            let first = at.next_multiple_of(PAGE);
            let last = (at.saturating_add(len) / PAGE).saturating_mul(PAGE);
            if first < last {
                to.storage.discard(Span::new(first, last.saturating_sub(first)))?;
            }
            Ok(())
        })
    }

    /// Calls `work` with the number of each block that `span` touches, the first byte in
    /// it and the number of bytes. Absent blocks over zeroes are passed over.
    fn each_block(
        &self,
        span: Span,
        mut work: impl FnMut(usize, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut at = span.start;
        while at < span.end() {
            let (index, within) = self.layout.split(at);
            let left = span.end().saturating_sub(at);
            if self.table().get(index) == ABSENT {
                let below = self.extent_below(at, left)?;
                if below.kind.reads_zero() {
                    at = at.saturating_add(self.locate(at, below.len)?.1);
                    continue;
                }
            }
            let len = self.layout.block.saturating_sub(within).min(left);
            work(index, within, len)?;
            at = at.saturating_add(len);
        }
        Ok(())
    }
}
