// SPDX-License-Identifier: Apache-2.0 OR MIT
//! New images, other sizes, shorter files.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use support::{MIB, assert_clean, bytes_of, child_options, in_memory, open, options, parent};
use tranship_block::{BlockDevice, ErrorKind, ExtentKind, MemoryDevice, Span, Storage};
use tranship_format_testing::{pattern, verify};
use tranship_vhdx::{
    CreateOptions, LARGEST_DISK, Shrink, Subformat, Vhdx, compact, create, read_data_write_guid,
    read_parent,
};

#[test]
fn a_new_image_is_what_was_asked_for() {
    let asked = CreateOptions {
        log_size: 3 << 20,
        logical_sector_size: 4096,
        ..CreateOptions::new(10 << 30)
    };
    let storage: Arc<dyn Storage> = in_memory(&asked);
    let image = open(&storage, None);
    assert_eq!((image.size(), image.sector_size(), image.block_size()), (10 << 30, 4096, 16 << 20));
    assert_eq!(image.physical_sector_size(), 4096);
    assert_eq!(image.subformat(), Subformat::Dynamic);
    assert!(image.creator().starts_with("tranship "));
    assert!(!image.disk_id().is_nil() && image.warnings().is_empty());
    assert_eq!(storage.size(), 6 * MIB);
    for (size, block) in
        [(1 << 30, 8), ((1 << 30) + 512, 16), (100 << 30, 16), (32 << 40, 32), (64 << 40, 64)]
    {
        let image = open(&(in_memory(&CreateOptions::new(size)) as Arc<dyn Storage>), None);
        assert_eq!(image.block_size(), block << 20, "{size}");
    }
}

#[test]
fn options_that_no_image_can_have_are_refused() {
    let good = options(MIB);
    let child = child_options(MIB);
    for wrong in [
        CreateOptions { size: MIB + 1, ..good.clone() },
        CreateOptions { size: LARGEST_DISK + 512, ..good.clone() },
        CreateOptions { size: MIB + 512, logical_sector_size: 4096, ..good.clone() },
        CreateOptions { block_size: Some(3 << 20), ..good.clone() },
        CreateOptions { block_size: Some(512 << 20), ..good.clone() },
        CreateOptions { block_size: Some(1 << 19), ..good.clone() },
        CreateOptions { log_size: 0, ..good.clone() },
        CreateOptions { log_size: 4096, ..good.clone() },
        CreateOptions { logical_sector_size: 520, ..good.clone() },
        CreateOptions { fixed: true, ..child },
    ] {
        let storage = MemoryDevice::new(Vec::new());
        let error = create(&storage, &wrong).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{wrong:?}");
        assert_eq!(storage.size(), 0, "refused before anything was written");
    }
}

#[test]
fn every_write_session_has_its_own_guid() {
    let storage: Arc<dyn Storage> = in_memory(&options(MIB));
    let first = read_data_write_guid(&storage).unwrap();
    let image = open(&storage, None);
    assert_eq!(image.data_write_guid(), first);
    image.flush().unwrap();
    assert_eq!(read_data_write_guid(&storage).unwrap(), first, "nothing was written");
    image.write_at(&[1], 0).unwrap();
    let second = image.data_write_guid();
    assert_ne!(second, first);
    assert_eq!(read_data_write_guid(&storage).unwrap(), second, "before the data is");
}

#[test]
fn a_disk_grows_with_zeroes() {
    for base in [None, Some(5 * MIB)] {
        let size = 2 * MIB + 8192;
        let make = if base.is_some() { child_options(size) } else { options(size) };
        let base = base.map(|len| parent(pattern(len as usize, 4)));
        let storage: Arc<dyn Storage> = in_memory(&make);
        let image = open(&storage, base.as_ref());
        image.write_at(&pattern(10_000, 1), 2 * MIB - 5000).unwrap();
        let mut model = bytes_of(&image);
        // Smaller first, so that there is something stale behind the end.
        image.resize(2 * MIB + 512, Shrink::LoseData).unwrap();
        model.truncate((2 << 20) + 512);
        verify(&image, &model);
        image.resize(4 * MIB, Shrink::KeepData).unwrap();
        model.resize(4 << 20, 0);
        verify(&image, &model);
        image.write_at(&[3; 100], 4 * MIB - 100).unwrap();
        let end = model.len();
        model[end - 100..].fill(3);
        drop(image);
        assert_clean(&*storage);
        verify(&open(&storage, base.as_ref()), &model);
    }
}

#[test]
fn a_bat_that_is_too_small_moves() {
    let storage: Arc<dyn Storage> = in_memory(&options(3 * MIB));
    let image = open(&storage, None);
    image.write_at(&pattern(3 << 20, 1), 0).unwrap();
    for size in [(100_u64 << 30) - 512, 300 << 30, 600 << 30] {
        image.resize(size, Shrink::KeepData).unwrap();
        image.write_at(&[7; 512], size - 512).unwrap();
    }
    drop(image);
    assert_clean(&*storage);
    let image = open(&storage, None);
    assert_eq!(image.size(), 600 << 30);
    let mut found = vec![0; 3 << 20];
    image.read_at(&mut found, 0).unwrap();
    assert!(found == pattern(3 << 20, 1));
    let mut end = [0; 512];
    image.read_at(&mut end, (600 << 30) - 512).unwrap();
    assert_eq!(end, [7; 512]);
    image.read_at(&mut end, (300 << 30) - 512).unwrap();
    assert_eq!(end, [7; 512]);
}

#[test]
fn a_disk_shrinks_only_over_zeroes_unless_told() {
    let storage: Arc<dyn Storage> = in_memory(&options(6 * MIB));
    let image = open(&storage, None);
    image.write_at(&pattern(1 << 20, 1), MIB / 2).unwrap();
    image.write_at(&vec![0; 1 << 20], 4 * MIB).unwrap();
    let error = image.resize(MIB, Shrink::KeepData).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert_eq!((error.offset(), image.size()), (Some(MIB), 6 * MIB));
    image.resize(2 * MIB, Shrink::KeepData).unwrap();
    image.resize(MIB, Shrink::LoseData).unwrap();
    assert!(image.read_at(&mut [0], MIB).is_err());
    assert_eq!(image.resize(100, Shrink::LoseData).unwrap_err().kind(), ErrorKind::Usage);
    drop(image);
    assert_clean(&*storage);
    assert_eq!(storage.size(), 5 * MIB, "one block is left");
    let mut model = vec![0; 1 << 20];
    model[1 << 19..].copy_from_slice(&pattern(1 << 20, 1)[..1 << 19]);
    verify(&open(&storage, None), &model);
}

#[test]
fn compacting_drops_zeroes_and_closes_gaps() {
    let storage: Arc<dyn Storage> = in_memory(&options(8 * MIB));
    let image = open(&storage, None);
    let mut model = pattern(8 << 20, 1);
    image.write_at(&model, 0).unwrap();
    for block in [0, 3, 4] {
        image.discard(Span::new(block * MIB, MIB)).unwrap();
        model[(block << 20) as usize..((block + 1) << 20) as usize].fill(0);
    }
    model[6 << 20..7 << 20].fill(0);
    image.write_at(&model[6 << 20..7 << 20], 6 * MIB).unwrap();
    drop(image);
    let guid = read_data_write_guid(&storage).unwrap();
    let compacted = compact(&storage).unwrap();
    assert_eq!((compacted.before, compacted.after), (12 * MIB, 8 * MIB));
    assert_eq!(storage.size(), 8 * MIB);
    assert_clean(&*storage);
    assert_eq!(read_data_write_guid(&storage).unwrap(), guid, "children stay valid");
    let image = open(&storage, None);
    verify(&image, &model);
    assert_eq!(image.extent_at(0).unwrap().kind, ExtentKind::Hole);
    drop(image);
    assert_eq!(compact(&storage).unwrap().after, 8 * MIB);
}

#[test]
fn compacting_needs_no_parent_and_drops_bitmaps_that_nobody_needs() {
    let base = parent(pattern(6 << 20, 5));
    let storage: Arc<dyn Storage> = in_memory(&child_options(6 * MIB));
    let image = open(&storage, Some(&base));
    let mut model = pattern(6 << 20, 5);
    image.write_at(&[1; 700], 5 * MIB + 100).unwrap();
    model[(5 << 20) + 100..(5 << 20) + 800].fill(1);
    image.write_at(&vec![0; 1 << 20], 0).unwrap();
    image.write_at(&vec![2; 1 << 20], MIB).unwrap();
    model[..1 << 20].fill(0);
    model[1 << 20..2 << 20].fill(2);
    drop(image);
    let compacted = compact(&storage).unwrap();
    assert_eq!(compacted.before - compacted.after, MIB);
    let image = open(&storage, Some(&base));
    verify(&image, &model);
    image.write_at(&vec![2; 1 << 20], 5 * MIB).unwrap();
    model[5 << 20..].fill(2);
    drop(image);
    let compacted = compact(&storage).unwrap();
    assert_eq!(compacted.before - compacted.after, MIB, "the bitmap");
    assert_clean(&*storage);
    verify(&open(&storage, Some(&base)), &model);
}

#[test]
fn fixed_disks_are_not_compacted() {
    let storage: Arc<dyn Storage> = in_memory(&CreateOptions { fixed: true, ..options(3 * MIB) });
    let before = bytes_of(&*storage);
    let compacted = compact(&storage).unwrap();
    assert_eq!(compacted.before, compacted.after);
    assert!(bytes_of(&*storage) == before);
}

#[test]
fn a_chain_of_children_reads_through() {
    let bottom: Arc<dyn Storage> = in_memory(&options(3 * MIB));
    let image = open(&bottom, None);
    let mut model = pattern(3 << 20, 1);
    image.write_at(&model, 0).unwrap();
    drop(image);
    let mut below: Arc<dyn Storage> = bottom;
    let mut device: Arc<dyn BlockDevice> = Arc::new(open(&below, None));
    for (layer, at) in [(1_u8, 100), (2, 1_500_000)] {
        let guid = read_data_write_guid(&below).unwrap();
        let mut make = child_options(3 * MIB);
        make.parent = Some(tranship_vhdx::ParentLocator::new(guid, Some("below.vhdx"), None));
        let child: Arc<dyn Storage> = in_memory(&make);
        assert!(read_parent(&child).unwrap().unwrap().accepts(guid));
        let parent = tranship_vhdx::Parent { device, data_write_guid: guid };
        let image: Vhdx = open(&child, Some(&parent));
        image.write_at(&[layer; 5000], at).unwrap();
        model[at as usize..at as usize + 5000].fill(layer);
        image.flush().unwrap();
        verify(&image, &model);
        let depth = image.extent_at(2_800_000).unwrap().depth;
        assert_eq!(depth, u32::from(layer));
        device = Arc::new(image);
        below = child;
    }
}
