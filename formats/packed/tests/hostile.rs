// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Damaged files: errors are fine, panics, floods and hangs are not.
#![allow(missing_docs, clippy::unwrap_used)]

mod make;

use make::{bzip2, gzip, seekable, xz, zstd, zstd_without_size};
use proptest::prelude::*;
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice, Span};
use tranship_format_testing::{damaged, exercise, pattern};
use tranship_packed::{OpenOptions, Packed};

/// A small disk, packed in every way.
fn packings() -> Vec<Vec<u8>> {
    let mut disk = pattern(3000, 1);
    disk.resize(60_000, 0);
    disk.extend(pattern(500, 2));
    let two = |pack: fn(&[u8]) -> Vec<u8>| [pack(&disk), pack(&disk)].concat();
    vec![two(gzip), two(xz), two(zstd), two(zstd_without_size), seekable(&disk, 9000), two(bzip2)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn damaged_files_do_no_harm(
        bytes in (0..6_usize).prop_flat_map(|which| {
            let packed = packings().swap_remove(which);
            let len = packed.len() as u64;
            damaged(packed, vec![Span::new(0, 64), Span::new(len - 100, 100)])
        }),
        salvage: bool,
    ) {
        let options = OpenOptions { max_size: 64 << 20, salvage };
        if let Ok(device) = Packed::open(Arc::new(MemoryDevice::read_only(bytes)), options) {
            prop_assert!(device.size() <= options.max_size);
            exercise(&device);
        }
    }
}

#[test]
fn an_xz_index_that_promises_too_much_is_refused_or_found_out() {
    // The index of a tiny file, whose block claims 4 GiB.
    let packed = xz(&[1; 100]);
    let footer = packed.len() - 12;
    let backward = u32::from_le_bytes(packed[footer + 4..footer + 8].try_into().unwrap());
    let index_at = footer - (backward as usize + 1) * 4;
    let mut index = packed[index_at..index_at + 3].to_vec();
    index.extend([0x80, 0x80, 0x80, 0x80, 0x10]);
    index.resize(index.len().next_multiple_of(4), 0);
    index.extend(crc32fast::hash(&index).to_le_bytes());
    let mut forged = packed[..index_at].to_vec();
    let backward = u32::try_from(index.len() / 4 - 1).unwrap();
    forged.extend(index);
    let mut fields = backward.to_le_bytes().to_vec();
    fields.extend(&packed[footer + 8..footer + 10]);
    forged.extend(crc32fast::hash(&fields).to_le_bytes());
    forged.extend(fields);
    forged.extend(b"YZ");
    let file = Arc::new(MemoryDevice::read_only(forged));
    let device = Packed::open(file, OpenOptions::default()).unwrap();
    assert_eq!(device.size(), 1 << 32);
    let error = device.read_at(&mut [0; 200], 0).unwrap_err();
    assert!(error.to_string().contains("xz"), "{error}");
}
