// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images made by hand, compared with qemu-img; hostile ones.
#![allow(missing_docs, clippy::unwrap_used)]

use proptest::prelude::*;
use std::sync::Arc;
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Span};
use tranship_cloop::Cloop;
use tranship_format_testing::{damaged, exercise, has_tool, pattern, raw_by_qemu, verify};

const BLOCK: usize = 4096;
const SCRIPT: &[u8] = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 \
                        /dev/cloop $1\n";

fn image(disk: &[u8]) -> Vec<u8> {
    let mut file = SCRIPT.to_vec();
    file.resize(128, 0);
    let blocks = disk.chunks(BLOCK);
    file.extend(u32::try_from(BLOCK).unwrap().to_be_bytes());
    file.extend(u32::try_from(blocks.len()).unwrap().to_be_bytes());
    let mut offset = 136 + (blocks.len() as u64 + 1) * 8;
    let mut data: Vec<u8> = Vec::new();
    let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
    for block in blocks {
        file.extend(offset.to_be_bytes());
        let mut packed = vec![0; compressor.zlib_compress_bound(block.len())];
        let len = compressor.zlib_compress(block, &mut packed).unwrap();
        data.extend(&packed[..len]);
        offset += len as u64;
    }
    file.extend(offset.to_be_bytes());
    file.extend(data);
    file
}

fn disk() -> Vec<u8> {
    let mut disk = pattern(BLOCK * 3, 1);
    disk.resize(BLOCK * 10, 0);
    disk.extend(pattern(BLOCK, 2));
    disk
}

fn open(bytes: Vec<u8>) -> tranship_block::Result<Cloop> {
    Cloop::open_read_only(Arc::new(MemoryDevice::read_only(bytes)))
}

#[test]
fn any_range_gives_the_bytes_that_went_in() {
    let disk = disk();
    let cloop = open(image(&disk)).unwrap();
    verify(&cloop, &disk);
    for (at, len) in [(0, 1), (1, BLOCK), (BLOCK, BLOCK * 2), (100, BLOCK * 9), (BLOCK * 11 - 1, 1)]
    {
        let mut buf = vec![0; len];
        cloop.read_at(&mut buf, at as u64).unwrap();
        assert_eq!(buf, disk[at..at + len], "{len} bytes at {at}");
    }
    assert_eq!(cloop.read_at(&mut [0; 2], cloop.size() - 1).unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn wrong_numbers_are_named() {
    let offset_of = |block: usize| 136 + block * 8;
    let cases: [(usize, &[u8], ErrorKind, &str); 7] = [
        (0, b"##", ErrorKind::Corrupt, "no cloop header"),
        (12, b"3", ErrorKind::Unsupported, "version of the cloop image is \"3.0\""),
        (128, &[0, 0, 0, 0], ErrorKind::Corrupt, "block size is 0"),
        (128, &[0xff, 0, 0, 0], ErrorKind::Corrupt, "block size is 4278190080"),
        (132, &[0xff; 4], ErrorKind::Corrupt, "image has 4294967295 blocks"),
        (132, &[0, 1, 0, 0], ErrorKind::Corrupt, "table of 65536 blocks ends past"),
        (offset_of(11), &[1], ErrorKind::Corrupt, "blocks end at byte 720575940"),
    ];
    for (at, new, kind, expected) in cases {
        let mut bytes = image(&disk());
        bytes[at..at + new.len()].copy_from_slice(new);
        let error = open(bytes).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
        assert_eq!(error.kind(), kind);
    }
    for (at, new) in [(offset_of(1), [0xff; 8]), (offset_of(1), [0; 8])] {
        let mut bytes = image(&disk());
        bytes[at..at + 8].copy_from_slice(&new);
        let error = open(bytes).unwrap().read_at(&mut [0; 1], 0).unwrap_err();
        assert!(error.to_string().starts_with("block 0 lies from byte 232 to"), "{error}");
    }
    let mut bytes = image(&disk());
    bytes.pop();
    assert!(open(bytes).unwrap_err().to_string().contains("it is truncated"));
    let mut bytes = image(&disk());
    bytes[300] ^= 1;
    let error = open(bytes).unwrap().read_at(&mut [0; 1], 0).unwrap_err().to_string();
    assert!(error.starts_with("compressed data of block 0 is damaged"), "{error}");
}

#[test]
fn qemu_reads_the_same_bytes() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.cloop");
    std::fs::write(&path, image(&disk())).unwrap();
    assert!(raw_by_qemu("cloop", folder.path(), &path) == disk());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damaged_images_do_no_harm(
        bytes in damaged(image(&disk()), vec![Span::new(0, 232)]),
    ) {
        if let Ok(cloop) = open(bytes) {
            exercise(&cloop);
        }
    }
}
