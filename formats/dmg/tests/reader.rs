// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The crate `dmg-core` reads the same bytes out of the same images.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod make;

use dmg::DmgReader;
use make::{ADC, BZIP2, IGNORED, LZFSE, LZMA, RAW, ZERO, ZLIB, image, pack};
use proptest::prelude::*;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice};
use tranship_dmg::Dmg;
use tranship_format_testing::{contents, pattern, samples, verify};

/// What the other reader makes of it: all at once, and the second half alone.
fn assert_reads(bytes: Vec<u8>, disk: &[u8]) {
    let mut reader = DmgReader::open(Cursor::new(bytes)).unwrap();
    assert_eq!(reader.virtual_disk_size(), disk.len() as u64);
    let mut found = Vec::new();
    reader.read_to_end(&mut found).unwrap();
    assert!(found == disk, "other bytes");
    let half = disk.len() / 2 + 3;
    reader.seek(SeekFrom::Start(half as u64)).unwrap();
    found.clear();
    reader.read_to_end(&mut found).unwrap();
    assert!(found == disk[half..], "other bytes behind {half}");
}

fn open(bytes: Vec<u8>) -> Dmg {
    Dmg::open_read_only(Arc::new(MemoryDevice::read_only(bytes))).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn chunks_of_all_kinds_read_the_same(
        chunks in prop::collection::vec(
            (
                prop::sample::select(vec![ZERO, RAW, IGNORED, ADC, ZLIB, BZIP2, LZFSE, LZMA]),
                1_u64..40,
                any::<u64>(),
            ),
            1..12,
        ),
        split in any::<prop::sample::Index>(),
    ) {
        let mut disk = Vec::new();
        let mut runs = Vec::new();
        for (kind, sectors, seed) in chunks {
            let mut bytes = vec![0; sectors as usize * 512];
            if !matches!(kind, ZERO | IGNORED) {
                let third = bytes.len() / 3;
                bytes[..third].copy_from_slice(&pattern(third, seed));
            }
            runs.push((kind, disk.len() as u64 / 512, sectors, pack(kind, &bytes)));
            disk.extend(bytes);
        }
        let split = split.index(runs.len());
        let bytes = image(disk.len() as u64 / 512, &runs, split);
        verify(&open(bytes.clone()), &disk);
        assert_reads(bytes, &disk);
    }
}

#[test]
fn samples_read_the_same() {
    let all = samples();
    let folder = tempfile::tempdir().unwrap();
    for sample in all
        .iter()
        .filter(|sample| sample.format.as_deref() == Some("dmg") && sample.expect == "content")
    {
        let bytes = std::fs::read(sample.unpack(folder.path(), &all)).unwrap();
        let dmg = open(bytes.clone());
        assert!(dmg.size() > 0, "{}", sample.path);
        assert_reads(bytes, &contents(&dmg));
    }
}
