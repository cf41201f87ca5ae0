// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is equal, what differs, and where.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    reason = "the numbers are the test's own"
)]

use super::*;
use crate::MemoryDevice;
use crate::testing::Faulty;
use proptest::prelude::*;

fn run(a: &dyn BlockDevice, b: &dyn BlockDevice, strict: bool) -> Outcome {
    compare(a, b, &CompareOptions { strict, threads: 3 }, &())
}

#[test]
fn a_longer_disk_is_identical_as_long_as_it_is_zero() {
    let mut bytes = vec![7; 5000];
    let short = MemoryDevice::new(bytes.clone());
    bytes.resize(20_000, 0);
    let long = MemoryDevice::new(bytes.clone());
    assert_eq!(run(&short, &long, false).unwrap(), Comparison::Identical);
    assert_eq!(run(&long, &short, false).unwrap(), Comparison::Identical);
    assert_eq!(run(&long, &short, true).unwrap(), Comparison::SizesDiffer);
    bytes[19_999] = 1;
    let long = MemoryDevice::new(bytes);
    assert_eq!(run(&short, &long, false).unwrap(), Comparison::DiffersAt(19_999));
    assert_eq!(run(&long, &short, false).unwrap(), Comparison::DiffersAt(19_999));
}

#[test]
fn strict_looks_at_what_is_stored() {
    let zeroes = vec![0; 3 << 20];
    let holes = MemoryDevice::new(zeroes.clone());
    let stored = Faulty::new(MemoryDevice::new(zeroes)).all_data(4096..u64::MAX);
    assert_eq!(run(&holes, &stored, false).unwrap(), Comparison::Identical);
    assert_eq!(run(&holes, &stored, true).unwrap(), Comparison::AllocationDiffersAt(4096));
    assert_eq!(run(&stored, &stored, true).unwrap(), Comparison::Identical);
}

#[test]
fn a_disk_that_cannot_be_read_is_told_unless_a_difference_comes_first() {
    let bytes = vec![1; 3 << 20];
    let good = MemoryDevice::new(bytes.clone());
    let bad = Faulty::new(MemoryDevice::new(bytes.clone())).bad(2_500_000..2_500_001);
    let Err(CompareError::Read(error)) = run(&good, &bad, false) else { panic!("no read error") };
    assert_eq!(error.message(), "reading the second disk failed");
    let mut other = bytes;
    other[100] = 2;
    let good = MemoryDevice::new(other);
    assert_eq!(run(&bad, &good, false).unwrap(), Comparison::DiffersAt(100));

    let lost = Faulty::new(MemoryDevice::new(vec![1; 9000])).no_extents(8192..8193);
    let Err(CompareError::Extents(error)) = run(&lost, &lost, false) else { panic!("no error") };
    assert_eq!(
        error.to_string(),
        "finding the extents of the first disk failed (at offset 0x2000)"
    );
}

#[test]
fn a_cancelled_comparison_ends() {
    struct Enough;
    impl CopyObserver for Enough {
        fn is_cancelled(&self) -> bool {
            true
        }
    }
    let device = MemoryDevice::new(vec![1; 9000]);
    let outcome = compare(&device, &device, &CompareOptions::default(), &Enough);
    assert_eq!(Error::from(outcome.unwrap_err()).kind(), ErrorKind::Cancelled);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn the_first_difference_is_found(
        pages in prop::collection::vec(0u8..3, 1..300),
        changes in prop::collection::vec((0usize..300 * 4096, 0u8..3), 0..4),
        sizes in (0usize..4096, 0usize..4096),
        threads in 1usize..4,
    ) {
        let mut a: Vec<u8> = pages.iter().flat_map(|page| vec![*page; 4096]).collect();
        let mut b = a.clone();
        for (at, byte) in changes {
            let at = at % b.len();
            b[at] = byte;
        }
        a.truncate(a.len() - sizes.0);
        b.truncate(b.len() - sizes.1);
        let at = |bytes: &[u8], at: usize| bytes.get(at).copied().unwrap_or(0);
        let expected = (0..a.len().max(b.len())).find(|i| at(&a, *i) != at(&b, *i));
        let expected = expected.map_or(Comparison::Identical, |at| Comparison::DiffersAt(at as u64));
        let (a, b) = (MemoryDevice::new(a), MemoryDevice::new(b));
        let options = CompareOptions { strict: false, threads };
        prop_assert_eq!(compare(&a, &b, &options, &()).unwrap(), expected);
    }
}
