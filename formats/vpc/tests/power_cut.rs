// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whenever the power goes, the image stays valid and keeps what was flushed.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use support::{BLOCK, in_memory, in_tiny_blocks, initially, open, over};
use tranship_block::{BlockDevice, MemoryDevice, Repair, Zeroing};
use tranship_format_testing::{Op, PowerCut, apply, contents, pattern};
use tranship_vpc::{Kind, Vpc, check};

const SIZE: u64 = 36_864;

/// Opens what is left; every guest byte is from the last promise or newer.
fn inspect(disk: Vec<u8>, base: Option<&[u8]>, promised: &[u8], states: &[Vec<u8>]) {
    let device = Arc::new(MemoryDevice::new(disk));
    let image = Vpc::open_read_only(device.clone(), over(base)).unwrap();
    let found = contents(&image);
    let mut expected = promised.to_vec();
    expected.resize(found.len(), 0);
    for (number, piece) in found.chunks(512).enumerate() {
        let start = number * 512;
        if *piece == expected[start..start + piece.len()] {
            continue;
        }
        for (at, byte) in (start..).zip(piece).filter(|(at, byte)| **byte != expected[*at]) {
            let known = states.iter().any(|state| state.get(at).is_none_or(|other| byte == other));
            assert!(known, "byte {at:#x} is {byte:#x}, promised {:#x}", expected[at]);
        }
    }
    // A footer may be missing at one end, which a repair mends; nothing else is wrong.
    check(&*device, Repair::All).unwrap();
    let report = check(&*device, Repair::Nothing).unwrap();
    assert!(report.is_clean(), "{report:?}");
    let image = Vpc::open_read_only(device, over(base)).unwrap();
    assert_eq!(image.warnings(), [] as [&str; 0]);
    assert!(contents(&image) == found, "the repair changed the disk");
}

fn run(kind: Kind, base: Option<&[u8]>, seed: u64, resizing: bool) {
    let fresh = if resizing { in_tiny_blocks(kind, SIZE) } else { in_memory(kind, SIZE) };
    let storage = Arc::new(PowerCut::new(fresh.snapshot()));
    let image = open(&storage, base);
    let first = initially(SIZE as usize, base);
    let mut model = first.clone();
    let mut states = vec![model.clone()];
    let mut random = seed;
    let mut next = |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % limit
    };
    for step in 0..if resizing { 21 } else { 30 } {
        let size = image.size();
        let at = next(size);
        let block = u64::from(BLOCK);
        let len = (next(if resizing { 4096 } else { 2 * block }) + 1).min(size - at);
        let op = match next(10) {
            0 => Op::Discard(at / block * block, block),
            1 => Op::Zero(at / block * block, block, Zeroing::MayUnmap),
            2 => Op::Zero(at, len, Zeroing::KeepAllocated),
            3..5 => Op::Flush,
            _ => Op::Write(at, len as usize, step),
        };
        apply(&image, &mut model, &op);
        states.push(model.clone());
        if matches!(op, Op::Flush) {
            storage.promise(&model);
        }
        if resizing && step % 10 == 9 {
            let size = size + if step == 9 { 30 << 10 } else { 5 * 512 };
            image.resize(size).unwrap();
            model.resize(size as usize, 0);
            states.push(model.clone());
            storage.promise(&model);
        }
    }
    image.flush().unwrap();
    storage.promise(&model);
    drop(image);
    storage.replay(&first, seed, |disk, promised| inspect(disk, base, promised, &states));
}

fn base() -> Vec<u8> {
    let mut base = pattern(30_000, 8);
    base[8192..20_000].fill(0);
    base
}

#[test]
fn a_dynamic_disk_survives_every_cut() {
    for seed in 1..3 {
        run(Kind::Dynamic, None, seed, false);
    }
}

#[test]
fn a_differencing_disk_survives_every_cut() {
    for seed in 1..3 {
        run(Kind::Differencing, Some(&base()), seed, false);
    }
}

#[test]
fn resizing_survives_every_cut() {
    run(Kind::Dynamic, None, 11, true);
    run(Kind::Differencing, Some(&base()), 12, true);
}

#[test]
fn mending_footers_survives_every_cut() {
    for end in [true, false] {
        let fresh = in_memory(Kind::Dynamic, SIZE);
        let disk = open(&fresh, None);
        let mut model = initially(SIZE as usize, None);
        apply(&disk, &mut model, &Op::Write(10, 20_000, 1));
        disk.flush().unwrap();
        let mut bytes = fresh.snapshot();
        let at = if end { bytes.len() - 512 } else { 0 };
        bytes[at..at + 512].fill(0x11);
        let storage = Arc::new(PowerCut::new(bytes));
        let disk = open(&storage, None);
        assert_eq!(disk.warnings().len(), 1);
        let first = model.clone();
        apply(&disk, &mut model, &Op::Write(30_000, 1000, 2));
        disk.flush().unwrap();
        storage.promise(&model);
        drop(disk);
        assert_eq!(open(&storage, None).warnings(), [] as [&str; 0]);
        let states = [first.clone(), model.clone()];
        storage.replay(&first, 3, |disk, promised| inspect(disk, None, promised, &states));
    }
}
