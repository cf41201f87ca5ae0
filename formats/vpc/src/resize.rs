// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changing the size of a disk.

use crate::commit::write_footers;
use crate::create::fill_absent;
use crate::disk::{Body, Vpc};
use crate::footer::Footer;
use crate::geometry::SECTOR;
use crate::header::MOST_ENTRIES;
use crate::open::{check_size, metadata};
use crate::sparse::Sparse;
use crate::table::{ABSENT, Layout, span_of, touches};
use crate::write::Target;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use tranship_block::{BlockDevice, Error, Result, Span, Storage, Zeroing, is_zero};

/// Bytes that are looked at or moved at once.
const PIECE: u64 = 1 << 20;

impl Vpc {
    /// Gives the disk `size` bytes. New bytes read as zero; those that go away have to.
    ///
    /// A grown table may need the place of the first blocks, which move to the end. After
    /// a power cut a dynamic or differencing disk has its old or its new size; a fixed
    /// disk that grows has no footer for a moment.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] for sizes that are not whole sectors, for
    /// shrinking over data and for read-only images,
    /// [`tranship_block::ErrorKind::Unsupported`] for sizes that the format does not have
    /// and for tables that cannot grow in place, and I/O errors.
    pub fn resize(&self, size: u64) -> Result<()> {
        let storage = self.writable()?;
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::usage(format!("size is {size} bytes, expected whole sectors")));
        }
        match &self.body {
            Body::Fixed { .. } => {
                let _alone = self.in_use.write().unwrap_or_else(PoisonError::into_inner);
                let footer = self.footer().resized(size);
                resize_fixed(storage, &footer, self.size())?;
                self.adopt(footer);
            }
            Body::Sparse(sparse) => {
                check_size(size)?;
                let flushing = sparse.flushing.lock();
                let _flushing = flushing.unwrap_or_else(PoisonError::into_inner);
                let _alone = self.in_use.write().unwrap_or_else(PoisonError::into_inner);
                let old = self.footer();
                let new = old.resized(size);
                sparse.mend(storage, &old)?;
                let freed = sparse.commit(storage)?;
                sparse.recycle(&freed);
                let change = Change { sparse, storage, old: &old, new: &new };
                if size < self.size() {
                    change.shrink(self.size(), size, || self.adopt(new.clone()))?;
                } else {
                    change.grow(self.size(), size)?;
                    self.adopt(new.clone());
                }
                sparse.trim(storage, &new)?;
            }
        }
        Ok(())
    }

    fn adopt(&self, footer: Footer) {
        self.size.store(footer.current_size, Ordering::Release);
        *self.footer.write().unwrap_or_else(PoisonError::into_inner) = footer;
    }
}

fn loses(at: u64) -> Error {
    Error::usage("shrinking would lose data that is not zero").at(at)
}

/// Checks that `span` of `device` holds nothing but zeroes.
fn check_zero(span: Span, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<()> {
    let mut at = span.start;
    let mut buf = vec![0; usize::try_from(PIECE.min(span.len)).unwrap_or(0)];
    while at < span.end() {
        let left = usize::try_from(span.end().saturating_sub(at)).unwrap_or(usize::MAX);
        let len = left.min(buf.len());
        let now = buf.get_mut(..len).unwrap_or_default();
        read(now, at)?;
        if !is_zero(now) {
            return Err(loses(at));
        }
        at = at.saturating_add(PIECE);
    }
    Ok(())
}

fn resize_fixed(storage: &dyn Storage, footer: &Footer, old: u64) -> Result<()> {
    let size = footer.current_size;
    let end = size.saturating_add(SECTOR);
    let file_end = storage.size();
    if size < old {
        let mut at = size;
        while at < old {
            let extent = storage.extent_at(at)?.limited_to(old.saturating_sub(at));
            if !extent.kind.reads_zero() {
                check_zero(Span::new(at, extent.len), |buf, at| storage.read_at(buf, at))?;
            }
            at = at.saturating_add(extent.len.max(1));
        }
    }
    if file_end < end {
        storage.set_len(end)?;
    }
    storage.write_at(&footer.to_bytes(), size)?;
    storage.flush()?;
    // What was the old footer, and bytes in front of it that were not part of the disk.
    let zeroes = Span::new(old, file_end.min(size).saturating_sub(old));
    if !zeroes.is_empty() {
        storage.write_zeroes(zeroes, Zeroing::MayUnmap)?;
        storage.flush()?;
    }
    if file_end > end {
        storage.set_len(end)?;
        storage.flush()?;
    }
    Ok(())
}

struct Change<'a> {
    sparse: &'a Sparse,
    storage: &'a dyn Storage,
    old: &'a Footer,
    new: &'a Footer,
}

impl Change<'_> {
    fn shrink(&self, old: u64, size: u64, adopt: impl FnOnce()) -> Result<()> {
        let sparse = self.sparse;
        let mut at = size;
        while at < old {
            let extent = sparse.extent(at, old.saturating_sub(at))?;
            if !extent.kind.reads_zero() {
                check_zero(Span::new(at, extent.len), |buf, at| sparse.read(buf, at))?;
            }
            at = at.saturating_add(extent.len.max(1));
        }
        self.write_footers()?;
        adopt();
        // Entries past the disk's end mean nothing any more, so that a cut here is harmless.
        let needed = sparse.header().entries_for(size);
        let needed = usize::try_from(needed).unwrap_or(usize::MAX);
        {
            let mut space = sparse.space();
            let mut table = sparse.table_mut();
            for index in needed..table.entries().len() {
                let entry = table.get(index);
                if entry != ABSENT {
                    table.set(index, ABSENT);
                    space.freed.push(entry);
                }
            }
        }
        let freed = sparse.commit(self.storage)?;
        sparse.recycle(&freed);
        sparse.table_mut().resize(needed);
        Ok(())
    }

    fn grow(&self, old: u64, size: u64) -> Result<()> {
        let sparse = self.sparse;
        let needed = sparse.header().entries_for(size);
        if needed > MOST_ENTRIES {
            return Err(Error::unsupported(format!(
                "disk would have {needed} blocks, expected at most {MOST_ENTRIES}"
            )));
        }
        self.grow_table(old, needed)?;
        self.clear_last_block(old)?;
        // The parent's bytes past the old end were never part of this disk.
        let parent_end = sparse.parent.as_ref().map_or(0, BlockDevice::size);
        if parent_end > old {
            let span = Span::new(old, parent_end.min(size).saturating_sub(old));
            let to = Target { storage: self.storage, footer: self.old, size };
            sparse.zero(to, span, Zeroing::MayUnmap)?;
        }
        let freed = sparse.commit(self.storage)?;
        sparse.recycle(&freed);
        self.write_footers()
    }

    fn write_footers(&self) -> Result<()> {
        let mut space = self.sparse.space();
        let end = space.end;
        let at = write_footers(self.storage, self.new, space.footer_at, end)?;
        space.footer_at = Some(at);
        Ok(())
    }

    /// Gives the table `needed` entries, in the file and in memory.
    fn grow_table(&self, size: u64, needed: u64) -> Result<()> {
        let sparse = self.sparse;
        let layout = &sparse.layout;
        let have = sparse.table().entries().len();
        let start = layout.entry_at(have);
        let needed_len = usize::try_from(needed).unwrap_or(usize::MAX);
        let mut header = sparse.header().clone();
        if needed <= u64::from(header.max_entries) {
            // What lies behind the entries in use may be anything.
            fill_absent(self.storage, start, layout.entry_at(needed_len))?;
            self.storage.flush()?;
            sparse.table_mut().resize(needed_len);
            return Ok(());
        }
        let len = needed.saturating_mul(4).next_multiple_of(SECTOR);
        let region = Span::new(header.table_offset, len);
        let others = metadata(self.storage.size(), &header, self.old);
        let is_other = |span: &Span| span.start != header.table_offset && touches(*span, region);
        if let Some((span, what)) = others.iter().find(|(span, _)| is_other(span)) {
            return Err(Error::unsupported(format!(
                "block allocation table cannot grow to {needed} entries: the {what} is in the way"
            ))
            .at(span.start));
        }
        self.clear_region(region, size)?;
        fill_absent(self.storage, start, region.end())?;
        self.storage.flush()?;
        // Offset, length and checksum are in one sector.
        header.max_entries = u32::try_from(needed).unwrap_or(u32::MAX);
        self.storage.write_at(&header.to_bytes(), layout.header_offset)?;
        self.storage.flush()?;
        *sparse.header() = header;
        sparse.table_mut().resize(needed_len);
        Ok(())
    }

    /// Moves everything out of `region`: blocks, free places, the footer.
    fn clear_region(&self, region: Span, size: u64) -> Result<()> {
        let sparse = self.sparse;
        let layout = &sparse.layout;
        {
            let mut space = sparse.space();
            space.keep_out(region);
            if space.footer_at.is_some_and(|footer| footer < region.end()) {
                let to = Target { storage: self.storage, footer: self.old, size };
                sparse.move_footer(to, &mut space, region.end())?;
            }
        }
        let in_region: Vec<(usize, u32)> = {
            let table = sparse.table();
            let all = table.entries().iter().copied().enumerate();
            let span = |entry| Span::new(Layout::bitmap_at(entry), layout.slot());
            all.filter(|(_, entry)| *entry != ABSENT && touches(span(*entry), region)).collect()
        };
        for (index, entry) in in_region {
            self.move_block(index, entry, size)?;
        }
        Ok(())
    }

    /// Copies block `index` of a disk of `size` bytes elsewhere, then changes its entry.
    fn move_block(&self, index: usize, entry: u32, size: u64) -> Result<()> {
        let sparse = self.sparse;
        let layout = &sparse.layout;
        let to = Target { storage: self.storage, footer: self.old, size };
        let new = sparse.new_place(to)?;
        let len = layout.bitmap.saturating_add(layout.used(index, size));
        let (from, onto) = (Layout::bitmap_at(entry), Layout::bitmap_at(new));
        // The rest of a block at the end of the disk may not be in the file.
        let rest = Span::new(onto.saturating_add(len), layout.slot().saturating_sub(len));
        self.storage.write_zeroes(rest, Zeroing::MayUnmap)?;
        let mut buf = vec![0; usize::try_from(PIECE.min(len)).unwrap_or(0)];
        let mut done = 0;
        while done < len {
            let left = usize::try_from(len.saturating_sub(done)).unwrap_or(usize::MAX);
            let piece_len = left.min(buf.len());
            let now = buf.get_mut(..piece_len).unwrap_or_default();
            self.storage.read_at(now, from.saturating_add(done))?;
            self.storage.write_at(now, onto.saturating_add(done))?;
            done = done.saturating_add(PIECE);
        }
        sparse.table_mut().set(index, new);
        let freed = sparse.commit(self.storage)?;
        sparse.recycle(&freed);
        sparse.bitmaps.forget(entry);
        Ok(())
    }

    /// Makes what the last block of a disk of `old` bytes has behind them zero.
    fn clear_last_block(&self, old: u64) -> Result<()> {
        let sparse = self.sparse;
        let layout = &sparse.layout;
        let (index, within) = layout.split(old);
        let entry = sparse.table().get(index);
        if within == 0 || entry == ABSENT {
            return Ok(());
        }
        let whole = Span::new(Layout::bitmap_at(entry), layout.slot());
        let is_shared = {
            let space = sparse.space();
            let table = sparse.table();
            let number = u32::try_from(index).unwrap_or(u32::MAX);
            let mut others = (0_u32..).zip(table.entries().iter().copied());
            space.footer_at.is_none_or(|footer| footer < whole.end())
                || space.is_free(whole)
                || others.any(|(other, entry)| {
                    let span = span_of(layout, entry, other, u64::MAX);
                    other != number && entry != ABSENT && touches(span, whole)
                })
        };
        if is_shared {
            self.move_block(index, entry, old)?;
        }
        let entry = sparse.table().get(index);
        let rest = Span::new(
            layout.data_at(entry).saturating_add(within),
            layout.block.saturating_sub(within),
        );
        self.storage.write_zeroes(rest, Zeroing::MayUnmap)
    }
}
