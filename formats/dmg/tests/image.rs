// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images with every kind of chunk, by hand and by Apple; hostile ones.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod make;

use make::{ADC, BZIP2, COMMENT, IGNORED, LZFSE, LZMA, RAW, Run, ZERO, ZLIB, image, pack};
use proptest::prelude::*;
use std::sync::Arc;
use tranship_block::{BlockDevice, ErrorKind, ExtentKind, MemoryDevice, Span};
use tranship_dmg::{Codec, Dmg};
use tranship_format_testing::{damaged, exercise, has_tool, pattern, raw_by_qemu, samples, verify};

fn open(bytes: Vec<u8>) -> tranship_block::Result<Dmg> {
    Dmg::open_read_only(Arc::new(MemoryDevice::read_only(bytes)))
}

/// Chunks of these kinds, 16 sectors each, and the disk that they make.
fn chunks(kinds: &[u32]) -> (Vec<Run>, Vec<u8>) {
    let mut disk = Vec::new();
    let mut runs = Vec::new();
    for (number, kind) in kinds.iter().enumerate() {
        if *kind == COMMENT {
            runs.push((COMMENT, number as u64 * 16, 0, Vec::new()));
            disk.extend([0; 16 * 512]);
            continue;
        }
        let mut bytes = vec![0; 16 * 512];
        if !matches!(*kind, ZERO | IGNORED) {
            bytes[..3000].copy_from_slice(&pattern(3000, number as u64));
        }
        runs.push((*kind, number as u64 * 16, 16, pack(*kind, &bytes)));
        disk.extend(bytes);
    }
    (runs, disk)
}

type Change = fn(&mut Vec<Run>);

const ALL: [u32; 10] = [ZLIB, ZERO, RAW, RAW, IGNORED, COMMENT, ADC, BZIP2, LZFSE, LZMA];

#[test]
fn every_kind_of_chunk_gives_its_bytes() {
    let (runs, disk) = chunks(&ALL);
    for (split, padding) in [(0, 0), (4, 0), (4, 300)] {
        let mut bytes = image(160, &runs, split);
        bytes.resize(bytes.len() + padding, 0);
        let dmg = open(bytes).unwrap();
        verify(&dmg, &disk);
        let codecs = [Codec::Adc, Codec::Zlib, Codec::Bzip2, Codec::Lzfse, Codec::Lzma];
        assert_eq!(dmg.codecs(), codecs);
        let extent = dmg.extent_at(2 * 8192 + 100).unwrap();
        assert_eq!((extent.kind, extent.len), (ExtentKind::Data, 2 * 8192 - 100));
        assert!(extent.offset.is_some());
        let hole = dmg.extent_at(4 * 8192).unwrap();
        assert_eq!((hole.kind, hole.len), (ExtentKind::Hole, 2 * 8192));
    }
}

#[test]
fn tables_that_contradict_are_refused_by_name() {
    let (runs, _) = chunks(&ALL);
    let changed = |change: Change| {
        let mut runs = runs.clone();
        change(&mut runs);
        open(image(160, &runs, 0)).unwrap_err()
    };
    let cases: [(Change, &str); 6] = [
        (|runs| runs[1].2 = 17, "two chunks have byte 16384 of the disk"),
        (|runs| runs[9].2 = 17, "chunk of 17 sectors at 0 + 144 ends past the disk's size"),
        (|runs| runs[9].1 = u64::MAX / 512, "chunk of 16 sectors at 0 + 36028797018963967"),
        (|runs| runs[0].0 = 0x8000_0009, "type of a chunk is 0x80000009"),
        (
            |runs| {
                runs[2].3.pop();
            },
            "plain chunk for byte 16384 has 8191 bytes",
        ),
        (|runs| runs.truncate(0), "property list has no resource-fork with blkx"),
    ];
    for (change, expected) in &cases[..5] {
        let error = changed(*change).to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    // A chunk of a disk so large that only the chunk itself is the limit.
    let huge = vec![(ZLIB, 0, (64 << 11) + 1, vec![0; 10])];
    let error = open(image(1 << 30, &huge, 0)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let (_, expected) = cases[5];
    let mut bytes = image(160, &runs, 0);
    let at = bytes.windows(4).position(|window| window == b"blkx").unwrap();
    bytes[at] = b'c';
    assert!(open(bytes).unwrap_err().to_string().starts_with(expected));
}

#[test]
fn damaged_chunks_are_errors() {
    for kind in [ADC, ZLIB, BZIP2, LZFSE, LZMA] {
        let (mut runs, _) = chunks(&[kind]);
        let whole = runs.clone();
        let half = runs[0].3.len() / 2;
        runs[0].3.truncate(half);
        let mut longer = whole.clone();
        longer[0].2 = 17;
        let mut shorter = whole;
        shorter[0].2 = 15;
        for (runs, needed) in [(runs, true), (longer, true), (shorter, kind != ADC)] {
            let dmg = open(image(20, &runs, 0)).unwrap();
            let result = dmg.read_at(&mut [0; 512], 0);
            assert!(result.is_err() || !needed, "kind {kind:#x}");
        }
    }
}

#[test]
fn other_files_under_the_same_name_are_named() {
    let cases: [(&[u8], &[u8], &str); 4] = [
        (b"encrcdsa", b"", "image is encrypted"),
        (b"", b"cdsaencr", "image is encrypted"),
        (b"sprs", b"", "image is a sparse image"),
        (b"", b"", "no koly trailer"),
    ];
    for (head, tail, expected) in cases {
        let mut bytes = vec![0; 4096];
        bytes[..head.len()].copy_from_slice(head);
        bytes[4096 - tail.len()..].copy_from_slice(tail);
        let error = open(bytes).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    assert!(open(vec![0; 3]).is_err());
    assert!(open(b"koly".to_vec()).is_err());
}

#[test]
fn qemu_reads_the_same_bytes() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.dmg");
    let (runs, disk) = chunks(&[ZLIB, ZERO, RAW, IGNORED, ZLIB]);
    std::fs::write(&path, image(80, &runs, 2)).unwrap();
    assert!(raw_by_qemu("dmg", folder.path(), &path) == disk);
}

#[test]
fn samples_have_their_content() {
    let all = samples();
    let folder = tempfile::tempdir().unwrap();
    for sample in all.iter().filter(|sample| sample.format.as_deref() == Some("dmg")) {
        let path = sample.unpack(folder.path(), &all);
        let opened = open(std::fs::read(&path).unwrap());
        if sample.expect == "content" {
            let dmg = opened.unwrap();
            assert_eq!(Some(dmg.size()), sample.virtual_size, "{}", sample.path);
            if has_tool("qemu-img") {
                verify(&dmg, &raw_by_qemu("dmg", folder.path(), &path));
            }
        } else if let Ok(image) = opened {
            assert_ne!(sample.expect, "refuse", "{}", sample.path);
            exercise(&image);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn damaged_images_do_no_harm(bytes in {
        let bytes = image(160, &chunks(&ALL).0, 4);
        let len = bytes.len() as u64;
        damaged(bytes, vec![Span::new(len - 512, 512)])
    }) {
        if let Ok(dmg) = open(bytes) {
            exercise(&dmg);
        }
    }

    #[test]
    fn damaged_chunks_do_no_harm(
        which in 0..5_usize,
        (seed, place) in (any::<u64>(), any::<prop::sample::Index>()),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let kind = [ADC, ZLIB, BZIP2, LZFSE, LZMA][which];
        let mut bytes = vec![7; 8192];
        let at = place.index(6000);
        bytes[at..at + 2000].copy_from_slice(&pattern(2000, seed));
        let mut stored = pack(kind, &bytes);
        for (place, new) in flips {
            let len = stored.len();
            stored[place.index(len)] = new;
        }
        let dmg = open(image(16, &[(kind, 0, 16, stored)], 0)).unwrap();
        exercise(&dmg);
    }

    #[test]
    fn damaged_tables_do_no_harm(
        table in damaged(
            {
                // The one table of an image, taken out of it again.
                let bytes = image(160, &chunks(&ALL).0, 0);
                let text = String::from_utf8_lossy(&bytes).into_owned();
                let data = text.split("<data>").nth(1).unwrap().split("</data>").next().unwrap();
                let data: String = data.split_whitespace().collect();
                base64::Engine::decode(&base64::engine::general_purpose::STANDARD, data).unwrap()
            },
            vec![Span::new(0, 600)],
        ),
    ) {
        let stored = chunks(&ALL).0.iter().flat_map(|run| run.3.clone()).collect();
        if let Ok(dmg) = open(make::wrap(stored, &[table], 160)) {
            exercise(&dmg);
        }
    }
}
