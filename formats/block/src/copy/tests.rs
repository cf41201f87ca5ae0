// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies of devices that fail, lie down and get up again.
#![allow(clippy::arithmetic_side_effects, reason = "the numbers are the test's own")]

mod combinations;
mod packed;
mod queued;

use super::*;
use crate::{Error, ErrorKind, Extent, ExtentKind, MemoryDevice, Zeroing};
use proptest::prelude::*;
use std::error::Error as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A target whose writes are lost in a power cut until they are flushed, and which fails
/// at the nth operation.
#[derive(Debug)]
struct Fragile {
    volatile: MemoryDevice,
    durable: Mutex<Vec<u8>>,
    operations: AtomicU64,
    fail_at: u64,
    written: AtomicU64,
    zeroed: AtomicU64,
}

impl Fragile {
    fn new(bytes: Vec<u8>, fail_at: u64) -> Self {
        Self {
            volatile: MemoryDevice::new(bytes.clone()),
            durable: Mutex::new(bytes),
            operations: AtomicU64::new(0),
            fail_at,
            written: AtomicU64::new(0),
            zeroed: AtomicU64::new(0),
        }
    }

    fn count(&self, offset: u64) -> Result<()> {
        if self.operations.fetch_add(1, Ordering::SeqCst) == self.fail_at {
            return Err(Error::new(ErrorKind::NoSpace, "disk is full").at(offset));
        }
        Ok(())
    }
}

impl BlockDevice for Fragile {
    fn size(&self) -> u64 {
        self.volatile.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.count(offset)?;
        self.volatile.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.count(offset)?;
        self.written.fetch_add(u64::try_from(buf.len()).unwrap(), Ordering::SeqCst);
        self.volatile.write_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.count(span.start)?;
        self.zeroed.fetch_add(span.len, Ordering::SeqCst);
        self.volatile.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.volatile.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        self.count(0)?;
        *self.durable.lock().unwrap() = self.volatile.snapshot();
        Ok(())
    }
}

/// Notes what it is told and checks that it makes sense.
#[derive(Debug, Default)]
struct Watcher {
    done: AtomicU64,
    checkpoint: AtomicU64,
    cancel_after: Option<u64>,
    busy: AtomicBool,
}

impl Watcher {
    fn alone(&self, work: impl FnOnce()) {
        assert!(!self.busy.swap(true, Ordering::SeqCst), "two calls at the same time");
        work();
        self.busy.store(false, Ordering::SeqCst);
    }
}

impl CopyObserver for Watcher {
    fn progress(&self, done: u64, total: u64) {
        self.alone(|| {
            assert!(self.done.swap(done, Ordering::SeqCst) <= done && done <= total);
        });
    }
    fn checkpoint(&self, offset: u64) {
        self.alone(|| assert!(self.checkpoint.swap(offset, Ordering::SeqCst) < offset));
    }
    fn is_cancelled(&self) -> bool {
        self.cancel_after.is_some_and(|limit| self.done.load(Ordering::SeqCst) >= limit)
    }
}

/// A device that says everything is data, as a raw file on a block device does.
#[derive(Debug)]
struct AllData(MemoryDevice);

impl BlockDevice for AllData {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent::new(ExtentKind::Data, self.size() - offset))
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// Bytes with pages of data where `pages` says so.
fn disk(pages: &[bool], odd: usize) -> Vec<u8> {
    let mut bytes = vec![0; pages.len() * 4096 + odd];
    for (at, page) in bytes.chunks_mut(4096).enumerate() {
        if pages.get(at).copied().unwrap_or(true) {
            page.fill(u8::try_from(at % 255).unwrap() + 1);
        }
    }
    bytes
}

#[test]
fn only_data_is_read_and_only_data_is_written() {
    let bytes = disk(&[false, true, true, false, false, false, true, false], 0);
    let source = MemoryDevice::read_only(bytes.clone());
    let target = Fragile::new(vec![0; bytes.len()], u64::MAX);
    let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    let copied = copy(&source, &target, &options, &()).unwrap();
    let expected =
        Copied { bytes_read: 12288, bytes_written: 12288, bytes_zero: 20480, ..Copied::default() };
    assert_eq!(copied, expected);
    assert_eq!(target.zeroed.load(Ordering::SeqCst), 0);
    assert_eq!(*target.durable.lock().unwrap(), bytes);
}

#[test]
fn zeroes_in_data_are_found_and_what_was_there_before_goes() {
    let bytes = disk(&[true, false, false, true], 100);
    let source = AllData(MemoryDevice::new(bytes.clone()));
    let mut expected = bytes.clone();
    expected.resize(30_000, 0);
    for (zero_block, bytes_written) in [(4096, 3 * 4096), (0, 5 * 4096)] {
        let target = Fragile::new(vec![0xee; 30_000], u64::MAX);
        let options = CopyOptions { zero_block, ..CopyOptions::default() };
        let copied = copy(&source, &target, &options, &()).unwrap();
        assert_eq!((copied.bytes_read, copied.bytes_written), (16_484, bytes_written));
        assert_eq!(copied.bytes_zero, 30_000 - bytes_written);
        assert_eq!(*target.durable.lock().unwrap(), expected);
    }
}

#[test]
fn extents_and_the_flush_can_be_left_out() {
    let bytes = disk(&[false, true, false, true], 100);
    let source = MemoryDevice::read_only(bytes.clone());
    let cases = [(true, 0, true, 8292), (false, 0, false, 16_484), (false, 4096, false, 16_484)];
    for (extents, checkpoint_every, flush, bytes_read) in cases {
        let target = Fragile::new(vec![0; bytes.len()], u64::MAX);
        let options = CopyOptions { extents, checkpoint_every, flush, ..CopyOptions::default() };
        let copied = copy(&source, &target, &options, &()).unwrap();
        assert_eq!((copied.bytes_read, copied.bytes_zero), (bytes_read, 8192));
        assert_eq!(target.volatile.snapshot(), bytes);
        let flushed = *target.durable.lock().unwrap() == bytes;
        assert_eq!(flushed, flush || checkpoint_every > 0);
    }
}

#[test]
fn sizes_and_starts_that_cannot_work_are_refused() {
    let source = MemoryDevice::new(vec![1; 100]);
    let small = MemoryDevice::new(vec![0; 99]);
    let error = copy(&source, &small, &CopyOptions::default(), &()).unwrap_err();
    assert_eq!(error.to_string(), "target has 99 bytes, expected at least the source's 100");
    let options = CopyOptions { start: 101, ..CopyOptions::default() };
    let error = copy(&source, &MemoryDevice::new(vec![0; 100]), &options, &()).unwrap_err();
    assert_eq!(error.to_string(), "copy cannot start behind its end at byte 100 (at offset 0x65)");
    let empty = MemoryDevice::new(vec![]);
    assert_eq!(copy(&empty, &empty, &CopyOptions::default(), &()).unwrap(), Copied::default());
}

#[test]
fn an_error_names_the_side_and_keeps_its_cause() {
    let good = MemoryDevice::new(vec![1; 10_000]);
    let bad = || Fragile::new(vec![2; 10_000], 0);
    let cases = [
        (copy(&good, &bad(), &CopyOptions::default(), &()), "writing the target failed"),
        (copy(&bad(), &good, &CopyOptions::default(), &()), "reading the source failed"),
        (
            copy(&MemoryDevice::new(vec![0; 9]), &bad(), &CopyOptions::default(), &()),
            "zeroing the target failed",
        ),
    ];
    for (result, expected) in cases {
        let error = result.unwrap_err();
        assert_eq!((error.message(), error.kind()), (expected, ErrorKind::NoSpace));
        assert_eq!(error.source().unwrap().to_string(), "disk is full (at offset 0x0)");
    }
}

#[test]
fn the_failure_with_the_lowest_offset_is_returned() {
    /// Every read fails; the higher, the sooner.
    #[derive(Debug)]
    struct Broken;
    impl BlockDevice for Broken {
        fn size(&self) -> u64 {
            64 << 20
        }
        fn is_read_only(&self) -> bool {
            true
        }
        fn read_at(&self, _buf: &mut [u8], offset: u64) -> Result<()> {
            std::thread::sleep(std::time::Duration::from_millis(20 - (offset >> 20).min(20)));
            Err(Error::new(ErrorKind::Io, "broken").at(offset))
        }
        fn write_zeroes(&self, _span: Span, _mode: Zeroing) -> Result<()> {
            Ok(())
        }
        fn extent_at(&self, offset: u64) -> Result<Extent> {
            Ok(Extent::new(ExtentKind::Data, self.size() - offset))
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
    }
    let target = MemoryDevice::new(vec![0; 64 << 20]);
    let error = copy(&Broken, &target, &CopyOptions::default(), &()).unwrap_err();
    assert_eq!(error.offset(), Some(0));
}

#[test]
fn a_cancelled_copy_leaves_a_checkpoint_from_which_it_goes_on() {
    let bytes = disk(&[true; 64], 7);
    let source = MemoryDevice::new(bytes.clone());
    let target = Fragile::new(vec![0xee; bytes.len()], u64::MAX);
    let options = CopyOptions { chunk: 8192, checkpoint_every: 1 << 30, ..CopyOptions::default() };
    let watcher = Watcher { cancel_after: Some(100_000), ..Watcher::default() };
    let error = copy(&source, &target, &options, &watcher).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    let start = watcher.checkpoint.load(Ordering::SeqCst);
    assert!(start >= 100_000 - 4 * 8192, "checkpoint at {start}");
    let options = CopyOptions { start, ..options };
    let watcher = Watcher::default();
    let copied = copy(&source, &target, &options, &watcher).unwrap();
    let len = u64::try_from(bytes.len()).unwrap();
    assert_eq!(copied.bytes_read, len - start);
    assert_eq!(watcher.done.load(Ordering::SeqCst), len);
    assert_eq!(watcher.checkpoint.load(Ordering::SeqCst), len);
    assert_eq!(*target.durable.lock().unwrap(), bytes);
}

#[test]
fn a_disk_of_many_tebibytes_costs_no_memory() {
    /// Sixteen TiB of nothing with a page of data each TiB.
    #[derive(Debug, Default)]
    struct Vast(AtomicU64);
    const TIB: u64 = 1 << 40;
    impl BlockDevice for Vast {
        fn size(&self) -> u64 {
            16 * TIB
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
            buf.fill(1);
            Ok(())
        }
        fn write_at(&self, buf: &[u8], _offset: u64) -> Result<()> {
            self.0.fetch_add(u64::try_from(buf.len()).unwrap(), Ordering::SeqCst);
            Ok(())
        }
        fn write_zeroes(&self, _span: Span, _mode: Zeroing) -> Result<()> {
            Ok(())
        }
        fn extent_at(&self, offset: u64) -> Result<Extent> {
            let within = offset % TIB;
            Ok(if within < 4096 {
                Extent::new(ExtentKind::Data, 4096 - within)
            } else {
                Extent::new(ExtentKind::Hole, TIB - within)
            })
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
    }
    let target = Vast::default();
    let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    let copied = copy(&Vast::default(), &target, &options, &()).unwrap();
    assert_eq!(target.0.load(Ordering::SeqCst), 16 * 4096);
    assert_eq!(copied.bytes_zero, 16 * (TIB - 4096));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Power cuts at any operation, any number of times: going on from the last checkpoint
    /// always ends with the source's bytes.
    #[test]
    fn a_copy_survives_power_cuts(
        pages in prop::collection::vec(any::<bool>(), 0..60),
        odd in 0usize..4096,
        larger in 0usize..10_000,
        chunk in prop::sample::select(vec![1u64, 4096, 12_288, 1 << 20]),
        threads in 1usize..4,
        target_is_zero: bool,
        ordered: bool,
        zero_block in prop::sample::select(vec![0u64, 1, 4096, 10_000]),
        every in 1u64..50_000,
        failures in prop::collection::vec(0u64..60, 0..6),
    ) {
        let bytes = disk(&pages, odd);
        let source = MemoryDevice::read_only(bytes.clone());
        let before = if target_is_zero { 0 } else { 0xee };
        let mut contents = vec![before; bytes.len() + larger];
        let mut start = 0;
        for fail_at in failures.into_iter().chain([u64::MAX]) {
            let target = Fragile::new(contents.clone(), fail_at);
            let options = CopyOptions {
                start, threads, chunk, target_is_zero, zero_block, ordered,
                checkpoint_every: every,
                ..CopyOptions::default()
            };
            let watcher = Watcher { checkpoint: AtomicU64::new(start), ..Watcher::default() };
            let result = copy(&source, &target, &options, &watcher);
            prop_assert!(result.is_ok() || fail_at != u64::MAX);
            contents = target.durable.lock().unwrap().clone();
            start = watcher.checkpoint.load(Ordering::SeqCst);
            if let Ok(copied) = result {
                let end = if target_is_zero { bytes.len() } else { contents.len() };
                prop_assert_eq!(start, u64::try_from(end).unwrap());
                prop_assert_eq!(target.written.load(Ordering::SeqCst), copied.bytes_written);
                break;
            }
        }
        prop_assert!(contents[..bytes.len()] == bytes[..], "contents differ");
        prop_assert!(contents[bytes.len()..].iter().all(|byte| *byte == 0));
    }
}
