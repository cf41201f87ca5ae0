// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ranges of a device, and what they hold.

use crate::{BlockDevice, Error, Result};

/// A half-open byte range `[start, start + len)` of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// First byte of the range.
    pub start: u64,
    /// Number of bytes in the range.
    pub len: u64,
}

impl Span {
    /// The range of `len` bytes from `start`.
    pub fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }

    /// First byte after the range; saturates, so that a hostile length cannot wrap.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Checks that the range lies within a device of `size` bytes.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Usage`] if it does not.
    pub fn check_within(&self, size: u64) -> Result<()> {
        if self.start > size || self.len > size.saturating_sub(self.start) {
            return Err(Error::usage(format!(
                "range of {} bytes ends past the device's size of {size} bytes",
                self.len
            ))
            .at(self.start));
        }
        Ok(())
    }
}

/// What a range holds, as far as metadata tells without reading the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Bytes are stored and have to be read.
    Data,
    /// Reads as zero, and a layer says so or reserves storage for it.
    Zero,
    /// Reads as zero because no layer stores anything here.
    Hole,
}

impl ExtentKind {
    /// Whether the range is known to read as zeroes.
    pub fn reads_zero(self) -> bool {
        !matches!(self, Self::Data)
    }
}

/// The state of the bytes from some offset onward, and how far it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Number of bytes for which the rest holds; never 0.
    pub len: u64,
    /// What they hold.
    pub kind: ExtentKind,
    /// Which layer answered: 0 the image itself, 1 its backing image, and so on.
    pub depth: u32,
    /// Where the first byte lies in that layer's file, if it lies there as it is.
    pub offset: Option<u64>,
    /// Whether the layer stores it compressed.
    pub compressed: bool,
}

impl Extent {
    /// An extent of the image itself that maps to no single place of a file.
    pub fn new(kind: ExtentKind, len: u64) -> Self {
        Self { len, kind, depth: 0, offset: None, compressed: false }
    }

    /// The same extent, mapped to byte `offset` of the layer's file.
    #[must_use]
    pub fn mapped_to(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    /// The same state for at most `len` bytes.
    #[must_use]
    pub fn limited_to(mut self, len: u64) -> Self {
        self.len = self.len.min(len);
        self
    }
}

/// Walks a range of a device, joining neighbours of the same kind.
#[derive(Debug)]
pub struct Extents<'a> {
    device: &'a dyn BlockDevice,
    next: u64,
    end: u64,
}

impl<'a> Extents<'a> {
    /// Walks `span` of `device`; what lies past the device's end is left out.
    pub fn new(device: &'a dyn BlockDevice, span: Span) -> Self {
        Self { device, next: span.start, end: span.end().min(device.size()) }
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<(Span, ExtentKind)>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.next;
        let mut kind = None;
        while self.next < self.end {
            let rest = Span::new(self.next, self.end.saturating_sub(self.next));
            let extent = match self.device.extent_within(rest) {
                Ok(extent) => extent,
                Err(error) => {
                    self.next = self.end;
                    return Some(Err(error));
                }
            };
            if extent.len == 0 {
                // A device that breaks its contract must not make us loop for ever.
                let at = self.next;
                self.next = self.end;
                return Some(Err(Error::corrupt("device reported an empty extent").at(at)));
            }
            if *kind.get_or_insert(extent.kind) != extent.kind {
                break;
            }
            self.next = self.next.saturating_add(extent.len).min(self.end);
        }
        kind.map(|kind| Ok((Span::new(start, self.next.saturating_sub(start)), kind)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ErrorKind, MemoryDevice};

    #[test]
    fn a_span_past_the_end_is_rejected_without_overflow() {
        assert!(Span::new(0, 10).check_within(10).is_ok());
        assert!(Span::new(10, 0).check_within(10).is_ok());
        for span in [Span::new(1, 10), Span::new(11, 0), Span::new(u64::MAX, u64::MAX)] {
            assert_eq!(span.check_within(10).unwrap_err().kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn neighbours_of_the_same_kind_are_joined() {
        let device = MemoryDevice::new(vec![0; 10_000]);
        device.write_at(&[1], 4096).unwrap();
        let seen: Vec<_> =
            Extents::new(&device, Span::new(0, u64::MAX)).map(Result::unwrap).collect();
        assert_eq!(
            seen,
            [
                (Span::new(0, 4096), ExtentKind::Hole),
                (Span::new(4096, 4096), ExtentKind::Data),
                (Span::new(8192, 1808), ExtentKind::Hole)
            ]
        );
    }
}
