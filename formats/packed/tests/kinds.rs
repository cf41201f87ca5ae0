// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks packed in every way that is found in the field, read back.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod make;

use make::{bzip2, gzip, seekable, xz, zstd, zstd_without_size};
use std::process::Command;
use std::sync::Arc;
use tranship_block::{BlockDevice, CopyOptions, ErrorKind, MemoryDevice, copy};
use tranship_format_testing::{contents, has_tool, pattern, verify};
use tranship_packed::{Compression, OpenOptions, Packed};

fn open(bytes: Vec<u8>) -> tranship_block::Result<Packed> {
    Packed::open(Arc::new(MemoryDevice::read_only(bytes)), OpenOptions::default())
}

/// Some noise, something that compresses well, and zeroes.
fn disk(mib: usize) -> Vec<u8> {
    let mut bytes = pattern(mib << 16, 5);
    while bytes.len() < mib << 19 {
        let line = format!("line {} of a log that repeats itself\n", bytes.len());
        bytes.extend(line.as_bytes());
    }
    bytes.resize((mib << 20) - 512, 0);
    let tail = bytes.len() - 700;
    bytes[tail..].fill(7);
    bytes
}

/// What threads that read ascending chunks get.
fn copied(device: &Packed, chunk: u64) -> Vec<u8> {
    let target = MemoryDevice::new(vec![0; device.size() as usize]);
    let options = CopyOptions { chunk, target_is_zero: true, ..CopyOptions::default() };
    copy(device, &target, &options, &()).unwrap();
    target.snapshot()
}

#[test]
fn every_kind_gives_the_bytes_that_went_in() {
    let disk = disk(5);
    let (a, b) = disk.split_at(3_000_001);
    let join = |parts: &[Vec<u8>]| parts.concat();
    let many = |pack: &dyn Fn(&[u8]) -> Vec<u8>| {
        disk.chunks(400_000).map(pack).collect::<Vec<_>>().concat()
    };
    let padded = join(&[xz(a), vec![0; 8], xz(b), vec![0; 4]]);
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &zstd(&disk)].concat();
    let cases = [
        ("gzip", gzip(&disk), Compression::Gzip, 1),
        ("gzip members", join(&[gzip(a), gzip(b)]), Compression::Gzip, 1),
        ("short gzip members", many(&gzip), Compression::Gzip, 2),
        ("xz", xz(&disk), Compression::Xz, 1),
        ("xz streams", padded, Compression::Xz, 2),
        ("zstd", zstd(&disk), Compression::Zstd, 1),
        ("zstd without size", zstd_without_size(&disk), Compression::Zstd, 1),
        ("zstd frames", many(&zstd), Compression::Zstd, 14),
        ("zstd frames, one unknown", join(&[zstd(a), zstd_without_size(b)]), Compression::Zstd, 2),
        ("seekable zstd", seekable(&disk, 400_000), Compression::Zstd, 14),
        ("zstd behind a skippable frame", skippable, Compression::Zstd, 1),
        ("bzip2", bzip2(&disk), Compression::Bzip2, 1),
        ("bzip2 streams", many(&bzip2), Compression::Bzip2, 14),
    ];
    for (name, packed, compression, pieces) in cases {
        let device = open(packed).unwrap();
        assert_eq!(device.compression(), compression, "{name}");
        assert!(device.pieces() >= pieces, "{name}: {} pieces", device.pieces());
        assert_eq!(device.warnings(), [""; 0], "{name}");
        verify(&device, &disk);
        assert!(copied(&device, 1 << 20) == disk, "{name}");
        for (at, len) in [(0, 1), (2_999_999, 3), (disk.len() - 1, 1), (4_193_000, 2000)] {
            let mut buf = vec![0; len];
            device.read_at(&mut buf, at as u64).unwrap();
            assert_eq!(buf, disk[at..at + len], "{name}: {len} bytes at {at}");
        }
        let error = device.read_at(&mut [0; 2], disk.len() as u64 - 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
}

#[test]
fn pieces_too_large_for_memory_are_read_by_a_cursor() {
    let disk = disk(36);
    for packed in [zstd(&disk), zstd_without_size(&disk)] {
        let device = open(packed).unwrap();
        assert_eq!((device.pieces(), device.largest_piece()), (1, disk.len() as u64));
        assert!(device.warnings()[0].contains("random access is slow"));
        assert!(copied(&device, 300_000) == disk);
        // Back to the start, then somewhere behind what is kept.
        for at in [0, 20 << 20, 3, 35 << 20, 1 << 20] {
            let mut buf = vec![0; 5000];
            device.read_at(&mut buf, at as u64).unwrap();
            assert_eq!(buf, disk[at..at + 5000], "at {at}");
        }
    }
}

#[test]
fn gzip_is_read_from_its_access_points() {
    let disk: Vec<u8> = (0..2_500_000_u32).flat_map(|n| (n / 3 * 7).to_le_bytes()).collect();
    for packed in [gzip(&disk), [gzip(&disk[..7]), gzip(&disk[7..])].concat()] {
        let device = open(packed).unwrap();
        assert!((2..=3).contains(&device.pieces()), "{} pieces", device.pieces());
        for at in [8_400_000, 9_999_000, 4_194_000, 0, 4_300_000] {
            let mut buf = vec![0; 1000];
            device.read_at(&mut buf, at as u64).unwrap();
            assert_eq!(buf, disk[at..at + 1000], "at {at}");
        }
        assert!(copied(&device, 700_000) == disk);
    }
}

#[test]
fn stretches_of_zeroes_in_gzip_are_holes() {
    let mut disk = vec![0; 40 << 20];
    disk[..1000].fill(1);
    let device = open(gzip(&disk)).unwrap();
    let extent = device.extent_at(20 << 20).unwrap();
    assert!(extent.kind.reads_zero());
    assert_eq!(extent.len, 20 << 20);
    assert!(!device.extent_at(0).unwrap().kind.reads_zero());
    verify(&device, &disk);
}

#[test]
fn a_limit_on_the_size_holds_for_all() {
    let disk = vec![0; 1 << 20];
    for packed in [gzip(&disk), xz(&disk), zstd(&disk), zstd_without_size(&disk), bzip2(&disk)] {
        let file = Arc::new(MemoryDevice::read_only(packed));
        let error = Packed::open(file.clone(), OpenOptions { max_size: 1_000_000, salvage: false })
            .unwrap_err();
        assert_eq!(error.to_string(), "packed disk is larger than the limit of 1000000 bytes");
        assert!(Packed::open(file, OpenOptions { max_size: 1 << 20, salvage: false }).is_ok());
    }
}

#[test]
fn truncated_and_altered_files_give_errors_and_no_bytes() {
    let disk = disk(2);
    let packings = [gzip(&disk), xz(&disk), zstd(&disk), zstd_without_size(&disk), bzip2(&disk)];
    for (number, packed) in packings.into_iter().enumerate() {
        for len in [packed.len() - 1, packed.len() / 2, 20, 4] {
            let mut buf = vec![0; disk.len()];
            let result =
                open(packed[..len].to_vec()).and_then(|device| device.read_at(&mut buf, 0));
            let error = result.expect_err("a truncated file gave a disk");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{number}, {len}: {error}");
        }
        let mut altered = packed.clone();
        let middle = altered.len() / 3;
        altered[middle] ^= 0x10;
        let mut buf = vec![0; disk.len()];
        let result = open(altered).and_then(|device| device.read_at(&mut buf, 0));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt, "{number}");
    }
}

#[test]
fn what_lies_before_the_damage_can_be_salvaged() {
    let disk: Vec<u8> = (0..500_000_u32).flat_map(|n| (n / 3 * 7).to_le_bytes()).collect();
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let sized = ["zstd", "zstd frames"];
    for (name, packed) in [
        ("gzip", gzip(&disk)),
        ("zstd", zstd(&disk)),
        ("zstd without size", zstd_without_size(&disk)),
        ("zstd frames", [zstd(&disk[..700_000]), zstd(&disk[700_000..])].concat()),
        ("bzip2", bzip2(&disk)),
    ] {
        let end = packed.len() * 3 / 4;
        let mut altered = packed[..packed.len() - 1].to_vec();
        altered[end..].iter_mut().for_each(|byte| *byte ^= 0xa5);
        for damaged in [packed[..end].to_vec(), altered] {
            let file = Arc::new(MemoryDevice::read_only(damaged));
            let device = Packed::open(file, options).unwrap();
            assert!(!device.warnings().is_empty(), "{name}");
            let bytes = contents(&device);
            let same = bytes.iter().zip(&disk).take_while(|(a, b)| a == b).count();
            assert!(same > disk.len() / 2, "{name}: {same} of {} bytes", disk.len());
            assert!(bytes.len() == disk.len() || !sized.contains(&name), "{name}");
            let mut tail = vec![0; 1000];
            device.read_at(&mut tail, device.size() - 1000).unwrap();
        }
    }
}

#[test]
fn bytes_behind_the_data_are_left_out_with_a_warning() {
    let disk = disk(1);
    for packed in [gzip(&disk), zstd(&disk), bzip2(&disk)] {
        let device = open([packed, vec![0; 1000]].concat()).unwrap();
        assert!(device.warnings()[0].starts_with("1000 bytes behind the"));
        verify(&device, &disk);
    }
}

#[test]
fn files_by_the_usual_tools_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("disk.raw");
    let disk = disk(5);
    std::fs::write(&plain, &disk).unwrap();
    let cases: [(&str, &[&str], usize); 8] = [
        ("gzip", &["-9"], 1),
        ("gzip", &["-1", "--rsyncable"], 1),
        ("xz", &["-0"], 1),
        ("xz", &["-1", "--block-size=1MiB", "--check=sha256"], 5),
        ("xz", &["--x86", "--lzma2=dict=1MiB", "--check=none"], 1),
        ("zstd", &["-q", "-3"], 1),
        ("zstd", &["-q", "--no-check", "--long=27", "-T2"], 1),
        ("bzip2", &["-1"], 1),
    ];
    for (tool, args, pieces) in cases {
        if !has_tool(tool) {
            continue;
        }
        let output = Command::new(tool).args(args).arg("-c").arg(&plain).output().unwrap();
        assert!(output.status.success(), "{tool} {args:?}");
        let device = open(output.stdout).unwrap();
        assert!(device.pieces() >= pieces, "{tool} {args:?}: {} pieces", device.pieces());
        verify(&device, &disk);
    }
}
