// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every kind of image that can be made here holds what is written to it, for this crate
//! and for qemu-img.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;
use support::{clean, save};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Span, Storage, Zeroing};
use tranship_format_testing::{
    Op, apply, contents, has_tool, pattern, qemu_img, qemu_img_status, raw_by_qemu, verify,
};
use tranship_qcow2::{
    Backing, Compression, CreateOptions, DataFile, OpenOptions, Preallocation, Qcow2, create,
    create_for_writing, create_over,
};
use tranship_raw::{Access, RawFile};

const SIZE: u64 = (3 << 20) + 512 * 5;

fn file(path: &Path) -> Arc<dyn Storage> {
    let _ = std::fs::remove_file(path);
    Arc::new(RawFile::create(path, 0).unwrap())
}

fn reopen(path: &Path) -> Arc<dyn Storage> {
    Arc::new(RawFile::open(path, Access::ReadWrite).unwrap())
}

fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Qcow2 {
    Qcow2::open(storage, options.clone()).unwrap()
}

/// Some of everything, with units of mapping in mind.
fn work(unit: u64) -> Vec<Op> {
    let cluster = unit.max(4096);
    vec![
        Op::Write(10, 1000, 1),
        Op::Write(290_000, 200_000, 2),
        Op::Write(cluster * 3 - 100, cluster as usize + 200, 3),
        Op::Zero(300_000, 100_000, Zeroing::MayUnmap),
        Op::Zero(1_500_000, 900_000, Zeroing::KeepAllocated),
        Op::Flush,
        Op::Write(1_600_000, 5000, 3),
        Op::Discard(100_000, 150_000),
        Op::Write(120_000, 70_000, 4),
        Op::Flush,
        Op::Zero(0, 2000, Zeroing::MayUnmap),
        Op::Discard(2_000_000, 500_000),
        Op::Write(2_100_000, 2000, 8),
        Op::Write(SIZE - 5, 5, 5),
        Op::Zero(SIZE - 1000, 1000, Zeroing::MayUnmap),
        Op::Write(SIZE - 700, 50, 5),
    ]
}

/// All kinds of images that differ in how their tables are written.
fn kinds() -> Vec<(String, CreateOptions)> {
    let mut kinds = Vec::new();
    for bits in [9, 10, 12, 14, 16, 18, 21] {
        for order in 0..=6 {
            // Every width of counts with one size of clusters, some with the others.
            let is_chosen = bits == 9 || order == bits % 7 || (bits == 16 && order % 4 == 0);
            if !is_chosen {
                continue;
            }
            let name = format!("clusters of {bits} bits, counts of order {order}");
            let options = CreateOptions {
                cluster_bits: bits,
                refcount_order: order,
                ..CreateOptions::new(SIZE)
            };
            kinds.push((name, options));
        }
        if matches!(bits, 9 | 12 | 16) {
            let options =
                CreateOptions { cluster_bits: bits, version: 2, ..CreateOptions::new(SIZE) };
            kinds.push((format!("version 2, clusters of {bits} bits"), options));
        }
        if bits >= 14 {
            let name = format!("extended, clusters of {bits} bits");
            let options = CreateOptions {
                cluster_bits: bits,
                extended_l2: true,
                refcount_order: bits % 7,
                ..CreateOptions::new(SIZE)
            };
            kinds.push((name, options));
        }
    }
    let lazy = CreateOptions { lazy_refcounts: true, ..CreateOptions::new(SIZE) };
    kinds.push(("lazy".to_owned(), lazy));
    kinds
}

#[test]
fn every_kind_of_image_is_good_for_qemu() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for (name, options) in kinds() {
        let storage = Arc::new(MemoryDevice::new(Vec::new()));
        create(&*storage, &options).unwrap();
        save(&storage, &path);
        clean(&path, &name);
        let image = open(storage.clone(), &OpenOptions::default());
        let mut model = vec![0; SIZE as usize];
        for op in work(1 << options.cluster_bits) {
            apply(&image, &mut model, &op);
        }
        verify(&image, &model);
        drop(image);
        save(&storage, &path);
        clean(&path, &name);
        let image = open(storage, &OpenOptions::default());
        verify(&image, &model);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{name}");
    }
}

#[test]
fn every_kind_of_image_can_be_written_in_bulk() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for (name, options) in kinds() {
        let storage = Arc::new(MemoryDevice::new(Vec::new()));
        let image = create_for_writing(storage.clone(), &options).unwrap();
        let mut model = vec![0; SIZE as usize];
        // From several threads, as a copy does it, then at random.
        let disk = pattern(2 << 20, 9);
        std::thread::scope(|scope| {
            for half in [0, 1] {
                let (image, disk) = (&image, &disk);
                scope.spawn(move || {
                    for (number, piece) in disk.chunks(100_000).enumerate() {
                        if number % 2 == half {
                            image.write_at(piece, number as u64 * 100_000).unwrap();
                        }
                    }
                });
            }
        });
        model[..2 << 20].copy_from_slice(&disk);
        for op in work(1 << options.cluster_bits) {
            apply(&image, &mut model, &op);
        }
        verify(&image, &model);
        // Killed now, it is no image.
        save(&storage, &path);
        let output = qemu_img_status(&["info", "-f", "qcow2"], &[&path]);
        assert!(!output.status.success(), "{name}: unfinished, but an image");
        image.finish().unwrap();
        save(&storage, &path);
        clean(&path, &name);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{name}");
        // It goes on as an ordinary image.
        for op in work(1 << options.cluster_bits) {
            apply(&image, &mut model, &op);
        }
        verify(&image, &model);
        drop(image);
        save(&storage, &path);
        clean(&path, &name);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{name}: afterwards");
    }
}

#[test]
fn a_bulk_image_that_is_dropped_leaves_no_image() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let image = create_for_writing(storage.clone(), &CreateOptions::new(SIZE)).unwrap();
    image.write_at(&pattern(1 << 20, 1), 0).unwrap();
    image.flush().unwrap();
    drop(image);
    let error = Qcow2::open(storage, OpenOptions::default()).unwrap_err();
    assert!(error.message().starts_with("magic is"), "{error}");
}

#[test]
fn a_bulk_image_gives_back_what_was_discarded() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let image = create_for_writing(storage.clone(), &CreateOptions::new(64 << 20)).unwrap();
    for round in 0..8 {
        image.write_at(&pattern(8 << 20, round), 0).unwrap();
        image.discard(Span::new(0, 8 << 20)).unwrap();
        image.flush().unwrap();
    }
    image.finish().unwrap();
    let report = image.check().unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.details);
    assert!(storage.size() < 20 << 20, "file has {} bytes", storage.size());
}

#[test]
fn preallocated_images_map_every_cluster() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for (preallocation, extended, bits) in [
        (Preallocation::Metadata, false, 16),
        (Preallocation::Metadata, false, 9),
        (Preallocation::Metadata, true, 16),
        (Preallocation::Falloc, false, 16),
        (Preallocation::Falloc, true, 14),
        (Preallocation::Full, false, 12),
    ] {
        let name = format!("{preallocation:?}, extended {extended}, clusters of {bits} bits");
        let options = CreateOptions {
            preallocation,
            extended_l2: extended,
            cluster_bits: bits,
            ..CreateOptions::new(SIZE)
        };
        create(&*file(&path), &options).unwrap();
        clean(&path, &name);
        let report: serde_json::Value =
            serde_json::from_str(&qemu_img(&["check", "--output=json"], &[&path])).unwrap();
        assert_eq!(report["allocated-clusters"], report["total-clusters"], "{name}");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
        let is_reserved = blocks * 512 >= SIZE;
        assert_eq!(is_reserved, preallocation != Preallocation::Metadata, "{name}");
        let image = open(reopen(&path), &OpenOptions::default());
        let mut model = vec![0; SIZE as usize];
        verify(&image, &model);
        for op in work(1 << bits) {
            apply(&image, &mut model, &op);
        }
        verify(&image, &model);
        drop(image);
        clean(&path, &name);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{name}");
    }
}

#[test]
fn overlays_with_subclusters_and_of_version_2() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.raw");
    let base_bytes = pattern(2_500_000 / 512 * 512, 7);
    std::fs::write(&base, &base_bytes).unwrap();
    let path = folder.path().join("image");
    let backing: Arc<dyn BlockDevice> = Arc::new(RawFile::open(&base, Access::ReadOnly).unwrap());
    for (version, extended_l2, bits, preallocation, bulk) in [
        (2, false, 16, Preallocation::Off, false),
        (2, false, 9, Preallocation::Off, true),
        (3, true, 14, Preallocation::Off, false),
        (3, true, 16, Preallocation::Off, true),
        (3, true, 21, Preallocation::Off, false),
        (3, true, 16, Preallocation::Metadata, false),
        (3, true, 14, Preallocation::Falloc, true),
    ] {
        let name = format!("version {version}, {bits} bits, extended {extended_l2}, bulk {bulk}");
        let options = CreateOptions {
            version,
            cluster_bits: bits,
            extended_l2,
            preallocation,
            backing: Some(Backing {
                name: base.to_str().unwrap().to_owned(),
                format: Some("raw".to_owned()),
            }),
            ..CreateOptions::new(SIZE)
        };
        let open_options =
            OpenOptions { backing: Some(Arc::clone(&backing)), ..OpenOptions::default() };
        let storage = Arc::new(MemoryDevice::new(Vec::new()));
        let image = if bulk {
            create_over(storage.clone(), &options, Some(Arc::clone(&backing))).unwrap()
        } else {
            create(&*storage, &options).unwrap();
            open(storage.clone(), &open_options)
        };
        let mut model = vec![0; SIZE as usize];
        model[..base_bytes.len()].copy_from_slice(&base_bytes);
        verify(&image, &model);
        for op in work(if extended_l2 { 1 << (bits - 5) } else { 1 << bits }) {
            apply(&image, &mut model, &op);
        }
        verify(&image, &model);
        image.finish().unwrap();
        drop(image);
        save(&storage, &path);
        clean(&path, &name);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{name}");
        verify(&open(storage, &open_options), &model);
    }
}

#[test]
fn a_subcluster_is_the_unit_of_an_extent() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let options = CreateOptions { extended_l2: true, ..CreateOptions::new(SIZE) };
    create(&*storage, &options).unwrap();
    let image = open(storage, &OpenOptions::default());
    image.write_at(&[1; 100], 5000).unwrap();
    image.write_zeroes(Span::new(8192, 2048), Zeroing::MayUnmap).unwrap();
    let extents: Vec<_> = [0, 4096, 6144, 8192, 10_240]
        .map(|offset| image.extent_at(offset).unwrap())
        .map(|extent| (format!("{:?}", extent.kind), extent.len.min(SIZE / 2)))
        .into();
    let expected =
        [("Hole", 4096), ("Data", 2048), ("Hole", 2048), ("Zero", 2048), ("Hole", SIZE / 2)];
    // From the last one on, every table that exists ends an extent.
    assert_eq!(extents[..4], expected.map(|(kind, len)| (kind.to_owned(), len))[..4]);
    assert_eq!(extents[4].0, "Hole");
}

#[test]
fn images_with_a_data_file() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let data_path = folder.path().join("image.data");
    for (raw, bulk, extended_l2) in
        [(false, false, false), (true, false, false), (true, true, false), (false, true, true)]
    {
        let name = format!("raw {raw}, bulk {bulk}, extended {extended_l2}");
        let data = file(&data_path);
        let options = CreateOptions {
            data_file: Some(DataFile {
                name: data_path.to_str().unwrap().to_owned(),
                storage: Arc::clone(&data),
                raw,
            }),
            extended_l2,
            ..CreateOptions::new(SIZE)
        };
        let open_options =
            OpenOptions { data_file: Some(Arc::clone(&data)), ..OpenOptions::default() };
        let storage = file(&path);
        let image = if bulk {
            create_for_writing(storage, &options).unwrap()
        } else {
            create(&*storage, &options).unwrap();
            open(storage, &open_options)
        };
        let mut model = vec![0; SIZE as usize];
        verify(&image, &model);
        for op in work(65_536) {
            apply(&image, &mut model, &op);
        }
        verify(&image, &model);
        image.finish().unwrap();
        drop(image);
        clean(&path, &name);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{name}");
        assert!(!raw || contents(&data) == model, "{name}: data file differs");
        let error = Qcow2::open(reopen(&path), OpenOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.message().contains("image.data"), "{error}");
        // And what qemu makes of it afterwards.
        qemu_io(&path, &["write -P 0x33 300000 70000", "write -z 65536 131072", "discard 0 65536"]);
        model[300_000..370_000].fill(0x33);
        model[..196_608].fill(0);
        let image = open(reopen(&path), &open_options);
        assert_eq!(image.header().is_data_file_raw(), raw);
        verify(&image, &model);
    }
}

fn qemu_io(path: &Path, commands: &[&str]) {
    let mut run = std::process::Command::new("qemu-io");
    run.args(["-f", "qcow2"]);
    for command in commands {
        run.args(["-c", command]);
    }
    let output = run.arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !text.contains("failed"), "{text}");
}

#[test]
fn subclusters_written_by_qemu() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.raw");
    std::fs::write(&base, pattern(SIZE as usize, 4)).unwrap();
    let path = folder.path().join("image");
    let name = base.to_str().unwrap();
    for bits in ["16k", "64k", "2M"] {
        let _ = std::fs::remove_file(&path);
        let options = format!("extended_l2=on,cluster_size={bits}");
        qemu_img(
            &["create", "-q", "-f", "qcow2", "-o", &options, "-b", name, "-F", "raw"],
            &[&path],
        );
        let commands = [
            "write -P 0x11 1000 3000",
            "write -P 0x22 70000 100",
            "write -z 66048 4096",
            "write -z 131072 65536",
            "write -c -P 0x44 2097152 65536",
            "discard 524288 65536",
        ];
        let commands = if bits == "64k" { &commands[..] } else { &commands[..4] };
        qemu_io(&path, commands);
        let mut model = raw_by_qemu("qcow2", folder.path(), &path);
        let backing: Arc<dyn BlockDevice> =
            Arc::new(RawFile::open(&base, Access::ReadOnly).unwrap());
        let options = OpenOptions { backing: Some(backing), ..OpenOptions::default() };
        let image = open(reopen(&path), &options);
        verify(&image, &model);
        for op in work(65_536) {
            apply(&image, &mut model, &op);
        }
        apply(&image, &mut model, &Op::Zero((2 << 20) + 4096, 8192, Zeroing::MayUnmap));
        apply(&image, &mut model, &Op::Write((2 << 20) + 30_000, 500, 1));
        verify(&image, &model);
        drop(image);
        clean(&path, bits);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{bits}");
        // A snapshot shares the clusters: they are copied before they are changed.
        qemu_img(&["snapshot", "-c", "one"], &[&path]);
        let before = model.clone();
        let image = open(reopen(&path), &options);
        for op in work(65_536) {
            apply(&image, &mut model, &op);
        }
        verify(&image, &model);
        drop(image);
        clean(&path, bits);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{bits}");
        qemu_img(&["snapshot", "-a", "one"], &[&path]);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == before, "{bits}: snapshot");
    }
}

#[test]
fn lazy_refcounts_are_dirty_until_the_image_is_closed() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let options = CreateOptions { lazy_refcounts: true, ..CreateOptions::new(SIZE) };
    create(&*storage, &options).unwrap();
    let file = storage.clone();
    let is_dirty = || tranship_qcow2::Header::read(&*file).unwrap().is_dirty();
    let image = open(storage.clone(), &OpenOptions::default());
    assert!(!is_dirty());
    let bytes = pattern(300_000, 2);
    image.write_at(&bytes, 1000).unwrap();
    image.flush().unwrap();
    assert!(is_dirty());
    // What a crash would leave can be read.
    let left = Arc::new(MemoryDevice::read_only(storage.snapshot()));
    let crashed = Qcow2::open_read_only(left, None).unwrap();
    assert!(contents(&crashed)[1000..301_000] == bytes);
    image.finish().unwrap();
    assert!(!is_dirty());
    image.write_at(&[1], 2_000_000).unwrap();
    assert!(is_dirty());
    drop(image);
    assert!(!is_dirty());
    let report = tranship_qcow2::check_read_only(&*storage).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.details);
}

#[test]
fn options_are_written_as_qemu_reads_them() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let options = CreateOptions {
        compression: Compression::Zstd,
        lazy_refcounts: true,
        extended_l2: true,
        refcount_order: 5,
        backing: Some(Backing { name: "no such file".into(), format: Some("raw".into()) }),
        ..CreateOptions::new(SIZE)
    };
    create(&*file(&path), &options).unwrap();
    let info: serde_json::Value =
        serde_json::from_str(&qemu_img(&["info", "--output=json"], &[&path])).unwrap();
    let data = &info["format-specific"]["data"];
    assert_eq!(data["compression-type"], "zstd");
    assert_eq!(data["lazy-refcounts"], true);
    assert_eq!(data["extended-l2"], true);
    assert_eq!(data["refcount-bits"], 32);
    assert_eq!(info["backing-filename"], "no such file");
    assert_eq!(info["backing-filename-format"], "raw");
}
