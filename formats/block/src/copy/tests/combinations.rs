// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whatever the options, the target has the source's bytes.
#![allow(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "the numbers are the test's own"
)]

use super::*;
use crate::testing::Faulty;
use crate::{Advice, Digest, HashedChunk};
use sha2::Digest as _;
use std::ops::Range;

#[derive(Default)]
struct Notes {
    hashes: Mutex<Vec<HashedChunk>>,
    unreadable: Mutex<Vec<Span>>,
}

impl CopyObserver for Notes {
    fn hashed(&self, chunk: HashedChunk) {
        self.hashes.lock().unwrap().push(chunk);
    }
    fn unreadable(&self, span: Span, error: &Error) {
        assert_eq!(error.message(), "bad sector");
        self.unreadable.lock().unwrap().push(span);
    }
}

/// A target that notes the order of what reaches it.
#[derive(Debug)]
struct Ordered {
    inner: MemoryDevice,
    block: u32,
    checked: bool,
    last: AtomicU64,
    busy: AtomicBool,
}

impl Ordered {
    fn note(&self, start: u64) {
        if self.checked {
            assert!(!self.busy.swap(true, Ordering::SeqCst), "two writes at the same time");
            assert!(self.last.swap(start, Ordering::SeqCst) <= start, "writes go back");
            std::thread::yield_now();
            self.busy.store(false, Ordering::SeqCst);
        }
    }
}

impl BlockDevice for Ordered {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn preferred_block(&self) -> u32 {
        self.block
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.note(offset);
        self.inner.write_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.note(span.start);
        self.inner.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.inner.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// Ranges of 0 to a few pages, not aligned to anything.
fn ranges(size: u64) -> impl Strategy<Value = Vec<Range<u64>>> {
    let range = (0..size, 1..40_000_u64).prop_map(|(at, len)| at..at + len);
    prop::collection::vec(range, 0..5)
}

fn options() -> impl Strategy<Value = CopyOptions> {
    let block = prop::sample::select(vec![0_u64, 1, 4096, 10_000, 65_536]);
    let chunk = prop::sample::select(vec![1_u64, 4096, 50_000, 1 << 20]);
    let step = prop::sample::select(vec![0_u64, 5000, 1 << 20]);
    let flags = prop::array::uniform6(any::<bool>());
    let hash = prop::option::of(prop::sample::select(vec![4096_u64, 16_384, 65_536]));
    (0..200_000_u64, 1..4_usize, block, (chunk, step), flags, hash).prop_map(
        |(start, threads, zero_block, (chunk, step), flags, hash)| {
            let [target_is_zero, allocate, ordered, salvage, backed, extents] = flags;
            CopyOptions {
                start,
                threads,
                zero_block,
                chunk,
                step,
                extents: extents || backed,
                target_is_zero: target_is_zero && !backed,
                allocate,
                ordered,
                salvage,
                hash: hash.filter(|_| !backed),
                deepest: backed.then_some(0),
                ..CopyOptions::default()
            }
        },
    )
}

fn expected_hashes(bytes: &[u8], chunk: u64, start: u64) -> Vec<HashedChunk> {
    bytes
        .chunks(chunk as usize)
        .zip(0..)
        .filter(|(bytes, index)| index * chunk >= start && !crate::is_zero(bytes))
        .map(|(bytes, index)| HashedChunk {
            index,
            digest: Digest(sha2::Sha256::digest(bytes).into()),
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn the_bytes_arrive(
        pages in prop::collection::vec(any::<bool>(), 1..60),
        odd in 0usize..4096,
        larger in prop::sample::select(vec![0usize, 1, 9000]),
        stored in ranges(250_000),
        deeper in ranges(250_000),
        block in prop::sample::select(vec![512_u32, 4096, 16_384, 2 << 20, 5000]),
        mut options in options(),
    ) {
        let bytes = disk(&pages, odd);
        let size = bytes.len() as u64;
        options.start = options.start.min(size);
        if let Some(chunk) = options.hash {
            options.start -= options.start % chunk;
        }
        let mut source = Faulty::new(MemoryDevice::read_only(bytes.clone()));
        for range in stored {
            source = source.all_data(range);
        }
        let start = options.start as usize;
        let mut before = vec![if options.target_is_zero { 0 } else { 0xee }; bytes.len() + larger];
        before[..start].fill(0xdd);
        for range in deeper {
            source = source.deeper(range.clone());
            let end = (range.end as usize).min(bytes.len());
            let range = (range.start as usize).min(end)..end;
            before[range.clone()].copy_from_slice(&bytes[range]);
        }
        if options.deepest.is_none() && !options.target_is_zero {
            before[start..].fill(0xee);
        } else if options.deepest.is_none() {
            before[start..].fill(0);
        }
        let mut expected = bytes.clone();
        expected.resize(bytes.len() + larger, 0);
        expected[..start].copy_from_slice(&before[..start]);
        let target = Ordered {
            inner: MemoryDevice::new(before),
            block,
            checked: options.ordered,
            last: AtomicU64::new(0),
            busy: AtomicBool::new(false),
        };
        let notes = Notes::default();
        let copied = copy(&source, &target, &options, &notes).unwrap();
        let found = target.inner.snapshot();
        let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
        prop_assert_eq!(differs, None, "{:?}", copied);
        let all = copied.bytes_written + copied.bytes_zero + copied.bytes_skipped;
        let keeps_rest = options.target_is_zero && !options.allocate;
        let end = if keeps_rest { size } else { size + larger as u64 };
        prop_assert_eq!(all, end - options.start);
        if let Some(chunk) = options.hash {
            prop_assert_eq!(
                notes.hashes.into_inner().unwrap(),
                expected_hashes(&bytes, chunk, options.start)
            );
        }
    }

    #[test]
    fn what_can_be_read_is_saved(
        pages in prop::collection::vec(any::<bool>(), 1..60),
        odd in 0usize..4096,
        bad in ranges(250_000),
        lost in ranges(250_000),
        unit in prop::sample::select(vec![512_u64, 4096, 8192]),
        threads in 1usize..3,
    ) {
        let bytes = disk(&pages, odd);
        let mut source = Faulty::new(MemoryDevice::read_only(bytes.clone()));
        for range in lost {
            source = source.no_extents(range);
        }
        let mut expected = bytes.clone();
        for range in bad.into_iter().filter(|range| range.start < bytes.len() as u64) {
            let first = (range.start / unit * unit) as usize;
            let last = (range.end.next_multiple_of(unit) as usize).min(bytes.len());
            expected[first.min(last)..last].fill(0);
            source = source.bad(range);
        }
        let target = MemoryDevice::new(vec![0xee; bytes.len()]);
        let options = CopyOptions {
            salvage: true, threads, zero_block: unit, chunk: 16_384, ..CopyOptions::default()
        };
        let notes = Notes::default();
        let copied = copy(&source, &target, &options, &notes).unwrap();
        let found = target.snapshot();
        // A piece that begins inside a unit loses less than the whole unit.
        let right = |at: usize| {
            found[at] == expected[at] || (expected[at] == 0 && found[at] == bytes[at])
        };
        prop_assert_eq!((0..bytes.len()).find(|at| !right(*at)), None);
        let reported = notes.unreadable.into_inner().unwrap();
        prop_assert_eq!(reported.iter().map(|span| span.len).sum::<u64>(), copied.bytes_unreadable);
        for (at, (was, is)) in bytes.iter().zip(&found).enumerate() {
            let told = reported.iter().any(|span| span.start <= at as u64 && (at as u64) < span.end());
            prop_assert!(was == is || told, "byte {} was lost in silence", at);
        }
    }
}

#[test]
fn without_salvage_bad_places_end_the_copy() {
    let bytes = vec![1; 100_000];
    let target = MemoryDevice::new(vec![0; 100_000]);
    let source = Faulty::new(MemoryDevice::new(bytes.clone())).bad(50_000..50_001);
    let options = CopyOptions { chunk: 4096, ordered: true, threads: 3, ..CopyOptions::default() };
    let error = copy(&source, &target, &options, &()).unwrap_err();
    assert_eq!((error.message(), error.offset()), ("reading the source failed", Some(49_152)));
    let source = Faulty::new(MemoryDevice::new(bytes)).no_extents(50_000..50_001);
    let error = copy(&source, &target, &options, &()).unwrap_err();
    let expected = ("finding the source's extents failed", Some(50_000));
    assert_eq!((error.message(), error.offset()), expected);
}

#[test]
fn options_that_contradict_one_another_are_refused() {
    let device = MemoryDevice::new(vec![1; 100]);
    let backed = CopyOptions { deepest: Some(0), ..CopyOptions::default() };
    for options in [
        CopyOptions { target_is_zero: true, ..backed },
        CopyOptions { hash: Some(4096), ..backed },
        CopyOptions { extents: false, ..backed },
    ] {
        assert_eq!(copy(&device, &device, &options, &()).unwrap_err().kind(), ErrorKind::Usage);
    }
}

#[test]
fn both_disks_leave_the_page_cache() {
    #[derive(Debug)]
    struct Advised(MemoryDevice, Mutex<Vec<(Span, Advice)>>);
    impl BlockDevice for Advised {
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
            Ok(Extent::new(ExtentKind::Data, self.size() - offset))
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
        fn advise(&self, span: Span, advice: Advice) {
            self.1.lock().unwrap().push((span, advice));
        }
    }
    let size = 70 << 20;
    let device = || Advised(MemoryDevice::new(vec![1; size]), Mutex::default());
    let (source, target) = (device(), device());
    // One thread: with more, nobody may be at the right place at the right time.
    let options =
        CopyOptions { drop_cache: true, threads: 1, zero_block: 0, ..CopyOptions::default() };
    copy(&source, &target, &options, &()).unwrap();
    let size = size as u64;
    let advice = source.1.into_inner().unwrap();
    assert_eq!(advice.first(), Some(&(Span::new(0, size), Advice::WillRead)));
    assert_eq!(advice.last(), Some(&(Span::new(0, size), Advice::DropCache)));
    let advice = target.1.into_inner().unwrap();
    let started: Vec<Span> = advice
        .iter()
        .filter(|(_, advice)| *advice == Advice::StartWriteback)
        .map(|(span, _)| *span)
        .collect();
    assert_eq!(started, [Span::new(0, 32 << 20), Span::new(32 << 20, 32 << 20)]);
    assert_eq!(advice.last(), Some(&(Span::new(0, size), Advice::DropCache)));
}
