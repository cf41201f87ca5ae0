// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whatever is in the file: no panic, no flood, and a repair that says what it has done.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::UNIX_EPOCH;
use support::{open, options};
use tranship_block::{BlockDevice, MemoryDevice, Repair, Span, Storage, Zeroing};
use tranship_format_testing::{damaged, exercise, has_tool, pattern, qemu_img_status};
use tranship_qcow2::{
    Amendments, BitmapContent, OpenOptions, Qcow2, ResizeOptions, add_bitmap, amend,
    apply_snapshot, bitmaps, check, check_read_only, create, create_snapshot, delete_snapshot,
    remove_bitmap, repair_leaks, resize, snapshots,
};

/// Data, zero clusters, a snapshot and two bitmaps; where its metadata lies.
fn image(cluster_bits: u32) -> (Vec<u8>, Vec<Span>) {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &options(200_192, cluster_bits)).unwrap();
    let dynamic: Arc<dyn Storage> = storage.clone();
    let write = |seed: u64| {
        let image = open(&dynamic, None);
        image.write_at(&pattern(60_000, seed), seed * 7000).unwrap();
        image.write_zeroes(Span::new(20_000, 9000), Zeroing::KeepAllocated).unwrap();
        image.finish().unwrap();
    };
    write(1);
    create_snapshot(&*storage, "one", UNIX_EPOCH).unwrap();
    add_bitmap(&*storage, "a", Some(512)).unwrap();
    add_bitmap(&*storage, "b", None).unwrap();
    write(2);
    let bytes = storage.snapshot();
    let cluster = 1_usize << cluster_bits;
    let mut metadata = vec![Span::new(0, 200), Span::new(20, 60), Span::new(100, 60)];
    // Clusters that begin with something like a table: few of their bytes are set.
    for (number, bytes) in bytes.chunks(cluster).enumerate() {
        if bytes.chunks(8).filter(|word| word[0] == 0).count() > bytes.len() / 24 {
            metadata.push(Span::new((number * cluster) as u64, bytes.len().min(512) as u64));
        }
    }
    (bytes, metadata)
}

static SMALL: LazyLock<(Vec<u8>, Vec<Span>)> = LazyLock::new(|| image(9));
static MEDIUM: LazyLock<(Vec<u8>, Vec<Span>)> = LazyLock::new(|| image(12));

fn broken() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        damaged(SMALL.0.clone(), SMALL.1.clone()),
        damaged(MEDIUM.0.clone(), MEDIUM.1.clone()),
    ]
}

fn copy(image: &[u8]) -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(image.to_vec()))
}

fn read_everything(storage: &Arc<MemoryDevice>) {
    if let Ok(image) = Qcow2::open_read_only(storage.clone(), None) {
        exercise(&image);
    }
    for snapshot in snapshots(storage).unwrap_or_default() {
        if let Ok(image) =
            Qcow2::open_snapshot(storage.clone(), &snapshot.id, OpenOptions::default())
        {
            exercise(&image);
        }
    }
    for bitmap in bitmaps(storage).unwrap_or_default() {
        if let Ok(content) = BitmapContent::read(storage, &bitmap.name) {
            content.dirty_bytes();
        }
    }
}

/// What is there after a repair is as good as the report says.
fn repair(image: &[u8], level: Repair) -> Option<Arc<MemoryDevice>> {
    let storage = copy(image);
    let before = check_read_only(&storage);
    let report = check(&*storage, level).ok()?;
    let before = before.unwrap();
    if before.is_clean() && level == Repair::Leaks {
        assert!(storage.snapshot() == image);
    }
    // A count that falls to 1 leaves its COPIED flag behind, which harms nothing.
    let flags = report.details.iter().filter(|line| line.contains("OFLAG_COPIED")).count() as u64;
    assert!(
        report.corruptions <= before.corruptions + flags || level == Repair::All,
        "{:#?}\nbefore: {:#?}",
        report.details,
        before.details
    );
    let again = check_read_only(&storage).unwrap();
    assert_eq!((again.corruptions, again.leaks), (report.corruptions, report.leaks));
    report.is_clean().then_some(storage)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_images_are_read_and_repaired_without_harm(image in broken()) {
        read_everything(&copy(&image));
        for level in [Repair::Leaks, Repair::All] {
            if let Some(storage) = repair(&image, level) {
                read_everything(&storage);
            }
        }
        let storage = copy(&image);
        let before = storage.snapshot();
        if repair_leaks(&*storage).is_err() {
            prop_assert!(storage.snapshot() == before);
        }
    }

    #[test]
    fn damaged_images_are_changed_or_refused(image in broken(), what in 0..8) {
        let storage = copy(&image);
        let dynamic: Arc<dyn Storage> = storage.clone();
        let is_sound = check_read_only(&storage).is_ok_and(|report| report.corruptions == 0);
        let width = Amendments { refcount_bits: Some(64), ..Amendments::default() };
        let version = Amendments { version: Some(2), ..Amendments::default() };
        let grown = ResizeOptions { allow_shrink: true, ..ResizeOptions::default() };
        let result = match what {
            0 => create_snapshot(&*storage, "two", UNIX_EPOCH).map(drop),
            1 => apply_snapshot(&*storage, "one"),
            2 => delete_snapshot(&*storage, "one"),
            3 => add_bitmap(&*storage, "c", None),
            4 => remove_bitmap(&*storage, "a"),
            5 => resize(&dynamic, 90_000, &grown),
            6 => amend(&*storage, &width),
            _ => delete_snapshot(&*storage, "one").and_then(|()| {
                remove_bitmap(&*storage, "a")?;
                remove_bitmap(&*storage, "b")?;
                amend(&*storage, &version)
            }),
        };
        if result.is_ok() && is_sound {
            let report = check_read_only(&storage).unwrap();
            prop_assert_eq!(report.corruptions, 0, "{:?}", report.details);
        }
        read_everything(&storage);
    }

    #[test]
    fn damaged_images_are_written_or_refused(image in broken()) {
        let storage = copy(&image);
        let Ok(image) = Qcow2::open(storage.clone(), OpenOptions::default()) else {
            return Ok(());
        };
        let _ = image.write_at(&pattern(9000, 5), 15_000.min(image.size().saturating_sub(9000)));
        let _ = image.discard(Span::new(0, image.size().min(30_000)));
        let _ = image.finish();
        let _ = check_read_only(&storage);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_clean_here_is_clean_for_qemu(image in broken()) {
        if !has_tool("qemu-img") {
            return Ok(());
        }
        let Some(storage) = repair(&image, Repair::All) else { return Ok(()) };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, storage.snapshot()).unwrap();
        let output = qemu_img_status(&["check", "-f", "qcow2"], &[Path::new(&path)]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        // A few images it refuses to open, for reasons that are no contradictions to us.
        prop_assert!(output.status.code() == Some(0) || text.contains("Could not open"), "{text}");
    }
}
