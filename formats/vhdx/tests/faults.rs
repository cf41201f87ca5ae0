// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A storage that counts what is asked of it, and fails when it is told to.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use support::{MIB, bytes_of, in_memory, open, open_read_only, options};
use tranship_block::{
    BlockDevice, CopyOptions, Error, ErrorKind, Extent, MemoryDevice, Repair, Result, Span,
    Storage, Zeroing, copy,
};
use tranship_format_testing::pattern;
use tranship_vhdx::{OpenOptions, Vhdx, check};

#[derive(Debug)]
struct Faulty {
    inner: Arc<MemoryDevice>,
    calls: AtomicU64,
    flushes: AtomicU64,
    /// The call that fails, and all after it.
    fails_from: u64,
    /// The file cannot grow beyond.
    most: u64,
}

impl Faulty {
    fn new(inner: Arc<MemoryDevice>) -> Self {
        let (calls, flushes) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { inner, calls, flushes, fails_from: u64::MAX, most: u64::MAX }
    }

    fn call(&self) -> Result<()> {
        if self.calls.fetch_add(1, Ordering::Relaxed) >= self.fails_from {
            return Err(Error::new(ErrorKind::Io, "pulled the plug"));
        }
        Ok(())
    }
}

impl BlockDevice for Faulty {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.call()?;
        self.inner.write_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.call()?;
        self.inner.write_zeroes(span, mode)
    }
    fn discard(&self, span: Span) -> Result<()> {
        self.call()?;
        self.inner.discard(span)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.inner.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        self.call()?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Storage for Faulty {
    fn set_len(&self, len: u64) -> Result<()> {
        self.call()?;
        if len > self.most {
            return Err(Error::new(ErrorKind::NoSpace, format!("no space for {len} bytes")));
        }
        self.inner.set_len(len)
    }
}

#[test]
fn converting_flushes_once_and_not_per_block() {
    let source = MemoryDevice::read_only(pattern(24 << 20, 1));
    let faulty = Arc::new(Faulty::new(in_memory(&options(24 * MIB))));
    let image = open(&(faulty.clone() as Arc<dyn Storage>), None);
    let how = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    copy(&source, &image, &how, &()).unwrap();
    drop(image);
    // Headers three times two, payload, entry, in place before the log is emptied.
    let flushes = faulty.flushes.load(Ordering::Relaxed);
    assert!(flushes <= 12, "{flushes} flushes for 24 blocks");
    let found = open_read_only(faulty.inner.snapshot(), None).unwrap();
    assert!(bytes_of(&found) == pattern(24 << 20, 1));
}

#[test]
fn whatever_fails_the_image_stays_valid_and_says_so() {
    let fresh = in_memory(&options(4 * MIB)).snapshot();
    let work = |image: &Vhdx| -> (Option<Vec<u8>>, Result<()>) {
        let mut flushed = None;
        let mut model = vec![0; 4 << 20];
        let mut run = || {
            for round in 0..3_u64 {
                let at = round * MIB + 1000;
                image.write_at(&pattern(5000, round), at)?;
                model[at as usize..at as usize + 5000].copy_from_slice(&pattern(5000, round));
                image.discard(Span::new(round.saturating_sub(1) * MIB, MIB / 2))?;
                image.flush()?;
                flushed = Some(model.clone());
            }
            Ok(())
        };
        let result = run();
        (flushed, result)
    };
    let mut failures = 0;
    for fails_from in 0.. {
        let inner = Arc::new(MemoryDevice::new(fresh.clone()));
        let faulty = Arc::new(Faulty { fails_from, ..Faulty::new(inner.clone()) });
        let image = open(&(faulty.clone() as Arc<dyn Storage>), None);
        let (flushed, result) = work(&image);
        drop(image);
        let device = Arc::new(MemoryDevice::read_only(inner.snapshot()));
        let report = check(&*device, Repair::Nothing).unwrap();
        assert_eq!(report.corruptions, 0, "{fails_from}: {:?}", report.details);
        let found = bytes_of(&Vhdx::open_read_only(device, OpenOptions::default()).unwrap());
        for (at, byte) in flushed.unwrap_or_default().chunks(5000).enumerate() {
            // What was written later may be there as well, where there were zeroes.
            let place = &found[at * 5000..at * 5000 + byte.len()];
            let kept = place.iter().zip(byte).all(|(is, was)| is == was || *was == 0);
            assert!(kept, "{fails_from}: flushed bytes at {} are lost", at * 5000);
        }
        if result.is_ok() && faulty.calls.load(Ordering::Relaxed) < fails_from {
            break;
        }
        failures += 1;
    }
    assert!(failures > 20, "{failures} places to fail");
}

#[test]
fn a_full_disk_is_an_error_that_can_be_got_over() {
    let inner = in_memory(&options(8 * MIB));
    let most = inner.size() + 2 * MIB;
    let faulty = Arc::new(Faulty { most, ..Faulty::new(inner) });
    let image = open(&(faulty as Arc<dyn Storage>), None);
    let error = image.write_at(&pattern(5 << 20, 1), 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    image.flush().unwrap();
    image.discard(Span::new(0, MIB)).unwrap();
    image.flush().unwrap();
    image.write_at(&pattern(1 << 20, 2), 5 * MIB).unwrap();
    image.flush().unwrap();
    let mut found = vec![0; 2 << 20];
    image.read_at(&mut found, 5 * MIB).unwrap();
    assert!(found[..1 << 20] == pattern(1 << 20, 2));
    image.read_at(&mut found, 0).unwrap();
    assert!(found[1 << 20..] == pattern(5 << 20, 1)[1 << 20..2 << 20]);
}
