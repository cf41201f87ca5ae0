// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images with subclusters, data files and lazy counts, and those that are written in
//! bulk, behave as a device in memory does, whatever is done to them by whomever.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use proptest::prelude::*;
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice, Storage};
use tranship_format_testing::{Op, apply, operations, pattern, verify, write_from_threads};
use tranship_qcow2::{CreateOptions, DataFile, OpenOptions, Qcow2, create, create_over};

const SIZE: u64 = 700_416;

#[derive(Clone, Copy, Debug)]
struct Shape {
    cluster_bits: u32,
    extended_l2: bool,
    lazy_refcounts: bool,
    /// A data file, and whether it is raw.
    data_file: Option<bool>,
    /// Bytes of the backing image.
    backing: Option<usize>,
    bulk: bool,
}

fn shape() -> impl Strategy<Value = Shape> {
    let backing = prop_oneof![
        Just(None),
        Just(Some(SIZE as usize)),
        Just(Some(300_000)),
        Just(Some(800_000))
    ];
    let data_file = prop_oneof![3 => Just(None), 1 => Just(Some(false)), 1 => Just(Some(true))];
    (
        prop_oneof![Just(14), Just(16)],
        any::<bool>(),
        any::<bool>(),
        data_file,
        backing,
        any::<bool>(),
    )
        .prop_map(|(cluster_bits, extended_l2, lazy_refcounts, data_file, backing, bulk)| {
            Shape {
                cluster_bits,
                extended_l2,
                lazy_refcounts,
                data_file,
                // A raw data file is all there is.
                backing: backing.filter(|_| data_file != Some(true)),
                bulk,
            }
        })
}

struct Made {
    storage: Arc<MemoryDevice>,
    options: OpenOptions,
    image: Qcow2,
    model: Vec<u8>,
}

fn make(shape: Shape) -> Made {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let data: Arc<dyn Storage> = Arc::new(MemoryDevice::new(Vec::new()));
    let create_options = CreateOptions {
        cluster_bits: shape.cluster_bits,
        extended_l2: shape.extended_l2,
        lazy_refcounts: shape.lazy_refcounts,
        data_file: shape.data_file.map(|raw| DataFile {
            name: "data".to_owned(),
            storage: Arc::clone(&data),
            raw,
        }),
        ..CreateOptions::new(SIZE)
    };
    let mut model = vec![0; SIZE as usize];
    let backing = shape.backing.map(|len| -> Arc<dyn BlockDevice> {
        let base = pattern(len, 77);
        let both = len.min(model.len());
        model[..both].copy_from_slice(&base[..both]);
        Arc::new(MemoryDevice::read_only(base))
    });
    let options = OpenOptions {
        backing: backing.clone(),
        data_file: shape.data_file.map(|_| data),
        ..OpenOptions::default()
    };
    let image = if shape.bulk {
        create_over(storage.clone(), &create_options, backing).unwrap()
    } else {
        create(&*storage, &create_options).unwrap();
        Qcow2::open(storage.clone(), options.clone()).unwrap()
    };
    Made { storage, options, image, model }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn same_bytes_as_memory(shape in shape(), ops in operations(SIZE, 2048, 30)) {
        let Made { storage, options, mut image, mut model } = make(shape);
        for op in &ops {
            if matches!(op, Op::Reopen) {
                image.finish().unwrap();
                drop(image);
                image = Qcow2::open(storage.clone(), options.clone()).unwrap();
            }
            apply(&image, &mut model, op);
        }
        verify(&image, &model);
        image.finish().unwrap();
        verify(&image, &model);
        drop(image);
        verify(&Qcow2::open(storage, options).unwrap(), &model);
    }
}

#[test]
fn threads_that_share_clusters_lose_nothing() {
    let plain = Shape {
        cluster_bits: 16,
        extended_l2: true,
        lazy_refcounts: false,
        data_file: None,
        backing: Some(600_000),
        bulk: false,
    };
    for shape in [
        plain,
        Shape { bulk: true, ..plain },
        Shape { extended_l2: false, bulk: true, ..plain },
        Shape { data_file: Some(false), ..plain },
        Shape { lazy_refcounts: true, ..plain },
    ] {
        let Made { storage, options, image, mut model } = make(shape);
        write_from_threads(&image, &mut model);
        verify(&image, &model);
        image.finish().unwrap();
        drop(image);
        verify(&Qcow2::open(storage, options).unwrap(), &model);
    }
}
