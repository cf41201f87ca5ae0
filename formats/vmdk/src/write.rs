// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Moving payload into a sparse extent.
//!
//! Grains that are stored are overwritten where they are. All others get a place at the
//! end of the file, are filled as a whole and mapped afterwards; in between they are held,
//! so that a second writer to one of them waits. No lock is held while bytes move.

use crate::SECTOR;
use crate::disk::Below;
use crate::layout::Place;
use crate::sparse::{SparseExtent, Walk, length};
use crate::writer::{MOST_CHANGED, Writer};
use std::io::IoSlice;
use tranship_block::{BlockDevice, Error, Result, Span, Zeroing};

/// Bytes that are mapped at a time.
const LARGEST_RUN: u64 = 16 << 20;
/// Zeroes that are written at a time.
const ZEROES: u64 = 1 << 20;

impl SparseExtent {
    fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(|| Error::usage("device is read-only"))
    }

    /// Stores `buf` from byte `offset` of the extent.
    pub(crate) fn write(&self, mut buf: &[u8], mut offset: u64, below: &Below<'_>) -> Result<()> {
        let writer = self.writer()?;
        let grain = self.layout.grain;
        while !buf.is_empty() {
            let index = offset / grain;
            let mut walk = Walk::new(self);
            let done = match walk.place(index)? {
                Place::Stored(at) => {
                    let start = at.saturating_add(offset % grain);
                    let len = walk.stored_run(offset, start, length(buf))?;
                    writer.check(Span::new(start, len))?;
                    writer.storage.write_at(head(buf, len), start)?;
                    len
                }
                Place::Absent | Place::Zero => self.map(writer, buf, offset, below)?,
            };
            offset = offset.saturating_add(done);
            buf = buf.get(usize::try_from(done).unwrap_or(usize::MAX)..).unwrap_or_default();
        }
        self.make_room(writer)
    }

    /// Writes changed tables before they become many.
    fn make_room(&self, writer: &Writer) -> Result<()> {
        let changed = u64::try_from(self.tables.lock().changed_len()).unwrap_or(u64::MAX);
        if changed.saturating_mul(self.layout.table_entries.get()) < MOST_CHANGED {
            return Ok(());
        }
        writer.flush(&self.layout, &self.tables)
    }

    /// Maps grains from that of byte `offset` on and fills them with `buf`; returns how
    /// many bytes of it are stored, 0 if somebody else was faster.
    fn map(&self, writer: &Writer, buf: &[u8], offset: u64, below: &Below<'_>) -> Result<u64> {
        let grain = self.layout.grain;
        let first = offset / grain;
        let len = length(buf).min(LARGEST_RUN.max(grain.get()));
        let end = offset.saturating_add(len).div_ceil(grain.get());
        let _held = writer.busy.hold(first, end);
        let blank = self.blank(writer, first, end)?;
        let Some(last) = blank.last().copied() else { return Ok(0) };
        let start = first.saturating_mul(grain.get());
        let count = u64::try_from(blank.len()).unwrap_or(u64::MAX);
        let stop = first.saturating_add(count).saturating_mul(grain.get());
        let retired = writer.retired(first);
        // Of the last grain the file may hold no more than belongs to the disk.
        let stop = if retired.is_some() { stop.min(self.layout.capacity) } else { stop };
        let end = offset.saturating_add(len).min(stop);
        let len = end.saturating_sub(offset);
        let first_place = blank.first().copied().unwrap_or(Place::Zero);
        let before = Span::new(start, offset.saturating_sub(start));
        let after = Span::new(end, stop.saturating_sub(end));
        let at = match retired {
            Some(at) => at,
            None => writer.allocate(&self.layout, stop.saturating_sub(start))?,
        };
        let now = head(buf, len);
        if grain.get() <= LARGEST_RUN {
            let before = self.old(first_place, before, below)?;
            let after = self.old(last, after, below)?;
            let all = [IoSlice::new(&before), IoSlice::new(now), IoSlice::new(&after)];
            writer.storage.write_vectored_at(&all, at)?;
        } else {
            let place = |byte: u64| at.saturating_add(byte.saturating_sub(start));
            self.store_old(writer, first_place, before, at, below)?;
            writer.storage.write_at(now, place(offset))?;
            self.store_old(writer, last, after, place(end), below)?;
        }
        let per_grain = grain.get() / SECTOR;
        self.set(writer, first, count, |number| {
            (at / SECTOR).saturating_add(number.saturating_mul(per_grain))
        })?;
        writer.revive(first);
        Ok(len)
    }

    /// The byte behind the place of the last grain, if it is stored: the file may end before
    /// it where the disk does.
    pub(crate) fn end_of_last_grain(&self) -> u64 {
        let capacity = self.layout.capacity;
        if capacity % self.layout.grain == 0 {
            return 0;
        }
        match self.place(capacity.saturating_sub(1)) {
            Ok(Place::Stored(at)) => at.saturating_add(self.layout.grain.get()),
            // A table that cannot be read is the business of whoever asks for a grain of it.
            _ => 0,
        }
    }

    /// The grains from `first` up to `end` that are not stored, as far as they can get a
    /// common place.
    fn blank(&self, writer: &Writer, first: u64, end: u64) -> Result<Vec<Place>> {
        let mut walk = Walk::new(self);
        let mut places = Vec::new();
        for index in first..end {
            let place = walk.place(index)?;
            let returns = writer.retired(index).is_some();
            if matches!(place, Place::Stored(_)) || (returns && index > first) {
                break;
            }
            places.push(place);
            if returns {
                break;
            }
        }
        Ok(places)
    }

    /// What the guest has in `span` of a grain that is not stored, with zeroes past the end.
    fn old(&self, place: Place, span: Span, below: &Below<'_>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(span.len).unwrap_or(0)];
        let there = self.layout.capacity.saturating_sub(span.start).min(span.len);
        if place == Place::Absent && there > 0 {
            let part = bytes.get_mut(..usize::try_from(there).unwrap_or(0)).unwrap_or_default();
            below.read(part, span.start)?;
        }
        Ok(bytes)
    }

    /// Stores what the guest has in `span` of a grain that is not stored at byte `at`, piece
    /// by piece: grains may have 1 GiB.
    fn store_old(
        &self,
        writer: &Writer,
        place: Place,
        span: Span,
        at: u64,
        below: &Below<'_>,
    ) -> Result<()> {
        let mut done = 0_u64;
        while done < span.len {
            let (from, to) = (span.start.saturating_add(done), at.saturating_add(done));
            let left = span.len.saturating_sub(done);
            let zero = if place == Place::Zero { left } else { below.zeroes(from, left)? };
            if zero > 0 {
                writer.storage.write_zeroes(Span::new(to, zero), Zeroing::MayUnmap)?;
                done = done.saturating_add(zero);
                continue;
            }
            let len = left.min(LARGEST_RUN);
            writer.storage.write_at(&self.old(place, Span::new(from, len), below)?, to)?;
            done = done.saturating_add(len);
        }
        Ok(())
    }

    /// Changes the entries of `count` grains from `first` on.
    fn set(
        &self,
        writer: &Writer,
        first: u64,
        count: u64,
        entry: impl Fn(u64) -> u64,
    ) -> Result<()> {
        let per_table = self.layout.table_entries;
        let mut number = 0;
        while number < count {
            let grain = first.saturating_add(number);
            let within = grain % per_table;
            let in_table = per_table.get().saturating_sub(within).min(count.saturating_sub(number));
            let index = usize::try_from(grain / per_table).unwrap_or(usize::MAX);
            writer.need_table(&self.layout, &self.tables, index)?;
            let base = number;
            let values = (0..in_table).map(|step| entry(base.saturating_add(step)));
            self.tables.put(&self.file, &self.layout, index, within, values)?;
            number = number.saturating_add(in_table);
        }
        Ok(())
    }

    /// Makes `span` of the extent zero: by table entries where it may and can, by holes
    /// and zeroes in the file elsewhere.
    pub(crate) fn zero(&self, span: Span, mode: Zeroing, below: &Below<'_>) -> Result<()> {
        let writer = self.writer()?;
        let mut offset = span.start;
        while offset < span.end() {
            let left = span.end().saturating_sub(offset);
            // The disk below may answer in small pieces, each of which asks again.
            let most = if below.is_nothing() { left } else { left.min(LARGEST_RUN) };
            let (place, len) = self.extent(offset, most)?;
            let len = len.min(left);
            let done = match place {
                Place::Zero => len,
                Place::Absent => match below.zeroes(offset, len)? {
                    0 => self.hide(writer, Span::new(offset, len), below)?,
                    zero => zero,
                },
                Place::Stored(at) => {
                    let whole = self.whole(Span::new(offset, len));
                    if mode == Zeroing::MayUnmap && self.layout.can_zero() && whole.is_some() {
                        self.declare_zero(writer, whole.unwrap_or((0, 0)), offset)?
                    } else {
                        let len = self.to_grain_end_or_all(offset, len, whole.is_some(), mode);
                        writer.check(Span::new(at, len))?;
                        writer.storage.write_zeroes(Span::new(at, len), mode)?;
                        len
                    }
                }
            };
            offset = offset.saturating_add(done);
            self.make_room(writer)?;
        }
        Ok(())
    }

    /// Up to where stored bytes are zeroed in the file: to the end of a grain that is not
    /// covered as a whole if the grains behind it can be declared zero.
    fn to_grain_end_or_all(&self, offset: u64, len: u64, whole: bool, mode: Zeroing) -> u64 {
        if whole || mode == Zeroing::KeepAllocated || !self.layout.can_zero() {
            return len;
        }
        let grain = self.layout.grain;
        len.min(grain.get().saturating_sub(offset % grain))
    }

    /// Forgets the whole grains in `span` of the extent.
    pub(crate) fn discard(&self, span: Span, below: &Below<'_>) -> Result<()> {
        let grain = self.layout.grain.get();
        let first = span.start.div_ceil(grain).saturating_mul(grain);
        let end = if span.end() >= self.layout.capacity {
            self.layout.capacity
        } else {
            (span.end() / self.layout.grain).saturating_mul(grain)
        };
        if first >= end {
            return Ok(());
        }
        let writer = self.writer()?;
        let mut offset = first;
        while offset < end {
            let left = end.saturating_sub(offset);
            let (place, len) = self.extent(offset, left)?;
            let len = len.min(left);
            if matches!(place, Place::Stored(_)) {
                self.zero(Span::new(offset, len), Zeroing::MayUnmap, below)?;
            }
            offset = offset.saturating_add(len);
        }
        self.make_room(writer)
    }

    /// First and end of the grains that `span` covers from its start on.
    fn whole(&self, span: Span) -> Option<(u64, u64)> {
        let grain = self.layout.grain;
        let end = if span.end() >= self.layout.capacity {
            self.layout.grains()
        } else {
            span.end() / grain
        };
        let first = span.start / grain;
        (span.start % grain == 0 && first < end).then_some((first, end))
    }

    /// Makes a part that would show the disk below read as zero.
    fn hide(&self, writer: &Writer, span: Span, below: &Below<'_>) -> Result<u64> {
        if self.layout.can_zero()
            && let Some(whole) = self.whole(span)
        {
            return self.declare_zero(writer, whole, span.start);
        }
        let grain = self.layout.grain;
        let most = if self.layout.can_zero() {
            grain.get().saturating_sub(span.start % grain).min(LARGEST_RUN)
        } else {
            ZEROES
        };
        let len = span.len.min(most);
        self.write(&vec![0; usize::try_from(len).unwrap_or(0)], span.start, below)?;
        Ok(len)
    }

    /// Sets the entries of grains to "zero" and gives the bytes of stored ones back;
    /// returns how far from byte `offset` that is.
    fn declare_zero(&self, writer: &Writer, (first, end): (u64, u64), offset: u64) -> Result<u64> {
        let most = self.layout.table_entries.get();
        let end = end.min(first.saturating_add(most));
        let _held = writer.busy.hold(first, end);
        let mut walk = Walk::new(self);
        for index in first..end {
            if let Place::Stored(at) = walk.place(index)? {
                let span = Span::new(at, self.layout.grain.get());
                writer.check(span)?;
                let there = self.file.size().saturating_sub(at).min(span.len);
                writer.storage.write_zeroes(Span::new(at, there), Zeroing::MayUnmap)?;
                writer.retire(index, at);
            }
        }
        self.set(writer, first, end.saturating_sub(first), |_| 1)?;
        let stop = end.saturating_mul(self.layout.grain.get()).min(self.layout.capacity);
        Ok(stop.saturating_sub(offset))
    }

    /// Brings everything to stable storage.
    pub(crate) fn flush(&self) -> Result<()> {
        match &self.writer {
            Some(writer) => writer.flush(&self.layout, &self.tables),
            None => Ok(()),
        }
    }
}

fn head(buf: &[u8], len: u64) -> &[u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
    buf.get(..len).unwrap_or_default()
}
