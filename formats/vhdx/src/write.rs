// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Moving payload into the image.
//!
//! What is stored already is overwritten where it is. Other blocks get a place: it is
//! taken under the lock, filled without it, and mapped under it again. In between, the
//! block is in `busy`, so that a second writer waits instead of losing bytes.

use crate::bat::{Entry, State};
use crate::bytes::{MIB, to_u64, to_usize};
use crate::image::{Table, Vhdx};
use crate::read::Mapping;
use std::sync::{MutexGuard, PoisonError};
use tranship_block::{BlockDevice, Result, Span, Storage, Zeroing};

/// How many allocations ahead the file grows, so that its length changes rarely.
const AHEAD: u64 = 3;

/// What is to be written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Payload<'a> {
    Bytes(&'a [u8]),
    Zeroes(u64),
}

impl Payload<'_> {
    fn len(self) -> u64 {
        match self {
            Self::Bytes(bytes) => to_u64(bytes.len()),
            Self::Zeroes(len) => len,
        }
    }

    fn split(self, at: u64) -> Result<(Self, Self)> {
        Ok(match self {
            Self::Bytes(bytes) => {
                let (now, rest) = bytes.split_at(to_usize(at)?.min(bytes.len()));
                (Self::Bytes(now), Self::Bytes(rest))
            }
            Self::Zeroes(len) => (Self::Zeroes(at.min(len)), Self::Zeroes(len.saturating_sub(at))),
        })
    }

    fn put(self, storage: &dyn Storage, at: u64) -> Result<()> {
        match self {
            Self::Bytes(bytes) => storage.write_at(bytes, at),
            Self::Zeroes(len) => storage.write_zeroes(Span::new(at, len), Zeroing::MayUnmap),
        }
    }

    fn copy_to(self, place: &mut [u8]) {
        match self {
            Self::Bytes(bytes) => {
                place.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
            }
            Self::Zeroes(_) => place.fill(0),
        }
    }
}

/// Where the next bytes go.
enum Target {
    /// Over bytes that are stored already: byte offset in the file.
    InPlace(u64),
    /// Into a block that gets its place, or sectors that the parent had.
    Fill(Fill),
}

#[derive(Clone, Copy)]
struct Fill {
    block: u64,
    /// Where the block is in the file.
    place: u64,
    /// The place was taken for this.
    is_new: bool,
    /// The sectors that are not written stay the parent's.
    by_sectors: bool,
}

impl Vhdx {
    /// Writes what was checked and is protected by `in_use`.
    pub(crate) fn write_payload(&self, mut payload: Payload<'_>, mut offset: u64) -> Result<()> {
        let storage = self.writable(offset)?;
        while payload.len() > 0 {
            let (target, len) = self.target(storage, offset, payload.len())?;
            let (now, rest) = payload.split(len)?;
            match target {
                Target::InPlace(at) => now.put(storage, at)?,
                Target::Fill(fill) => self.fill_and_map(storage, fill, now, offset)?,
            }
            payload = rest;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    /// The lock, once nobody fills `block`.
    pub(crate) fn lock_idle(&self, block: u64) -> MutexGuard<'_, Table> {
        let is_busy = |table: &mut Table| table.busy.contains(&block);
        self.idle.wait_while(self.lock(), is_busy).unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `len` bytes from `offset` are all that the guest sees of a block.
    pub(crate) fn covers_block(&self, offset: u64, len: u64) -> bool {
        let left = self.size().saturating_sub(offset);
        self.geometry.within(offset) == 0 && len >= left.min(self.geometry.block())
    }

    fn target(&self, storage: &dyn Storage, offset: u64, len: u64) -> Result<(Target, u64)> {
        let geometry = self.geometry;
        let block = geometry.index(offset);
        let mut table = self.lock_idle(block);
        let (mapping, run) = self.run(&mut table, offset, len)?;
        if let Mapping::Data(at) = mapping {
            return Ok((Target::InPlace(at), run));
        }
        let len = len.min(geometry.block().saturating_sub(geometry.within(offset)));
        let entry = table.bat.get(geometry.payload_entry(block));
        let (fill, len) = if entry.state() == State::Partial {
            (Fill { block, place: entry.offset(), is_new: false, by_sectors: true }, run.min(len))
        } else {
            let by_sectors = geometry.has_parent
                && entry.state() == State::NotPresent
                && !self.covers_block(offset, len);
            if by_sectors {
                self.need_bitmap(&mut table, storage, block)?;
            }
            let place = table.allocate(storage, geometry.block())?;
            (Fill { block, place, is_new: true, by_sectors }, len)
        };
        table.busy.insert(block);
        Ok((Target::Fill(fill), len))
    }

    /// Gives the chunk of `block` a sector bitmap if it has none.
    fn need_bitmap(&self, table: &mut Table, storage: &dyn Storage, block: u64) -> Result<()> {
        let index = self.geometry.bitmap_entry(self.geometry.chunk(block));
        if table.bat.get(index).state() == State::Full {
            return Ok(());
        }
        let place = Span::new(table.allocate(storage, MIB)?, MIB);
        if let Err(error) = storage.write_zeroes(place, Zeroing::MayUnmap) {
            table.space.release(place);
            return Err(error);
        }
        table.bitmaps.forget(place);
        table.bat.set(index, Entry::new(State::Full, place.start));
        Ok(())
    }

    fn fill_and_map(
        &self,
        storage: &dyn Storage,
        fill: Fill,
        payload: Payload<'_>,
        offset: u64,
    ) -> Result<()> {
        let filled = if fill.by_sectors {
            self.fill_sectors(storage, fill, payload, offset)
        } else {
            self.fill_block(storage, fill, payload, offset)
        };
        let mut table = self.lock();
        let mapped = filled.and_then(|()| {
            if fill.by_sectors {
                return self.map_sectors(&mut table, fill, Span::new(offset, payload.len()));
            }
            let index = self.geometry.payload_entry(fill.block);
            table.bat.set(index, Entry::new(State::Full, fill.place));
            Ok(())
        });
        if mapped.is_err() && fill.is_new {
            table.space.release(Span::new(fill.place, self.geometry.block()));
        }
        table.busy.remove(&fill.block);
        self.idle.notify_all();
        mapped
    }

    /// A whole block: what is not written becomes zero, since nobody knows what was there.
    fn fill_block(
        &self,
        storage: &dyn Storage,
        fill: Fill,
        payload: Payload<'_>,
        offset: u64,
    ) -> Result<()> {
        let within = self.geometry.within(offset);
        let before = Span::new(fill.place, within);
        let after = within.saturating_add(payload.len());
        let after = Span::new(
            fill.place.saturating_add(after),
            self.geometry.block().saturating_sub(after),
        );
        for span in [before, after] {
            if !span.is_empty() {
                storage.write_zeroes(span, self.zeroing(Zeroing::MayUnmap))?;
            }
        }
        payload.put(storage, before.end())
    }

    /// Whole sectors; the rest of the first and the last one comes from the parent.
    fn fill_sectors(
        &self,
        storage: &dyn Storage,
        fill: Fill,
        mut payload: Payload<'_>,
        mut offset: u64,
    ) -> Result<()> {
        let sector = self.geometry.sector();
        let mask = sector.wrapping_sub(1);
        while payload.len() > 0 {
            let place = fill.place.saturating_add(self.geometry.within(offset));
            let into = offset & mask;
            let whole = payload.len() & !mask;
            let len = if into == 0 && whole > 0 {
                let (now, _) = payload.split(whole)?;
                now.put(storage, place)?;
                whole
            } else {
                let len = sector.saturating_sub(into).min(payload.len());
                let mut bytes = vec![0; to_usize(sector)?];
                self.read_parent(&mut bytes, offset.saturating_sub(into))?;
                let range = to_usize(into)?..to_usize(into.saturating_add(len))?;
                let (now, _) = payload.split(len)?;
                now.copy_to(bytes.get_mut(range).unwrap_or_default());
                storage.write_at(&bytes, place.saturating_sub(into))?;
                len
            };
            payload = payload.split(len)?.1;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    /// Sets the bits of the sectors that `span` touches; a block that has all of its
    /// sectors needs no bits any more.
    fn map_sectors(&self, table: &mut Table, fill: Fill, span: Span) -> Result<()> {
        let geometry = self.geometry;
        let first = geometry.sectors_in(geometry.within(span.start));
        let last = geometry.sectors_in(geometry.within(span.end().saturating_sub(1)));
        let count = last.saturating_sub(first).saturating_add(1);
        if fill.is_new {
            let all = self.bits(table, fill.block, 0, geometry.sectors());
            table.bitmaps.set(&self.file, all, false)?;
        }
        let bits = self.bits(table, fill.block, first, count);
        table.bitmaps.set(&self.file, bits, true)?;
        let left = self.size().saturating_sub(geometry.offset(fill.block));
        let visible = geometry.sectors_in(left.min(geometry.block()));
        let all = self.bits(table, fill.block, 0, visible);
        let is_whole = table.bitmaps.run(&self.file, all)? == (true, visible);
        let state = if is_whole { State::Full } else { State::Partial };
        table.bat.set(geometry.payload_entry(fill.block), Entry::new(state, fill.place));
        Ok(())
    }

    /// How to make a part of the file zero: fixed disks keep their storage.
    pub(crate) fn zeroing(&self, mode: Zeroing) -> Zeroing {
        if self.is_fixed() { Zeroing::KeepAllocated } else { mode }
    }
}

impl Table {
    /// Takes `len` bytes of the file, which are there afterwards.
    pub(crate) fn allocate(&mut self, storage: &dyn Storage, len: u64) -> Result<u64> {
        let place = Span::new(self.space.allocate(len), len);
        if storage.size() < place.end() {
            let ahead = place.end().saturating_add(len.saturating_mul(AHEAD));
            if storage.set_len(ahead).or_else(|_| storage.set_len(place.end())).is_err() {
                // Asked again for what is needed, so that the error tells the need.
                storage.set_len(place.end()).inspect_err(|_| self.space.release(place))?;
            }
        }
        Ok(place.start)
    }
}
