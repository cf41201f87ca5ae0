// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An image behaves as a device in memory does, whatever is done to it.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use std::sync::Arc;
use support::{apply, in_memory, open, options};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Span, Storage, Zeroing};
use tranship_format_testing::{Op, contents, operations, pattern, write_from_threads};
use tranship_qcow2::{Backing, OpenOptions, Qcow2, check_read_only, create};

/// Cluster size, disk size, size of the backing image.
fn shape() -> impl Strategy<Value = (u32, u64, Option<u64>)> {
    prop_oneof![
        Just((9, 100_352)),
        Just((9, 512 * 7)),
        Just((12, 300_544)),
        Just((16, 700_416)),
        Just((21, 5_000_192)),
    ]
    .prop_flat_map(|(bits, size)| {
        let backing = prop_oneof![
            Just(None),
            Just(Some(size)),
            Just(Some(size / 3)),
            Just(Some(size + 70_000)),
        ];
        (Just(bits), Just(size), backing)
    })
}

fn verify(image: &Qcow2, model: &[u8]) {
    tranship_format_testing::verify(image, model);
    let report = image.check().unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.details);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn same_bytes_as_memory(
        ((bits, size, backing), ops) in shape().prop_flat_map(|shape| {
            (Just(shape), operations(shape.1, 1 << shape.0, 30))
        })
    ) {
        let storage: Arc<dyn Storage> = in_memory(size, bits);
        let base = backing.map(|len| pattern(len as usize, 77));
        let mut model = vec![0; size as usize];
        if let Some(base) = &base {
            let len = base.len().min(model.len());
            model[..len].copy_from_slice(&base[..len]);
        }
        let backing: Option<Arc<dyn BlockDevice>> =
            base.map(|base| -> Arc<dyn BlockDevice> { Arc::new(MemoryDevice::read_only(base)) });
        let mut image = open(&storage, backing.clone());
        for op in &ops {
            if matches!(op, Op::Reopen) {
                drop(image);
                image = open(&storage, backing.clone());
            }
            apply(&image, &mut model, 1 << bits, op);
        }
        verify(&image, &model);
        drop(image);
        verify(&open(&storage, backing), &model);
    }
}

#[test]
fn threads_that_share_clusters_lose_nothing() {
    const SIZE: usize = 512 << 10;
    let storage: Arc<dyn Storage> = in_memory(SIZE as u64, 14);
    let mut model = pattern(SIZE, 5);
    let image = open(&storage, Some(Arc::new(MemoryDevice::read_only(model.clone()))));
    write_from_threads(&image, &mut model);
    verify(&image, &model);
}

#[test]
fn readers_never_see_bytes_of_clusters_that_changed_hands() {
    const CLUSTERS: u64 = 64;
    let storage: Arc<dyn Storage> = in_memory(CLUSTERS << 12, 12);
    let image = open(&storage, None);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 0..200_u64 {
                // Each cluster holds its own number or zeroes.
                let cluster = round * 31 % CLUSTERS;
                image.write_at(&[cluster as u8 + 1; 4096], cluster << 12).unwrap();
                image.discard(Span::new((round * 17 % CLUSTERS) << 12, 4096)).unwrap();
                image.flush().unwrap();
            }
        });
        let mut buf = [0; 4096];
        while !writer.is_finished() {
            for cluster in 0..CLUSTERS {
                image.read_at(&mut buf, cluster << 12).unwrap();
                let own = cluster as u8 + 1;
                assert!(buf.iter().all(|byte| *byte == 0 || *byte == own));
            }
        }
    });
    assert_eq!(image.check().unwrap().corruptions, 0);
}

#[test]
fn discarded_clusters_are_used_again() {
    let storage: Arc<dyn Storage> = in_memory(1 << 20, 12);
    let image = open(&storage, None);
    for round in 0..20 {
        image.write_at(&pattern(200 << 10, round), 0).unwrap();
        image.flush().unwrap();
        image.discard(Span::new(0, 200 << 10)).unwrap();
        image.flush().unwrap();
    }
    assert!(storage.size() < 400 << 10, "file has {} bytes", storage.size());
    assert_eq!(image.check().unwrap().leaks, 0);
}

#[test]
fn a_backing_file_that_was_not_given_is_named() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryDevice::new(Vec::new()));
    let mut options = options(1 << 20, 16);
    options.backing = Some(Backing { name: "base.raw".into(), format: Some("raw".into()) });
    create(&*storage, &options).unwrap();
    let error = Qcow2::open(storage.clone(), OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("\"base.raw\""), "{error}");
    let base: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::read_only(vec![9; 1000]));
    let image = open(&storage, Some(base));
    assert_eq!(image.header().backing, options.backing);
    let mut expected = vec![0; 1 << 20];
    expected[..1000].fill(9);
    assert!(contents(&image) == expected);
}

#[test]
fn extents_tell_the_layer_and_the_place() {
    let storage: Arc<dyn Storage> = in_memory(1 << 20, 16);
    let base = Arc::new(MemoryDevice::read_only(pattern(200_000, 1)));
    let image = open(&storage, Some(base));
    image.write_at(&vec![1; 65_536], 65_536).unwrap();
    image.write_zeroes(Span::new(131_072, 65_536), Zeroing::MayUnmap).unwrap();
    let kinds: Vec<_> = [0, 65_536 + 10, 131_072, 262_144]
        .map(|offset| image.extent_at(offset).unwrap())
        .iter()
        .map(|extent| (extent.depth, format!("{:?}", extent.kind), extent.offset.is_some()))
        .collect();
    assert_eq!(
        kinds,
        [
            (1, "Data".into(), true),
            (0, "Data".into(), true),
            (0, "Zero".into(), false),
            (0, "Hole".into(), false)
        ]
    );
    let extent = image.extent_at(65_536 + 10).unwrap();
    let mut there = [0; 1];
    storage.read_at(&mut there, extent.offset.unwrap()).unwrap();
    assert_eq!((extent.len, there[0]), (65_526, 1));
    // Everything past the backing image's end is one hole.
    assert_eq!(image.extent_at(262_144).unwrap().len, (1 << 20) - 262_144);
}

#[test]
fn a_huge_empty_image_is_cheap() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &options(64 << 40, 16)).unwrap();
    let image = open(&storage, None);
    assert_eq!(image.extent_at(0).unwrap().len, 64 << 40);
    image.write_zeroes(Span::new(0, 64 << 40), Zeroing::MayUnmap).unwrap();
    image.write_at(&[1], (64 << 40) - 1).unwrap();
    image.flush().unwrap();
    assert_eq!(check_read_only(&storage).unwrap().corruptions, 0);
}

#[test]
fn options_that_no_image_can_have_are_refused() {
    let storage = MemoryDevice::new(Vec::new());
    for (size, bits) in [(1 << 40, 9), (1 << 20, 8), (1 << 20, 22), (u64::MAX, 21)] {
        let error = create(&storage, &options(size, bits)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{size} {bits}");
    }
    assert_eq!(storage.size(), 0, "refused before anything was written");
}
