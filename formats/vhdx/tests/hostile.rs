// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that lie or are damaged: each is refused with an error that names the lie, read
//! through its redundant copies, or does no harm.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use std::sync::{Arc, LazyLock};
use support::{
    LINKAGE, MIB, bytes_of, child_options, in_memory, open, open_read_only, options, parent,
    storage,
};
use tranship_block::{BlockDevice, Error, ErrorKind, MemoryDevice, Repair, Span, Storage, Zeroing};
use tranship_format_testing::{damaged, exercise, pattern};
use tranship_vhdx::{Guid, LogState, OpenOptions, Parent, Vhdx, check, compact, read_parent};

/// Where things are in the images of this test.
const LOG: usize = 1 << 20;
const METADATA: usize = 2 << 20;
const BAT: usize = 3 << 20;

/// A dynamic image of 4 MiB with two blocks of data, at 4 and 5 MiB of the file.
fn good() -> Vec<u8> {
    static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let storage = in_memory(&options(4 * MIB));
        let image = open(&(storage.clone() as Arc<dyn Storage>), None);
        image.write_at(&pattern(2 << 20, 1), MIB).unwrap();
        drop(image);
        storage.snapshot()
    });
    IMAGE.clone()
}

/// A child of [`base`] with a block that is partially present.
fn child() -> Vec<u8> {
    static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let storage = in_memory(&child_options(4 * MIB));
        let image = open(&(storage.clone() as Arc<dyn Storage>), Some(&base()));
        image.write_at(&pattern(10_000, 2), MIB + 5000).unwrap();
        drop(image);
        storage.snapshot()
    });
    IMAGE.clone()
}

fn base() -> Parent {
    parent(pattern(4 << 20, 9))
}

/// An image whose writer died after a flush: the log has to be replayed.
fn dirty() -> Vec<u8> {
    static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let storage = in_memory(&options(4 * MIB));
        let image = open(&(storage.clone() as Arc<dyn Storage>), None);
        image.write_at(&pattern(2 << 20, 1), MIB).unwrap();
        image.flush().unwrap();
        let mut bytes = storage.snapshot();
        drop(image);
        // The entries were not put in place.
        bytes[BAT..BAT + 64].fill(0);
        bytes
    });
    IMAGE.clone()
}

fn patched(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

/// Makes the checksums of headers and region tables right again.
fn sealed(mut image: Vec<u8>) -> Vec<u8> {
    for (at, len) in
        [(64, 4), (128, 4), (192, 64), (256, 64)].map(|(at, len)| (at << 10, len << 10))
    {
        if let Some(bytes) = image.get_mut(at..at + len) {
            bytes[4..8].fill(0);
            let sum = crc32c::crc32c(bytes);
            bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        }
    }
    image
}

fn model() -> Vec<u8> {
    let mut model = vec![0; 4 << 20];
    model[1 << 20..3 << 20].copy_from_slice(&pattern(2 << 20, 1));
    model
}

fn refused(image: Vec<u8>) -> Error {
    open_read_only(image, None).unwrap_err()
}

#[test]
fn bat_entries_that_lie_are_refused() {
    for (entry, text) in [
        (4_u64, "block 0 has the reserved state 4"),
        (7 | 6 << 20, "block 0 is partially present, but no sector bitmap says where"),
        (6, "block 0 lies at 0x0, where the image has its own structures"),
        (6 | 1 << 20, "block 0 lies at 0x100000, where"),
        (6 | 3 << 20, "block 0 lies at 0x300000, where"),
        (6 | 6 << 20, "block 0 of 1048576 bytes at 0x600000 ends past the file's 6291456 bytes"),
        (u64::MAX - 1, "ends past the file's"),
    ] {
        let error = refused(patched(good(), BAT, &entry.to_le_bytes()));
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.message().contains(text), "{error}");
        assert_eq!(error.offset(), Some(BAT as u64));
    }
    let bitmap = BAT + 8 * 4096;
    let image = child();
    let entry = u64::from_le_bytes(image[bitmap..bitmap + 8].try_into().unwrap());
    assert_eq!(entry & 7, 6, "the entry of the sector bitmap");
    let error = open_read_only(patched(image, bitmap, &[0; 8]), Some(&base())).unwrap_err();
    assert!(error.message().contains("but no sector bitmap says where"), "{error}");
}

#[test]
fn blocks_that_overlap_can_be_read_but_not_written() {
    let image = patched(good(), BAT, &(6 | 4_u64 << 20).to_le_bytes());
    assert!(open_read_only(image.clone(), None).is_ok());
    let storage = storage(image);
    let error = Vhdx::open(storage.clone(), OpenOptions::default()).unwrap_err();
    assert!(error.message().contains("belong to two structures"), "{error}");
    assert_eq!(check(&*storage, Repair::Nothing).unwrap().corruptions, 1);
    assert_eq!(check(&*storage, Repair::All).unwrap().corruptions, 1);
}

#[test]
fn a_file_that_was_cut_is_an_error_and_not_zeroes() {
    let image = good();
    for len in [0, 7, 8, 1000, 70_000, 200_000, 300_000, LOG, METADATA, BAT, image.len() - 1] {
        let error = refused(image[..len].to_vec());
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{len}: {error}");
    }
    let error = refused(image[..image.len() - 1].to_vec());
    assert!(error.message().ends_with("the image is incomplete"), "{error}");
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    let cut = Arc::new(MemoryDevice::read_only(image[..image.len() - 10_000].to_vec()));
    let found = Vhdx::open_read_only(cut, salvage).unwrap();
    assert!(found.warnings()[0].ends_with("what is missing reads as zero"));
    let mut expected = model();
    expected[(3 << 20) - 10_000..3 << 20].fill(0);
    assert!(bytes_of(&found) == expected);
}

#[test]
fn redundant_copies_are_used_with_a_warning_and_mended() {
    for (at, text) in [
        (64 << 10, "header 1 is unusable"),
        (128 << 10, "header 2 is unusable"),
        (192 << 10, "region table 1 is unusable"),
        (256 << 10, "region table 2 is unusable"),
    ] {
        let image = patched(good(), at + 100, b"x");
        let opened = open_read_only(image.clone(), None).unwrap();
        assert!(opened.warnings()[0].starts_with(text), "{:?}", opened.warnings());
        assert!(bytes_of(&opened) == model());
        let storage = storage(image);
        let report = check(&*storage, Repair::Nothing).unwrap();
        assert_eq!(report.corruptions, 1, "{:?}", report.details);
        let report = check(&*storage, Repair::All).unwrap();
        assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
        support::assert_clean(&*storage);
        assert!(open(&storage, None).warnings().is_empty());
    }
}

#[test]
fn both_headers_or_tables_lost_need_salvage() {
    for at in [64 << 10, 192 << 10] {
        let image = patched(good(), at + 100, b"x");
        let image = patched(image, at + (64 << 10) + 100, b"x");
        assert_eq!(refused(image.clone()).kind(), ErrorKind::Corrupt);
        let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
        let found = Vhdx::open(storage(image), salvage);
        if at == 64 << 10 {
            let found = found.unwrap();
            assert!(found.is_read_only());
            assert!(bytes_of(&found) == model());
            assert_eq!(found.warnings(), ["both headers are unusable (at offset 0x10000)"]);
        } else {
            assert!(found.is_err(), "nothing tells where the BAT is");
        }
    }
}

#[test]
fn a_dirty_log_is_replayed_in_memory_or_into_the_file() {
    let image = dirty();
    let device = Arc::new(MemoryDevice::new(image.clone()));
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let opened = Vhdx::open(device.clone(), options).unwrap();
    assert_eq!(opened.log_state(), LogState::ReplayedInMemory);
    assert!(bytes_of(&opened) == model());
    assert_eq!(opened.extent_at(MIB).unwrap().offset, Some(4 * MIB));
    drop(opened);
    let report = check(&*device, Repair::Nothing).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.details);
    assert!(report.details[0].ends_with("holds 1 changes that are not in place yet"));
    assert!(device.snapshot() == image, "reading changes nothing");
    let opened = Vhdx::open(device.clone(), OpenOptions::default()).unwrap();
    assert_eq!(opened.log_state(), LogState::Replayed);
    assert!(bytes_of(&opened) == model());
    drop(opened);
    let clean = open_read_only(device.snapshot(), None).unwrap();
    assert_eq!(clean.log_state(), LogState::Clean);
    assert!(bytes_of(&clean) == model());
    let repaired = storage(image);
    assert!(check(&*repaired, Repair::All).unwrap().is_clean());
    assert_eq!(open(&repaired, None).log_state(), LogState::Clean);
}

#[test]
fn a_log_without_its_entries_is_an_error() {
    let image = patched(dirty(), LOG + 100, b"xxxx");
    let error = refused(image.clone());
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().ends_with("but has no valid sequence of entries"), "{error}");
    assert!(check(&*storage(image.clone()), Repair::All).is_err());
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    let found = Vhdx::open(storage(image), salvage).unwrap();
    assert_eq!(found.log_state(), LogState::Lost);
    assert!(found.warnings()[0].starts_with("changes in the log are lost"));
    let cut = dirty()[..6 << 20].to_vec();
    let error = refused(cut);
    assert!(error.message().contains("its log was written when it had 8388608"), "{error}");
}

#[test]
fn parents_have_to_be_the_right_ones() {
    let wanted = read_parent(&MemoryDevice::read_only(child())).unwrap().unwrap();
    assert_eq!(
        (wanted.linkage.as_slice(), wanted.names[0].path()),
        (&[LINKAGE][..], "base.vhdx".into())
    );
    assert_eq!(read_parent(&MemoryDevice::read_only(good())).unwrap(), None);
    let error = refused(child());
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("base.vhdx"), "{error}");
    let other = Parent { data_write_guid: Guid::from_bytes([8; 16]), ..base() };
    let error = open_read_only(child(), Some(&other)).unwrap_err();
    assert!(error.message().starts_with("parent has data-write GUID 08080808-"), "{error}");
    let error = open_read_only(good(), Some(&base())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    let salvage = OpenOptions { salvage: true, parent: Some(other), ..OpenOptions::default() };
    let device = Arc::new(MemoryDevice::read_only(child()));
    assert_eq!(Vhdx::open_read_only(device.clone(), salvage).unwrap().warnings().len(), 1);
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    let alone = Vhdx::open_read_only(device, salvage).unwrap();
    assert!(alone.warnings()[0].ends_with("was not given: what it has reads as zero"));
    let mut found = vec![0; 10_000];
    alone.read_at(&mut found, MIB + 5000).unwrap();
    assert!(found == pattern(10_000, 2));
}

#[test]
fn space_at_the_end_that_belongs_to_nothing_is_a_leak() {
    let mut image = good();
    image.resize(image.len() + (3 << 20), 7);
    let storage = storage(image);
    let report = check(&*storage, Repair::Nothing).unwrap();
    assert_eq!((report.leaks, report.image_end_offset), (3, 6 * MIB));
    assert_eq!((report.allocated_clusters, report.total_clusters), (2, 4));
    let report = check(&*storage, Repair::Leaks).unwrap();
    assert_eq!((report.leaks, report.leaks_fixed, storage.size()), (0, 3, 6 * MIB));
    let read_only = MemoryDevice::read_only(good());
    assert!(check(&read_only, Repair::Nothing).unwrap().is_clean());
    assert_eq!(check(&read_only, Repair::All).unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn what_is_opened_for_reading_cannot_be_written() {
    let image = open_read_only(good(), None).unwrap();
    assert_eq!(image.write_at(&[1], 0).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(image.discard(Span::new(0, 1)).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(image.read_at(&mut [0; 2], 4 * MIB - 1).unwrap_err().kind(), ErrorKind::Usage);
    image.flush().unwrap();
    let device = Arc::new(MemoryDevice::read_only(good()));
    let error = Vhdx::open(device, OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

/// All that can be done to an image.
fn work(image: Vec<u8>) {
    let parent = base();
    for parent in [None, Some(&parent)] {
        if let Ok(image) = open_read_only(image.clone(), parent) {
            exercise(&image);
        }
        let options =
            OpenOptions { salvage: true, parent: parent.cloned(), ..OpenOptions::default() };
        if let Ok(image) = Vhdx::open(storage(image.clone()), options) {
            exercise(&image);
        }
        let target = storage(image.clone());
        let options = OpenOptions { parent: parent.cloned(), ..OpenOptions::default() };
        let Ok(image) = Vhdx::open(target, options) else { continue };
        // In memory, blocks of 256 MiB would only be slow.
        if image.block_size() <= 4 << 20 {
            let end = image.size().saturating_sub(5);
            let _ = image.write_at(&[1; 5], end.min(MIB));
            let _ = image.write_at(&[1; 5], end);
            let _ = image.write_zeroes(Span::new(0, image.size().min(MIB)), Zeroing::MayUnmap);
            let _ = image.discard(Span::new(0, image.size()));
            let _ = image.flush();
        }
    }
    let _ = read_parent(&MemoryDevice::read_only(image.clone()));
    let _ = check(&MemoryDevice::read_only(image.clone()), Repair::Nothing);
    let _ = check(&*storage(image.clone()), Repair::All);
    let _ = compact(&storage(image));
}

/// A kilobyte of everything that counts.
fn metadata() -> Vec<Span> {
    [
        0,
        64 << 10,
        128 << 10,
        192 << 10,
        256 << 10,
        LOG,
        LOG + 4096,
        METADATA,
        METADATA + 65_536,
        BAT,
    ]
    .map(|at| Span::new(at as u64, 256))
    .to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn damaged_images_never_panic(
        image in prop_oneof![
            damaged(good(), metadata()),
            damaged(child(), metadata()),
            damaged(dirty(), metadata()),
        ],
        seal in any::<bool>(),
    ) {
        work(if seal { sealed(image) } else { image });
    }
}

#[test]
fn emptying_the_log_mends_a_damaged_header_and_says_so() {
    for header in [64 << 10, 128 << 10] {
        for repair in [Repair::Leaks, Repair::All] {
            let storage = MemoryDevice::new(patched(dirty(), header, b"nope"));
            let report = check(&storage, repair).unwrap();
            assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{report:?}");
            assert!(check(&storage, Repair::Nothing).unwrap().is_clean());
        }
    }
}
