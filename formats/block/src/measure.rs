// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counting what a device is asked to do, and how long it takes.

mod counter;
mod queue;

pub use counter::{Counts, LatencyClass, OperationCounter, OperationStatistics, Statistics};

use crate::{
    Advice, BlockDevice, Encoding, Extent, FileRange, PackedTarget, PackedUnit, ReadQueue, Result,
    Span, Storage, Zeroing, device::length,
};
use counter::Counters;
use queue::MeasuredQueue;
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// A device that counts what passes through it. Clones count together.
#[derive(Clone, Debug)]
pub struct Measured<D> {
    device: D,
    counters: Arc<Counters>,
}

impl<D> Measured<D> {
    /// Counts what `device` does from now on.
    pub fn new(device: D) -> Self {
        Self { device, counters: Arc::default() }
    }

    /// Counts what `device` does together with what this one does.
    pub fn along<E>(&self, device: E) -> Measured<E> {
        Measured { device, counters: Arc::clone(&self.counters) }
    }

    /// The device itself.
    pub fn inner(&self) -> &D {
        &self.device
    }

    /// What was counted. Operations of other threads may be counted in part.
    pub fn snapshot(&self) -> Statistics {
        self.counters.snapshot()
    }

    /// What was counted, for another process.
    pub fn counts(&self) -> Counts {
        self.counters.counts()
    }

    /// Counts what another process has counted of the same device.
    pub fn add(&self, counts: &Counts) {
        self.counters.add(counts);
    }

    /// Counts zeroes that somebody had no need to write: [`crate::Copied::bytes_zero`] of
    /// a copy onto a target that was zero before.
    pub fn note_zeroes_skipped(&self, bytes: u64) {
        self.counters.zeroes_skipped.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl<D: BlockDevice> BlockDevice for Measured<D> {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn refresh_size(&self) {
        self.device.refresh_size();
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
        self.counters.reads.time(length(buf), || self.device.read_at(buf, offset))
    }

    fn read_queues(&self) -> Vec<Box<dyn ReadQueue + '_>> {
        let counted = |queue| -> Box<dyn ReadQueue + '_> {
            let counters = &*self.counters;
            Box::new(MeasuredQueue { queue, counters, begun: Mutex::default() })
        };
        self.device.read_queues().into_iter().map(counted).collect()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let bytes = bufs.iter().map(|buf| length(buf)).fold(0, u64::saturating_add);
        self.counters.reads.time(bytes, || self.device.read_vectored_at(bufs, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.counters.writes.time(length(buf), || self.device.write_at(buf, offset))
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let bytes = bufs.iter().map(|buf| length(buf)).fold(0, u64::saturating_add);
        self.counters.writes.time(bytes, || self.device.write_vectored_at(bufs, offset))
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.counters.zeroes.time(span.len, || self.device.write_zeroes(span, mode))
    }

    fn zeroes_quickly(&self, span: Span, mode: Zeroing) -> bool {
        self.device.zeroes_quickly(span, mode)
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.counters.discards.time(span.len, || self.device.discard(span))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.counters.extents.time(0, || self.device.extent_at(offset))
    }

    fn extent_within(&self, span: Span) -> Result<Extent> {
        self.counters.extents.time(0, || self.device.extent_within(span))
    }

    fn flush(&self) -> Result<()> {
        self.counters.flushes.time(0, || self.device.flush())
    }

    /// What the kernel copies from here to another file is counted by that file alone.
    fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
        self.device.file_range(offset)
    }

    fn write_from_file(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
        let begun = Instant::now();
        let result = self.device.write_from_file(offset, range);
        // `false` is followed by a write of the same bytes.
        if !matches!(result, Ok(false)) {
            self.counters.writes.note(range.len, result.is_ok(), begun.elapsed());
        }
        result
    }

    fn advise(&self, span: Span, advice: Advice) {
        self.device.advise(span, advice);
    }
}

impl<D: Storage> Storage for Measured<D> {
    fn set_len(&self, len: u64) -> Result<()> {
        self.device.set_len(len)
    }
}

/// What is packed is counted as it is stored: compressed.
impl<D: PackedTarget> PackedTarget for Measured<D> {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn unit(&self) -> u32 {
        self.device.unit()
    }

    fn pack(&self, bytes: &[u8], arena: &mut Vec<u8>) -> Result<Encoding> {
        self.device.pack(bytes, arena)
    }

    fn store(&self, arena: &[u8], units: &[PackedUnit]) -> Result<()> {
        self.counters.writes.time(length(arena), || self.device.store(arena, units))
    }

    fn finish(&self) -> Result<()> {
        self.counters.flushes.time(0, || self.device.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;

    #[test]
    fn everything_is_counted_once() {
        let device = Measured::new(Arc::new(MemoryDevice::new(vec![0; 100])));
        let same = device.clone();
        let span = Span::new(0, 30);
        same.write_at(&[1; 10], 0).unwrap();
        same.write_vectored_at(&[IoSlice::new(&[1; 3]), IoSlice::new(&[2; 4])], 0).unwrap();
        same.read_at(&mut [0; 50], 0).unwrap();
        assert!(same.read_at(&mut [0; 50], 51).is_err());
        same.write_zeroes(span, Zeroing::MayUnmap).unwrap();
        same.discard(span).unwrap();
        same.flush().unwrap();
        assert_eq!(device.along(same.inner()).extent_at(7).unwrap().len, 93);
        same.note_zeroes_skipped(5);
        let seen = device.snapshot();
        let numbers = [&seen.reads, &seen.writes, &seen.zeroes, &seen.discards, &seen.flushes]
            .map(|kind| (kind.operations, kind.bytes, kind.errors));
        assert_eq!(numbers, [(2, 50, 1), (2, 17, 0), (1, 30, 0), (1, 30, 0), (1, 0, 0)]);
        assert_eq!((seen.zeroes_skipped, seen.extents.operations), (5, 1));
        let classes = seen.reads.latency.iter().map(|class| class.operations).sum::<u64>();
        assert_eq!(classes, 2);
        let json = serde_json::to_value(&seen).unwrap();
        assert_eq!(json["writes"]["bytes"], 17);
    }
}
