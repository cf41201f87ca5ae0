// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sources that answer many requests at a time, in an order of their own.

use super::*;
use crate::testing::Faulty;
use crate::{HashedChunk, ReadQueue};

/// A disk with two ways to it. Of what is asked for, the latest is answered first.
#[derive(Debug)]
struct Backwards {
    disk: Faulty,
    most: AtomicU64,
}

#[derive(Debug)]
struct Way<'a> {
    disk: &'a Backwards,
    asked: Mutex<Vec<Span>>,
}

impl BlockDevice for Backwards {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn read_at(&self, _buf: &mut [u8], offset: u64) -> Result<()> {
        Err(Error::usage("there are queues for that").at(offset))
    }
    fn read_queues(&self) -> Vec<Box<dyn ReadQueue + '_>> {
        let way = || Way { disk: self, asked: Mutex::default() };
        vec![Box::new(way()), Box::new(way())]
    }
    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.disk.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

impl ReadQueue for Way<'_> {
    fn start(&self, spans: &[Span]) -> Result<()> {
        for span in spans {
            span.check_within(self.disk.size())?;
        }
        let mut asked = self.asked.lock().unwrap();
        asked.extend(spans);
        self.disk.most.fetch_max(u64::try_from(asked.len()).unwrap(), Ordering::SeqCst);
        Ok(())
    }

    fn next(&self, buf: &mut Vec<u8>) -> Option<(Span, Result<()>)> {
        let span = self.asked.lock().unwrap().pop()?;
        let len = usize::try_from(span.len).unwrap();
        *buf = vec![0xee; len + 7];
        let read = self.disk.disk.read_at(&mut buf[..len], span.start);
        Some((span, read))
    }
}

#[derive(Debug, Default)]
struct Hashes(Mutex<Vec<HashedChunk>>);

impl CopyObserver for Hashes {
    fn hashed(&self, chunk: HashedChunk) {
        self.0.lock().unwrap().push(chunk);
    }
}

/// Data here and there; the end is no whole block.
fn disk() -> Vec<u8> {
    let mut bytes = vec![0; (3 << 20) + 777];
    for (number, at) in (0..bytes.len() - 20_000).step_by(37_000).enumerate() {
        if number % 5 != 3 {
            bytes[at..at + 300 * (number % 67)].fill(u8::try_from(number % 250).unwrap() + 1);
        }
    }
    bytes[1 << 20..(2 << 20) + 50].fill(7);
    *bytes.last_mut().unwrap() = 9;
    bytes
}

fn backwards(bytes: &[u8]) -> Backwards {
    let disk = Faulty::new(MemoryDevice::new(bytes.to_vec()));
    Backwards { disk, most: AtomicU64::new(0) }
}

#[test]
fn answers_in_any_order_make_the_same_copy() {
    let bytes = disk();
    let plain = AllData(MemoryDevice::new(bytes.clone()));
    for extents in [true, false] {
        for zero_block in [0, 4096] {
            for (chunk, step) in [(65_536, 65_536), (1 << 20, 65_536), (4096, 4096)] {
                for hash in [None, Some(65_536)] {
                    let options = CopyOptions {
                        threads: 3,
                        in_flight: 8,
                        chunk,
                        step,
                        extents,
                        zero_block,
                        hash,
                        ..CopyOptions::default()
                    };
                    let (source, seen, wanted) =
                        (backwards(&bytes), Hashes::default(), Hashes::default());
                    let target = MemoryDevice::new(vec![0xee; (3 << 20) + 5000]);
                    let copied = copy(&source, &target, &options, &seen).unwrap();
                    let found = target.snapshot();
                    assert!(found[..bytes.len()] == bytes, "{options:?}");
                    assert!(found[bytes.len()..].iter().all(|byte| *byte == 0));
                    assert!(copied.bytes_read > 0 && source.most.load(Ordering::SeqCst) > 1);
                    let target = MemoryDevice::new(vec![0xee; bytes.len()]);
                    copy(&plain, &target, &CopyOptions { in_flight: 0, ..options }, &wanted)
                        .unwrap();
                    assert_eq!(*seen.0.lock().unwrap(), *wanted.0.lock().unwrap());
                }
            }
        }
    }
}

#[test]
fn the_failure_is_that_with_the_lowest_offset_and_nothing_stays_in_flight() {
    let bytes = vec![5; 4 << 20];
    for threads in [1, 4] {
        let mut source = backwards(&bytes);
        source.disk = Faulty::new(MemoryDevice::new(bytes.clone()))
            .bad((1 << 20) + 5..(1 << 20) + 6)
            .bad(3 << 20..(3 << 20) + 1);
        let options = CopyOptions {
            threads,
            in_flight: 64,
            chunk: 65_536,
            step: 65_536,
            ..CopyOptions::default()
        };
        let target = MemoryDevice::new(vec![0; bytes.len()]);
        let error = copy(&source, &target, &options, &()).unwrap_err();
        assert_eq!((error.kind(), error.offset()), (ErrorKind::Io, Some(1 << 20)));
        assert_eq!(error.message(), "reading the source failed");
    }
}

#[test]
fn a_cancelled_copy_ends() {
    let bytes = vec![5; 4 << 20];
    let watcher = Watcher { cancel_after: Some(1 << 20), ..Watcher::default() };
    let options = CopyOptions {
        threads: 2,
        in_flight: 16,
        chunk: 65_536,
        checkpoint_every: 1 << 18,
        ..CopyOptions::default()
    };
    let target = MemoryDevice::new(vec![0; bytes.len()]);
    let error = copy(&backwards(&bytes), &target, &options, &watcher).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    let checkpoint = usize::try_from(watcher.checkpoint.load(Ordering::SeqCst)).unwrap();
    assert!(target.snapshot()[..checkpoint] == bytes[..checkpoint] && checkpoint < bytes.len());
}

/// A target whose first flush fails.
#[derive(Debug)]
struct Forgetful(MemoryDevice, AtomicBool);

impl BlockDevice for Forgetful {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.0.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.0.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        if self.1.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Io, "what was written is gone"))
    }
}

#[test]
fn a_flush_after_one_that_failed_makes_no_checkpoint() {
    let bytes = vec![5; 4 << 20];
    let source = MemoryDevice::new(bytes.clone());
    let target = Forgetful(MemoryDevice::new(vec![0; bytes.len()]), AtomicBool::new(false));
    let watcher = Watcher::default();
    let options = CopyOptions { checkpoint_every: 1 << 20, threads: 2, ..CopyOptions::default() };
    let error = copy(&source, &target, &options, &watcher).unwrap_err();
    assert_eq!(error.message(), "flushing the target failed");
    assert_eq!(watcher.checkpoint.load(Ordering::SeqCst), 0);
}
