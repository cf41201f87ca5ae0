// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Holding a device to a rate.

use crate::{
    Advice, BlockDevice, Encoding, Extent, FileRange, PackedTarget, PackedUnit, Result, Span,
    Storage, Zeroing, device::length,
};
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What may pass at once after a pause, in time at the full rate.
const BURST: Duration = Duration::from_millis(100);

/// The most that may pass on average; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Bytes read and written per second.
    pub bytes: Option<NonZeroU64>,
    /// Reads, writes, zeroings and discards per second.
    pub operations: Option<NonZeroU64>,
}

/// A rate that all of its clones keep together.
#[derive(Clone, Debug)]
pub struct Throttle {
    rate: Rate,
    began: Instant,
    bytes: Arc<Mutex<Bucket>>,
    operations: Arc<Mutex<Bucket>>,
}

/// The time, counted from the start, at which everything let through so far would have
/// passed at exactly the full rate; it lags behind the clock by a burst at most. No tokens are counted, so nothing has to refill them.
#[derive(Debug, Default)]
struct Bucket {
    paid: Duration,
}

impl Bucket {
    /// Lets `count` pass at `rate` per second, and tells until when they have to wait.
    fn pass(&mut self, now: Duration, count: u64, rate: NonZeroU64) -> Duration {
        let start = self.paid.max(now.saturating_sub(BURST));
        self.paid = start.saturating_add(time_of(count, rate));
        self.paid
    }
}

fn time_of(count: u64, rate: NonZeroU64) -> Duration {
    let nanoseconds = u128::from(count)
        .saturating_mul(1_000_000_000)
        .checked_div(u128::from(rate.get()))
        .unwrap_or(0);
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

impl Throttle {
    /// A throttle that lets nothing pass but `rate`.
    pub fn new(rate: Rate) -> Self {
        Self { rate, began: Instant::now(), bytes: Arc::default(), operations: Arc::default() }
    }

    /// What it lets pass.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Waits until one more operation of `bytes` bytes may be done.
    pub fn wait(&self, bytes: u64) {
        let now = self.began.elapsed();
        let pass = |bucket: &Mutex<Bucket>, count, rate: Option<NonZeroU64>| {
            rate.map_or(Duration::ZERO, |rate| {
                bucket.lock().unwrap_or_else(PoisonError::into_inner).pass(now, count, rate)
            })
        };
        let until = pass(&self.bytes, bytes, self.rate.bytes).max(pass(
            &self.operations,
            1,
            self.rate.operations,
        ));
        if let Some(pause) = until.checked_sub(now).filter(|pause| !pause.is_zero()) {
            std::thread::sleep(pause);
        }
    }
}

/// A device whose operations wait for a [`Throttle`].
///
/// Copies inside the kernel from it are not offered, since nobody would see them.
#[derive(Clone, Debug)]
pub struct Throttled<D> {
    device: D,
    throttle: Throttle,
}

impl<D> Throttled<D> {
    /// Holds `device` to `throttle`.
    pub fn new(device: D, throttle: Throttle) -> Self {
        Self { device, throttle }
    }
}

impl<D: BlockDevice> BlockDevice for Throttled<D> {
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
        self.throttle.wait(length(buf));
        self.device.read_at(buf, offset)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.throttle.wait(bufs.iter().map(|buf| length(buf)).fold(0, u64::saturating_add));
        self.device.read_vectored_at(bufs, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.throttle.wait(length(buf));
        self.device.write_at(buf, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.throttle.wait(bufs.iter().map(|buf| length(buf)).fold(0, u64::saturating_add));
        self.device.write_vectored_at(bufs, offset)
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.throttle.wait(0);
        self.device.write_zeroes(span, mode)
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.throttle.wait(0);
        self.device.discard(span)
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.device.extent_at(offset)
    }

    fn extent_within(&self, span: Span) -> Result<Extent> {
        self.device.extent_within(span)
    }

    fn flush(&self) -> Result<()> {
        self.device.flush()
    }

    fn write_from_file(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
        self.throttle.wait(range.len);
        self.device.write_from_file(offset, range)
    }

    fn advise(&self, span: Span, advice: Advice) {
        self.device.advise(span, advice);
    }
}

impl<D: Storage> Storage for Throttled<D> {
    fn set_len(&self, len: u64) -> Result<()> {
        self.device.set_len(len)
    }
}

impl<D: PackedTarget> PackedTarget for Throttled<D> {
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
        self.throttle.wait(length(arena));
        self.device.store(arena, units)
    }

    fn finish(&self) -> Result<()> {
        self.device.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;

    fn rate(count: u64) -> NonZeroU64 {
        NonZeroU64::new(count).unwrap()
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_is_kept() {
        let mut bucket = Bucket::default();
        let mut now = Duration::from_secs(5);
        // A second's worth at 1000 a second in operations of 10, each done when it may be.
        let begun = now;
        for _ in 0..100 {
            now = now.max(bucket.pass(now, 10, rate(1000)));
        }
        assert_eq!(now.checked_sub(begun), Some(Duration::from_millis(900)));
        // A pause gives back a burst and not more.
        now = now.saturating_add(Duration::from_hours(1));
        assert!(bucket.pass(now, 100, rate(1000)) <= now);
        let until = bucket.pass(now, 100, rate(1000));
        assert_eq!(until.checked_sub(now), Some(Duration::from_millis(100)));
    }

    #[test]
    fn no_rate_or_count_overflows() {
        for (count, per_second) in [(u64::MAX, 1), (u64::MAX, u64::MAX), (1, u64::MAX), (0, 1)] {
            let mut bucket = Bucket::default();
            for _ in 0..3 {
                bucket.pass(Duration::MAX, count, rate(per_second));
                bucket.pass(Duration::ZERO, count, rate(per_second));
            }
        }
    }

    #[test]
    fn clones_share_a_rate_and_bytes_stay_the_same() {
        let rate = Rate { bytes: Some(rate(1_000_000)), operations: None };
        let throttle = Throttle::new(rate);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                let throttle = throttle.clone();
                scope.spawn(move || {
                    let device = Throttled::new(MemoryDevice::new(vec![0; 60_000]), throttle);
                    let mut buf = vec![1; 60_000];
                    device.write_at(&buf, 0).unwrap();
                    buf.fill(0);
                    device.read_at(&mut buf, 0).unwrap();
                    assert!(buf.iter().all(|byte| *byte == 1));
                });
            }
        });
        // 360 ms at the rate, of which 100 are the burst.
        assert!(begun.elapsed() >= Duration::from_millis(260));
    }
}
