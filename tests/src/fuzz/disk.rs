// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking at a disk that may be broken: whatever it says has to agree with what it gives.

use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, Extent, Result, is_zero};

/// Extents that are looked at.
const MOST_EXTENTS: usize = 200;
/// Places that cannot be looked at, before one gives up.
const MOST_ERRORS: usize = 8;
/// How long extents are looked at.
const LONGEST: Duration = Duration::from_millis(50);
/// Bytes that are read at the start of an extent.
const START: u64 = 6000;
/// Bytes that are read at its end.
const END: u64 = 700;
/// How far one goes on behind a place that has no extent.
const STEP: u64 = 64 << 10;

/// Bytes of a disk, or that they cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) bytes: Option<Vec<u8>>,
}

/// Looks at a disk and returns what was seen of its bytes. `file` is where stored bytes lie
/// as they are, if they do.
pub(crate) fn look(device: &dyn BlockDevice, file: Option<&dyn BlockDevice>) -> Vec<Seen> {
    let size = device.size();
    assert!(device.read_at(&mut [0], size).is_err(), "a byte behind the end was read");
    assert!(device.extent_at(size).is_err(), "there is an extent behind the end");
    assert!(device.sector_size().is_power_of_two());
    assert!(device.preferred_block() > 0);
    if device.is_read_only() && size > 0 {
        assert!(device.write_at(&[0], 0).is_err(), "a read-only disk was written");
    }
    let mut seen = Vec::new();
    let (mut at, mut extents, mut errors) = (0, 0, 0);
    // Disks may be so large that looking at all their tables takes minutes.
    let start = Instant::now();
    while at < size && extents < MOST_EXTENTS && errors < MOST_ERRORS && start.elapsed() < LONGEST {
        let Ok(extent) = device.extent_at(at) else {
            at = (at / STEP).saturating_add(1).saturating_mul(STEP);
            errors += 1;
            continue;
        };
        assert!(extent.len > 0, "empty extent at {at:#x}");
        let left = size - at;
        assert!(extent.len <= left, "{extent:?} at {at:#x}, but only {left} bytes left");
        extent_tells_the_truth(device, file, at, extent, &mut seen);
        at += extent.len;
        extents += 1;
    }
    // Larger reads, which cross extents, wherever the disk goes on.
    for part in 0..4 {
        let at = (size / 4).saturating_mul(part);
        seen.push(read(device, at, (size - at).min(70_000)));
    }
    seen
}

fn extent_tells_the_truth(
    device: &dyn BlockDevice,
    file: Option<&dyn BlockDevice>,
    at: u64,
    extent: Extent,
    seen: &mut Vec<Seen>,
) {
    let end = extent.len.min(END);
    for (skip, len) in [(0, extent.len.min(START)), (extent.len - end, end)] {
        let start = at + skip;
        let first = read(device, start, len);
        assert_eq!(first, read(device, start, len), "two reads differ in {extent:?}");
        let Some(bytes) = &first.bytes else {
            // Why a stored byte cannot be read is the format's business.
            assert!(!extent.kind.reads_zero(), "{extent:?} at {at:#x} cannot be read");
            seen.push(first);
            continue;
        };
        if extent.kind.reads_zero() {
            assert!(is_zero(bytes), "{extent:?} at {at:#x} has data");
        }
        let middle = len / 3;
        let (one, two) = (read(device, start, middle), read(device, start + middle, len - middle));
        let (Some(one), Some(two)) = (one.bytes, two.bytes) else {
            panic!("{extent:?} at {at:#x} can be read at once, but not piece by piece");
        };
        assert!([one, two].concat() == *bytes, "a split read differs in {extent:?} at {at:#x}");
        let mapped = extent.offset.filter(|_| extent.depth == 0 && !extent.compressed);
        if let (Some(offset), Some(file)) = (mapped, file) {
            let mut stored = vec![0; bytes.len()];
            let offset = offset + skip;
            assert!(offset + len <= file.size(), "{extent:?} at {at:#x} lies outside of the file");
            file.read_at(&mut stored, offset).unwrap();
            assert!(stored == *bytes, "{extent:?} at {at:#x} lies elsewhere in the file");
        }
        seen.push(first);
    }
}

pub(crate) fn read(device: &dyn BlockDevice, at: u64, len: u64) -> Seen {
    let mut bytes = vec![0xee; len as usize];
    let read: Result<()> = device.read_at(&mut bytes, at);
    Seen { at, len, bytes: read.is_ok().then_some(bytes) }
}

/// What was seen before is still there.
pub(crate) fn verify(device: &dyn BlockDevice, seen: &[Seen]) {
    for before in seen {
        let now = read(device, before.at, before.len);
        assert!(now == *before, "{} bytes at {:#x} have changed", before.len, before.at);
    }
}
