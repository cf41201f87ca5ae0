// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bringing tables and bitmaps into the file.
//!
//! The order: what is going to be written is looked at first; then everything written
//! before, data of guests and bitmaps of new blocks among it, is flushed; then changed
//! bitmaps and entries are written, in any order, and flushed. So nothing in the file
//! ever refers to data that is not there yet, and a cut in between leaves at worst blocks
//! that no entry knows.
//!
//! A block that was given up is used again only when the file's own table has forgotten
//! it, and when all reads and writes that found it before are done.

use crate::footer::Footer;
use crate::geometry::{SECTOR, whole_sectors};
use crate::sparse::Sparse;
use crate::table::Layout;
use std::mem;
use std::sync::atomic::Ordering;
use tranship_block::{Result, Storage};

impl Sparse {
    /// Writes what is newer in memory. Returns blocks that the file's table does not know
    /// any more; the caller holds the lock `flushing`, and gives them to [`Self::recycle`]
    /// when nobody can be using them.
    pub(crate) fn commit(&self, storage: &dyn Storage) -> Result<Vec<u32>> {
        let layout = &self.layout;
        let bitmaps = self.bitmaps.dirty();
        let (freed, entries) = {
            let mut space = self.space();
            let mut table = self.table_mut();
            (mem::take(&mut space.freed), table.take_dirty(layout))
        };
        let write = || {
            storage.flush()?;
            if bitmaps.is_empty() && entries.is_empty() {
                return Ok(());
            }
            for (entry, bits) in &bitmaps {
                storage.write_at(bits, Layout::bitmap_at(*entry))?;
            }
            for (at, bytes) in &entries {
                storage.write_at(bytes, *at)?;
            }
            storage.flush()
        };
        if let Err(error) = write() {
            self.space().freed.extend(freed);
            self.table_mut().mark_dirty(&entries, layout);
            return Err(error);
        }
        self.bitmaps.clean(layout, bitmaps);
        Ok(freed)
    }

    /// Whether tables or bitmaps are newer in memory than in the file.
    pub(crate) fn is_changed(&self) -> bool {
        self.table().is_dirty() || self.bitmaps.is_changed()
    }

    /// Makes the places of `freed` blocks available.
    pub(crate) fn recycle(&self, freed: &[u32]) {
        let mut space = self.space();
        for entry in freed {
            self.bitmaps.forget(*entry);
            space.give_back(Layout::bitmap_at(*entry), &self.layout);
        }
        if !freed.is_empty() {
            space.tidy(&self.layout);
        }
    }

    /// Cuts off what blocks that were given up have left at the end of the file.
    pub(crate) fn trim(&self, storage: &dyn Storage, footer: &Footer) -> Result<()> {
        let mut space = self.space();
        let end = space.end;
        let is_shorter = space.footer_at.is_some_and(|footer| end < footer);
        if !(space.has_shrunk && is_shorter) {
            return Ok(());
        }
        // The new footer is written over free space, and the old one stays until then.
        storage.write_at(&footer.to_bytes(), end)?;
        storage.flush()?;
        storage.set_len(end.saturating_add(SECTOR))?;
        space.footer_at = Some(end);
        space.has_shrunk = false;
        Ok(())
    }

    /// Writes both copies of the footer again if one of them is damaged.
    pub(crate) fn mend(&self, storage: &dyn Storage, footer: &Footer) -> Result<()> {
        if !self.is_stale.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut space = self.space();
        let end = space.end;
        space.footer_at = Some(write_footers(storage, footer, space.footer_at, end)?);
        self.is_stale.store(false, Ordering::Release);
        Ok(())
    }
}

/// Writes both copies of the footer, one at a time: over the good one at `footer_at`, or
/// at `end`, where the file ends from then on. Returns where the one at the end is.
pub(crate) fn write_footers(
    storage: &dyn Storage,
    footer: &Footer,
    footer_at: Option<u64>,
    end: u64,
) -> Result<u64> {
    let bytes = footer.to_bytes();
    if footer_at.is_some() {
        // The one at the end is good: it stays until the one at the start is, too.
        storage.write_at(&bytes, 0)?;
        storage.flush()?;
    }
    let at = footer_at.unwrap_or_else(|| whole_sectors(end));
    let file_end = at.saturating_add(SECTOR);
    if storage.size() < file_end {
        storage.set_len(file_end)?;
    }
    storage.write_at(&bytes, at)?;
    storage.flush()?;
    if storage.size() != file_end {
        storage.set_len(file_end)?;
    }
    storage.write_at(&bytes, 0)?;
    storage.flush()?;
    Ok(at)
}
