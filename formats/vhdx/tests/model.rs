// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whatever is done to an image, it has the bytes that memory would have.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use std::sync::Arc;
use support::{MIB, assert_clean, child_options, in_memory, open, options, parent};
use tranship_block::{BlockDevice, ExtentKind, Extents, Span, Storage, Zeroing};
use tranship_format_testing::{Op, apply, contents, operations, pattern, verify};
use tranship_vhdx::{CreateOptions, Subformat};

/// Images of a few blocks; sizes that are no multiple of the block, both sector sizes.
fn shape() -> impl Strategy<Value = (CreateOptions, Option<u64>)> {
    let size = prop_oneof![Just(3 * MIB), Just(4 * MIB + 40_960)];
    let sector = prop_oneof![Just(512), Just(4096)];
    let base = prop_oneof![Just(None), Just(Some(MIB + 300_000)), Just(Some(6 * MIB))];
    (size, sector, 0..3_u8, base).prop_map(|(size, sector, kind, base)| {
        let plain = CreateOptions { logical_sector_size: sector, ..options(size) };
        match (kind, base) {
            (0, _) => (CreateOptions { fixed: true, ..plain }, None),
            (1, _) | (_, None) => {
                (CreateOptions { block_state_zero: sector == 512, ..plain }, None)
            }
            (_, Some(base)) => {
                let child = child_options(size);
                (CreateOptions { logical_sector_size: sector, ..child }, Some(base))
            }
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]
    #[test]
    fn same_bytes_as_memory(
        ((options, base), ops) in shape().prop_flat_map(|shape| {
            let ops = operations(shape.0.size, MIB, 24);
            (Just(shape), ops)
        })
    ) {
        let storage: Arc<dyn Storage> = in_memory(&options);
        let mut model = vec![0; options.size as usize];
        let parent = base.map(|len| {
            let bytes = pattern(len as usize, 77);
            let len = bytes.len().min(model.len());
            model[..len].copy_from_slice(&bytes[..len]);
            parent(bytes)
        });
        let mut image = open(&storage, parent.as_ref());
        for op in &ops {
            if matches!(op, Op::Reopen) {
                drop(image);
                assert_clean(&*storage);
                image = open(&storage, parent.as_ref());
            }
            apply(&image, &mut model, op);
        }
        verify(&image, &model);
        drop(image);
        assert_clean(&*storage);
        verify(&open(&storage, parent.as_ref()), &model);
    }
}

#[test]
fn threads_that_share_blocks_and_sectors_lose_nothing() {
    const SIZE: u64 = 2 * MIB;
    const THREADS: usize = 4;
    const PIECE: usize = 1333;
    for base in [None, Some(pattern(SIZE as usize, 5))] {
        let make = if base.is_some() { child_options(SIZE) } else { options(SIZE) };
        let storage: Arc<dyn Storage> = in_memory(&make);
        let mut model = base.clone().unwrap_or_else(|| vec![0; SIZE as usize]);
        let parent = base.map(parent);
        let image = open(&storage, parent.as_ref());
        // Every thread writes each fourth piece, so that all meet in every block.
        let pieces = SIZE as usize / PIECE;
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let image = &image;
                scope.spawn(move || {
                    for piece in (thread..pieces).step_by(THREADS) {
                        let at = (piece * PIECE) as u64;
                        image.write_at(&pattern(PIECE, piece as u64), at).unwrap();
                        if piece % 397 == 0 {
                            image.flush().unwrap();
                        }
                    }
                });
            }
        });
        for piece in 0..pieces {
            let place = &mut model[piece * PIECE..(piece + 1) * PIECE];
            place.copy_from_slice(&pattern(PIECE, piece as u64));
        }
        verify(&image, &model);
        drop(image);
        assert_clean(&*storage);
    }
}

#[test]
fn readers_never_see_bytes_of_blocks_that_changed_hands() {
    const BLOCKS: u64 = 8;
    let storage: Arc<dyn Storage> = in_memory(&options(BLOCKS * MIB));
    let image = open(&storage, None);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 0..60_u64 {
                // Each block holds its own number or zeroes.
                let block = round * 3 % BLOCKS;
                image.write_at(&[block as u8 + 1; 4096], block * MIB).unwrap();
                image.discard(Span::new(round * 5 % BLOCKS * MIB, MIB)).unwrap();
                image.flush().unwrap();
            }
        });
        let mut buf = [0; 8192];
        while !writer.is_finished() {
            for block in 0..BLOCKS {
                image.read_at(&mut buf, block * MIB).unwrap();
                let own = block as u8 + 1;
                assert!(buf.iter().all(|byte| *byte == 0 || *byte == own));
            }
        }
    });
    drop(image);
    assert_clean(&*storage);
}

#[test]
fn discarded_blocks_are_used_again_and_given_back() {
    let storage: Arc<dyn Storage> = in_memory(&options(64 * MIB));
    let empty = storage.size();
    let image = open(&storage, None);
    for round in 0..10 {
        image.write_at(&pattern(3 << 20, round), round * 4 * MIB).unwrap();
        image.flush().unwrap();
        image.discard(Span::new(round * 4 * MIB, 3 * MIB)).unwrap();
        assert_eq!(image.extent_at(round * 4 * MIB).unwrap().kind, ExtentKind::Zero);
        image.flush().unwrap();
    }
    assert!(storage.size() < empty + 10 * MIB, "file has {} bytes", storage.size());
    drop(image);
    assert_eq!(storage.size(), empty);
}

#[test]
fn a_discarded_block_hides_the_parent() {
    let base = parent(pattern(4 << 20, 1));
    let storage: Arc<dyn Storage> = in_memory(&child_options(4 * MIB));
    let image = open(&storage, Some(&base));
    image.write_at(&[7; 4096], 10).unwrap();
    image.discard(Span::new(0, MIB)).unwrap();
    image.write_zeroes(Span::new(MIB, MIB), Zeroing::MayUnmap).unwrap();
    drop(image);
    let image = open(&storage, Some(&base));
    assert_eq!(contents(&image)[..2 << 20], vec![0; 2 << 20]);
    assert_eq!(image.extent_at(0).unwrap().kind, ExtentKind::Zero);
    let below = image.extent_at(2 * MIB).unwrap();
    assert_eq!((below.depth, below.kind), (1, ExtentKind::Data));
    // A small write to a block that hides its parent leaves zeroes around it.
    image.write_at(&[5], 1000).unwrap();
    let mut model = pattern(4 << 20, 1);
    model[..2 << 20].fill(0);
    model[1000] = 5;
    verify(&image, &model);
}

#[test]
fn fixed_disks_keep_their_blocks() {
    let storage: Arc<dyn Storage> = in_memory(&CreateOptions { fixed: true, ..options(3 * MIB) });
    let len = storage.size();
    let image = open(&storage, None);
    assert_eq!(image.subformat(), Subformat::Fixed);
    assert_eq!(image.extent_at(0).unwrap().len, 3 * MIB);
    image.write_at(&pattern(2 << 20, 3), MIB / 2).unwrap();
    image.discard(Span::new(0, 2 * MIB)).unwrap();
    image.write_zeroes(Span::new(2 * MIB, MIB), Zeroing::MayUnmap).unwrap();
    image.flush().unwrap();
    let extent = image.extent_at(0).unwrap();
    assert_eq!((extent.kind, extent.len), (ExtentKind::Data, 3 * MIB));
    drop(image);
    assert_eq!(storage.size(), len);
    assert_clean(&*storage);
}

#[test]
fn extents_tell_the_place() {
    let storage: Arc<dyn Storage> = in_memory(&options(8 * MIB));
    let image = open(&storage, None);
    image.write_at(&pattern(3 << 20, 1), MIB).unwrap();
    let extent = image.extent_at(MIB + 10).unwrap();
    assert_eq!(extent.len, 3 * MIB - 10, "neighbours are joined");
    let mut there = [0; 4];
    storage.read_at(&mut there, extent.offset.unwrap()).unwrap();
    assert_eq!(there, pattern(3 << 20, 1)[10..14]);
}

#[test]
fn huge_empty_disks_are_cheap() {
    for block_state_zero in [true, false] {
        let options = CreateOptions { block_state_zero, ..CreateOptions::new(64 << 40) };
        let storage: Arc<dyn Storage> = in_memory(&options);
        let image = open(&storage, None);
        let whole = |end| {
            let mut runs = Extents::new(&image, Span::new(0, end)).map(|run| run.unwrap().0);
            assert_eq!((runs.next(), runs.next()), (Some(Span::new(0, end)), None));
        };
        whole(64 << 40);
        assert!(image.extent_at(0).unwrap().len >= 4 << 40, "one answer is enough for most");
        image.write_at(&[1], (64 << 40) - 1).unwrap();
        image.write_zeroes(Span::new(0, (64 << 40) - 4096), Zeroing::MayUnmap).unwrap();
        image.flush().unwrap();
        whole((64 << 40) - (64 << 20));
    }
}
