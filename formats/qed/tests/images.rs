// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images of qemu-img, and broken ones.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use proptest::prelude::*;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, ErrorKind, ExtentKind, MemoryDevice, Span};
use tranship_format_testing::{
    damaged, exercise, has_tool, pattern, qemu_img, raw_by_qemu, verify,
};
use tranship_qed::{Header, MAGIC, OpenOptions, Qed, check};
use tranship_raw::{Access, RawFile};

const CLUSTER: usize = 4096;

/// An image of one L2 table with these entries, and `stored` clusters of data from cluster
/// 3 on, whose bytes are their number.
fn image(entries: &[u64], features: u64, stored: usize) -> Vec<u8> {
    let mut bytes = vec![0; 3 * CLUSTER];
    bytes[..4].copy_from_slice(&MAGIC);
    let size = (entries.len() * CLUSTER) as u64 - 512;
    let numbers = [
        (4, 4096_u64 | 1 << 32),
        (12, 1),
        (16, features),
        (40, CLUSTER as u64),
        (48, size),
        (56, 64 | 4 << 32),
        (64, u64::from(u32::from_le_bytes(*b"base"))),
        (CLUSTER, 2 * CLUSTER as u64),
    ];
    for (at, number) in numbers {
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    for (index, entry) in entries.iter().enumerate() {
        let at = 2 * CLUSTER + 8 * index;
        bytes[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    for number in 0..stored {
        bytes.extend([number as u8 + 3; CLUSTER]);
    }
    bytes
}

fn cluster(number: u64) -> u64 {
    number * CLUSTER as u64
}

fn open(bytes: Vec<u8>, options: OpenOptions) -> tranship_block::Result<Qed> {
    Qed::open_read_only(Arc::new(MemoryDevice::read_only(bytes)), options)
}

fn backed(bytes: Vec<u8>) -> OpenOptions {
    OpenOptions {
        backing: Some(Arc::new(MemoryDevice::read_only(bytes))),
        ..OpenOptions::default()
    }
}

#[test]
fn clusters_are_found_wherever_they_are() {
    let entries = [cluster(5), cluster(3), cluster(4), 0, 1, cluster(6)];
    let base = pattern(4 * CLUSTER, 1);
    for features in [0, 1, 2] {
        let options = if features == 1 { backed(base.clone()) } else { OpenOptions::default() };
        let disk = open(image(&entries, features, 4), options).unwrap();
        let mut model: Vec<u8> =
            [5, 3, 4, 0, 0, 6].iter().flat_map(|byte| [*byte; CLUSTER]).collect();
        if features == 1 {
            model[3 * CLUSTER..4 * CLUSTER].copy_from_slice(&base[3 * CLUSTER..]);
        }
        model.truncate(model.len() - 512);
        verify(&disk, &model);
        assert_eq!(disk.extent_at(cluster(1)).unwrap().len, cluster(2));
        assert_eq!(disk.extent_at(cluster(4)).unwrap().kind, ExtentKind::Zero);
        assert_eq!(disk.warnings().len(), usize::from(features == 2));
    }
}

#[test]
fn an_image_is_not_opened_without_its_backing_file() {
    let bytes = image(&[0], 1, 0);
    let error = open(bytes.clone(), OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert_eq!(error.to_string(), "the image's backing file \"base\" is missing");
    let options = OpenOptions { salvage: true, backing: None };
    assert_eq!(open(bytes, options).unwrap().warnings().len(), 1);
    let error = open(image(&[0], 0, 0), backed(Vec::new())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn entries_that_lead_nowhere_are_refused_or_salvaged() {
    for bad in [cluster(4), cluster(3) + 8, 2, u64::MAX] {
        let bytes = image(&[cluster(3), bad, 0], 0, 1);
        let disk = open(bytes.clone(), OpenOptions::default()).unwrap();
        assert_eq!(disk.extent_at(0).unwrap().len, cluster(1));
        let error = disk.extent_at(cluster(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().starts_with("cluster for 0x1000 is at"), "{error}");
        let disk = open(bytes, OpenOptions { salvage: true, backing: None }).unwrap();
        assert!(disk.warnings()[0].starts_with("1 entries"), "{:?}", disk.warnings());
        let mut model = [[3; CLUSTER], [0; CLUSTER], [0; CLUSTER]].concat();
        model.truncate(model.len() - 512);
        verify(&disk, &model);
    }
    let mut bytes = image(&[cluster(3)], 0, 1);
    bytes[CLUSTER] = 1;
    let error = open(bytes, OpenOptions::default()).unwrap().extent_at(0).unwrap_err();
    assert!(error.to_string().starts_with("L2 table for 0x0 is at 0x2001"), "{error}");
}

fn file(path: &Path) -> Arc<dyn BlockDevice> {
    Arc::new(RawFile::open(path, Access::ReadOnly).unwrap())
}

fn qemu_io(path: &Path, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qed"]);
    for text in commands {
        command.args(["-c", text]);
    }
    assert!(command.arg(path).output().unwrap().status.success());
}

#[test]
fn images_made_by_qemu_read_alike() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("base.raw");
    std::fs::write(&raw, pattern(2 << 20, 3)).unwrap();
    for options in ["cluster_size=4096", "cluster_size=65536", "cluster_size=2M"] {
        let path = folder.path().join("image");
        let base = raw.to_str().unwrap();
        qemu_img(
            &["create", "-q", "-f", "qed", "-b", base, "-F", "raw", "-o", options],
            &[&path, Path::new("9M")],
        );
        qemu_io(&path, &["write -P 3 70000 1000", "write -z 1M 512k", "write -P 7 5M 3M"]);
        let header = Header::read(&*file(&path)).unwrap();
        let backing = header.backing.as_ref().unwrap();
        assert_eq!((backing.name.as_str(), backing.format), (base, Some("raw")));
        let options = OpenOptions { backing: Some(file(&raw)), ..OpenOptions::default() };
        let disk = Qed::open_read_only(file(&path), options).unwrap();
        verify(&disk, &raw_by_qemu("qed", folder.path(), &path));
    }
}

#[test]
fn an_empty_disk_is_mapped_at_once() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    qemu_img(&["create", "-q", "-f", "qed"], &[&path, Path::new("1T")]);
    let disk = Qed::open_read_only(file(&path), OpenOptions::default()).unwrap();
    let start = Instant::now();
    assert_eq!(disk.extent_at(0).unwrap().len, 1 << 40);
    assert!(start.elapsed() < Duration::from_secs(3));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damage_does_no_harm(
        bytes in damaged(
            image(&[cluster(5), cluster(3), 0, 1, cluster(4)], 1, 3),
            vec![Span::new(0, 72), Span::new(4096, 8), Span::new(8192, 40)],
        ),
        salvage in any::<bool>(),
    ) {
        let _ = check(&MemoryDevice::read_only(bytes.clone()));
        let options = OpenOptions { salvage, ..backed(pattern(9000, 1)) };
        if let Ok(disk) = open(bytes, options) {
            exercise(&disk);
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
    assert!(!text.is_empty(), "{}", String::from_utf8_lossy(&run.stderr));
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
    // qemu-img refuses tables of one cluster: those of these images have two.
    let (l1, l2) = (CLUSTER, 3 * CLUSTER);
    let entries = [cluster(5), 0, cluster(6), 1, cluster(8)];
    let mut good = image(&[0; 5], 0, 6);
    good[8] = 2;
    let put = |bytes: &mut [u8], at: usize, number: u64| {
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
    };
    good[2 * CLUSTER..5 * CLUSTER].fill(0);
    put(&mut good, l1, cluster(3));
    for (index, entry) in entries.iter().enumerate() {
        put(&mut good, l2 + 8 * index, *entry);
    }
    let changed = |at: usize, number: u64| {
        let mut bytes = good.clone();
        put(&mut bytes, at, number);
        bytes
    };
    // One cluster of the good one belongs to nothing.
    for (bytes, expected) in [
        (good.clone(), (0, 1)),
        (changed(16, 2), (0, 1)),
        (changed(l2 + 8, cluster(7)), (0, 0)),
        (changed(l2 + 8, cluster(5)), (1, 1)),
        (changed(l2 + 8, cluster(100)), (1, 1)),
        (changed(l2 + 8, cluster(7) + 512), (1, 1)),
        (changed(l2 + 8, cluster(3)), (1, 1)),
        (changed(l2 + 8, cluster(0) + 8), (1, 1)),
        (changed(l1 + 8, cluster(3)), (2, 1)),
        (changed(l1 + 8, cluster(200)), (1, 1)),
        (changed(l1, 0), (0, 6)),
    ] {
        let [ours, theirs] = verdicts("qed", &bytes);
        assert_eq!((ours, theirs), (expected, expected));
    }
}
