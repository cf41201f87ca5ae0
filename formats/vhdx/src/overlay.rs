// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file with changes in front of it that exist in memory alone: how an image whose log
//! has to be replayed is read without touching it.

use crate::bytes::{SECTOR, SECTOR_BYTES, to_u64};
use crate::log::Change;
use std::collections::BTreeMap;
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Result, Span, Zeroing};

/// A read-only file with patches. Behind the file's end it has zeroes up to its size.
#[derive(Debug)]
pub(crate) struct Overlay<D> {
    file: D,
    size: u64,
    /// By offset; these count before `zeroes`.
    data: BTreeMap<u64, Box<[u8; SECTOR]>>,
    /// Disjoint ranges: start and end.
    zeroes: BTreeMap<u64, u64>,
}

impl<D: BlockDevice> Overlay<D> {
    /// `file` with at least `size` bytes.
    pub(crate) fn new(file: D, size: u64) -> Self {
        let size = size.max(file.size());
        Self { file, size, data: BTreeMap::new(), zeroes: BTreeMap::new() }
    }

    /// Applies a change whose range was checked.
    pub(crate) fn apply(&mut self, change: Change) {
        match change {
            Change::Data(sector) => {
                self.data.insert(sector.at, sector.bytes);
            }
            Change::Zero(span) if span.is_empty() => {}
            Change::Zero(span) => {
                let mut behind = self.data.split_off(&span.start);
                self.data.append(&mut behind.split_off(&span.end()));
                let (mut start, mut end) = (span.start, span.end());
                while let Some((&from, &to)) = self.zeroes.range(..=end).next_back() {
                    if to < start {
                        break;
                    }
                    self.zeroes.remove(&from);
                    (start, end) = (start.min(from), end.max(to));
                }
                self.zeroes.insert(start, end);
            }
        }
    }

    /// Whether all of `span` is as it is in the file.
    pub(crate) fn is_untouched(&self, span: Span) -> bool {
        span.end() <= self.file.size()
            && self.zeroes_in(span).next().is_none()
            && self.data_in(span).next().is_none()
    }

    fn zeroes_in(&self, span: Span) -> impl Iterator<Item = (u64, u64)> + '_ {
        let below = self.zeroes.range(..span.end()).rev().map(|(start, end)| (*start, *end));
        below.take_while(move |(_, end)| *end > span.start)
    }

    fn data_in(&self, span: Span) -> impl Iterator<Item = (u64, &[u8; SECTOR])> + '_ {
        let first = span.start & !SECTOR_BYTES.wrapping_sub(1);
        self.data.range(first..span.end().max(first)).map(|(at, bytes)| (*at, &**bytes))
    }
}

/// The part of `buf`, which begins at `offset`, between two offsets of the file, and how
/// far behind `start` it begins.
fn part(buf: &mut [u8], offset: u64, start: u64, end: u64) -> (&mut [u8], usize) {
    let from = start.max(offset);
    let within = |at: u64| usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
    let to = within(end).min(buf.len());
    let skipped = usize::try_from(from.saturating_sub(start)).unwrap_or(usize::MAX);
    (buf.get_mut(within(from)..to).unwrap_or_default(), skipped)
}

impl<D: BlockDevice> BlockDevice for Overlay<D> {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let span = Span::new(offset, to_u64(buf.len()));
        span.check_within(self.size)?;
        let (stored, _) = part(buf, offset, offset, self.file.size());
        let there = stored.len();
        if there > 0 {
            self.file.read_at(stored, offset)?;
        }
        buf.get_mut(there..).unwrap_or_default().fill(0);
        for (start, end) in self.zeroes_in(span) {
            part(buf, offset, start, end).0.fill(0);
        }
        for (at, bytes) in self.data_in(span) {
            let (to, skipped) = part(buf, offset, at, at.saturating_add(SECTOR_BYTES));
            let from = bytes.get(skipped..).and_then(|bytes| bytes.get(..to.len()));
            to.copy_from_slice(from.unwrap_or_default());
        }
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Span::new(offset, 1).check_within(self.size)?;
        let left = self.size.saturating_sub(offset);
        if offset >= self.file.size() && self.data_in(Span::new(offset, left)).next().is_none() {
            return Ok(Extent::new(ExtentKind::Hole, left));
        }
        // Where a patch may be near, nothing better is known than that it must be read.
        let found = Span::new(offset, left.min(1 << 20));
        if !self.is_untouched(found) {
            return Ok(Extent::new(ExtentKind::Data, found.len));
        }
        Ok(self.file.extent_at(offset)?.limited_to(found.len))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::as_conversions, clippy::cast_possible_truncation)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use crate::log::Sector;
    use tranship_block::{Extents, MemoryDevice};

    fn data(at: u64, fill: u8) -> Change {
        Change::Data(Sector { at, bytes: Box::new([fill; SECTOR]) })
    }

    #[test]
    fn changes_hide_what_was_there_in_their_order() {
        const SIZE: usize = 100_000;
        let mut overlay = Overlay::new(MemoryDevice::read_only(vec![1; 70_000]), 100_000);
        let mut model = vec![1; SIZE];
        model[70_000..].fill(0);
        let changes = [
            data(8192, 2),
            Change::Zero(Span::new(4096, 12_288)),
            data(12_288, 3),
            Change::Zero(Span::new(40_960, 4096)),
            Change::Zero(Span::new(36_864, 4096)),
            data(69_632, 4),
            data(90_112, 5),
        ];
        for change in changes {
            let (at, len, fill) = match &change {
                Change::Data(sector) => (sector.at as usize, SECTOR, sector.bytes[0]),
                Change::Zero(span) => (span.start as usize, span.len as usize, 0),
            };
            model[at..at + len].fill(fill);
            overlay.apply(change);
        }
        for (start, len) in [(0, SIZE), (5000, 10), (8191, 8194), (69_000, 3000), (94_207, 2)] {
            let mut buf = vec![9; len];
            overlay.read_at(&mut buf, start as u64).unwrap();
            assert_eq!(buf, model[start..start + len], "{start} {len}");
        }
        for run in Extents::new(&overlay, Span::new(0, u64::MAX)) {
            let (span, kind) = run.unwrap();
            let bytes = &model[span.start as usize..span.end() as usize];
            assert!(!kind.reads_zero() || tranship_block::is_zero(bytes));
        }
        assert!(overlay.is_untouched(Span::new(0, 4096)));
        assert!(!overlay.is_untouched(Span::new(0, 4097)));
        assert!(!overlay.is_untouched(Span::new(60_000, 12_000)));
        assert!(overlay.read_at(&mut [0; 2], 99_999).is_err());
    }
}
