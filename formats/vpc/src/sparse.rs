// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks of blocks: where their bytes are, and reading them.

use crate::bitmaps::{self, Bitmaps, Bits};
use crate::geometry::SECTOR;
use crate::header::Header;
use crate::space::Space;
use crate::table::{ABSENT, Layout, Table};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tranship_block::{BlockDevice, Extent, ExtentKind, Result, Span};

/// A dynamic or differencing disk.
///
/// Locks are taken in the order of the fields that hold them; none is held while payload
/// is read or written, except the one of [`Bitmaps::edit`] for single sectors.
#[derive(Debug)]
pub(crate) struct Sparse {
    pub(crate) file: Arc<dyn BlockDevice>,
    pub(crate) layout: Layout,
    pub(crate) is_differencing: bool,
    pub(crate) parent: Option<Arc<dyn BlockDevice>>,
    pub(crate) header: Mutex<Header>,
    /// Whether a copy of the footer has to be written before anything else.
    pub(crate) is_stale: AtomicBool,
    /// Held from looking at what has to be written until it is.
    pub(crate) flushing: Mutex<()>,
    pub(crate) bitmaps: Bitmaps,
    pub(crate) space: Mutex<Space>,
    pub(crate) table: RwLock<Table>,
}

/// Where bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// This image does not have them: the parent may.
    Below,
    /// From this byte of the file on.
    Stored(u64),
}

impl Sparse {
    pub(crate) fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where byte `offset` of the disk is, and for how many bytes, at most `most`, the
    /// answer holds.
    pub(crate) fn locate(&self, offset: u64, most: u64) -> Result<(Place, u64)> {
        let layout = &self.layout;
        let (index, within) = layout.split(offset);
        let left = layout.block.saturating_sub(within);
        let entry = {
            let table = self.table();
            let entry = table.get(index);
            if entry == ABSENT {
                let more = most.saturating_sub(left).div_ceil(layout.block);
                let more = usize::try_from(more).unwrap_or(usize::MAX);
                let run = table.absent_run(index.saturating_add(1), more);
                let run = u64::try_from(run).unwrap_or(0).saturating_mul(layout.block);
                return Ok((Place::Below, left.saturating_add(run).min(most)));
            }
            entry
        };
        let stored = Place::Stored(layout.data_at(entry).saturating_add(within));
        match self.bitmaps.get(&self.file, layout, entry)? {
            Bits::Full => Ok((stored, left.min(most))),
            Bits::Some(bits) => {
                let wanted = within.saturating_add(left.min(most)).div_ceil(SECTOR);
                let (is_here, end) = bitmaps::run(&bits, within / SECTOR, wanted);
                let len = end.saturating_mul(SECTOR).saturating_sub(within).min(most);
                Ok((if is_here { stored } else { Place::Below }, len))
            }
        }
    }

    /// Fills `buf` from byte `offset` of the disk.
    pub(crate) fn read(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let (place, len) = self.locate(offset, length(buf))?;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
            let (now, rest) = buf.split_at_mut(len);
            match place {
                Place::Below => self.read_below(now, offset)?,
                Place::Stored(at) => self.file.read_at(now, at)?,
            }
            offset = offset.saturating_add(length(now));
            buf = rest;
        }
        Ok(())
    }

    /// Fills `buf` with what the parent has at `offset`; zeroes where it has nothing.
    pub(crate) fn read_below(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(parent) = &self.parent else {
            buf.fill(0);
            return Ok(());
        };
        let left = parent.size().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let (there, beyond) = buf.split_at_mut(len);
        beyond.fill(0);
        if there.is_empty() { Ok(()) } else { parent.read_at(there, offset) }
    }

    /// What is at byte `offset` of a disk that has `left` more bytes.
    pub(crate) fn extent(&self, offset: u64, left: u64) -> Result<Extent> {
        let (place, len) = self.locate(offset, left)?;
        match place {
            Place::Stored(at) => Ok(Extent::new(ExtentKind::Data, len).mapped_to(at)),
            Place::Below => self.extent_below(offset, len),
        }
    }

    pub(crate) fn extent_below(&self, offset: u64, len: u64) -> Result<Extent> {
        let parent = self.parent.as_ref().filter(|parent| offset < parent.size());
        let Some(parent) = parent else { return Ok(Extent::new(ExtentKind::Hole, len)) };
        let mut extent = parent.extent_at(offset)?.limited_to(len);
        extent.depth = extent.depth.saturating_add(1);
        Ok(extent)
    }

    /// Whether `span` reads as zero where this image has nothing, as far as that can be
    /// told without reading. `known` is a span for which that is so, from one call to the
    /// next.
    pub(crate) fn is_zero_below(&self, span: Span, known: &mut Span) -> Result<bool> {
        let mut at = span.start;
        while at < span.end() {
            if !(known.start..known.end()).contains(&at) {
                let extent = self.extent_below(at, u64::MAX)?;
                if !extent.kind.reads_zero() || extent.len == 0 {
                    return Ok(false);
                }
                *known = Span::new(at, extent.len);
            }
            at = known.end();
        }
        Ok(true)
    }
}

pub(crate) fn length(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}
