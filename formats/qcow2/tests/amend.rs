// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an image's header says can be changed, and nothing else changes with it.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use support::{open, options};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Repair, Span, Storage, Zeroing};
use tranship_format_testing::{PowerCut, contents, has_tool, pattern, qemu_img, raw_by_qemu};
use tranship_qcow2::{
    Amendments, Backing, CreateOptions, Header, OpenOptions, Qcow2, add_bitmap, amend,
    change_backing, check, check_read_only, create, create_snapshot,
};
use tranship_raw::{Access, RawFile};

fn file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(RawFile::open(path, Access::ReadWrite).unwrap())
}

fn clean(storage: &dyn Storage) {
    let report = check(storage, Repair::Nothing).unwrap();
    assert!(report.is_clean(), "{:?}", report.details);
}

fn version(version: u32) -> Amendments {
    Amendments { version: Some(version), ..Amendments::default() }
}

fn width(bits: u32) -> Amendments {
    Amendments { refcount_bits: Some(bits), ..Amendments::default() }
}

/// Data, zero clusters with and without a place, and holes.
fn fill(storage: &Arc<dyn Storage>, backing: Option<Arc<dyn BlockDevice>>) {
    let image = open(storage, backing);
    image.write_at(&pattern(400_000, 1), 1000).unwrap();
    image.write_zeroes(Span::new(100_000, 90_000), Zeroing::KeepAllocated).unwrap();
    image.write_zeroes(Span::new(300_000, 300_000), Zeroing::MayUnmap).unwrap();
    image.finish().unwrap();
}

#[test]
fn widths_and_versions_change_back_and_forth() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    create(&RawFile::create(&path, 0).unwrap(), &options(1 << 20, 12)).unwrap();
    fill(&file(&path), None);
    let before = raw_by_qemu("qcow2", folder.path(), &path);
    let check_all = |what: &str| {
        clean(&*file(&path));
        qemu_img(&["check", "-q"], &[&path]);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == before, "{what}");
    };
    for bits in [1, 64, 2, 32, 4, 8, 16] {
        amend(&*file(&path), &width(bits)).unwrap();
        assert_eq!(Header::read(&file(&path)).unwrap().refcount_order, bits.trailing_zeros());
        check_all("width");
    }
    amend(&*file(&path), &Amendments { lazy_refcounts: Some(true), ..Default::default() }).unwrap();
    assert_eq!(Header::read(&file(&path)).unwrap().compatible_features, 1);
    check_all("lazy");
    create_snapshot(&*file(&path), "one", UNIX_EPOCH).unwrap();
    assert_eq!(amend(&*file(&path), &width(1)).unwrap_err().kind(), ErrorKind::Unsupported);
    fill(&file(&path), None);
    amend(&*file(&path), &version(2)).unwrap();
    assert_eq!(Header::read(&file(&path)).unwrap().version, 2);
    check_all("version 2");
    qemu_img(&["snapshot", "-a", "one"], &[&path]);
    check_all("snapshot in version 2");
    amend(&*file(&path), &version(3)).unwrap();
    amend(&*file(&path), &version(3)).unwrap();
    check_all("version 3");
    let info = qemu_img(&["info"], &[&path]);
    assert!(info.contains("compat: 1.1"), "{info}");
}

#[test]
fn zero_clusters_still_hide_a_backing_image_in_version_2() {
    let base: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::read_only(pattern(1 << 20, 7)));
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let backing = Some(Backing { name: "base".to_owned(), format: Some("raw".to_owned()) });
    create(&*storage, &CreateOptions { backing, ..options(1 << 20, 12) }).unwrap();
    let storage: Arc<dyn Storage> = storage;
    fill(&storage, Some(base.clone()));
    create_snapshot(&*storage, "one", UNIX_EPOCH).unwrap();
    let before = contents(&open(&storage, Some(base.clone())));
    amend(&*storage, &version(2)).unwrap();
    clean(&*storage);
    assert!(contents(&open(&storage, Some(base.clone()))) == before);
    let with = OpenOptions { backing: Some(base), ..OpenOptions::default() };
    let kept = Qcow2::open_snapshot(storage.clone(), "one", with).unwrap();
    assert!(contents(&kept) == before);
}

#[test]
fn backing_files_change_and_unknown_extensions_stay() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let base = folder.path().join("base");
    std::fs::write(&base, pattern(1 << 20, 2)).unwrap();
    create(&RawFile::create(&path, 0).unwrap(), &options(1 << 20, 16)).unwrap();
    let unknown = [0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5, b'h', b'e', b'l', b'l', b'o'];
    file(&path).write_at(&unknown, 112).unwrap();
    let name = base.to_str().unwrap().to_owned();
    for format in ["raw", "qcow2"] {
        let backing = Backing { name: name.clone(), format: Some(format.to_owned()) };
        change_backing(&*file(&path), Some(backing.clone())).unwrap();
        assert_eq!(Header::read(&file(&path)).unwrap().backing, Some(backing));
    }
    let backing = Backing { name: name.clone(), format: Some("raw".to_owned()) };
    change_backing(&*file(&path), Some(backing)).unwrap();
    assert!(raw_by_qemu("qcow2", folder.path(), &path) == pattern(1 << 20, 2));
    qemu_img(&["check", "-q"], &[&path]);
    let mut start = [0; 512];
    file(&path).read_at(&mut start, 0).unwrap();
    assert!(start.windows(13).any(|window| window == unknown));
    change_backing(&*file(&path), None).unwrap();
    assert_eq!(Header::read(&file(&path)).unwrap().backing, None);
    file(&path).read_at(&mut start, 0).unwrap();
    assert!(start.windows(13).any(|window| window == unknown));
    assert!(!start.windows(5).any(|window| *window == name.as_bytes()[..5]));
    qemu_img(&["check", "-q"], &[&path]);
}

#[test]
fn contradictions_are_refused_and_change_nothing() {
    let storage = MemoryDevice::new(Vec::new());
    create(&storage, &options(1 << 20, 9)).unwrap();
    add_bitmap(&storage, "b", None).unwrap();
    let before = storage.snapshot();
    let backing = |name: &str, format: Option<&str>| Amendments {
        backing: Some(Some(Backing { name: name.to_owned(), format: format.map(str::to_owned) })),
        ..Amendments::default()
    };
    let usage = [
        version(1),
        version(4),
        width(3),
        width(128),
        Amendments { version: Some(2), ..width(8) },
        Amendments { lazy_refcounts: Some(true), ..version(2) },
        Amendments { data_file: Some("x".to_owned()), ..Amendments::default() },
        Amendments { data_file_raw: Some(true), ..Amendments::default() },
        backing("x", None),
        backing("", Some("raw")),
        backing("x", Some("a name that is too long")),
        backing(&"x".repeat(1000), Some("raw")),
    ];
    for amendments in usage {
        let error = amend(&storage, &amendments).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    }
    assert_eq!(amend(&storage, &version(2)).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(storage.snapshot() == before);
}

#[test]
fn every_cut_leaves_a_sound_image() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &options(40_448, 9)).unwrap();
    let image = open(&(storage.clone() as Arc<dyn Storage>), None);
    image.write_at(&pattern(30_000, 1), 0).unwrap();
    image.write_zeroes(Span::new(5000, 9000), Zeroing::KeepAllocated).unwrap();
    image.finish().unwrap();
    let first = contents(&Qcow2::open_read_only(storage.clone(), None).unwrap());
    for amendments in [width(64), width(1), version(2)] {
        let cut = PowerCut::new(storage.snapshot());
        amend(&cut, &amendments).unwrap();
        cut.replay(&[], 5, |disk, _| {
            let device = Arc::new(MemoryDevice::read_only(disk));
            let report = check_read_only(&device).unwrap();
            assert_eq!(report.corruptions, 0, "{:?}", report.details);
            assert!(contents(&Qcow2::open_read_only(device, None).unwrap()) == first);
        });
    }
}
