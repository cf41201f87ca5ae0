// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The counters of a device, and what is told of them.

use crate::Result;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Latencies are sorted by powers of two of microseconds; the last class is everything
/// from 67 seconds on.
const CLASSES: usize = 28;

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: OperationCounter,
    pub(super) writes: OperationCounter,
    pub(super) zeroes: OperationCounter,
    pub(super) discards: OperationCounter,
    pub(super) flushes: OperationCounter,
    pub(super) extents: OperationCounter,
    pub(super) zeroes_skipped: AtomicU64,
}

/// What a device has counted, for whoever counts the same device in another process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    reads: OperationCounts,
    writes: OperationCounts,
    zeroes: OperationCounts,
    discards: OperationCounts,
    flushes: OperationCounts,
    extents: OperationCounts,
    zeroes_skipped: u64,
}

/// The counters of one kind of operations as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct OperationCounts {
    operations: u64,
    bytes: u64,
    errors: u64,
    microseconds: u64,
    slowest: u64,
    latency: [u64; CLASSES],
}

/// Counts operations of one kind and how long they take; shared freely between threads.
#[derive(Debug, Default)]
pub struct OperationCounter {
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    microseconds: AtomicU64,
    slowest: AtomicU64,
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
    /// Questions about what is allocated.
    pub extents: OperationStatistics,
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
    /// Microseconds that all of them took together; those of several threads add up.
    pub microseconds: u64,
    /// Microseconds that one took on average.
    pub mean_microseconds: u64,
    /// Half of them took no longer than this many microseconds. As with the other shares,
    /// the upper end of the class of latency in which the share is reached.
    pub p50_microseconds: u64,
    /// 90 in 100 took no longer.
    pub p90_microseconds: u64,
    /// 99 in 100 took no longer.
    pub p99_microseconds: u64,
    /// The slowest took this long.
    pub max_microseconds: u64,
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

impl Counters {
    pub(super) fn snapshot(&self) -> Statistics {
        let Self { reads, writes, zeroes, discards, flushes, extents, zeroes_skipped } = self;
        Statistics {
            reads: reads.snapshot(),
            writes: writes.snapshot(),
            zeroes: zeroes.snapshot(),
            discards: discards.snapshot(),
            flushes: flushes.snapshot(),
            extents: extents.snapshot(),
            zeroes_skipped: zeroes_skipped.load(Ordering::Relaxed),
        }
    }

    pub(super) fn counts(&self) -> Counts {
        let Self { reads, writes, zeroes, discards, flushes, extents, zeroes_skipped } = self;
        Counts {
            reads: reads.counts(),
            writes: writes.counts(),
            zeroes: zeroes.counts(),
            discards: discards.counts(),
            flushes: flushes.counts(),
            extents: extents.counts(),
            zeroes_skipped: zeroes_skipped.load(Ordering::Relaxed),
        }
    }

    pub(super) fn add(&self, counts: &Counts) {
        let Self { reads, writes, zeroes, discards, flushes, extents, zeroes_skipped } = self;
        reads.add(&counts.reads);
        writes.add(&counts.writes);
        zeroes.add(&counts.zeroes);
        discards.add(&counts.discards);
        flushes.add(&counts.flushes);
        extents.add(&counts.extents);
        zeroes_skipped.fetch_add(counts.zeroes_skipped, Ordering::Relaxed);
    }
}

impl OperationCounter {
    /// An operation on `bytes` bytes ended, well or badly.
    pub fn note(&self, bytes: u64, good: bool, took: Duration) {
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
        self.slowest.fetch_max(microseconds, Ordering::Relaxed);
        let class = usize::try_from(u64::BITS.saturating_sub(microseconds.leading_zeros()));
        let class = class.unwrap_or(CLASSES).min(CLASSES.saturating_sub(1));
        if let Some(class) = self.latency.get(class) {
            add(class, 1);
        }
    }

    /// What was counted. An operation of another thread may be counted in part.
    pub fn snapshot(&self) -> OperationStatistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let last = CLASSES.saturating_sub(1);
        let latency = self.latency.iter().enumerate().map(|(class, count)| LatencyClass {
            below_microseconds: u32::try_from(class)
                .ok()
                .filter(|_| class < last)
                .and_then(|class| 1_u64.checked_shl(class)),
            operations: get(count),
        });
        let latency: Vec<LatencyClass> = latency.filter(|class| class.operations > 0).collect();
        let (operations, microseconds) = (get(&self.operations), get(&self.microseconds));
        let slowest = get(&self.slowest);
        OperationStatistics {
            operations,
            bytes: get(&self.bytes),
            errors: get(&self.errors),
            microseconds,
            mean_microseconds: microseconds.checked_div(operations).unwrap_or(0),
            p50_microseconds: share(&latency, 50, slowest),
            p90_microseconds: share(&latency, 90, slowest),
            p99_microseconds: share(&latency, 99, slowest),
            max_microseconds: slowest,
            latency,
        }
    }

    fn counts(&self) -> OperationCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        OperationCounts {
            operations: get(&self.operations),
            bytes: get(&self.bytes),
            errors: get(&self.errors),
            microseconds: get(&self.microseconds),
            slowest: get(&self.slowest),
            latency: self.latency.each_ref().map(get),
        }
    }

    fn add(&self, counts: &OperationCounts) {
        // Numbers of a process that tells lies may overflow, and are still only numbers.
        let add = |counter: &AtomicU64, more| {
            counter.fetch_add(more, Ordering::Relaxed);
        };
        add(&self.operations, counts.operations);
        add(&self.bytes, counts.bytes);
        add(&self.errors, counts.errors);
        add(&self.microseconds, counts.microseconds);
        self.slowest.fetch_max(counts.slowest, Ordering::Relaxed);
        for (counter, more) in self.latency.iter().zip(counts.latency) {
            add(counter, more);
        }
    }

    pub(super) fn time<T>(&self, bytes: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let begun = Instant::now();
        let result = work();
        self.note(bytes, result.is_ok(), begun.elapsed());
        result
    }
}

/// The end of the class in which `percent` of all operations are reached.
fn share(latency: &[LatencyClass], percent: u64, slowest: u64) -> u64 {
    let sum = latency.iter().fold(0_u64, |sum, class| sum.saturating_add(class.operations));
    // Rounded up: half of three are two.
    let wanted = u128::from(sum).saturating_mul(u128::from(percent)).div_ceil(100);
    let mut seen = 0_u128;
    for class in latency {
        seen = seen.saturating_add(u128::from(class.operations));
        if seen >= wanted {
            let end = class.below_microseconds.map(|below| below.saturating_sub(1));
            return end.unwrap_or(slowest).min(slowest);
        }
    }
    slowest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_sorted_by_powers_of_two() {
        let counter = OperationCounter::default();
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

    #[test]
    fn what_another_process_counted_is_added() {
        let (here, there) = (Counters::default(), Counters::default());
        here.reads.note(10, true, Duration::from_micros(100));
        there.reads.note(20, true, Duration::from_micros(5));
        there.reads.note(20, false, Duration::from_micros(300));
        there.flushes.note(0, true, Duration::from_micros(1));
        there.zeroes_skipped.fetch_add(7, Ordering::Relaxed);
        let text = serde_json::to_string(&there.counts()).unwrap();
        here.add(&serde_json::from_str(&text).unwrap());
        let told = here.snapshot();
        let OperationStatistics { operations, bytes, errors, microseconds, .. } = told.reads;
        assert_eq!([operations, bytes, errors, microseconds], [3, 30, 1, 405]);
        assert_eq!((told.reads.max_microseconds, told.reads.latency.len()), (300, 3));
        assert_eq!((told.flushes.operations, told.zeroes_skipped), (1, 7));
        // Lies are nothing but wrong numbers.
        let worst = text.replace("20", "18446744073709551615");
        for _ in 0..2 {
            here.add(&serde_json::from_str(&worst).unwrap());
            here.snapshot();
        }
        assert!(serde_json::from_str::<Counts>("{}").is_err());
    }

    #[test]
    fn shares_are_ends_of_classes_and_never_more_than_the_slowest() {
        let told = |latencies: &[u64]| {
            let counter = OperationCounter::default();
            for microseconds in latencies {
                counter.note(0, true, Duration::from_micros(*microseconds));
            }
            let told = counter.snapshot();
            let OperationStatistics { p50_microseconds, p90_microseconds, .. } = told;
            [
                told.mean_microseconds,
                p50_microseconds,
                p90_microseconds,
                told.p99_microseconds,
                told.max_microseconds,
            ]
        };
        assert_eq!(told(&[]), [0; 5]);
        assert_eq!(told(&[5]), [5, 5, 5, 5, 5]);
        // Half of them are in the class below 8, 90 of 100 in the one below 128.
        assert_eq!(told(&[4, 5, 6, 7, 7, 100, 100, 100, 100, 1000]), [142, 7, 127, 1000, 1000]);
        // The class without an end.
        let long = 1 << 40;
        assert_eq!(told(&[1, long, long])[1..], [long; 4]);
    }
}
