// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sizes are those that qemu-img measures.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use std::path::Path;
use tranship_format_testing::{has_tool, pattern, qemu_img};
use tranship_qcow2::{MeasureOptions, bitmaps, measure, measure_bitmaps};
use tranship_raw::{Access, RawFile};

fn by_qemu(args: &[&str], paths: &[&Path]) -> serde_json::Value {
    let mut all = vec!["measure", "--output", "json", "-O", "qcow2"];
    all.extend(args);
    serde_json::from_str(&qemu_img(&all, paths)).unwrap()
}

#[test]
fn sizes_without_contents() {
    if !has_tool("qemu-img") {
        return;
    }
    let plain = MeasureOptions::default();
    let cases = [
        (plain, "cluster_size=64k"),
        (MeasureOptions { cluster_bits: 9, ..plain }, "cluster_size=512"),
        (MeasureOptions { cluster_bits: 21, ..plain }, "cluster_size=2M"),
        (MeasureOptions { refcount_bits: 1, ..plain }, "refcount_bits=1"),
        (MeasureOptions { refcount_bits: 64, ..plain }, "refcount_bits=64"),
        (MeasureOptions { extended_l2: true, ..plain }, "extended_l2=on"),
        (MeasureOptions { is_preallocated: true, ..plain }, "preallocation=full"),
    ];
    for (options, text) in cases {
        for size in [0, 512, 65_536, 1_000_448, 1 << 30, 5_000_000_000, 64 << 30] {
            let ours = measure(size, None, &options).unwrap();
            let theirs = by_qemu(&["-o", text, "--size", &size.to_string()], &[]);
            assert_eq!(theirs["required"], ours.required, "{text} {size}");
            assert_eq!(theirs["fully-allocated"], ours.fully_allocated, "{text} {size}");
        }
    }
    assert!(measure(1 << 50, None, &MeasureOptions { cluster_bits: 9, ..plain }).is_err());
    assert!(measure(1, None, &MeasureOptions { cluster_bits: 22, ..plain }).is_err());
    assert!(measure(1, None, &MeasureOptions { refcount_bits: 3, ..plain }).is_err());
}

#[test]
fn sizes_of_a_disk_with_bitmaps() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let mut disk = vec![0; 5 << 20];
    for at in [0, 100_000, 1_000_000, 3_000_000, 5_242_000] {
        disk[at..at + 500].copy_from_slice(&pattern(500, 1));
    }
    std::fs::write(&raw, &disk).unwrap();
    let path = folder.path().join("image");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k"], &[&raw, &path]);
    for (name, granularity) in [("one", "512"), ("another", "64k")] {
        qemu_img(&["bitmap", "--add", "-g", granularity], &[&path, Path::new(name)]);
    }
    let file = || std::sync::Arc::new(RawFile::open(&path, Access::ReadOnly).unwrap());
    let image = tranship_qcow2::Qcow2::open_read_only(file(), None).unwrap();
    let list = bitmaps(&file()).unwrap();
    for bits in [9, 12, 16, 21] {
        let options = MeasureOptions { cluster_bits: bits, ..MeasureOptions::default() };
        let ours = measure(5 << 20, Some(&image), &options).unwrap();
        let text = format!("cluster_size={}", 1 << bits);
        let theirs = by_qemu(&["-f", "qcow2", "-o", &text], &[&path]);
        assert_eq!(theirs["required"], ours.required, "{bits}");
        assert_eq!(theirs["fully-allocated"], ours.fully_allocated, "{bits}");
        assert_eq!(theirs["bitmaps"], measure_bitmaps(5 << 20, bits, &list), "{bits}");
    }
}
