// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device in memory: the model that property tests compare formats with.

use crate::{BlockDevice, Error, Extent, ExtentKind, Result, Span, Storage, Zeroing, is_zero};
use std::sync::{PoisonError, RwLock};

const PAGE: usize = 4096;

/// Bytes in memory. Pages of 4 KiB that are all zero count as holes.
#[derive(Debug)]
pub struct MemoryDevice {
    bytes: RwLock<Vec<u8>>,
    read_only: bool,
}

impl MemoryDevice {
    /// A writable device with these contents.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes), read_only: false }
    }

    /// A read-only device with these contents.
    pub fn read_only(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes), read_only: true }
    }

    /// A copy of the whole contents.
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn modify(&self, span: Span, change: impl FnOnce(&mut [u8])) -> Result<()> {
        if self.read_only {
            return Err(Error::usage("device is read-only").at(span.start));
        }
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        range(span, bytes.len())
            .and_then(|range| bytes.get_mut(range))
            .map(change)
            .ok_or_else(|| Error::usage("write past the end of the device").at(span.start))
    }
}

fn range(span: Span, len: usize) -> Option<std::ops::Range<usize>> {
    span.check_within(u64::try_from(len).ok()?).ok()?;
    Some(usize::try_from(span.start).ok()?..usize::try_from(span.end()).ok()?)
}

fn span_of(buf: &[u8], offset: u64) -> Span {
    Span::new(offset, u64::try_from(buf.len()).unwrap_or(u64::MAX))
}

impl BlockDevice for MemoryDevice {
    fn size(&self) -> u64 {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        u64::try_from(bytes.len()).unwrap_or(u64::MAX)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        range(span_of(buf, offset), bytes.len())
            .and_then(|range| bytes.get(range))
            .map(|found| buf.copy_from_slice(found))
            .ok_or_else(|| Error::usage("read past the end of the device").at(offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.modify(span_of(buf, offset), |bytes| bytes.copy_from_slice(buf))
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        self.modify(span, |bytes| bytes.fill(0))
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.modify(span, |bytes| bytes.fill(0))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let tail = bytes.get(start..).filter(|tail| !tail.is_empty());
        let Some(tail) = tail else {
            return Err(Error::usage("extent past the end of the device").at(offset));
        };
        let to_page_end = PAGE.saturating_sub(start.checked_rem(PAGE).unwrap_or(0));
        let page = tail.get(..to_page_end).unwrap_or(tail);
        let kind = if is_zero(page) { ExtentKind::Hole } else { ExtentKind::Data };
        let extent = Extent::new(kind, u64::try_from(page.len()).unwrap_or(u64::MAX));
        Ok(if kind == ExtentKind::Data { extent.mapped_to(offset) } else { extent })
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

impl Storage for MemoryDevice {
    fn set_len(&self, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::usage("device is read-only"));
        }
        let len = usize::try_from(len)
            .map_err(|_| Error::usage(format!("{len} bytes do not fit into memory")))?;
        self.bytes.write().unwrap_or_else(PoisonError::into_inner).resize(len, 0);
        Ok(())
    }
}
