// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Internal snapshots: taken, applied, deleted and read here and by qemu-img.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use support::{open, options};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Repair, Storage};
use tranship_format_testing::{PowerCut, contents, has_tool, pattern, qemu_img, raw_by_qemu};
use tranship_qcow2::{
    CreateOptions, OpenOptions, Qcow2, apply_snapshot, check, check_read_only, create,
    create_snapshot, delete_snapshot, snapshots,
};
use tranship_raw::{Access, RawFile};

const SIZE: u64 = 1_500_160;

fn time() -> SystemTime {
    UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789)
}

fn file(path: &Path) -> Arc<RawFile> {
    Arc::new(RawFile::open(path, Access::ReadWrite).unwrap())
}

fn clean(storage: &dyn Storage) {
    let report = check(storage, Repair::Nothing).unwrap();
    assert!(report.is_clean(), "{:?}", report.details);
}

fn write(path: &Path, len: usize, at: u64, seed: u64) {
    let storage: Arc<dyn Storage> = file(path);
    let image = open(&storage, None);
    image.write_at(&pattern(len, seed), at).unwrap();
    image.finish().unwrap();
}

#[test]
fn snapshots_of_ours_and_of_qemu_live_side_by_side() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (bits, args) in [
        (9, "cluster_size=512"),
        (12, "cluster_size=4k,refcount_bits=8"),
        (16, "compat=0.10"),
        (14, "cluster_size=16k,extended_l2=on"),
    ] {
        let path = folder.path().join("image");
        let path = path.as_path();
        qemu_img(
            &["create", "-q", "-f", "qcow2", "-o", args],
            &[path, Path::new(&SIZE.to_string())],
        );
        let extended = args.contains("extended");
        let change = |len: usize, at: u64, seed: u64| {
            if extended {
                let line = format!("write -P {seed} {} {}", at / 512 * 512, len / 512 * 512);
                let mut command = std::process::Command::new("qemu-io");
                assert!(command.args(["-c", &line]).arg(path).output().unwrap().status.success());
            } else {
                write(path, len, at, seed);
            }
        };
        change(300_000, 1000, 1);
        let one = raw_by_qemu("qcow2", folder.path(), path);
        assert_eq!(create_snapshot(&*file(path), "one", time()).unwrap(), "1");
        clean(&*file(path));
        change(400_000, 200_000, 2);
        clean(&*file(path));
        let two = raw_by_qemu("qcow2", folder.path(), path);
        qemu_img(&["snapshot", "-c", "two"], &[path]);
        clean(&*file(path));
        change(SIZE as usize, 0, 3);
        let three = raw_by_qemu("qcow2", folder.path(), path);
        assert_eq!(create_snapshot(&*file(path), "three", time()).unwrap(), "3");
        change(1000, 0, 4);

        let list = snapshots(&file(path)).unwrap();
        let names: Vec<_> = list.iter().map(|snapshot| &*snapshot.name).collect();
        assert_eq!(names, ["one", "two", "three"]);
        assert_eq!((list[0].date_seconds, list[0].date_nanoseconds), (1_700_000_000, 123_456_789));
        assert_eq!((list[1].disk_size, list[1].icount), (Some(SIZE), Some(0)));
        let text = qemu_img(&["info", "--output", "json"], &[path]);
        let info: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(info["snapshots"][2]["name"], "three");
        assert_eq!(info["snapshots"][2]["date-sec"], 1_700_000_000);
        assert_eq!(info["snapshots"][2]["date-nsec"], 123_456_789);

        for (name, expected) in [("one", &one), ("2", &two), ("three", &three)] {
            if !extended {
                let disk = Qcow2::open_snapshot(file(path), name, OpenOptions::default()).unwrap();
                assert!(contents(&disk) == **expected, "{args}: snapshot {name} as a device");
            }
            if name == "2" {
                qemu_img(&["snapshot", "-a", name], &[path]);
            } else {
                apply_snapshot(&*file(path), name).unwrap();
            }
            clean(&*file(path));
            qemu_img(&["check", "-q"], &[path]);
            let now = raw_by_qemu("qcow2", folder.path(), path);
            assert!(now == **expected, "{args}: {name} applied");
            change(70_000, 50_000, 5);
            clean(&*file(path));
        }
        delete_snapshot(&*file(path), "two").unwrap();
        clean(&*file(path));
        qemu_img(&["check", "-q"], &[path]);
        qemu_img(&["snapshot", "-d", "three"], &[path]);
        apply_snapshot(&*file(path), "one").unwrap();
        delete_snapshot(&*file(path), "1").unwrap();
        clean(&*file(path));
        qemu_img(&["check", "-q"], &[path]);
        assert!(raw_by_qemu("qcow2", folder.path(), path) == one, "{args}: {bits}");
        assert_eq!(snapshots(&file(path)).unwrap(), []);
        assert_eq!(apply_snapshot(&*file(path), "one").unwrap_err().kind(), ErrorKind::NotFound);
        let _ = std::fs::remove_file(path);
    }
}

#[test]
fn a_snapshot_brings_its_disk_size_back() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let path = path.as_path();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"], &[path, Path::new("1M")]);
    write(path, 1 << 20, 0, 1);
    let small = raw_by_qemu("qcow2", folder.path(), path);
    create_snapshot(&*file(path), "small", time()).unwrap();
    qemu_img(&["resize", "-q"], &[path, Path::new("40M")]);
    write(path, 1 << 20, 39 << 20, 2);
    let large = raw_by_qemu("qcow2", folder.path(), path);
    create_snapshot(&*file(path), "large", time()).unwrap();
    for (name, expected) in [("small", &small), ("large", &large), ("small", &small)] {
        let disk = Qcow2::open_snapshot(file(path), name, OpenOptions::default()).unwrap();
        assert!(contents(&disk) == **expected, "{name}");
        apply_snapshot(&*file(path), name).unwrap();
        clean(&*file(path));
        qemu_img(&["check", "-q"], &[path]);
        assert!(raw_by_qemu("qcow2", folder.path(), path) == **expected, "{name} applied");
    }
}

#[test]
fn counts_that_are_too_narrow_refuse_and_change_nothing() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let narrow = folder.path().join("narrow");
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-o", "refcount_bits=1"],
        &[&narrow, Path::new("1M")],
    );
    write(&narrow, 300_000, 0, 1);
    // Compressed clusters share what they are in: one more for each of them is too many.
    let [raw, packed] = ["raw", "packed"].map(|name| folder.path().join(name));
    std::fs::write(&raw, vec![7; 1 << 20]).unwrap();
    let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "refcount_bits=2"];
    qemu_img(&convert, &[&raw, &packed]);
    for path in [&narrow, &packed] {
        let before = std::fs::read(path).unwrap();
        let error = create_snapshot(&*file(path), "one", time()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("bits"), "{error}");
        assert!(std::fs::read(path).unwrap() == before, "{}", path.display());
        qemu_img(&["check", "-q"], &[path]);
    }
}

/// The guest's bytes after a repair, which has to succeed whatever a power cut has left.
fn repaired(disk: Vec<u8>) -> (Vec<u8>, Vec<Vec<u8>>) {
    let storage = Arc::new(MemoryDevice::new(disk));
    let before = check_read_only(&storage).unwrap();
    let is_about_flags =
        |detail: &String| detail.starts_with("Leaked") || detail.starts_with("ERROR OFLAG_COPIED");
    assert!(before.details.iter().all(is_about_flags), "{:?}", before.details);
    let report = check(&*storage, Repair::All).unwrap();
    assert!(report.is_clean(), "{:?}", report.details);
    let kept = snapshots(&storage)
        .unwrap()
        .iter()
        .map(|snapshot| {
            contents(
                &Qcow2::open_snapshot(storage.clone(), &snapshot.id, OpenOptions::default())
                    .unwrap(),
            )
        })
        .collect();
    (contents(&Qcow2::open_read_only(storage, None).unwrap()), kept)
}

#[test]
fn every_cut_leaves_the_old_state_or_the_new_one() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &CreateOptions { size: 40_448, ..options(40_448, 9) }).unwrap();
    let image = open(&(storage.clone() as Arc<dyn Storage>), None);
    image.write_at(&pattern(30_000, 1), 0).unwrap();
    image.finish().unwrap();
    let first = contents(&Qcow2::open_read_only(storage.clone(), None).unwrap());
    let cut = Arc::new(PowerCut::new(storage.snapshot()));
    create_snapshot(&*cut, "one", time()).unwrap();
    cut.replay(&[], 1, |disk, _| {
        let (now, kept) = repaired(disk);
        assert!(now == first && kept.iter().all(|kept| *kept == first));
    });

    let image = open(&(cut.clone() as Arc<dyn Storage>), None);
    image.write_at(&pattern(20_000, 2), 9000).unwrap();
    image.finish().unwrap();
    let second = contents(&Qcow2::open_read_only(cut.clone(), None).unwrap());
    let mut whole = vec![0; cut.size() as usize];
    cut.read_at(&mut whole, 0).unwrap();
    let cut = PowerCut::new(whole);
    apply_snapshot(&cut, "one").unwrap();
    cut.replay(&[], 2, |disk, _| {
        let (now, kept) = repaired(disk);
        assert!(now == first || now == second);
        assert!(kept == [first.clone()]);
    });
    let mut whole = vec![0; cut.size() as usize];
    cut.read_at(&mut whole, 0).unwrap();
    let cut = PowerCut::new(whole);
    delete_snapshot(&cut, "one").unwrap();
    cut.replay(&[], 3, |disk, _| {
        let (now, kept) = repaired(disk);
        assert!(now == first && kept.iter().all(|kept| *kept == first));
    });
}
