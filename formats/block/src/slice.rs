// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A range of a device as a device of its own: a partition, a member of an archive.

use crate::{Advice, BlockDevice, Error, Extent, FileRange, Result, Span, Zeroing};
use std::sync::Arc;

/// The bytes `[start, start + len)` of another device.
#[derive(Clone, Debug)]
pub struct Slice {
    device: Arc<dyn BlockDevice>,
    span: Span,
}

impl Slice {
    /// The part `span` of `device`.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Usage`] if `span` reaches past the device's end.
    pub fn new(device: Arc<dyn BlockDevice>, span: Span) -> Result<Self> {
        span.check_within(device.size())?;
        Ok(Self { device, span })
    }

    /// Where `span` of the slice lies in the whole device.
    fn outer(&self, span: Span) -> Result<Span> {
        span.check_within(self.span.len)?;
        let start = self
            .span
            .start
            .checked_add(span.start)
            .ok_or_else(|| Error::usage("offset overflows").at(span.start))?;
        Ok(Span::new(start, span.len))
    }

    fn outer_of(&self, buf: &[u8], offset: u64) -> Result<u64> {
        let len = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        self.outer(Span::new(offset, len)).map(|span| span.start)
    }
}

impl BlockDevice for Slice {
    fn size(&self) -> u64 {
        self.span.len
    }

    fn is_read_only(&self) -> bool {
        self.device.is_read_only()
    }

    fn preferred_block(&self) -> u32 {
        self.device.preferred_block()
    }

    fn sector_size(&self) -> u32 {
        self.device.sector_size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let outer = self.outer_of(buf, offset)?;
        self.device.read_at(buf, outer)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let outer = self.outer_of(buf, offset)?;
        self.device.write_at(buf, outer)
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.device.write_zeroes(self.outer(span)?, mode)
    }

    fn zeroes_quickly(&self, span: Span, mode: Zeroing) -> bool {
        self.outer(span).is_ok_and(|outer| self.device.zeroes_quickly(outer, mode))
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.device.discard(self.outer(span)?)
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let outer = self.outer(Span::new(offset, 1))?;
        let left = self.span.len.saturating_sub(offset);
        Ok(self.device.extent_at(outer.start)?.limited_to(left))
    }

    fn flush(&self) -> Result<()> {
        self.device.flush()
    }

    fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
        let outer = self.outer(Span::new(offset, 1)).ok()?;
        let range = self.device.file_range(outer.start)?;
        let left = self.span.len.saturating_sub(offset);
        Some(FileRange { len: range.len.min(left), ..range })
    }

    fn write_from_file(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
        let outer = self.outer(Span::new(offset, range.len))?;
        self.device.write_from_file(outer.start, range)
    }

    fn advise(&self, span: Span, advice: Advice) {
        if let Ok(outer) = self.outer(span) {
            self.device.advise(outer, advice);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ErrorKind, MemoryDevice};

    #[test]
    fn a_slice_reads_its_own_range_and_nothing_else() {
        let whole = Arc::new(MemoryDevice::new((0..=255).collect()));
        let slice = Slice::new(whole.clone(), Span::new(10, 20)).unwrap();
        let mut buf = [0; 20];
        slice.read_at(&mut buf, 0).unwrap();
        assert_eq!(buf.to_vec(), (10..30).collect::<Vec<u8>>());
        assert_eq!(slice.read_at(&mut buf, 1).unwrap_err().kind(), ErrorKind::Usage);
        slice.write_at(&[7], 19).unwrap();
        assert_eq!(whole.snapshot()[29], 7);
        assert_eq!(slice.extent_at(5).unwrap().len, 15);
        assert!(Slice::new(whole, Span::new(250, 7)).is_err());
    }
}
