// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Test doubles: devices with bad places.
#![allow(clippy::arithmetic_side_effects, reason = "the numbers are the test's own")]

use crate::{
    BlockDevice, Error, ErrorKind, Extent, ExtentKind, MemoryDevice, Result, Span, Zeroing,
};
use std::ops::Range;

/// A disk some of whose bytes cannot be read or written, or whose extents are wrong to
/// ask for.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: MemoryDevice,
    bad: Vec<Range<u64>>,
    stored: Vec<Range<u64>>,
    no_extents: Vec<Range<u64>>,
    deeper: Vec<Range<u64>>,
}

impl Faulty {
    pub(crate) fn new(inner: MemoryDevice) -> Self {
        Self {
            inner,
            bad: Vec::new(),
            stored: Vec::new(),
            no_extents: Vec::new(),
            deeper: Vec::new(),
        }
    }

    pub(crate) fn bad(mut self, range: Range<u64>) -> Self {
        self.bad.push(range);
        self
    }

    /// Everything there counts as data.
    pub(crate) fn all_data(mut self, range: Range<u64>) -> Self {
        self.stored.push(range);
        self
    }

    /// Nobody knows what is there.
    pub(crate) fn no_extents(mut self, range: Range<u64>) -> Self {
        self.no_extents.push(range);
        self
    }

    /// What is there comes from the backing image.
    pub(crate) fn deeper(mut self, range: Range<u64>) -> Self {
        self.deeper.push(range);
        self
    }

    fn check(&self, span: Span) -> Result<()> {
        match self.bad.iter().find(|bad| bad.start < span.end() && span.start < bad.end) {
            Some(bad) => Err(Error::new(ErrorKind::Io, "bad sector").at(bad.start)),
            None => Ok(()),
        }
    }
}

impl BlockDevice for Faulty {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(Span::new(offset, u64::try_from(buf.len()).unwrap()))?;
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check(Span::new(offset, u64::try_from(buf.len()).unwrap()))?;
        self.inner.write_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.check(span)?;
        self.inner.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        if self.no_extents.iter().any(|range| range.contains(&offset)) {
            return Err(Error::corrupt("table is gone").at(offset));
        }
        let mut extent = self.inner.extent_at(offset)?;
        if self.stored.iter().any(|range| range.contains(&offset)) {
            extent.kind = ExtentKind::Data;
        }
        if self.deeper.iter().any(|range| range.contains(&offset)) {
            extent.depth = 1;
        }
        // An answer ends where another range of ours begins or ends.
        let ranges = [&self.stored, &self.deeper, &self.no_extents].into_iter().flatten();
        let ends = ranges.flat_map(|range| [range.start, range.end]).filter(|end| *end > offset);
        Ok(ends.fold(extent, |extent, end| extent.limited_to(end - offset)))
    }
    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }
}
