// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counting what a device is asked to do, and how long it takes.

use crate::{
    Advice, BlockDevice, Extent, FileRange, Result, Span, Storage, Zeroing, device::length,
};
use serde::Serialize;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Latencies are sorted by powers of two of microseconds; the last class is everything
/// from 67 seconds on.
const CLASSES: usize = 28;

/// A device that counts what passes through it. Clones count together.
#[derive(Clone, Debug)]
pub struct Measured<D> {
    device: D,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    reads: Counter,
    writes: Counter,
    zeroes: Counter,
    discards: Counter,
    flushes: Counter,
    zeroes_skipped: AtomicU64,
}

#[derive(Debug, Default)]
struct Counter {
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    microseconds: AtomicU64,
    latency: [AtomicU64; CLASSES],
}

/// What a device did until now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// Reads.
    pub reads: OperationStatistics,
    /// Writes of data, copies inside the kernel included.
    pub writes: OperationStatistics,
    /// Ranges made zero without data.
    pub zeroes: OperationStatistics,
    /// Ranges given back.
    pub discards: OperationStatistics,
    /// Flushes.
    pub flushes: OperationStatistics,
    /// Bytes that were zero and of which the device heard nothing.
    pub zeroes_skipped: u64,
}

/// What a device did of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OperationStatistics {
    /// Operations that ended, well or badly.
    pub operations: u64,
    /// Bytes of those that ended well.
    pub bytes: u64,
    /// Operations that failed.
    pub errors: u64,
    /// Microseconds that all of them took together.
    pub microseconds: u64,
    /// How many took how long; classes without operations are left out.
    pub latency: Vec<LatencyClass>,
}

/// Operations of similar latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LatencyClass {
    /// They took less than this many microseconds, and at least half of it; a power of
    /// two, or none for the class without an upper end.
    pub below_microseconds: Option<u64>,
    /// How many there were.
    pub operations: u64,
}

impl Counter {
    fn note(&self, bytes: u64, good: bool, took: Duration) {
        let add = |counter: &AtomicU64, more| {
            counter.fetch_add(more, Ordering::Relaxed);
        };
        add(&self.operations, 1);
        if good {
            add(&self.bytes, bytes);
        } else {
            add(&self.errors, 1);
        }
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        add(&self.microseconds, microseconds);
        let class = usize::try_from(u64::BITS.saturating_sub(microseconds.leading_zeros()));
        let class = class.unwrap_or(CLASSES).min(CLASSES.saturating_sub(1));
        if let Some(class) = self.latency.get(class) {
            add(class, 1);
        }
    }

    fn snapshot(&self) -> OperationStatistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let last = CLASSES.saturating_sub(1);
        let latency = self.latency.iter().enumerate().map(|(class, count)| LatencyClass {
            below_microseconds: u32::try_from(class)
                .ok()
                .filter(|_| class < last)
                .and_then(|class| 1_u64.checked_shl(class)),
            operations: get(count),
        });
        OperationStatistics {
            operations: get(&self.operations),
            bytes: get(&self.bytes),
            errors: get(&self.errors),
            microseconds: get(&self.microseconds),
            latency: latency.filter(|class| class.operations > 0).collect(),
        }
    }

    fn time<T>(&self, bytes: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let begun = Instant::now();
        let result = work();
        self.note(bytes, result.is_ok(), begun.elapsed());
        result
    }
}

impl<D> Measured<D> {
    /// Counts what `device` does from now on.
    pub fn new(device: D) -> Self {
        Self { device, counters: Arc::default() }
    }

    /// The device itself.
    pub fn inner(&self) -> &D {
        &self.device
    }

    /// What was counted. Operations of other threads may be counted in part.
    pub fn snapshot(&self) -> Statistics {
        let Counters { reads, writes, zeroes, discards, flushes, zeroes_skipped } = &*self.counters;
        Statistics {
            reads: reads.snapshot(),
            writes: writes.snapshot(),
            zeroes: zeroes.snapshot(),
            discards: discards.snapshot(),
            flushes: flushes.snapshot(),
            zeroes_skipped: zeroes_skipped.load(Ordering::Relaxed),
        }
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

    fn discard(&self, span: Span) -> Result<()> {
        self.counters.discards.time(span.len, || self.device.discard(span))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.device.extent_at(offset)
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
        same.note_zeroes_skipped(5);
        let seen = device.snapshot();
        let numbers = [&seen.reads, &seen.writes, &seen.zeroes, &seen.discards, &seen.flushes]
            .map(|kind| (kind.operations, kind.bytes, kind.errors));
        assert_eq!(numbers, [(2, 50, 1), (2, 17, 0), (1, 30, 0), (1, 30, 0), (1, 0, 0)]);
        assert_eq!(seen.zeroes_skipped, 5);
        let classes = seen.reads.latency.iter().map(|class| class.operations).sum::<u64>();
        assert_eq!(classes, 2);
        let json = serde_json::to_value(&seen).unwrap();
        assert_eq!(json["writes"]["bytes"], 17);
    }

    #[test]
    fn latencies_are_sorted_by_powers_of_two() {
        let counter = Counter::default();
        for microseconds in [0, 1, 2, 3, 4, 1023, 1024, 1 << 26, u64::MAX] {
            counter.note(0, true, Duration::from_micros(microseconds));
        }
        let classes: Vec<_> = counter
            .snapshot()
            .latency
            .iter()
            .map(|class| (class.below_microseconds, class.operations))
            .collect();
        assert_eq!(
            classes,
            [
                (Some(1), 1),
                (Some(2), 1),
                (Some(4), 2),
                (Some(8), 1),
                (Some(1024), 1),
                (Some(2048), 1),
                (None, 2)
            ]
        );
    }
}
