// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks grow with zeroes and shrink without leaks, whatever is in the way.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use support::{open, options};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Repair, Storage};
use tranship_format_testing::{PowerCut, contents, has_tool, pattern, qemu_img, raw_by_qemu};
use tranship_qcow2::{
    Backing, BitmapContent, CreateOptions, Header, OpenOptions, Preallocation, Qcow2,
    ResizeOptions, add_bitmap, apply_snapshot, check, check_read_only, create, create_snapshot,
    delete_snapshot, resize,
};
use tranship_raw::{Access, RawFile};

fn file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(RawFile::open(path, Access::ReadWrite).unwrap())
}

fn shrink() -> ResizeOptions {
    ResizeOptions { allow_shrink: true, ..ResizeOptions::default() }
}

fn clean(storage: &dyn Storage) {
    let report = check(storage, Repair::Nothing).unwrap();
    assert!(report.is_clean(), "{:?}", report.details);
}

#[test]
fn growing_and_shrinking_agree_with_qemu() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for args in
        ["cluster_size=512", "cluster_size=4k,refcount_bits=64", "compat=0.10", "cluster_size=2M"]
    {
        let _ = std::fs::remove_file(&path);
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", args], &[&path, Path::new("1000k")]);
        let mut model = pattern(1_024_000, 1);
        let image = open(&file(&path), None);
        image.write_at(&model, 0).unwrap();
        image.finish().unwrap();
        for size in
            [1_500_160, 20 << 20, (20 << 20) + 512, 1_024_512, 700_000, 3 << 20, 512, 0, 9000]
        {
            resize(&file(&path), size, &shrink()).unwrap();
            let size = size.next_multiple_of(512);
            model.resize(size as usize, 0);
            clean(&*file(&path));
            qemu_img(&["check", "-q"], &[&path]);
            let now = raw_by_qemu("qcow2", folder.path(), &path);
            assert!(now == model, "{args}: {size}");
            // Something at the end that the next size cuts off or has to keep.
            let at = size.saturating_sub(3000);
            let image = open(&file(&path), None);
            let piece = pattern((size - at) as usize, size);
            image.write_at(&piece, at).unwrap();
            image.finish().unwrap();
            model[at as usize..].copy_from_slice(&piece);
        }
    }
}

#[test]
fn a_smaller_disk_has_a_smaller_file() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &options(10 << 20, 16)).unwrap();
    let storage: Arc<dyn Storage> = storage;
    let image = open(&storage, None);
    // The table comes first, as it does when a guest writes.
    image.write_at(&[1], 0).unwrap();
    image.write_at(&pattern(10 << 20, 1), 0).unwrap();
    image.finish().unwrap();
    resize(&storage, 1 << 20, &shrink()).unwrap();
    assert!(storage.size() <= 22 << 16, "{}", storage.size());
    clean(&*storage);
}

#[test]
fn preallocation_reserves_what_it_says() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let _ = std::fs::remove_file(&path);
        create(&RawFile::create(&path, 0).unwrap(), &options(1_000_448, 14)).unwrap();
        let grown = ResizeOptions { preallocation: how, ..ResizeOptions::default() };
        resize(&file(&path), 5_000_192, &grown).unwrap();
        clean(&*file(&path));
        qemu_img(&["check", "-q"], &[&path]);
        let report = check_read_only(&file(&path)).unwrap();
        assert_eq!(report.allocated_clusters, 5_000_192_u64.div_ceil(16_384) - 62, "{how:?}");
        assert!(raw_by_qemu("qcow2", folder.path(), &path).iter().all(|byte| *byte == 0));
        let kept = qemu_img(&["info", "--output", "json"], &[&path]);
        let info: serde_json::Value = serde_json::from_str(&kept).unwrap();
        let is_stored = info["actual-size"].as_u64().unwrap() > 3_900_000;
        assert_eq!(is_stored, how != Preallocation::Metadata, "{how:?}");
    }
}

#[test]
fn what_a_longer_backing_image_has_does_not_appear() {
    let base: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::read_only(pattern(1 << 20, 7)));
    for size in [300_032_u64, 262_144] {
        let storage = Arc::new(MemoryDevice::new(Vec::new()));
        let backing = Some(Backing { name: "base".to_owned(), format: Some("raw".to_owned()) });
        create(&*storage, &CreateOptions { backing, ..options(size, 16) }).unwrap();
        let storage: Arc<dyn Storage> = storage;
        let denied = resize(&storage, 900_096, &ResizeOptions::default()).unwrap_err();
        assert_eq!(denied.kind(), ErrorKind::Denied);
        let with = ResizeOptions { backing: Some(base.clone()), ..ResizeOptions::default() };
        resize(&storage, 900_096, &with).unwrap();
        resize(&storage, 2 << 20, &with).unwrap();
        clean(&*storage);
        let image = open(&storage, Some(base.clone()));
        let mut expected = pattern(1 << 20, 7);
        expected[size as usize..].fill(0);
        expected.resize(2 << 20, 0);
        assert!(contents(&image) == expected);
    }
}

#[test]
fn subclusters_past_the_end_are_hidden_as_qemu_hides_them() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    std::fs::write(&base, pattern(1 << 20, 7)).unwrap();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    for (args, size) in [
        ("extended_l2=on,cluster_size=16k", 300_544_u64),
        ("extended_l2=on,cluster_size=64k", 301_056),
        ("extended_l2=on,cluster_size=16k", 311_296),
    ] {
        let text = size.to_string();
        let backing = ["-b", base.to_str().unwrap(), "-F", "raw"];
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", args];
        create.extend(backing);
        let _ = std::fs::remove_file(&ours);
        qemu_img(&create, &[&ours, Path::new(&text)]);
        let mut command = std::process::Command::new("qemu-io");
        command.args(["-f", "qcow2", "-c", "write -P 9 270k 20k", "-c", "write 1k 1k"]).arg(&ours);
        assert!(command.output().unwrap().status.success());
        std::fs::copy(&ours, &theirs).unwrap();
        let backing: Option<Arc<dyn BlockDevice>> = Some(file(&base));
        let with = ResizeOptions { backing, ..ResizeOptions::default() };
        for grown in [size + 1024, 900_096, 2 << 20] {
            resize(&file(&ours), grown, &with).unwrap();
            clean(&*file(&ours));
            qemu_img(&["check", "-q"], &[&ours]);
            qemu_img(&["resize", "-q"], &[&theirs, Path::new(&grown.to_string())]);
            let expected = raw_by_qemu("qcow2", folder.path(), &theirs);
            assert!(raw_by_qemu("qcow2", folder.path(), &ours) == expected, "{args}: {grown}");
        }
    }
}

#[test]
fn a_data_file_gets_the_size_of_the_disk() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, data) = (folder.path().join("image"), folder.path().join("data"));
    for raw in ["off", "on"] {
        let _ = std::fs::remove_file(&path);
        let _ = std::fs::remove_file(&data);
        let named = format!("data_file={},data_file_raw={raw}", data.display());
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &named], &[&path, Path::new("300k")]);
        let mut command = std::process::Command::new("qemu-io");
        command.args(["-f", "qcow2", "-c", "write -P 7 200k 100k"]).arg(&path);
        assert!(command.output().unwrap().status.success());
        let denied = resize(&file(&path), 1 << 20, &shrink()).unwrap_err();
        assert_eq!(denied.kind(), ErrorKind::Denied);
        for size in [1 << 20, 250 << 10, 600 << 10] {
            let with = ResizeOptions { data_file: Some(file(&data)), ..shrink() };
            resize(&file(&path), size, &with).unwrap();
            clean(&*file(&path));
            qemu_img(&["check", "-q"], &[&path]);
            let now = raw_by_qemu("qcow2", folder.path(), &path);
            let mut expected = vec![0; size as usize];
            let kept = if size == 1 << 20 { 300 } else { 250 };
            expected[200 << 10..kept << 10].fill(7);
            assert!(now == expected, "raw {raw}, {size}");
            assert_eq!(std::fs::metadata(&data).unwrap().len(), size);
            if raw == "on" {
                assert!(std::fs::read(&data).unwrap() == expected);
            }
        }
    }
}

#[test]
fn snapshots_and_bitmaps_are_kept() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &options(300_032, 12)).unwrap();
    let storage: Arc<dyn Storage> = storage;
    let image = open(&storage, None);
    image.write_at(&pattern(300_032, 1), 0).unwrap();
    image.finish().unwrap();
    let first = pattern(300_032, 1);
    create_snapshot(&*storage, "one", UNIX_EPOCH).unwrap();
    for size in [100_352, 500_224, 300_032] {
        resize(&storage, size, &shrink()).unwrap();
        clean(&*storage);
        let kept = Qcow2::open_snapshot(storage.clone(), "one", OpenOptions::default()).unwrap();
        assert!(contents(&kept) == first);
        let now = contents(&Qcow2::open_read_only(storage.clone(), None).unwrap());
        assert!(now[..100_352] == first[..100_352]);
        assert!(now[100_352..].iter().all(|byte| *byte == 0));
    }
    apply_snapshot(&*storage, "one").unwrap();
    delete_snapshot(&*storage, "one").unwrap();
    clean(&*storage);

    add_bitmap(&*storage, "b", Some(4096)).unwrap();
    let image = open(&storage, None);
    image.write_at(&[1], 5000).unwrap();
    image.write_at(&[1], 290_000).unwrap();
    image.finish().unwrap();
    resize(&storage, 40 << 20, &shrink()).unwrap();
    assert_eq!(BitmapContent::read(&storage, "b").unwrap().dirty_bytes(), 8192);
    resize(&storage, 100_352, &shrink()).unwrap();
    assert_eq!(BitmapContent::read(&storage, "b").unwrap().dirty_bytes(), 4096);
    clean(&*storage);
}

#[test]
fn what_would_lose_data_is_refused() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &options(1 << 20, 9)).unwrap();
    let before = storage.snapshot();
    let dynamic: Arc<dyn Storage> = storage.clone();
    let preallocated = ResizeOptions { preallocation: Preallocation::Full, ..shrink() };
    for (size, options) in [
        (512, ResizeOptions::default()),
        (512, preallocated),
        (u64::MAX, shrink()),
        (1 << 60, shrink()),
    ] {
        let error = resize(&dynamic, size, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    }
    assert!(storage.snapshot() == before);
}

#[test]
fn every_cut_leaves_the_old_size_or_the_new_one() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &options(40_448, 9)).unwrap();
    let image = open(&(storage.clone() as Arc<dyn Storage>), None);
    let first = pattern(40_448, 1);
    image.write_at(&first, 0).unwrap();
    image.finish().unwrap();
    for (size, how) in [
        (200_192, Preallocation::Off),
        (60_416, Preallocation::Metadata),
        (9728, Preallocation::Off),
    ] {
        let cut = Arc::new(PowerCut::new(storage.snapshot()));
        let with = ResizeOptions { preallocation: how, ..shrink() };
        resize(&(cut.clone() as Arc<dyn Storage>), size, &with).unwrap();
        let mut second = first.clone();
        second.resize(size as usize, 0);
        // A file's growth is zero; the double gives other bytes, as block devices do.
        let shown = if how == Preallocation::Off { size as usize } else { 40_448 };
        cut.replay(&[], size, |disk, _| {
            let device = Arc::new(MemoryDevice::new(disk));
            let report = check_read_only(&device).unwrap();
            assert_eq!(report.corruptions, 0, "{:?}", report.details);
            let now = contents(&Qcow2::open_read_only(device.clone(), None).unwrap());
            let is_new = now.len() == second.len() && now[..shown] == second[..shown];
            assert!(now == first || is_new);
            check(&*device, Repair::All).unwrap();
            assert!(Header::read(&device).is_ok());
        });
    }
}
