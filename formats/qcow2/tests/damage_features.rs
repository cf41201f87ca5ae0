// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whatever is in the tables of subclusters and compressed clusters: no panic, no flood.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use proptest::prelude::*;
use std::sync::{Arc, LazyLock};
use tranship_block::{BlockDevice, MemoryDevice, Result, Span, Zeroing};
use tranship_format_testing::{damaged, exercise, pattern};
use tranship_qcow2::{Compression, CreateOptions, OpenOptions, Qcow2, create};

const SIZE: u64 = 500_224;

/// Data, zeroes and compressed clusters, with and without subclusters.
fn good(extended_l2: bool) -> Vec<u8> {
    let compression = if extended_l2 { Compression::Zstd } else { Compression::Deflate };
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let options =
        CreateOptions { extended_l2, compression, cluster_bits: 14, ..CreateOptions::new(SIZE) };
    create(&*storage, &options).unwrap();
    let image = Qcow2::open(storage.clone(), OpenOptions::default()).unwrap();
    image.write_at(&pattern(50_000, 1), 1000).unwrap();
    image.write_zeroes(Span::new(40_000, 30_000), Zeroing::KeepAllocated).unwrap();
    for cluster in 8..16_u64 {
        image.write_compressed(cluster << 14, &vec![cluster as u8; 1 << 14]).unwrap();
    }
    image.finish().unwrap();
    drop(image);
    storage.snapshot()
}

/// The header, the tables, and everything behind them that is small.
fn places(image: &[u8]) -> Vec<Span> {
    let at = |offset: usize| u64::from_be_bytes(image[offset..offset + 8].try_into().unwrap());
    let l1 = at(40);
    let l2 = at(l1 as usize) & 0x00ff_ffff_ffff_fe00;
    vec![Span::new(0, 120), Span::new(at(48), 8), Span::new(l1, 8), Span::new(l2, 1024)]
}

fn strategy() -> impl Strategy<Value = Vec<u8>> {
    static PLAIN: LazyLock<Vec<u8>> = LazyLock::new(|| good(false));
    static EXTENDED: LazyLock<Vec<u8>> = LazyLock::new(|| good(true));
    any::<bool>().prop_flat_map(|extended| {
        let image = if extended { &*EXTENDED } else { &*PLAIN };
        damaged(image.clone(), places(image))
    })
}

fn change(bytes: Vec<u8>) -> Result<()> {
    let image = Qcow2::open(Arc::new(MemoryDevice::new(bytes)), OpenOptions::default())?;
    let size = image.size().min(SIZE);
    let mut first = Ok(());
    let mut keep = |result: Result<()>| {
        if first.is_ok() {
            first = result;
        }
    };
    keep(image.write_at(&pattern(70_000.min(size as usize), 2), 0));
    keep(image.write_zeroes(Span::new(size / 2, size / 4), Zeroing::MayUnmap));
    keep(image.write_zeroes(Span::new(size / 3, size / 5), Zeroing::KeepAllocated));
    keep(image.write_compressed(0, &[1; 1 << 14]));
    keep(image.discard(Span::new(0, size)));
    keep(image.finish());
    first
}

#[test]
fn the_image_is_good_before_it_is_damaged() {
    for extended in [false, true] {
        change(good(extended)).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn damaged_images_never_panic(bytes in strategy()) {
        let device = Arc::new(MemoryDevice::read_only(bytes.clone()));
        if let Ok(image) = Qcow2::open_read_only(device, None) {
            exercise(&image);
        }
        let _ = change(bytes);
    }
}
