// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Persistent bitmaps: qemu finds the bits that were set here, and the other way round.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use support::open;
use tranship_block::{BlockDevice, ErrorKind, Repair, Span, Storage, Zeroing};
use tranship_format_testing::{has_tool, pattern, qemu_img};
use tranship_qcow2::{
    BitmapContent, add_bitmap, bitmaps, check, clear_bitmap, disable_bitmap, enable_bitmap,
    merge_bitmap, remove_bitmap,
};
use tranship_raw::{Access, RawFile};

fn file(path: &Path) -> Arc<RawFile> {
    Arc::new(RawFile::open(path, Access::ReadWrite).unwrap())
}

fn clean(path: &Path) {
    let report = check(&*file(path), Repair::Nothing).unwrap();
    assert!(report.is_clean(), "{:?}", report.details);
    qemu_img(&["check", "-q", "-f", "qcow2"], &[path]);
}

/// Marked ranges as this crate reads them.
fn ours(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let content = BitmapContent::read(&file(path), name).unwrap();
    let (mut found, mut at) = (Vec::new(), 0);
    loop {
        match content.dirty_at(at) {
            (_, 0) => return found,
            (is_set, len) => {
                if is_set {
                    found.push((at, len));
                }
                at += len;
            }
        }
    }
}

/// Marked ranges as qemu-nbd exports them, over the standard streams of a socket file.
fn by_qemu(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let argument = format!("--map=qemu:dirty-bitmap:{name}");
    let output = Command::new("nbdinfo")
        .args([&argument, "--json", "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name])
        .arg(path)
        .arg("]")
        .output()
        .unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let mut found: Vec<(u64, u64)> = Vec::new();
    for row in json.as_array().unwrap() {
        if row["type"] == 1 {
            let (start, len) = (row["offset"].as_u64().unwrap(), row["length"].as_u64().unwrap());
            match found.last_mut() {
                Some(last) if last.0 + last.1 == start => last.1 += len,
                _ => found.push((start, len)),
            }
        }
    }
    found
}

fn info(path: &Path) -> Vec<(String, u64, Vec<String>)> {
    let text = qemu_img(&["info", "--output", "json"], &[path]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let list = json["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    list.iter()
        .map(|row| {
            let flags = row["flags"].as_array().unwrap();
            (
                row["name"].as_str().unwrap().to_owned(),
                row["granularity"].as_u64().unwrap(),
                flags.iter().map(|flag| flag.as_str().unwrap().to_owned()).collect(),
            )
        })
        .collect()
}

fn listed(path: &Path) -> Vec<(String, u64, Vec<String>)> {
    bitmaps(&file(path))
        .unwrap()
        .into_iter()
        .map(|bitmap| {
            let mut flags = Vec::new();
            if bitmap.is_in_use {
                flags.push("in-use".to_owned());
            }
            if bitmap.is_enabled {
                flags.push("auto".to_owned());
            }
            (bitmap.name, bitmap.granularity, flags)
        })
        .collect()
}

#[test]
fn bits_set_by_writes_are_what_qemu_exports() {
    if !has_tool("qemu-img") || !has_tool("qemu-nbd") || !has_tool("nbdinfo") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for args in ["cluster_size=512", "cluster_size=64k", "cluster_size=4k,refcount_bits=64"] {
        let path = folder.path().join("image");
        let path = path.as_path();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", args], &[path, Path::new("6M")]);
        add_bitmap(&*file(path), "fine", Some(512)).unwrap();
        add_bitmap(&*file(path), "coarse", None).unwrap();
        add_bitmap(&*file(path), "off", Some(4096)).unwrap();
        disable_bitmap(&*file(path), "off").unwrap();
        qemu_img(&["bitmap", "--add", "-g", "2M"], &[path, Path::new("theirs")]);
        assert_eq!(listed(path), info(path), "{args}");
        clean(path);
        let storage: Arc<dyn Storage> = file(path);
        let image = open(&storage, None);
        image.write_at(&pattern(1000, 1), 5000).unwrap();
        assert!(listed(path).iter().filter(|row| row.2.len() == 2).count() == 3, "in use");
        image.flush().unwrap();
        image.write_zeroes(Span::new(3 << 20, 70_000), Zeroing::MayUnmap).unwrap();
        image.discard(Span::new(2_000_000, 100_000)).unwrap();
        image.write_at(&pattern(10, 1), (6 << 20) - 10).unwrap();
        image.finish().unwrap();
        clean(path);
        assert_eq!(listed(path), info(path), "{args}");
        assert_eq!(ours(path, "fine")[0], (4608, 1536));
        for name in ["fine", "coarse", "off", "theirs"] {
            assert_eq!(ours(path, name), by_qemu(path, name), "{args}: {name}");
        }
        assert!(ours(path, "off").is_empty());

        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2", "-c", "write 4500k 300k", "-c", "write 100k 1k"]).arg(path);
        assert!(command.output().unwrap().status.success());
        enable_bitmap(&*file(path), "off").unwrap();
        let fine = BitmapContent::read(&file(path), "fine").unwrap();
        merge_bitmap(&*file(path), "off", &fine).unwrap();
        let theirs = BitmapContent::read(&file(path), "theirs").unwrap();
        assert_eq!(theirs.granularity(), 2 << 20);
        merge_bitmap(&*file(path), "coarse", &theirs).unwrap();
        clean(path);
        for name in ["fine", "coarse", "off", "theirs"] {
            assert_eq!(ours(path, name), by_qemu(path, name), "{args}: {name} merged");
        }
        qemu_img(&["bitmap", "--merge", "off"], &[path, Path::new("theirs")]);
        assert_eq!(ours(path, "theirs"), by_qemu(path, "theirs"), "{args}");
        clear_bitmap(&*file(path), "fine").unwrap();
        assert!(by_qemu(path, "fine").is_empty());
        remove_bitmap(&*file(path), "coarse").unwrap();
        clean(path);
        for name in ["fine", "off", "theirs"] {
            remove_bitmap(&*file(path), name).unwrap();
        }
        assert!(info(path).is_empty() && listed(path).is_empty());
        clean(path);
        let _ = std::fs::remove_file(path);
    }
}

#[test]
fn bitmaps_that_cannot_be_are_refused() {
    let storage = Arc::new(tranship_block::MemoryDevice::new(Vec::new()));
    tranship_qcow2::create(&*storage, &support::options(1 << 20, 16)).unwrap();
    add_bitmap(&*storage, "one", None).unwrap();
    let long = "x".repeat(1024);
    for (name, granularity) in
        [("one", None), ("", None), (&*long, None), ("two", Some(256)), ("two", Some(5000))]
    {
        let error = add_bitmap(&*storage, name, granularity).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    }
    assert_eq!(remove_bitmap(&*storage, "two").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_writer_that_died_leaves_its_bitmaps_inconsistent() {
    let storage = Arc::new(tranship_block::MemoryDevice::new(Vec::new()));
    tranship_qcow2::create(&*storage, &support::options(1 << 20, 16)).unwrap();
    add_bitmap(&*storage, "one", None).unwrap();
    let image = open(&(storage.clone() as Arc<dyn Storage>), None);
    image.write_at(&[1], 0).unwrap();
    image.flush().unwrap();
    let killed = tranship_block::MemoryDevice::new(storage.snapshot());
    drop(image);
    assert!(!bitmaps(&storage).unwrap()[0].is_in_use);
    assert_eq!(BitmapContent::read(&storage, "one").unwrap().dirty_bytes(), 65_536);

    assert!(bitmaps(&killed).unwrap()[0].is_in_use);
    assert!(check(&killed, Repair::Nothing).unwrap().is_clean());
    for result in [
        BitmapContent::read(&killed, "one").map(drop),
        clear_bitmap(&killed, "one"),
        enable_bitmap(&killed, "one"),
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt);
    }
    remove_bitmap(&killed, "one").unwrap();
    assert!(check(&killed, Repair::Nothing).unwrap().is_clean());
}
