// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Test doubles: devices with bad places.
#![allow(clippy::arithmetic_side_effects, reason = "the numbers are the test's own")]

use crate::{BlockDevice, Error, ErrorKind, Extent, MemoryDevice, Result, Span, Zeroing};
use std::ops::Range;

/// A disk some of whose bytes cannot be read or written, or whose extents are wrong to
/// ask for.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: MemoryDevice,
    bad: Vec<Range<u64>>,
}

impl Faulty {
    pub(crate) fn new(inner: MemoryDevice) -> Self {
        Self { inner, bad: Vec::new() }
    }

    pub(crate) fn bad(mut self, range: Range<u64>) -> Self {
        self.bad.push(range);
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
        self.inner.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }
}
