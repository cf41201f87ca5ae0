// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changing the virtual size.

use crate::bat::{Entry, State, Subject};
use crate::bytes::{MIB, SECTOR_BYTES, mib_up, put, read};
use crate::image::Vhdx;
use crate::log::Sector;
use crate::metadata::check_size;
use crate::region::Regions;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use tranship_block::{BlockDevice, Error, ExtentKind, Result, Span, Storage, Zeroing, is_zero};

/// What becomes of data behind a smaller end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shrink {
    /// Shrinking is refused if any byte there is stored and not zero.
    #[default]
    KeepData,
    /// It is lost.
    LoseData,
}

impl Vhdx {
    /// Gives the disk `size` bytes; new ones read as zero. Durable when it returns.
    ///
    /// A fixed disk grows by blocks that get their place when they are written.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] for a size that no disk can have, on a
    /// read-only image, and if data would be lost. I/O errors.
    pub fn resize(&self, size: u64, shrink: Shrink) -> Result<()> {
        let storage = self.writable(0)?;
        check_size(size, self.sector_size()).map_err(Error::usage)?;
        self.start_writing(0)?;
        let _nobody = self.in_use.write().unwrap_or_else(PoisonError::into_inner);
        let old = self.size();
        if size < old && shrink == Shrink::KeepData {
            self.check_no_data(Span::new(size, old.saturating_sub(size)))?;
        }
        let mut freed = self.write_back(storage, Vec::new())?;
        let resized = match size {
            _ if size > old => self.grow(storage, old, size),
            _ if size < old => self.shrink(storage, size),
            _ => Ok(Vec::new()),
        };
        freed.extend(resized.inspect_err(|_| self.failed.store(true, Ordering::Release))?);
        self.release_unused(storage, freed);
        Ok(())
    }

    /// Refuses if the image itself stores anything but zeroes in `span`.
    fn check_no_data(&self, span: Span) -> Result<()> {
        let mut at = span.start;
        let mut buf = vec![0; 1 << 20];
        while at < span.end() {
            let extent = self.extent(at)?;
            let mut len = extent.len.min(span.end().saturating_sub(at));
            if extent.depth == 0 && extent.kind == ExtentKind::Data {
                len = len.min(MIB);
                let piece = usize::try_from(len).ok().and_then(|len| buf.get_mut(..len));
                let piece = piece.unwrap_or_default();
                self.read_payload(piece, at)?;
                if !is_zero(piece) {
                    return Err(Error::usage(format!(
                        "disk has data behind the new size of {} bytes",
                        span.start
                    ))
                    .at(at));
                }
            }
            at = at.saturating_add(len.max(1));
        }
        Ok(())
    }

    fn grow(&self, storage: &dyn Storage, old: u64, size: u64) -> Result<Vec<Span>> {
        let geometry = self.geometry;
        self.clear_last_block(storage, old)?;
        let (from, to) = (geometry.entries(old), geometry.entries(size));
        let mut table = self.lock();
        let region = table.bat.region;
        let needed = to.saturating_mul(8);
        let mut others = Vec::new();
        let mut moved = None;
        table.bat.resize(to)?;
        if needed > region.len {
            // Nothing refers to the new place before the region tables do.
            let len = mib_up(needed);
            let place = Span::new(table.allocate(storage, len)?, len);
            storage.write_zeroes(place, Zeroing::MayUnmap)?;
            table.bat.region = place;
            for sector in table.bat.all() {
                storage.write_at(sector.bytes.as_slice(), sector.at)?;
            }
            let mut regions = Regions::read(storage)?;
            regions.move_bat(place);
            others.extend(regions.sectors(storage)?);
            moved = Some(Span::new(region.start, mib_up(region.len)));
        } else {
            // Nobody has promised that the table is zero where it was not used.
            let used = from.saturating_mul(8).next_multiple_of(SECTOR_BYTES);
            let end = needed.next_multiple_of(SECTOR_BYTES).min(region.len);
            let unused = Span::new(region.start.saturating_add(used), end.saturating_sub(used));
            storage.write_zeroes(unused, Zeroing::MayUnmap)?;
        }
        // Of the sector in which old entries end, and after this disk was smaller once.
        let stale: Vec<u64> = table
            .bat
            .entries(to)
            .map(|(index, _)| index)
            .filter(|index| match geometry.subject(*index) {
                Subject::Block(block) => block >= geometry.blocks(old),
                Subject::Bitmap(_) => *index >= from,
            })
            .collect();
        for index in stale {
            table.bat.set(index, Entry::new(State::NotPresent, 0));
        }
        drop(table);
        self.size.store(size, Ordering::Release);
        let exposed = self.parent.as_ref().map_or(0, |parent| parent.size().min(size));
        if exposed > old {
            self.zero(Span::new(old, exposed.saturating_sub(old)), Zeroing::MayUnmap)?;
        }
        let mut freed = self.write_back(storage, Vec::new())?;
        others.extend(self.size_sectors(storage, size)?);
        freed.extend(self.write_back(storage, others)?);
        freed.extend(moved);
        Ok(freed)
    }

    /// What lies in the last block behind the end of the disk becomes visible.
    fn clear_last_block(&self, storage: &dyn Storage, old: u64) -> Result<()> {
        let geometry = self.geometry;
        let within = geometry.within(old);
        if within == 0 {
            return Ok(());
        }
        let block = geometry.index(old);
        let mut table = self.lock();
        let entry = table.bat.get(geometry.payload_entry(block));
        match entry.state() {
            State::Full => {
                let end = entry.offset().saturating_add(geometry.block());
                if storage.size() < end {
                    storage.set_len(end)?;
                }
                let start = entry.offset().saturating_add(within);
                let span = Span::new(start, end.saturating_sub(start));
                storage.write_zeroes(span, self.zeroing(Zeroing::MayUnmap))
            }
            State::Partial => {
                let first = geometry.sectors_in(within);
                let count = geometry.sectors().saturating_sub(first);
                let bits = self.bits(&table, block, first, count);
                table.bitmaps.set(&self.file, bits, false)
            }
            _ => Ok(()),
        }
    }

    /// The size first: entries that are left behind the end mean nothing.
    fn shrink(&self, storage: &dyn Storage, size: u64) -> Result<Vec<Span>> {
        let geometry = self.geometry;
        let old = self.size();
        let mut freed = self.write_back(storage, self.size_sectors(storage, size)?)?;
        self.size.store(size, Ordering::Release);
        let mut table = self.lock();
        let end = geometry.entries(size);
        let gone: Vec<(u64, Entry)> = table.bat.entries(geometry.entries(old)).collect();
        for (index, entry) in gone {
            let len = match geometry.subject(index) {
                Subject::Block(block) if block >= geometry.blocks(size) => geometry.block(),
                Subject::Bitmap(_) if index >= end => MIB,
                _ => continue,
            };
            if entry.is_stored() {
                let place = Span::new(entry.offset(), len);
                table.bitmaps.forget(place);
                table.freed.push(place);
            }
            table.bat.set(index, Entry::new(State::NotPresent, 0));
        }
        drop(table);
        freed.extend(self.write_back(storage, Vec::new())?);
        self.lock().bat.resize(end)?;
        Ok(freed)
    }

    /// The sectors of the metadata region that hold the size, with a new one.
    fn size_sectors(&self, storage: &dyn Storage, size: u64) -> Result<Vec<Sector>> {
        let size_at = self.structure.metadata.size_at;
        let first = size_at & !SECTOR_BYTES.wrapping_sub(1);
        let into = usize::try_from(size_at.saturating_sub(first)).unwrap_or(0);
        let end = size_at.saturating_add(8).next_multiple_of(SECTOR_BYTES);
        let len = usize::try_from(end.saturating_sub(first)).unwrap_or(0);
        let mut bytes = read(storage, "metadata item", first, len)?;
        put(&mut bytes, into, &size.to_le_bytes());
        let chunks = bytes.as_chunks().0.iter();
        let offsets =
            (0_u64..).map(|number| first.saturating_add(number.saturating_mul(SECTOR_BYTES)));
        Ok(chunks.zip(offsets).map(|(bytes, at)| Sector { at, bytes: Box::new(*bytes) }).collect())
    }
}
