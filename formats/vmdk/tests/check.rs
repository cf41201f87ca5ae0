// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking, mending and salvaging.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "for tests alone")]

mod folder;

use folder::Memory;
use proptest::prelude::*;
use std::sync::Arc;
use tranship_block::{
    BlockDevice, CheckReport, DenyAll, ErrorKind, MemoryDevice, PackedTarget, PackedUnit, Repair,
    Span,
};
use tranship_format_testing::{damaged, exercise, pattern, verify};
use tranship_vmdk::{
    CreateOptions, NoFiles, OpenOptions, ResizeOptions, StreamTarget, Subformat, Vmdk, check,
};

const GRAIN: usize = 64 << 10;
const SIZE: usize = 65 << 20;
/// Sectors of a disk of 65 MiB: both directories, and the first table of both.
const REDUNDANT: usize = 21;
const REDUNDANT_TABLE: usize = 22;
const DIRECTORY: usize = 34;
const TABLE: usize = 35;

fn places() -> [(usize, Vec<u8>); 3] {
    [(0, pattern(3 * GRAIN, 1)), (33 << 20, pattern(GRAIN, 2)), (SIZE - 512, pattern(512, 3))]
}

/// A sparse disk with grains under all three tables.
fn sparse() -> Vec<u8> {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let create = CreateOptions::new(SIZE as u64, Subformat::MonolithicSparse, "d.vmdk");
    tranship_vmdk::create(&*storage, &NoFiles, &create).unwrap();
    let disk = Vmdk::open_writable(storage.clone(), &NoFiles, OpenOptions::default()).unwrap();
    for (at, bytes) in places() {
        disk.write_at(&bytes, at as u64).unwrap();
    }
    drop(disk);
    storage.snapshot()
}

/// The same disk as a stream.
fn stream() -> Vec<u8> {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let create = CreateOptions::new(SIZE as u64, Subformat::StreamOptimized, "d.vmdk");
    let target = StreamTarget::create(storage.clone(), &create).unwrap();
    for (at, bytes) in places() {
        let start = at / GRAIN * GRAIN;
        let all = [vec![0; at - start], bytes].concat();
        for (number, grain) in all.chunks(GRAIN).enumerate() {
            let mut arena = Vec::new();
            let encoding = target.pack(grain, &mut arena).unwrap();
            let offset = (start + number * GRAIN) as u64;
            target.store(&arena, &[PackedUnit { offset, len: arena.len(), encoding }]).unwrap();
        }
    }
    target.finish().unwrap();
    storage.snapshot()
}

fn model() -> Vec<u8> {
    let mut model = vec![0; SIZE];
    for (at, bytes) in places() {
        model[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    model
}

fn entry(image: &[u8], sector: usize, index: usize) -> u32 {
    let at = sector * 512 + index * 4;
    u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
}

fn set(image: &mut [u8], sector: usize, index: usize, value: u32) {
    let at = sector * 512 + index * 4;
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn look(image: Vec<u8>) -> CheckReport {
    check(&MemoryDevice::read_only(image), &NoFiles, Repair::Nothing).unwrap()
}

fn mend(image: Vec<u8>) -> (CheckReport, Vec<u8>) {
    let storage = MemoryDevice::new(image);
    let report = check(&storage, &NoFiles, Repair::All).unwrap();
    (report, storage.snapshot())
}

fn read(image: Vec<u8>, options: OpenOptions) -> tranship_block::Result<(Vec<u8>, Vmdk)> {
    let disk = Vmdk::open(Arc::new(MemoryDevice::read_only(image)), &DenyAll, options)?;
    let bytes = folder::contents(&disk)?;
    Ok((bytes, disk))
}

fn salvage() -> OpenOptions {
    OpenOptions { salvage: true, ..OpenOptions::default() }
}

#[test]
fn whole_disks_are_clean() {
    for (image, compressed) in [(sparse(), 0), (stream(), 5)] {
        assert!(read(image.clone(), OpenOptions::default()).unwrap().0 == model());
        let report = look(image.clone());
        assert!(report.is_clean(), "{report:?}");
        assert_eq!((report.allocated_clusters, report.total_clusters), (5, 65 << 4));
        assert_eq!(report.compressed_clusters, compressed);
        if compressed == 0 {
            assert_eq!(report.image_end_offset, image.len() as u64);
            assert_eq!(entry(&image, DIRECTORY, 0), TABLE as u32);
            assert_eq!(entry(&image, REDUNDANT, 0), REDUNDANT_TABLE as u32);
        }
    }
}

#[test]
fn damage_is_found_and_mended_from_the_other_copy() {
    let good = sparse();
    let first = entry(&good, TABLE, 0);
    let beyond = u32::MAX - 7;
    // Where, which entry, its new value, and whether a reader would notice.
    let cases = [
        ("lost directory entry", DIRECTORY, 0, 0),
        ("directory entry past the end", DIRECTORY, 1, beyond),
        ("redundant directory entry past the end", REDUNDANT, 1, beyond),
        ("lost table entry", TABLE, 0, 0),
        ("table entry past the end", TABLE, 1, beyond),
        ("table entry in the metadata", TABLE, 1, 3),
        ("lost redundant table entry", REDUNDANT_TABLE, 2, 0),
        ("wrong redundant table entry", REDUNDANT_TABLE, 2, first),
    ];
    for (what, sector, index, value) in cases {
        let mut image = good.clone();
        set(&mut image, sector, index, value);
        let report = look(image.clone());
        assert_eq!(report.corruptions, 1, "{what}: {report:?}");
        let (report, mended) = mend(image);
        assert!(report.is_clean() && report.corruptions_fixed == 1, "{what}: {report:?}");
        let again = look(mended.clone());
        assert!(again.is_clean(), "{what}: {again:?}");
        let (bytes, disk) = read(mended, OpenOptions::default()).unwrap();
        assert!(bytes == model(), "{what}");
        assert!(disk.warnings().is_empty(), "{what}: {:?}", disk.warnings());
    }
}

#[test]
fn what_cannot_be_mended_stays() {
    let good = sparse();
    let mut image = good.clone();
    set(&mut image, TABLE, 0, u32::MAX);
    set(&mut image, REDUNDANT_TABLE, 0, u32::MAX);
    let (report, mended) = mend(image.clone());
    assert_eq!((report.corruptions, report.corruptions_fixed), (1, 0), "{report:?}");
    assert!(mended == image, "nothing is guessed");
    let mut image = good.clone();
    let other = entry(&image, TABLE, 1);
    set(&mut image, TABLE, 0, other);
    set(&mut image, REDUNDANT_TABLE, 0, other);
    let report = look(image);
    assert_eq!(report.corruptions, 1);
    assert!(report.details[0].contains("share their place"), "{report:?}");
    let mut image = stream();
    image[128 * 512] ^= 8;
    let report = look(image);
    assert!(report.details[0].contains("marker of grain 0"), "{report:?}");
}

#[test]
fn leaks_are_given_back() {
    let mut image = sparse();
    let whole = image.len();
    // The grain in the middle is forgotten, and two more are behind the end.
    set(&mut image, TABLE, 1, 0);
    set(&mut image, REDUNDANT_TABLE, 1, 0);
    image.extend(pattern(2 * GRAIN, 9));
    let report = look(image.clone());
    assert_eq!((report.leaks, report.corruptions), (3, 0), "{report:?}");
    let storage = MemoryDevice::new(image);
    let report = check(&storage, &NoFiles, Repair::Leaks).unwrap();
    assert_eq!((report.leaks, report.leaks_fixed), (0, 3), "{report:?}");
    assert_eq!(storage.size(), whole as u64);
    assert!(look(storage.snapshot()).is_clean());
}

#[test]
fn truncated_disks_are_refused_or_salvaged() {
    let mut image = sparse();
    let cut = image.len() - GRAIN - GRAIN / 2;
    image.truncate(cut);
    let error = read(image.clone(), OpenOptions::default()).unwrap_err();
    assert!(error.to_string().contains("truncated"), "{error}");
    let (bytes, disk) = read(image.clone(), salvage()).unwrap();
    let mut expected = model();
    expected[(33 << 20) + GRAIN / 2..].fill(0);
    assert!(bytes == expected);
    assert!(disk.warnings()[0].contains("2 grains of 64 KiB"), "{:?}", disk.warnings());

    // Both copies of the first table lead nowhere.
    let mut image = sparse();
    set(&mut image, DIRECTORY, 0, u32::MAX);
    set(&mut image, REDUNDANT, 0, u32::MAX);
    assert!(read(image.clone(), OpenOptions::default()).is_err());
    let (bytes, disk) = read(image, salvage()).unwrap();
    let mut expected = model();
    expected[..32 << 20].fill(0);
    assert!(bytes == expected);
    assert!(disk.warnings()[0].contains("1 grain tables of 32 MiB"), "{:?}", disk.warnings());
}

#[test]
fn streams_without_a_footer_are_followed_by_their_markers() {
    let whole = stream();
    // Only the footer is damaged: the markers tell that nothing is missing.
    let mut image = whole.clone();
    let footer = image.len() - 1024;
    image[footer..footer + 512].fill(0);
    let (bytes, disk) = read(image, OpenOptions::default()).unwrap();
    assert!(bytes == model());
    assert!(disk.warnings()[0].contains("markers of 5 grains"), "{:?}", disk.warnings());

    // Behind a download that was cut, grains are missing.
    let last = entry(&whole, (whole.len() - 1024) / 512, 14) as usize;
    let table = entry(&whole, last, 1) as usize;
    let image = whole[..table * 512 - 2048].to_vec();
    let error = read(image.clone(), OpenOptions::default()).unwrap_err();
    assert!(error.to_string().contains("the stream is truncated"), "{error}");
    let (bytes, disk) = read(image, salvage()).unwrap();
    let mut expected = model();
    expected[33 << 20..].fill(0);
    assert!(bytes == expected);
    assert!(disk.warnings()[0].contains("markers of 3 grains"), "{:?}", disk.warnings());

    // A damaged grain is the only one that is lost.
    let mut image = whole;
    image[128 * 512 + 20] ^= 0xff;
    assert!(read(image.clone(), OpenOptions::default()).is_err());
    let (bytes, disk) = read(image, salvage()).unwrap();
    let mut expected = model();
    expected[..GRAIN].fill(0);
    assert!(bytes == expected);
    assert!(disk.losses()[0].contains("grain 0"), "{:?}", disk.losses());
}

#[test]
fn missing_extents_are_named_or_salvaged() {
    let files = Memory::default();
    files.put("a", Arc::new(MemoryDevice::new(vec![1; 512])));
    let text =
        b"# Disk DescriptorFile\nRW 1 FLAT \"a\" 0\nRW 1 FLAT \"gone\" 0\nRW 2 FLAT \"a\" 0\n\
        NOACCESS 1 ZERO\n";
    let file = Arc::new(MemoryDevice::read_only(text.to_vec()));
    let error = Vmdk::open(file.clone(), &files, OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("extent \"gone\", which is missing"), "{error}");
    let disk = Vmdk::open(file.clone(), &files, salvage()).unwrap();
    let expected = [[1; 512], [0; 512], [1; 512], [0; 512], [0; 512]].concat();
    verify(&disk, &expected);
    assert_eq!(disk.warnings().len(), 3, "{:?}", disk.warnings());
    let report = check(&*file, &files, Repair::Nothing).unwrap();
    // The missing file, the short one, and that two extents share bytes of it.
    assert_eq!(report.corruptions, 3, "{report:?}");
}

#[test]
fn streams_do_not_grow() {
    let storage = MemoryDevice::new(stream());
    let error =
        tranship_vmdk::resize(&storage, &NoFiles, 1 << 30, ResizeOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn damaged_disks_are_survived(
        first in damaged(
            sparse(),
            vec![Span::new(0, 80), Span::new(512, 400), Span::new(21 * 512, 30 * 512)],
        ),
        second in damaged(stream(), {
            let end = stream().len() as u64;
            vec![Span::new(0, 80), Span::new(65_536, 32), Span::new(end - 5 * 512, 5 * 512)]
        }),
        salvaged in any::<bool>(),
        larger in any::<u64>(),
    ) {
        for image in [first, second] {
            let options = OpenOptions { salvage: salvaged, ..OpenOptions::default() };
            let file = Arc::new(MemoryDevice::read_only(image.clone()));
            let _ = tranship_vmdk::read_descriptor(&*file);
            if let Ok(disk) = Vmdk::open(file, &DenyAll, options) {
                exercise(&disk);
            }
            let storage = Arc::new(MemoryDevice::new(image.clone()));
            let _ = check(&*storage, &NoFiles, Repair::All);
            let opened = Vmdk::open_writable(storage.clone(), &NoFiles, OpenOptions::default());
            if let Ok(disk) = opened {
                let end = disk.size().saturating_sub(5000);
                for at in [0, 40 << 20, end] {
                    let _ = disk.write_at(&[7; 5000], at);
                    let _ = disk.write_zeroes(Span::new(at, 70_000), tranship_block::Zeroing::MayUnmap);
                }
                let _ = disk.flush();
            }
            let storage = MemoryDevice::new(image);
            let _ = tranship_vmdk::resize(&storage, &NoFiles, larger % (1 << 33), ResizeOptions::default());
        }
    }

    #[test]
    fn damaged_descriptors_are_survived(
        text in damaged(
            b"# Disk DescriptorFile\nversion=1\nencoding=\"windows-1252\"\nCID=00000001\n\
              parentCID=ffffffff\ncreateType=\"custom\"\n\nRW 8 FLAT \"a\" 0\nRDONLY 8 FLAT \"a\" 8\n\
              RW 5 ZERO\nNOACCESS 3 ZERO\nRW 4096 SPARSE \"b\"\n\nddb.adapterType = \"ide\"\n"
                .to_vec(),
            Vec::new(),
        ),
        salvaged in any::<bool>(),
    ) {
        let files = Memory::default();
        files.put("a", Arc::new(MemoryDevice::new(vec![1; 16 * 512])));
        files.put("b", Arc::new(MemoryDevice::new(sparse())));
        let options = OpenOptions { salvage: salvaged, ..OpenOptions::default() };
        let file = Arc::new(MemoryDevice::new(text));
        if let Ok(disk) = Vmdk::open(file.clone(), &files, options) {
            exercise(&disk);
        }
        if let Ok(disk) = Vmdk::open_writable(file.clone(), &files, OpenOptions::default()) {
            let _ = disk.write_at(&[1; 600], 100);
        }
        let _ = check(&*file, &files, Repair::All);
        let _ = tranship_vmdk::resize(&*file, &files, 1 << 22, ResizeOptions::default());
    }
}

#[test]
fn a_gap_that_shares_a_block_with_its_neighbour_is_given_back_once() {
    let mut image = sparse();
    image.extend(pattern(2 * GRAIN + 512, 5));
    // The table that this loses is written anew behind the gap, in the same 4 KiB.
    image[DIRECTORY * 512..DIRECTORY * 512 + 4].fill(0);
    let storage = MemoryDevice::new(image);
    let report = check(&storage, &NoFiles, Repair::All).unwrap();
    assert_eq!((report.leaks, report.leaks_fixed), (0, 2), "{report:?}");
    let again = check(&storage, &NoFiles, Repair::Nothing).unwrap();
    assert!(again.is_clean(), "{again:?}");
}

#[test]
fn a_descriptor_outside_of_the_file_is_a_contradiction_and_no_gap_in_front_of_it() {
    let mut image = sparse();
    image[28..36].copy_from_slice(&4_000_000_u64.to_le_bytes());
    let storage = MemoryDevice::new(image.clone());
    for repair in [Repair::Nothing, Repair::All] {
        let report = check(&storage, &NoFiles, repair).unwrap();
        assert_eq!((report.corruptions, report.leaks), (1, 0), "{report:?}");
        assert!(report.details[0].contains("descriptor ends past"), "{report:?}");
    }
    assert!(storage.snapshot() == image);
}

#[test]
fn extents_that_share_bytes_are_read_but_never_written() {
    let files = Memory::default();
    files.put("d-flat.vmdk", Arc::new(MemoryDevice::new(pattern(4096, 1))));
    for (second, is_apart) in [(4, true), (3, false), (0, false)] {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n\
             RW 4 FLAT \"d-flat.vmdk\" 0\nRW 4 FLAT \"d-flat.vmdk\" {second}\n"
        );
        let storage = Arc::new(MemoryDevice::new(text.into_bytes()));
        let report = check(&*storage, &files, Repair::Nothing).unwrap();
        assert_eq!(report.corruptions, u64::from(!is_apart), "{report:?}");
        assert!(Vmdk::open(storage.clone(), &files, OpenOptions::default()).is_ok());
        let opened = Vmdk::open_writable(storage, &files, OpenOptions::default());
        match opened {
            Ok(_) => assert!(is_apart),
            Err(error) => {
                assert_eq!(error.message(), "two extents share bytes of \"d-flat.vmdk\"");
                assert!(!is_apart);
            }
        }
    }
}

#[test]
fn a_table_that_lies_on_a_directory_is_not_mended() {
    let mut image = sparse();
    image[DIRECTORY * 512..DIRECTORY * 512 + 4].copy_from_slice(&(REDUNDANT as u32).to_le_bytes());
    let storage = MemoryDevice::new(image.clone());
    let before = check(&storage, &NoFiles, Repair::Nothing).unwrap();
    assert!(before.details[0].contains("1 tables and directories lie on others"), "{before:?}");
    let report = check(&storage, &NoFiles, Repair::All).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (before.corruptions, 0));
    assert!(storage.snapshot() == image);
}

#[test]
fn tables_of_several_numbers_are_not_mended() {
    let good = sparse();
    let second = entry(&good, DIRECTORY, 1);
    for (directory, index, entry) in
        [(REDUNDANT, 0, second), (DIRECTORY, 1, TABLE as u32), (DIRECTORY, 2, second)]
    {
        let mut image = good.clone();
        set(&mut image, directory, index, entry);
        // What the first table has and the second one does not.
        set(&mut image, TABLE, 7, 0);
        let (report, mended) = mend(image.clone());
        assert!(report.details[0].contains("1 tables and directories lie on others"), "{report:?}");
        assert_eq!(report.corruptions_fixed, 0, "{report:?}");
        assert!(mended == image);
    }
}
