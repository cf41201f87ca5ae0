// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whenever the power goes, the image stays valid and keeps what was flushed.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use support::{apply, in_memory, open};
use tranship_block::{BlockDevice, MemoryDevice, Storage, Zeroing};
use tranship_format_testing::{Op, PowerCut, contents, pattern};
use tranship_qcow2::{Qcow2, check_read_only};

/// Opens what is left of the disk; every guest byte is from the last promise or newer.
fn inspect(
    disk: Vec<u8>,
    backing: Option<&Arc<dyn BlockDevice>>,
    promised: &[u8],
    now: &[Vec<u8>],
) {
    let device = Arc::new(MemoryDevice::read_only(disk));
    let report = check_read_only(&device).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.details);
    let image = Qcow2::open_read_only(device, backing.cloned()).unwrap();
    let found = contents(&image);
    for (at, byte) in found.iter().enumerate().filter(|(at, byte)| **byte != promised[*at]) {
        let known = now.iter().any(|state| *byte == state[at]);
        assert!(known, "byte {at:#x} is {byte}, promised {}", promised[at]);
    }
}

fn run(bits: u32, size: u64, base: Option<Vec<u8>>, seed: u64) {
    let backing =
        base.map(|base| -> Arc<dyn BlockDevice> { Arc::new(MemoryDevice::read_only(base)) });
    let recorder = Arc::new(PowerCut::new(in_memory(size, bits).snapshot()));
    let storage: Arc<dyn Storage> = recorder.clone();
    let image = open(&storage, backing.clone());
    let mut model = contents(&image);
    let first = model.clone();
    let mut states = vec![model.clone()];
    let mut random = seed;
    let mut next = |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % limit
    };
    for step in 0..14 {
        let at = next(size);
        let len = (next(3 << bits) + 1).min(size - at);
        let cluster = 1 << bits;
        let op = match next(6) {
            0 => Op::Discard(at, len),
            1 => Op::Zero(at, len, Zeroing::MayUnmap),
            2 => Op::Flush,
            _ => Op::Write(at, len as usize, step),
        };
        apply(&image, &mut model, cluster, &op);
        states.push(model.clone());
        if matches!(op, Op::Flush) {
            recorder.promise(&model);
        }
    }
    drop(image);

    let mut looked_at = 0_usize;
    recorder.replay(&first, seed, |disk, promised| {
        looked_at += 1;
        inspect(disk, backing.as_ref(), promised, &states);
    });
    assert!(looked_at > 50, "only {looked_at} disks were looked at");
}

#[test]
fn a_standalone_image_survives_every_cut() {
    run(9, 36_864, None, 1);
}

#[test]
fn an_overlay_survives_every_cut() {
    run(9, 35_328, Some(pattern(20_000, 8)), 2);
}
