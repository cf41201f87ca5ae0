// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qemu-img and this crate agree on the contents of images that either of them made.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::{apply, open, options};
use tranship_block::{BlockDevice, Span, Storage, Zeroing};
use tranship_format_testing::{Op, contents, has_tool, pattern, qemu_img, raw_by_qemu};
use tranship_qcow2::{Qcow2, check_read_only, create};
use tranship_raw::{Access, RawFile};

const SIZE: usize = 3 << 20;

fn storage(path: &Path) -> Arc<dyn Storage> {
    Arc::new(RawFile::open(path, Access::ReadWrite).unwrap())
}

fn read_only(path: &Path) -> Arc<RawFile> {
    Arc::new(RawFile::open(path, Access::ReadOnly).unwrap())
}

/// Data, compressible data, holes and written zeroes.
fn disk() -> Vec<u8> {
    let mut disk = pattern(SIZE, 3);
    disk[300_000..900_000].fill(b'a');
    disk[1_000_000..2_000_000].fill(0);
    disk
}

/// Some of everything, also in clusters that are shared, compressed or only in the backing.
fn change(image: &Qcow2, model: &mut [u8], cluster: u64) {
    let ops = [
        Op::Write(10, 1000, 1),
        Op::Write(290_000, 200_000, 2),
        Op::Zero(500_000, 300_000, Zeroing::MayUnmap),
        Op::Zero(1_500_000, 900_000, Zeroing::KeepAllocated),
        Op::Flush,
        Op::Write(1_600_000, 5000, 3),
        Op::Discard(100_000, 150_000),
        Op::Flush,
        Op::Write(120_000, 70_000, 4),
        Op::Write(SIZE as u64 - 5, 5, 5),
    ];
    for op in &ops {
        // Version 2 cannot say that a cluster hides its backing file; discard does nothing.
        if matches!(op, Op::Discard(..)) && image.header().version == 2 {
            continue;
        }
        apply(image, model, cluster, op);
    }
}

fn clean_by_qemu(image: &Path) {
    qemu_img(&["check", "-q", "-f", "qcow2"], &[image]);
}

#[test]
fn images_made_by_qemu_read_and_change_alike() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("source.raw");
    std::fs::write(&raw, disk()).unwrap();
    let cases: [(&str, &[&str], u64); 10] = [
        ("plain", &[], 65_536),
        ("small", &["-o", "cluster_size=512"], 512),
        ("large", &["-o", "cluster_size=2M"], 2 << 20),
        ("old", &["-o", "compat=0.10"], 65_536),
        ("zlib", &["-c"], 65_536),
        ("zlib-small", &["-c", "-o", "cluster_size=4k"], 4096),
        ("zstd", &["-c", "-o", "compression_type=zstd"], 65_536),
        ("narrow", &["-o", "refcount_bits=1"], 65_536),
        ("wide", &["-o", "refcount_bits=64,cluster_size=1k"], 1024),
        ("prealloc", &["-S", "0", "-o", "preallocation=metadata"], 65_536),
    ];
    for (name, args, cluster) in cases {
        let path = folder.path().join(name);
        let mut all = vec!["convert", "-f", "raw", "-O", "qcow2"];
        all.extend(args);
        qemu_img(&all, &[&raw, &path]);
        let mut model = disk();
        let image = Qcow2::open_read_only(read_only(&path), None).unwrap();
        assert!(contents(&image) == model, "{name}: contents differ");
        let mut pieces = vec![0; SIZE];
        for (number, piece) in pieces.chunks_mut(7000).enumerate() {
            image.read_at(piece, number as u64 * 7000).unwrap();
        }
        assert!(pieces == model, "{name}: contents differ when read in pieces");
        let report = check_read_only(&read_only(&path)).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{name}: {:?}", report.details);

        let image = open(&storage(&path), None);
        change(&image, &mut model, cluster);
        drop(image);
        clean_by_qemu(&path);
        assert!(
            raw_by_qemu("qcow2", folder.path(), &path) == model,
            "{name}: qemu sees other contents"
        );
        let report = check_read_only(&read_only(&path)).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{name}: {:?}", report.details);
    }
}

#[test]
fn the_refcount_table_grows_where_qemu_made_it_small() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64"],
        &[&path, Path::new("40M")],
    );
    let image = open(&storage(&path), None);
    let model = pattern(40 << 20, 9);
    for (number, piece) in model.chunks(1_000_000).enumerate() {
        image.write_at(piece, number as u64 * 1_000_000).unwrap();
    }
    drop(image);
    clean_by_qemu(&path);
    assert!(raw_by_qemu("qcow2", folder.path(), &path) == model);
}

fn snapshot(action: &str, path: &Path) {
    qemu_img(&["snapshot", action, "one"], &[path]);
}

#[test]
fn a_snapshot_keeps_its_contents_when_the_active_image_changes() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("source.raw");
    std::fs::write(&raw, disk()).unwrap();
    for args in [&["-o", "cluster_size=4k"][..], &["-c"]] {
        let path = folder.path().join("image");
        let mut all = vec!["convert", "-f", "raw", "-O", "qcow2"];
        all.extend(args);
        qemu_img(&all, &[&raw, &path]);
        snapshot("-c", &path);
        let cluster = if args.len() == 2 { 4096 } else { 65_536 };
        let mut model = disk();
        let image = open(&storage(&path), None);
        change(&image, &mut model, cluster);
        let report = image.check().unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.details);
        drop(image);
        clean_by_qemu(&path);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "active image");
        snapshot("-a", &path);
        clean_by_qemu(&path);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == disk(), "snapshot");
    }
}

#[test]
fn overlays_hide_and_show_their_backing_file_alike() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let base: PathBuf = folder.path().join("base.raw");
    std::fs::write(&base, &disk()[..SIZE - 400_384]).unwrap();
    for compat in ["1.1", "0.10"] {
        let path = folder.path().join(compat);
        let options = format!("compat={compat},cluster_size=16k");
        let name = base.to_str().unwrap();
        qemu_img(
            &["create", "-q", "-f", "qcow2", "-o", &options, "-b", name, "-F", "raw"],
            &[&path, Path::new("3M")],
        );
        let mut model = disk();
        model[SIZE - 400_384..].fill(0);
        let image = open(&storage(&path), Some(read_only(&base)));
        assert_eq!(image.header().backing.as_ref().unwrap().format.as_deref(), Some("raw"));
        assert!(contents(&image) == model);
        change(&image, &mut model, 16_384);
        assert!(contents(&image) == model);
        drop(image);
        clean_by_qemu(&path);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "compat {compat}");
    }
}

#[test]
fn images_made_here_are_good_for_qemu() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for bits in [9, 12, 16, 21] {
        let path = folder.path().join(format!("{bits}"));
        create(&RawFile::create(&path, 0).unwrap(), &options(SIZE as u64, bits)).unwrap();
        clean_by_qemu(&path);
        let image = open(&storage(&path), None);
        let mut model = vec![0; SIZE];
        image.write_at(&disk(), 0).unwrap();
        model.copy_from_slice(&disk());
        change(&image, &mut model, 1 << bits);
        image.discard(Span::new(0, SIZE as u64)).unwrap();
        model.fill(0);
        change(&image, &mut model, 1 << bits);
        drop(image);
        clean_by_qemu(&path);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "cluster_bits {bits}");
    }
}
