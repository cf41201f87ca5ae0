// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Emptying images and giving space back while the power may go.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and its numbers are small"
)]

use std::sync::Arc;
use std::time::UNIX_EPOCH;
use tranship_block::{BlockDevice, MemoryDevice, Repair, Span, Storage, Zeroing};
use tranship_format_testing::PowerCut;
use tranship_qcow2::{
    Backing, CreateOptions, OpenOptions, Qcow2, check, check_read_only, create, create_snapshot,
    empty, give_back,
};
use tranship_raw::{Access, RawFile};

const SIZE: u64 = 200_000;

fn over(base: &Arc<MemoryDevice>) -> OpenOptions {
    OpenOptions { backing: Some(Arc::<MemoryDevice>::clone(base)), ..OpenOptions::default() }
}

fn contents(image: Arc<dyn BlockDevice>, base: &Arc<MemoryDevice>) -> Vec<u8> {
    let disk = Qcow2::open_read_only_with(image, over(base)).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// An image over `base` with some data, and a snapshot if that is asked for.
fn image(base: &Arc<MemoryDevice>, snapshot: bool) -> Vec<u8> {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let mut options = CreateOptions::new(SIZE);
    options.cluster_bits = 9;
    options.backing = Some(Backing { name: "base".to_owned(), format: Some("raw".to_owned()) });
    create(&*storage, &options).unwrap();
    let disk = Qcow2::open(storage.clone(), over(base)).unwrap();
    disk.write_at(&[1; 5000], 700).unwrap();
    disk.write_at(&[2; 3000], 150_000).unwrap();
    disk.finish().unwrap();
    if snapshot {
        create_snapshot(&*storage, "kept", UNIX_EPOCH).unwrap();
    }
    storage.snapshot()
}

#[test]
fn a_cut_leaves_old_bytes_or_those_of_the_base() {
    let base = Arc::new(MemoryDevice::new(vec![7; SIZE as usize]));
    for snapshot in [false, true] {
        let first = image(&base, snapshot);
        let before = contents(Arc::new(MemoryDevice::new(first.clone())), &base);
        let cut = PowerCut::new(first);
        empty(&cut).unwrap();
        let mut seen = [0_u32; 2];
        cut.replay(&[], 3, |disk, _| {
            let device = Arc::new(MemoryDevice::new(disk));
            let report = check_read_only(&device).unwrap();
            assert_eq!(report.corruptions, 0, "{:?}", report.details);
            let now = contents(device.clone(), &base);
            assert!(now.iter().zip(&before).all(|(now, old)| now == old || *now == 7));
            seen[usize::from(now.iter().all(|byte| *byte == 7))] += 1;
            check(&*device, Repair::All).unwrap();
        });
        assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
    }
}

#[test]
fn a_cut_while_space_is_given_back_changes_nothing() {
    let base = Arc::new(MemoryDevice::new(vec![7; SIZE as usize]));
    let storage = Arc::new(MemoryDevice::new(image(&base, false)));
    let disk = Qcow2::open(storage.clone(), over(&base)).unwrap();
    disk.write_zeroes(Span::new(0, 4096), Zeroing::MayUnmap).unwrap();
    disk.finish().unwrap();
    // Space that nobody knows of.
    storage.set_len(storage.size() + 100_000).unwrap();
    let before = contents(storage.clone(), &base);
    let cut = PowerCut::new(storage.snapshot());
    give_back(&cut).unwrap();
    assert!(cut.size() < storage.size());
    cut.replay(&[], 5, |disk, _| {
        let device = Arc::new(MemoryDevice::new(disk));
        assert_eq!(check_read_only(&device).unwrap().corruptions, 0);
        assert!(contents(device, &base) == before);
    });
}

#[test]
fn the_end_of_a_very_long_file_is_found_at_once() {
    let base = Arc::new(MemoryDevice::new(vec![7; SIZE as usize]));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let bytes = image(&base, false);
    std::fs::write(&path, &bytes).unwrap();
    let file = RawFile::open(&path, Access::ReadWrite).unwrap();
    // 2^33 clusters behind the image, of which no table knows.
    file.set_len(4 << 40).unwrap();
    give_back(&file).unwrap();
    assert!(file.size() <= bytes.len() as u64);
    assert!(check_read_only(&file).unwrap().is_clean());
}
