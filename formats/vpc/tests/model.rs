// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whatever is done to a disk, it has the bytes that a list of bytes would have.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{BLOCK, assert_clean, in_memory, initially, open, options, over};
use tranship_block::{BlockDevice, ErrorKind, ExtentKind, MemoryDevice, Span, Zeroing};
use tranship_format_testing::{Op, apply, contents, operations, pattern, verify};
use tranship_vpc::{CreateOptions, Footer, Kind, ParentRequest, Sizing, Vpc, create};

const SIZE: u64 = 50_176;

fn run(kind: Kind, base: Option<&[u8]>, ops: &[Op]) {
    let storage = in_memory(kind, SIZE);
    let mut model = initially(SIZE as usize, base);
    let mut disk = open(&storage, base);
    for op in ops {
        if matches!(op, Op::Reopen) {
            drop(disk);
            disk = open(&storage, base);
        }
        apply(&disk, &mut model, op);
        verify(&disk, &model);
    }
    disk.flush().unwrap();
    drop(disk);
    verify(&open(&storage, base), &model);
    assert_clean(&*storage);
}

/// A parent that is shorter than its child, with holes.
fn base() -> Vec<u8> {
    let mut base = pattern(36_000, 4);
    base[8192..20_000].fill(0);
    base
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn a_dynamic_disk_is_its_bytes(ops in operations(SIZE, u64::from(BLOCK), 25)) {
        run(Kind::Dynamic, None, &ops);
    }

    #[test]
    fn a_differencing_disk_is_its_bytes(ops in operations(SIZE, u64::from(BLOCK), 25)) {
        run(Kind::Differencing, Some(&base()), &ops);
    }

    #[test]
    fn a_fixed_disk_is_its_bytes(ops in operations(SIZE, u64::from(BLOCK), 10)) {
        run(Kind::Fixed, None, &ops);
    }

    #[test]
    fn a_resized_disk_keeps_its_bytes(
        which in 0..3_usize,
        steps in prop::collection::vec((1..200_u64, 0..100_000_u64, 1..20_000_usize), 1..8),
    ) {
        let kind = [Kind::Fixed, Kind::Dynamic, Kind::Differencing][which];
        let base = (kind == Kind::Differencing).then(base);
        let base = base.as_deref();
        let storage = in_memory(kind, SIZE);
        let mut model = initially(SIZE as usize, base);
        let mut disk = open(&storage, base);
        for (seed, (sectors, at, len)) in steps.into_iter().enumerate() {
            let size = sectors * 4 * 512;
            // Shrinking is refused unless what goes away is zero.
            if size < disk.size() {
                if !model[size as usize..].iter().all(|byte| *byte == 0) {
                    let error = disk.resize(size).unwrap_err();
                    prop_assert_eq!(error.kind(), ErrorKind::Usage);
                }
                let tail = Span::new(size, disk.size() - size);
                disk.write_zeroes(tail, Zeroing::MayUnmap).unwrap();
            }
            disk.resize(size).unwrap();
            model.resize(size as usize, 0);
            verify(&disk, &model);
            apply(&disk, &mut model, &Op::Write(at, len, seed as u64));
            if seed % 2 == 1 {
                drop(disk);
                disk = open(&storage, base);
            }
            verify(&disk, &model);
        }
        drop(disk);
        verify(&open(&storage, base), &model);
        assert_clean(&*storage);
    }
}

#[test]
fn an_empty_disk_of_a_tebibyte_is_mapped_at_once() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let size = 1 << 40;
    create(&*storage, &CreateOptions { sizing: Sizing::Exact, ..CreateOptions::new(size) })
        .unwrap();
    let disk = open(&storage, None);
    let start = Instant::now();
    let extent = disk.extent_at(512).unwrap();
    assert_eq!((extent.kind, extent.len), (ExtentKind::Hole, size - 512));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[test]
fn data_is_aligned_and_zeroed_blocks_are_used_again() {
    let storage = in_memory(Kind::Dynamic, 64 * u64::from(BLOCK));
    let disk = open(&storage, None);
    let block = u64::from(BLOCK);
    for index in 0..4 {
        disk.write_at(&pattern(BLOCK as usize, index), index * block).unwrap();
        let extent = disk.extent_at(index * block).unwrap();
        assert_eq!(extent.offset.unwrap() % 4096, 0);
    }
    disk.flush().unwrap();
    let full = storage.size();
    disk.write_zeroes(Span::new(block, 2 * block), Zeroing::MayUnmap).unwrap();
    assert_eq!(disk.extent_at(block).unwrap().kind, ExtentKind::Hole);
    // The file's own table still refers to the two places: they are not free yet.
    disk.write_at(&[1; 10], 9 * block).unwrap();
    assert!(storage.size() > full);
    let grown = storage.size();
    disk.flush().unwrap();
    disk.write_at(&[2; 10], 20 * block).unwrap();
    disk.write_at(&[3; 10], 21 * block + 50).unwrap();
    assert_eq!(storage.size(), grown);
    disk.flush().unwrap();
    let mut bytes = contents(&disk);
    assert_eq!(bytes[20 * BLOCK as usize..][..11], [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0]);
    bytes[20 * BLOCK as usize..].fill(0);
    assert!(bytes[block as usize..3 * block as usize].iter().all(|byte| *byte == 0));
    assert_clean(&*storage);
}

#[test]
fn many_threads_write_into_the_same_blocks() {
    for base in [None, Some(base())] {
        let kind = if base.is_some() { Kind::Differencing } else { Kind::Dynamic };
        let storage = in_memory(kind, 1 << 20);
        let disk = open(&storage, base.as_deref());
        let model = pattern(1 << 20, 77);
        std::thread::scope(|scope| {
            for thread in 0..4_usize {
                let (disk, model) = (&disk, &model);
                scope.spawn(move || {
                    // Pieces of all threads share sectors.
                    for at in (thread * 100..model.len()).step_by(400) {
                        let end = (at + 100).min(model.len());
                        disk.write_at(&model[at..end], at as u64).unwrap();
                        if at % 65_536 < 400 {
                            disk.flush().unwrap();
                        }
                    }
                });
            }
        });
        verify(&disk, &model);
        disk.flush().unwrap();
        verify(&open(&storage, base.as_deref()), &model);
        assert_clean(&*storage);
    }
}

#[test]
fn blocks_are_given_up_and_used_while_others_read_and_write() {
    let storage = in_memory(Kind::Dynamic, 32 * u64::from(BLOCK));
    let disk = open(&storage, None);
    let block = u64::from(BLOCK);
    // Each thread has its own blocks, but all share the places in the file.
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let disk = &disk;
            scope.spawn(move || {
                let mut buf = vec![0; BLOCK as usize];
                for round in 0..60 {
                    let at = (round % 8 * 4 + thread) * block;
                    let bytes = pattern(BLOCK as usize, thread * 1000 + round);
                    disk.write_at(&bytes, at).unwrap();
                    disk.read_at(&mut buf, at).unwrap();
                    assert!(buf == bytes, "thread {thread}, round {round}");
                    disk.write_zeroes(Span::new(at, block), Zeroing::MayUnmap).unwrap();
                    disk.read_at(&mut buf, at).unwrap();
                    assert!(buf.iter().all(|byte| *byte == 0));
                    if round % 3 == 0 {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    // Closing cuts off what was given up.
    drop(disk);
    assert_clean(&*storage);
}

#[test]
fn a_table_grows_over_the_first_blocks() {
    for base in [None, Some(base())] {
        let kind = if base.is_some() { Kind::Differencing } else { Kind::Dynamic };
        let storage = in_memory(kind, SIZE);
        let disk = open(&storage, base.as_deref());
        let mut model = initially(SIZE as usize, base.as_deref());
        for at in [0, 9000, 30_000, 50_000] {
            apply(&disk, &mut model, &Op::Write(at, 100, at));
        }
        let size = 8 << 20;
        disk.resize(size).unwrap();
        model.resize(size as usize, 0);
        apply(&disk, &mut model, &Op::Write(size - 1000, 1000, 3));
        verify(&disk, &model);
        drop(disk);
        verify(&open(&storage, base.as_deref()), &model);
        assert_clean(&*storage);
    }
}

#[test]
fn names_of_the_parent_are_found_before_opening() {
    let storage = in_memory(Kind::Differencing, SIZE);
    let request = ParentRequest::read(&*storage).unwrap().unwrap();
    assert_eq!((request.unique_id, request.timestamp), (support::PARENT_ID, 5));
    let names: Vec<_> = request.names.iter().map(|name| name.name.as_str()).collect();
    assert_eq!(names, ["base.vhd", "/disks/base.vhd"]);
    assert_eq!(ParentRequest::read(&*in_memory(Kind::Dynamic, SIZE)).unwrap(), None);
    assert_eq!(ParentRequest::read(&*in_memory(Kind::Fixed, SIZE)).unwrap(), None);
}

#[test]
fn a_child_is_not_opened_without_its_parent() {
    let storage = in_memory(Kind::Differencing, SIZE);
    let error = Vpc::open(storage.clone(), over(None)).unwrap_err();
    assert_eq!(error.to_string(), "the disk is differencing and its parent is missing");
    let mut options = over(Some(&[]));
    options.parent.as_mut().unwrap().unique_id[0] ^= 1;
    let error = Vpc::open(storage.clone(), options.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("06070707-0707-"), "{error}");
    for parent in [None, options.parent.clone()] {
        options = tranship_vpc::OpenOptions { salvage: true, parent, ..options };
        let disk = Vpc::open(storage.clone(), options.clone()).unwrap();
        assert_eq!((disk.warnings().len(), disk.is_read_only()), (1, true));
    }
    let error = Vpc::open(in_memory(Kind::Dynamic, SIZE), over(Some(&[]))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn facts_are_those_asked_for() {
    let storage = Arc::new(MemoryDevice::new(vec![9; 5000]));
    let options = CreateOptions {
        kind: Kind::Fixed,
        sizing: Sizing::Azure,
        ..options(Kind::Fixed, (21 << 20) + 5)
    };
    create(&*storage, &options).unwrap();
    assert_eq!(storage.size(), (22 << 20) + 512);
    let disk = open(&storage, None);
    assert_eq!((disk.kind(), disk.size(), disk.block_size()), (Kind::Fixed, 22 << 20, None));
    assert_eq!(Footer::read(&*storage).unwrap().creator, *b"trns");
    assert!(contents(&disk).iter().all(|byte| *byte == 0));

    let bad = [
        CreateOptions { kind: Kind::Dynamic, ..options.clone() },
        CreateOptions { kind: Kind::Differencing, sizing: Sizing::Exact, ..options.clone() },
        CreateOptions { block_size: 1000, ..options },
    ];
    for options in bad {
        assert_eq!(create(&*storage, &options).unwrap_err().kind(), ErrorKind::Usage);
    }
}
