// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies into an image of packed units that checks what it is given.
#![allow(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "the numbers are the test's own"
)]

use super::*;
use crate::testing::Faulty;
use crate::{Encoding, PackedTarget, PackedUnit};

/// Stores a unit of one byte value as that byte.
#[derive(Debug, Default)]
struct Tape {
    size: u64,
    unit: u32,
    bytes: Mutex<Vec<u8>>,
    units: AtomicU64,
    next: AtomicU64,
    busy: AtomicBool,
    finished: AtomicBool,
    stores: AtomicU64,
    fail_pack: Option<u64>,
    fail_store: Option<u64>,
}

impl PackedTarget for Tape {
    fn size(&self) -> u64 {
        self.size
    }
    fn unit(&self) -> u32 {
        self.unit
    }
    fn pack(&self, bytes: &[u8], arena: &mut Vec<u8>) -> Result<Encoding> {
        if bytes.first().is_some_and(|byte| Some(u64::from(*byte)) == self.fail_pack) {
            return Err(Error::new(ErrorKind::Io, "compressor is tired"));
        }
        if let [first, rest @ ..] = bytes
            && rest.iter().all(|byte| byte == first)
        {
            arena.push(*first);
            return Ok(Encoding::Compressed);
        }
        arena.extend_from_slice(bytes);
        Ok(Encoding::Plain)
    }
    fn store(&self, mut arena: &[u8], units: &[PackedUnit]) -> Result<()> {
        assert!(!self.busy.swap(true, Ordering::SeqCst), "two stores at the same time");
        let count = self.stores.fetch_add(1, Ordering::SeqCst);
        if self.fail_store.is_some_and(|at| count >= at) {
            self.busy.store(false, Ordering::SeqCst);
            return Err(Error::new(ErrorKind::NoSpace, "tape ends"));
        }
        let mut disk = self.bytes.lock().unwrap();
        for unit in units {
            let PackedUnit { offset, len, encoding } = *unit;
            assert!(offset.is_multiple_of(u64::from(self.unit)) && offset < self.size);
            assert!(self.next.swap(offset + 1, Ordering::SeqCst) <= offset, "out of order");
            let whole = u64::from(self.unit).min(self.size - offset) as usize;
            let packed = arena.split_off(..len).unwrap();
            let bytes = match encoding {
                Encoding::Plain => packed.to_vec(),
                Encoding::Compressed => vec![packed[0]; whole],
            };
            assert_eq!(bytes.len(), whole);
            disk[offset as usize..offset as usize + whole].copy_from_slice(&bytes);
            self.units.fetch_add(1, Ordering::SeqCst);
        }
        assert!(arena.is_empty());
        self.busy.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn finish(&self) -> Result<()> {
        self.finished.store(true, Ordering::SeqCst);
        Ok(())
    }
}

fn tape(before: Vec<u8>, unit: u32) -> Tape {
    Tape { size: before.len() as u64, unit, bytes: Mutex::new(before), ..Tape::default() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn the_tape_has_the_disk(
        pages in prop::collection::vec(any::<bool>(), 0..80),
        odd in 0usize..4096,
        larger in prop::sample::select(vec![0usize, 1, 5000, 200_000]),
        stored in (0u64..300_000, 0u64..100_000),
        deeper in prop::option::of((0u64..300_000, 0u64..100_000)),
        unit in prop::sample::select(vec![512_u32, 4096, 65_536]),
        chunk in prop::sample::select(vec![1_u64, 70_000, 1 << 20]),
        zero_block in prop::sample::select(vec![0_u64, 4096]),
        threads in 1usize..5,
    ) {
        let mut bytes = disk(&pages, odd);
        let mut source = Faulty::new(MemoryDevice::read_only(bytes.clone()))
            .all_data(stored.0..stored.0 + stored.1);
        bytes.resize(bytes.len() + larger, 0);
        let mut before = vec![0; bytes.len()];
        if let Some((at, len)) = deeper {
            source = source.deeper(at..at + len);
            before.fill(0xee);
            let end = ((at + len) as usize).min(source.size() as usize);
            let range = (at as usize).min(end)..end;
            before[range.clone()].copy_from_slice(&bytes[range]);
        }
        let target = tape(before, unit);
        let options = CopyOptions {
            threads, chunk, zero_block, deepest: deepest(deeper), ..CopyOptions::default()
        };
        let copied = copy_packed(&source, &target, &options, &()).unwrap();
        prop_assert!(target.finished.load(Ordering::SeqCst));
        let found = target.bytes.into_inner().unwrap();
        prop_assert_eq!(found.iter().zip(&bytes).position(|(a, b)| a != b), None, "{:?}", copied);
        if zero_block > 0 && deeper.is_none() {
            let data = bytes.chunks(unit as usize).filter(|unit| !crate::is_zero(unit)).count();
            prop_assert_eq!(target.units.load(Ordering::SeqCst), data as u64);
        }
    }

    /// Wherever it fails, it ends, tells what failed, and finishes no image.
    #[test]
    fn a_failure_ends_it(
        threads in 1usize..5,
        at in 0u64..40,
        what in 0u8..4,
    ) {
        let bytes = disk(&[true; 200], 0);
        let mut target = tape(vec![0; bytes.len()], 4096);
        let mut source = Faulty::new(MemoryDevice::read_only(bytes));
        let mut observer = Watcher::default();
        let expected = match what {
            0 => {
                target.fail_pack = Some(at + 1);
                "packing a unit failed"
            }
            1 => {
                target.fail_store = Some(at);
                "writing the target failed"
            }
            2 => {
                source = source.bad(at * 4096..at * 4096 + 1);
                "reading the source failed"
            }
            _ => {
                observer.cancel_after = Some(at * 4096);
                "copy was cancelled"
            }
        };
        let options = CopyOptions { threads, chunk: 4096, ..CopyOptions::default() };
        let error = copy_packed(&source, &target, &options, &observer).unwrap_err();
        prop_assert_eq!(error.message(), expected);
        prop_assert!(!target.finished.load(Ordering::SeqCst));
    }
}

#[test]
fn units_that_are_longer_than_a_step_are_whole() {
    for data in [0..1, 700_000..700_001, (1 << 20) - 1..(1 << 20) + 1, 4_500_000..4_500_001] {
        let mut bytes = vec![0; 4_600_000];
        bytes[data.clone()].fill(7);
        let source = MemoryDevice::read_only(bytes.clone());
        for unit in [1 << 20, 2 << 20] {
            let target = tape(vec![0; bytes.len()], unit);
            copy_packed(&source, &target, &CopyOptions::default(), &()).unwrap();
            assert!(target.bytes.into_inner().unwrap() == bytes, "{data:?} {unit}");
        }
    }
}

fn deepest(deeper: Option<(u64, u64)>) -> Option<u32> {
    deeper.map(|_| 0)
}

#[test]
fn what_a_tape_cannot_do_is_refused() {
    let source = MemoryDevice::new(vec![1; 5000]);
    for options in [
        CopyOptions { start: 1, ..CopyOptions::default() },
        CopyOptions { checkpoint_every: 1, ..CopyOptions::default() },
        CopyOptions { allocate: true, ..CopyOptions::default() },
    ] {
        let error = copy_packed(&source, &tape(vec![0; 5000], 512), &options, &()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
    let small = tape(vec![0; 4999], 512);
    assert!(copy_packed(&source, &small, &CopyOptions::default(), &()).is_err());
}
