// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whenever the power goes, images with subclusters, lazy reference counts and compressed
//! clusters stay valid and keep what was flushed; and an image that is written in bulk is
//! whole or none.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice, PackedTarget, PackedUnit, Storage, Zeroing};
use tranship_format_testing::{Op, PowerCut, apply, contents, pattern};
use tranship_qcow2::{
    CreateOptions, Header, OpenOptions, Qcow2, create, create_for_writing, create_packed,
};

type Backing = Option<Arc<dyn BlockDevice>>;

fn options(backing: &Backing) -> OpenOptions {
    OpenOptions { backing: backing.clone(), ..OpenOptions::default() }
}

/// What is done: the usual, and a cluster written compressed.
enum Step {
    Plain(Op),
    Compressed(u64, u8),
}

fn steps(create: &CreateOptions, seed: u64) -> Vec<Step> {
    let size = create.size;
    let cluster = 1_u64 << create.cluster_bits;
    let unit = if create.extended_l2 { cluster / 32 } else { cluster };
    let mut random = seed;
    let mut next = move |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % limit
    };
    (0..14)
        .map(|step| {
            let at = next(size);
            let len = next(3 * unit) + 1;
            Step::Plain(match next(8) {
                0 => Op::Discard(at / unit * unit, len.next_multiple_of(unit)),
                1 => Op::Zero(at, len, Zeroing::MayUnmap),
                2 => Op::Zero(at / unit * unit, unit * 2, Zeroing::KeepAllocated),
                3 => Op::Flush,
                4 => return Step::Compressed(at / cluster * cluster, step as u8 + 1),
                _ => Op::Write(at, len as usize, step),
            })
        })
        .collect()
}

/// Does all of it to an image, cuts the power everywhere, and looks at what is left.
fn run(create_options: &CreateOptions, backing: &Backing, seed: u64) {
    let fresh = MemoryDevice::new(Vec::new());
    create(&fresh, create_options).unwrap();
    let storage = Arc::new(PowerCut::new(fresh.snapshot()));
    let image = Qcow2::open(storage.clone(), options(backing)).unwrap();
    let mut model = contents(&image);
    let first = model.clone();
    let mut states = vec![model.clone()];
    for step in steps(create_options, seed) {
        match step {
            Step::Plain(op) => {
                apply(&image, &mut model, &op);
                if matches!(op, Op::Flush) {
                    storage.promise(&model);
                }
            }
            Step::Compressed(at, byte) => {
                let len = (create_options.size - at).min(1 << create_options.cluster_bits);
                let bytes = vec![byte; len as usize];
                image.write_compressed(at, &bytes).unwrap();
                model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
            }
        }
        states.push(model.clone());
    }
    image.finish().unwrap();
    storage.promise(&model);
    drop(image);
    let mut looked_at = 0_usize;
    storage.replay(&first, seed, |disk, promised| {
        looked_at += 1;
        let device = Arc::new(MemoryDevice::read_only(disk));
        let is_dirty = Header::read(&*device).unwrap().is_dirty();
        assert!(!is_dirty || create_options.lazy_refcounts);
        let image = Qcow2::open_read_only(device, backing.clone()).unwrap();
        // Counts of a dirty image are rebuilt before they are trusted.
        if !is_dirty && !create_options.extended_l2 {
            let report = image.check().unwrap();
            assert_eq!(report.corruptions, 0, "{:?}", report.details);
        }
        let found = contents(&image);
        for (at, byte) in found.iter().enumerate().filter(|(at, byte)| **byte != promised[*at]) {
            let known = states.iter().any(|state| *byte == state[at]);
            assert!(known, "byte {at:#x} is {byte}, promised {}", promised[at]);
        }
    });
    assert!(looked_at > 50, "only {looked_at} disks were looked at");
}

#[test]
fn subclusters_survive_every_cut() {
    let options =
        CreateOptions { extended_l2: true, cluster_bits: 14, ..CreateOptions::new(40_960) };
    run(&options, &None, 3);
}

#[test]
fn subclusters_over_a_backing_image_survive_every_cut() {
    let options =
        CreateOptions { extended_l2: true, cluster_bits: 14, ..CreateOptions::new(40_960) };
    let base = Arc::new(MemoryDevice::read_only(pattern(30_000, 8)));
    run(&options, &Some(base), 4);
}

#[test]
fn lazy_refcounts_survive_every_cut() {
    let options =
        CreateOptions { lazy_refcounts: true, cluster_bits: 9, ..CreateOptions::new(36_864) };
    run(&options, &None, 5);
}

#[test]
fn compressed_clusters_survive_every_cut() {
    let options = CreateOptions { cluster_bits: 10, ..CreateOptions::new(20_480) };
    for seed in [6, 7] {
        run(&options, &None, seed);
    }
}

/// Either no image, or one with these contents.
fn whole_or_none(storage: &PowerCut, expected: &[u8]) {
    let (mut whole, mut none) = (0, 0);
    storage.replay(&[], 1, |disk, _| {
        let device = Arc::new(MemoryDevice::read_only(disk));
        match Qcow2::open_read_only(device, None) {
            Ok(image) => {
                whole += 1;
                assert_eq!(image.check().unwrap().corruptions, 0);
                assert!(contents(&image) == expected);
            }
            Err(_) => none += 1,
        }
    });
    assert!(whole > 0 && none > 10, "{whole} whole, {none} none");
}

#[test]
fn a_bulk_image_is_whole_or_none() {
    let options = CreateOptions { cluster_bits: 9, ..CreateOptions::new(100_352) };
    let storage = Arc::new(PowerCut::new(Vec::new()));
    let image = create_for_writing(storage.clone() as Arc<dyn Storage>, &options).unwrap();
    let mut model = vec![0; 100_352];
    for (number, at) in (0..100_000).step_by(7000).enumerate() {
        apply(&image, &mut model, &Op::Write(at, 5000, number as u64));
    }
    apply(&image, &mut model, &Op::Discard(20_480, 10_240));
    image.finish().unwrap();
    drop(image);
    whole_or_none(&storage, &model);
}

#[test]
fn a_packed_image_is_whole_or_none() {
    let options = CreateOptions { cluster_bits: 10, ..CreateOptions::new(40_960) };
    let storage = Arc::new(PowerCut::new(Vec::new()));
    let target = create_packed(storage.clone() as Arc<dyn Storage>, &options).unwrap();
    let mut model = vec![0; 40_960];
    for (number, cluster) in model.chunks_mut(1024).enumerate() {
        match number % 3 {
            0 => continue,
            1 => cluster.fill(number as u8),
            _ => cluster.copy_from_slice(&pattern(1024, number as u64)),
        }
        let mut arena = Vec::new();
        let encoding = target.pack(cluster, &mut arena).unwrap();
        let unit = PackedUnit { offset: number as u64 * 1024, len: arena.len(), encoding };
        target.store(&arena, &[unit]).unwrap();
    }
    target.finish().unwrap();
    drop(target);
    whole_or_none(&storage, &model);
}
