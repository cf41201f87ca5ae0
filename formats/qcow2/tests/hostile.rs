// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that lie: each is refused with an error that names the lie, or does no harm.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use std::sync::{Arc, LazyLock};
use support::{in_memory, open};
use tranship_block::{
    BlockDevice, ErrorKind, Extents, MemoryDevice, Repair, Span, Storage, Zeroing,
};
use tranship_format_testing::{contents, pattern};
use tranship_qcow2::{Header, OpenOptions, Qcow2, check, check_read_only};

/// A good image of 1 MiB: header, refcount table, L1 table and refcount block in the
/// first four clusters of 64 KiB, then an L2 table and data.
fn good() -> Vec<u8> {
    static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let storage = in_memory(1 << 20, 16);
        let image = open(&(storage.clone() as Arc<dyn Storage>), None);
        image.write_at(&pattern(200_000, 1), 0).unwrap();
        drop(image);
        storage.snapshot()
    });
    IMAGE.clone()
}

const L1: usize = 2 << 16;

fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = good();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

fn entry(image: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
}

/// Where the L2 table is.
fn l2(image: &[u8]) -> usize {
    (entry(image, L1) & 0x00ff_ffff_ffff_fe00) as usize
}

fn open_and_read(image: Vec<u8>) -> Result<Vec<u8>, tranship_block::Error> {
    let image = Qcow2::open_read_only(Arc::new(MemoryDevice::read_only(image)), None)?;
    let mut bytes = vec![0; 1 << 20];
    image.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[test]
fn headers_that_lie_are_refused_by_name() {
    use ErrorKind::{Corrupt, Denied, Unsupported};
    let cases: [(usize, &[u8], ErrorKind, &str); 24] = [
        (0, b"QFI\0", Corrupt, "magic is"),
        (4, &4_u32.to_be_bytes(), Unsupported, "qcow version is 4"),
        (20, &8_u32.to_be_bytes(), Corrupt, "cluster_bits is 8"),
        (20, &63_u32.to_be_bytes(), Corrupt, "cluster_bits is 63"),
        (24, &u64::MAX.to_be_bytes(), Corrupt, "virtual size of 18446744073709551615 bytes"),
        (24, &(1_u64 << 40).to_be_bytes(), Corrupt, "l1_size is 1, expected at least 2048"),
        (32, &1_u32.to_be_bytes(), Unsupported, "encrypted with AES"),
        (32, &2_u32.to_be_bytes(), Unsupported, "encrypted with LUKS"),
        (32, &3_u32.to_be_bytes(), Corrupt, "crypt_method is 3"),
        (36, &u32::MAX.to_be_bytes(), Corrupt, "L1 table has 34359738360 bytes"),
        (40, &0x20001_u64.to_be_bytes(), Corrupt, "no multiple of the cluster size"),
        (40, &(1_u64 << 63).to_be_bytes(), Corrupt, "ends past the file's"),
        (48, &(u64::MAX << 16).to_be_bytes(), Corrupt, "refcount table of"),
        (56, &u32::MAX.to_be_bytes(), Corrupt, "refcount table has"),
        (60, &u32::MAX.to_be_bytes(), Corrupt, "nb_snapshots is 4294967295"),
        (60, &[0, 0, 0, 1, 0xff, 0, 0, 0, 0, 0, 0, 0], Corrupt, "snapshot table"),
        (72, &4_u64.to_be_bytes(), Denied, "keeps its data in another file"),
        (72, &8_u64.to_be_bytes(), Unsupported, "compression_type is 0"),
        (72, &(1_u64 << 40).to_be_bytes(), Unsupported, "incompatible feature 40 (without a name)"),
        (96, &7_u32.to_be_bytes(), Corrupt, "refcount_order is 7"),
        (100, &96_u32.to_be_bytes(), Corrupt, "header_length is 96"),
        (100, &0x10001_u32.to_be_bytes(), Corrupt, "header_length is 65537"),
        (104, &[99], Unsupported, "compression_type is 99"),
        (
            112,
            &[0x12, 0x34, 0x56, 0x78, 0xff, 0xff, 0xff, 0xff],
            Corrupt,
            "header extension 0x12345678",
        ),
    ];
    for (at, bytes, kind, text) in cases {
        let error = open_and_read(patched(at, bytes)).unwrap_err();
        assert_eq!(error.kind(), kind, "{at}: {error}");
        assert!(error.message().contains(text), "{at}: {error}");
    }
}

#[test]
fn a_feature_is_called_what_the_image_calls_it_without_control_characters() {
    let mut image = patched(72, &(1_u64 << 5).to_be_bytes());
    image[112..120].copy_from_slice(&[0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 48]);
    image[120..126].copy_from_slice(b"\0\x05a\x1bz\0");
    // The end of the extensions.
    image[168..176].fill(0);
    let error = open_and_read(image).unwrap_err();
    assert!(error.message().contains("feature 5 (a?z)"), "{error}");
}

#[test]
fn a_file_that_was_cut_is_an_error_and_not_zeroes() {
    let whole = good();
    let storage = Arc::new(MemoryDevice::new(whole.clone()));
    let image = open(&(storage.clone() as Arc<dyn Storage>), None);
    image.write_at(&[1], 900_000).unwrap();
    drop(image);
    let mut cut = storage.snapshot();
    cut.truncate(whole.len());
    let error = open_and_read(cut).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains("the image is incomplete"), "{error}");
    for len in 0..120 {
        assert!(open_and_read(whole[..len].to_vec()).is_err(), "{len} bytes");
    }
}

#[test]
fn table_entries_that_lie_are_refused() {
    let image = good();
    let l2 = l2(&image);
    let copied = 1_u64 << 63;
    for (at, entry) in [
        (L1, copied | 0x200),
        (L1, copied | 1 << 50),
        (L1, copied),
        (l2, copied),
        (l2, copied | 0x200),
        (l2, copied | 1 << 50),
        // A compressed cluster past the end, and one that is no deflate stream.
        (l2, 1 << 62 | 1 << 40),
        (l2, 1 << 62 | 512),
    ] {
        let error = open_and_read(patched(at, &entry.to_be_bytes())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{at:#x} {entry:#x}: {error}");
    }
}

#[test]
fn a_stream_may_not_inflate_to_more_or_less_than_its_cluster() {
    use flate2::{Compression, write::DeflateEncoder};
    use std::io::Write;
    for (len, good) in [(65_536, true), (65_535, false), (65_537, false), (1 << 20, false)] {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&vec![b'x'; len]).unwrap();
        let stream = encoder.finish().unwrap();
        let mut image = crate::good();
        let place = image.len() as u64;
        image.extend(&stream);
        let l2 = l2(&image);
        let sectors = (stream.len() as u64 - 1) / 512;
        let entry = 1 << 62 | sectors << 54 | place;
        image[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
        match open_and_read(image) {
            Ok(bytes) => assert!(good && bytes[..65_536].iter().all(|byte| *byte == b'x')),
            Err(error) => {
                assert!(!good && error.kind() == ErrorKind::Corrupt, "{len}: {error}");
                assert!(error.message().starts_with("compressed cluster inflates to"), "{error}");
            }
        }
    }
}

/// Tries to write to an image; whatever happens, the first 4 clusters' tables stay whole.
fn write(image: Vec<u8>) -> tranship_block::Result<()> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryDevice::new(image));
    let image = Qcow2::open(storage, OpenOptions::default())?;
    image.write_at(&vec![9; 65_536], 0)?;
    image.write_at(&[9; 1000], 900_000)?;
    image.discard(Span::new(0, 1 << 20))?;
    image.flush()
}

#[test]
fn metadata_that_overlaps_is_never_written() {
    let image = good();
    let l2_at = l2(&image);
    let copied = 1_u64 << 63;
    let block = 3_u64 << 16;
    write(image.clone()).unwrap();
    for (at, value, text) in [
        (1 << 16, 1_u64 << 16, "shares cluster 1"),
        (1 << 16, 0, "reference counts are missing"),
        (L1, copied | block, "shares cluster 3"),
        (l2_at, copied | block, "holds metadata"),
        (l2_at, copied | l2_at as u64, "holds metadata"),
        (block as usize, 0, "reference count"),
    ] {
        let error = write(patched(at, &value.to_be_bytes())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{at:#x}: {error}");
        assert!(error.message().contains(text), "{at:#x}: {error}");
    }
}

#[test]
fn images_that_need_a_repair_can_only_be_read() {
    let image = patched(72, &2_u64.to_be_bytes());
    assert!(open_and_read(image.clone()).unwrap()[..200_000] == pattern(200_000, 1));
    assert_eq!(write(image).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn autoclear_bits_go_with_the_first_write_and_not_before() {
    let storage = Arc::new(MemoryDevice::new(patched(88, &u64::MAX.to_be_bytes())));
    let before = storage.snapshot();
    let image = open(&(storage.clone() as Arc<dyn Storage>), None);
    contents(&image);
    image.flush().unwrap();
    assert!(storage.snapshot() == before);
    image.write_zeroes(Span::new(0, 10), Zeroing::MayUnmap).unwrap();
    assert_eq!(Header::read(&storage).unwrap().autoclear_features, 0);
}

#[test]
fn a_check_finds_leaks_and_corruptions() {
    let image = good();
    let l2 = l2(&image);
    let report = |image: Vec<u8>| check(&MemoryDevice::read_only(image), Repair::Nothing).unwrap();
    assert_eq!((report(image.clone()).corruptions, report(image).leaks), (0, 0));
    let leak = report(patched(l2, &[0; 8]));
    assert_eq!((leak.corruptions, leak.leaks), (0, 1));
    let lost = report(patched((3 << 16) + 2 * (l2 >> 16), &[0; 2]));
    // No count for the L2 table, and its COPIED flag is wrong then.
    assert_eq!((lost.corruptions, lost.leaks), (2, 0), "{:?}", lost.details);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn damaged_images_never_panic(
        damage in prop::collection::vec((0..5_usize, 0..256_usize, any::<u8>()), 1..6)
    ) {
        let mut image = good();
        let places = [0, 1 << 16, L1, 3 << 16, l2(&image)];
        for (place, at, byte) in damage {
            image[places[place] + at] = byte;
        }
        let device = Arc::new(MemoryDevice::read_only(image.clone()));
        let _ = check_read_only(&device);
        if let Ok(image) = Qcow2::open_read_only(device, None) {
            let size = image.size().min(2 << 20);
            let mut buf = vec![0; 4096];
            for at in (0..size.saturating_sub(4096)).step_by(40_000) {
                let _ = image.read_at(&mut buf, at);
            }
            for run in Extents::new(&image, Span::new(0, size)) {
                if run.is_err() {
                    break;
                }
            }
        }
        let _ = write(image);
    }
}
