// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images of qemu-img, of other writers, and broken ones.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use proptest::prelude::*;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, ErrorKind, ExtentKind, MemoryDevice, Span};
use tranship_format_testing::{
    contents, damaged, digest, exercise, has_tool, pattern, qemu_img, samples, verify,
};
use tranship_raw::{Access, RawFile};
use tranship_vdi::{Header, Kind, OpenOptions, Parent, SIGNATURE, Vdi, check};

const BLOCK: usize = 4096;
const PARENT: [u8; 16] = [5; 16];
const NONE: u32 = u32::MAX;
const ZERO: u32 = u32::MAX - 1;

fn put(bytes: &mut [u8], at: usize, number: u32) {
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

/// An image of four-KiB blocks; `stored` blocks of data, whose bytes are their number + 1.
fn image(kind: u32, map: &[u32], extra: usize, stored: usize) -> Vec<u8> {
    let data = 0x1000;
    let mut bytes = vec![0; data];
    let size = (map.len() * BLOCK) as u32 - 512;
    let numbers = [
        (0x40, SIGNATURE),
        (0x44, 0x0001_0001),
        (0x48, 0x190),
        (0x4c, kind),
        (0x154, 0x200),
        (0x158, data as u32),
        (0x170, size),
        (0x178, BLOCK as u32),
        (0x17c, extra as u32),
        (0x180, map.len() as u32),
    ];
    for (at, number) in numbers {
        put(&mut bytes, at, number);
    }
    for (index, entry) in map.iter().enumerate() {
        put(&mut bytes, 0x200 + 4 * index, *entry);
    }
    if kind == 4 {
        bytes[0x1a8..0x1b8].fill(5);
        bytes[0x1b8..0x1c8].fill(6);
    }
    for number in 0..stored {
        bytes.extend(vec![0xee; extra]);
        bytes.extend(vec![number as u8 + 1; BLOCK]);
    }
    bytes
}

fn open(bytes: Vec<u8>, options: OpenOptions) -> tranship_block::Result<Vdi> {
    Vdi::open_read_only(Arc::new(MemoryDevice::read_only(bytes)), options)
}

#[test]
fn blocks_are_found_wherever_they_are() {
    for extra in [0, 512] {
        for kind in [1, 2] {
            let disk =
                open(image(kind, &[2, 0, 1, NONE, ZERO, 3], extra, 4), OpenOptions::default())
                    .unwrap();
            let mut model: Vec<u8> =
                [3, 1, 2, 0, 0, 4].iter().flat_map(|byte| [*byte; BLOCK]).collect();
            model.truncate(model.len() - 512);
            verify(&disk, &model);
            assert_eq!(disk.extent_at(3 * 4096).unwrap().kind, ExtentKind::Hole);
            assert_eq!(disk.extent_at(4 * 4096).unwrap().kind, ExtentKind::Zero);
            // Blocks 1 and 2 follow each other, unless there is something between them.
            let joined = if extra == 0 { 2 * 4096 } else { 4096 };
            assert_eq!(disk.extent_at(4096).unwrap().len, joined);
        }
    }
}

#[test]
fn a_child_needs_its_own_parent() {
    let bytes = image(4, &[NONE, ZERO, 0, NONE], 0, 1);
    let base = pattern(3 * BLOCK + 100, 1);
    let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::read_only(base.clone()));
    let parent = Parent { device, uuid: PARENT, modification: [6; 16] };
    let with = |parent| OpenOptions { parent: Some(parent), ..OpenOptions::default() };
    let disk = open(bytes.clone(), with(parent.clone())).unwrap();
    let mut model = base.clone();
    model.resize(4 * BLOCK - 512, 0);
    model[BLOCK..2 * BLOCK].fill(0);
    model[2 * BLOCK..3 * BLOCK].fill(1);
    verify(&disk, &model);
    assert_eq!(disk.extent_at(0).unwrap().depth, 1);

    let error = open(bytes.clone(), OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    let text = "its parent 05050505-0505-0505-0505-050505050505 is missing";
    assert!(error.to_string().contains(text), "{error}");
    let other = Parent { uuid: [9; 16], ..parent.clone() };
    let error = open(bytes.clone(), with(other)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let changed = Parent { modification: [9; 16], ..parent.clone() };
    let error = open(bytes.clone(), with(changed.clone())).unwrap_err();
    assert!(error.to_string().contains("was changed since"), "{error}");
    let options = OpenOptions { salvage: true, parent: Some(changed) };
    assert_eq!(open(bytes, options).unwrap().warnings().len(), 1);
    let error = open(image(1, &[0], 0, 1), with(parent)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn lost_blocks_are_refused_or_salvaged() {
    let bytes = image(1, &[0, 1, 7], 0, 2);
    let error = open(bytes.clone(), OpenOptions::default()).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(0x208)));
    let disk = open(bytes, OpenOptions { salvage: true, parent: None }).unwrap();
    assert_eq!(disk.warnings().len(), 1);
    let mut model = [[1; BLOCK], [2; BLOCK], [0; BLOCK]].concat();
    model.truncate(3 * BLOCK - 512);
    verify(&disk, &model);
}

#[test]
fn an_empty_disk_is_mapped_at_once() {
    let mut bytes = image(1, &[NONE], 0, 0);
    bytes.truncate(0x200);
    bytes.resize(0x200 + (4 << 20), 0xff);
    bytes[0x170..0x178].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    put(&mut bytes, 0x178, 1 << 20);
    put(&mut bytes, 0x180, 1 << 20);
    let disk = open(bytes, OpenOptions::default()).unwrap();
    let start = Instant::now();
    assert_eq!(disk.extent_at(0).unwrap().len, 1 << 40);
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn images_made_by_qemu_read_alike() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let mut model = pattern(7 << 20, 3);
    model[1 << 20..4 << 20].fill(0);
    std::fs::write(&raw, &model).unwrap();
    for (name, options) in [("dynamic", "static=off"), ("fixed", "static=on")] {
        let path = folder.path().join(name);
        qemu_img(&["convert", "-f", "raw", "-O", "vdi", "-o", options], &[&raw, &path]);
        let status = std::process::Command::new("qemu-io")
            .args(["-f", "vdi", "-c", "write -P 9 3145000 2000"])
            .arg(&path)
            .output()
            .unwrap();
        assert!(status.status.success());
        let mut model = model.clone();
        model[3_145_000..3_147_000].fill(9);
        let file = Arc::new(RawFile::open(&path, Access::ReadOnly).unwrap());
        let disk = Vdi::open_read_only(file, OpenOptions::default()).unwrap();
        verify(&disk, &model);
        let kind = if name == "fixed" { Kind::Fixed } else { Kind::Dynamic };
        assert_eq!(disk.header().kind, kind);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damage_does_no_harm(
        bytes in damaged(
            image(4, &[2, 0, NONE, ZERO, 1], 0, 3),
            vec![Span::new(0x40, 0x18), Span::new(0x150, 0x80), Span::new(0x200, 20)],
        ),
        salvage in any::<bool>(),
    ) {
        let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::read_only(pattern(9000, 1)));
        let parent = Parent { device, uuid: PARENT, modification: [6; 16] };
        let _ = Header::read(&MemoryDevice::read_only(bytes.clone()));
        let _ = check(&MemoryDevice::read_only(bytes.clone()));
        if let Ok(disk) = open(bytes, OpenOptions { salvage, parent: Some(parent) }) {
            exercise(&disk);
        }
    }
}

#[test]
fn samples_do_as_recorded() {
    let all = samples();
    let folder = tempfile::tempdir().unwrap();
    for sample in all.iter().filter(|sample| sample.format.as_deref() == Some("vdi")) {
        let path = sample.unpack(folder.path(), &all);
        let file = Arc::new(RawFile::open(&path, Access::ReadOnly).unwrap());
        let found = Vdi::open_read_only(file, OpenOptions::default())
            .and_then(|disk| digest(&disk).map(|digest| (digest, contents(&disk).len())));
        match sample.expect.as_str() {
            "open" => assert!(found.is_ok(), "{}: {found:?}", sample.path),
            "refuse" => assert!(found.is_err(), "{}", sample.path),
            _ => {}
        }
    }
}

/// What qemu-img and this crate say about an image: corruptions and leaks.
fn verdicts(format: &str, bytes: &[u8]) -> [(u64, u64); 2] {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, bytes).unwrap();
    let run = Command::new("qemu-img")
        .args(["check", "--output", "json", "-f", format])
        .arg(&path)
        .output()
        .unwrap();
    let text = String::from_utf8(run.stdout).unwrap();
    let number = |key: &str| {
        let start = text.find(&format!("\"{key}\": ")).map(|at| at + key.len() + 4);
        let rest = start.map_or("0", |start| &text[start..]);
        rest.split([',', '\n']).next().unwrap().parse::<u64>().unwrap()
    };
    let report = check(&MemoryDevice::read_only(bytes.to_vec())).unwrap();
    assert_eq!(report.details.is_empty(), report.is_clean());
    if format != "vdi" {
        let theirs = ["allocated-clusters", "fragmented-clusters", "total-clusters"].map(number);
        let ours = [report.allocated_clusters, report.fragmented_clusters, report.total_clusters];
        assert_eq!(ours, theirs, "{text}");
    }
    [(report.corruptions, report.leaks), (number("corruptions"), number("leaks"))]
}

#[test]
fn contradictions_are_found_as_by_qemu() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [raw, path] = ["raw", "vdi"].map(|name| folder.path().join(name));
    let mut disk = vec![0; 10 << 20];
    disk[3 << 20..][..100].fill(1);
    disk[7 << 20..][..100].fill(2);
    std::fs::write(&raw, disk).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "vdi"], &[&raw, &path]);
    let good = std::fs::read(&path).unwrap();
    let map = u32::from_le_bytes(good[0x154..0x158].try_into().unwrap()) as usize;
    let changed = |at: usize, number: u32| {
        let mut bytes = good.clone();
        put(&mut bytes, at, number);
        bytes
    };
    // The same, but qemu-img does not look whether blocks are in the file.
    for (bytes, expected, theirs) in [
        (good.clone(), 0, 0),
        (changed(map + 4 * 7, 0), 1, 1),
        (changed(map + 4 * 5, 50), 2, 1),
        (changed(map + 4 * 5, 5), 2, 1),
        (changed(0x184, 5), 1, 1),
        (good[..good.len() - 4096].to_vec(), 1, 0),
    ] {
        let [ours, found] = verdicts("vdi", &bytes);
        assert_eq!((ours, found.1), ((expected, 0), 0));
        assert!(found.0 == theirs || found.0 == expected, "{found:?}");
    }
}

#[test]
fn a_check_needs_no_parent() {
    let mut bytes = image(4, &[0, NONE, ZERO, 1], 512, 2);
    put(&mut bytes, 0x184, 2);
    let report = check(&MemoryDevice::read_only(bytes)).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.allocated_clusters, report.total_clusters), (2, 4));
}
