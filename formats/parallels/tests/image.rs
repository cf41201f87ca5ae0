// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Growing images: made by hand, by qemu-img and by Parallels.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

use proptest::prelude::*;
use std::process::Command;
use std::sync::Arc;
use tranship_block::{BlockDevice, ErrorKind, ExtentKind, MemoryDevice, Span};
use tranship_format_testing::{
    contents, damaged, digest, exercise, has_tool, pattern, qemu_img, samples, verify,
};
use tranship_parallels::{Header, Image, OpenOptions, check};
use tranship_raw::{Access, RawFile};

const CLUSTER: usize = 8 * 512;

/// An image with a cluster for each number that is not `None`, at that place behind the
/// table; the disk ends half a cluster early.
fn image(magic: &[u8; 16], clusters: &[Option<u32>]) -> (Vec<u8>, Vec<u8>) {
    let size = clusters.len() * CLUSTER - CLUSTER / 2;
    let mut file = vec![0; CLUSTER];
    file[..16].copy_from_slice(magic);
    file[16] = 2;
    file[28] = 8;
    file[32..36].copy_from_slice(&(clusters.len() as u32).to_le_bytes());
    file[36..40].copy_from_slice(&((size / 512) as u32).to_le_bytes());
    file[48] = 8;
    let mut disk = vec![0; clusters.len() * CLUSTER];
    for (index, place) in clusters.iter().enumerate() {
        let Some(place) = *place else { continue };
        let unit = if magic.ends_with(b"Ext") { 1 } else { 8 };
        file[64 + index * 4..68 + index * 4].copy_from_slice(&(place * unit).to_le_bytes());
        let at = place as usize * CLUSTER;
        file.resize(file.len().max(at + CLUSTER), 0);
        let bytes = pattern(CLUSTER, index as u64);
        file[at..at + CLUSTER].copy_from_slice(&bytes);
        disk[index * CLUSTER..(index + 1) * CLUSTER].copy_from_slice(&bytes);
    }
    disk.truncate(size);
    (file, disk)
}

const LAYOUT: [Option<u32>; 7] = [Some(3), Some(4), None, None, Some(1), None, Some(2)];

fn open(file: Vec<u8>, options: OpenOptions) -> tranship_block::Result<Image> {
    Image::open_read_only(Arc::new(MemoryDevice::read_only(file)), options)
}

#[test]
fn both_kinds_give_their_bytes() {
    for magic in [b"WithoutFreeSpace", b"WithouFreSpacExt"] {
        let (file, disk) = image(magic, &LAYOUT);
        let image = open(file, OpenOptions::default()).unwrap();
        assert_eq!(image.warnings(), [""; 0]);
        verify(&image, &disk);
        let first = image.extent_at(100).unwrap();
        assert_eq!((first.kind, first.len), (ExtentKind::Data, 2 * CLUSTER as u64 - 100));
        assert_eq!(first.offset, Some(3 * CLUSTER as u64 + 100));
        let hole = image.extent_at(2 * CLUSTER as u64).unwrap();
        assert_eq!((hole.kind, hole.len), (ExtentKind::Hole, 2 * CLUSTER as u64));
    }
}

#[test]
fn a_parent_shows_through_as_far_as_it_reaches() {
    let (file, disk) = image(b"WithouFreSpacExt", &LAYOUT);
    let below = pattern(3 * CLUSTER, 99);
    let parent: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::read_only(below.clone()));
    let image = open(file, OpenOptions { parent: Some(parent), salvage: false }).unwrap();
    let mut expected = disk;
    expected[2 * CLUSTER..3 * CLUSTER].copy_from_slice(&below[2 * CLUSTER..]);
    verify(&image, &expected);
    assert_eq!(image.extent_at(2 * CLUSTER as u64).unwrap().depth, 1);
}

#[test]
fn a_truncated_file_is_refused_unless_it_is_to_be_salvaged() {
    let (mut file, mut disk) = image(b"WithoutFreeSpace", &LAYOUT);
    file.truncate(4 * CLUSTER + 10);
    let image = open(file.clone(), OpenOptions::default()).unwrap();
    let error = image.read_at(&mut [0; CLUSTER * 2], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("end past the file's size of 16394 bytes"), "{error}");
    let image = open(file, OpenOptions { salvage: true, parent: None }).unwrap();
    disk[CLUSTER + 10..2 * CLUSTER].fill(0);
    assert_eq!(contents(&image), disk);
    let extents = [0, CLUSTER as u64 + 10].map(|at| image.extent_at(at).unwrap());
    assert_eq!((extents[0].kind, extents[0].len), (ExtentKind::Data, CLUSTER as u64 + 10));
    assert_eq!((extents[1].kind, extents[1].offset), (ExtentKind::Zero, None));
    assert!(image.warnings()[0].contains("behind the end of the file"));
}

#[test]
fn clusters_inside_the_table_are_corrupt_and_a_set_mark_is_a_warning() {
    let (mut file, _) = image(b"WithoutFreeSpace", &[None, Some(1)]);
    file[44..48].copy_from_slice(&0x746f_6e59_u32.to_le_bytes());
    assert!(Header::read(&MemoryDevice::read_only(file.clone())).unwrap().dirty);
    let mut hostile = image(b"WithouFreSpacExt", &vec![None; 1100]).0;
    hostile.resize(3 * CLUSTER, 0);
    hostile[64] = 1;
    let opened = open(hostile, OpenOptions::default()).unwrap();
    let error = opened.read_at(&mut [0; 1], 0).unwrap_err().to_string();
    assert_eq!(error, "cluster 0 lies at byte 4096, inside the header or the BAT (at offset 0x40)");
    let opened = open(file, OpenOptions::default()).unwrap();
    assert!(opened.warnings()[0].contains("in use"));
}

#[test]
fn an_empty_disk_of_a_tebibyte_is_one_extent() {
    let (mut file, _) = image(b"WithouFreSpacExt", &[None]);
    let entries: u32 = 1 << 20;
    file[28..32].copy_from_slice(&2048_u32.to_le_bytes());
    file[32..36].copy_from_slice(&entries.to_le_bytes());
    file[36..44].copy_from_slice(&(1_u64 << 31).to_le_bytes());
    file.resize(64 + entries as usize * 4, 0);
    let image = open(file, OpenOptions::default()).unwrap();
    let extent = image.extent_at(0).unwrap();
    assert_eq!((extent.kind, extent.len), (ExtentKind::Hole, 1 << 40));
}

#[test]
fn images_by_qemu_have_the_bytes_that_went_in() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (raw, hds) = (folder.path().join("disk.raw"), folder.path().join("disk.hds"));
    let mut disk = vec![0; 5 << 20];
    disk[1000..5000].copy_from_slice(&pattern(4000, 1));
    disk[3_000_000..3_500_000].copy_from_slice(&pattern(500_000, 2));
    std::fs::write(&raw, &disk).unwrap();
    for options in ["cluster_size=1M", "cluster_size=64k"] {
        qemu_img(&["convert", "-O", "parallels", "-f", "raw", "-o", options], &[&raw, &hds]);
        let file = Arc::new(RawFile::open(&hds, Access::ReadOnly).unwrap());
        let image = Image::open_read_only(file, OpenOptions::default()).unwrap();
        assert_eq!(image.warnings(), [""; 0]);
        assert!(image.header().extended);
        verify(&image, &disk);
    }
}

#[test]
fn samples_have_their_content() {
    let all = samples();
    let folder = tempfile::tempdir().unwrap();
    for sample in all.iter().filter(|sample| sample.format.as_deref() == Some("parallels")) {
        let path = sample.unpack(folder.path(), &all);
        let file = Arc::new(MemoryDevice::read_only(std::fs::read(path).unwrap()));
        if sample.expect == "content" {
            let report = check(&file).unwrap();
            assert_eq!(report.corruptions, 0, "{}: {report:?}", sample.path);
        }
        let opened = Image::open_read_only(file, OpenOptions::default());
        if sample.expect == "content" {
            let found = digest(&opened.unwrap()).unwrap();
            assert_eq!(Some(found), sample.content_digest, "{}", sample.path);
        } else if let Ok(image) = opened {
            assert_ne!(sample.expect, "refuse", "{}", sample.path);
            exercise(&image);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damaged_images_do_no_harm(
        bytes in damaged(image(b"WithouFreSpacExt", &LAYOUT).0, vec![Span::new(0, 92)]),
        salvage: bool,
    ) {
        let _ = check(&MemoryDevice::read_only(bytes.clone()));
        if let Ok(image) = open(bytes, OpenOptions { parent: None, salvage }) {
            exercise(&image);
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
    for magic in [b"WithoutFreeSpace", b"WithouFreSpacExt"] {
        let (good, _) = image(magic, &LAYOUT);
        let changed = |at: usize, number: u32| {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
            bytes
        };
        let tail = |len: usize| [good.clone(), vec![0; len]].concat();
        for (bytes, expected) in [
            (good.clone(), (0, 0)),
            (changed(44, 0x746f_6e59), (1, 0)),
            (changed(64 + 4, 0), (0, 1)),
            (tail(3 * CLUSTER), (0, 3)),
            (tail(512), (0, 1)),
        ] {
            let [ours, theirs] = verdicts("parallels", &bytes);
            assert_eq!((ours, theirs), (expected, expected));
        }
        // qemu-img 10 gives up, or ends by an assertion.
        let unit = if magic.ends_with(b"Ext") { 1 } else { 8 };
        for (number, text) in
            [(3, "clusters 0 and 2 are the same"), (500, "cluster 2 is outside image")]
        {
            let bytes = changed(64 + 2 * 4, number * unit);
            let report = check(&MemoryDevice::read_only(bytes)).unwrap();
            assert_eq!((report.corruptions, report.leaks), (1, 0));
            assert!(report.details[0].contains(text), "{report:?}");
        }
    }
}
