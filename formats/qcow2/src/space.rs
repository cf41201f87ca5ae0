// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Giving space back: that of an image that is to hold nothing, and what nobody uses.

use crate::check::{compare::Counts, refcount_table};
use crate::editor::Editor;
use crate::geometry::COPIED;
use crate::refcounts::to_bytes;
use tranship_block::{Result, Span, Storage};

/// Takes everything away that the image in `storage` holds itself: it shows its backing
/// image everywhere, or reads as zero. Snapshots stay. Nobody else may have it open.
///
/// If it is interrupted, some of it may show the backing image already: whoever calls this
/// has made sure that that has the same contents.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Corrupt`] for an image that needs a repair; I/O errors.
pub fn empty(storage: &dyn Storage) -> Result<()> {
    let mut editor = Editor::open(storage)?;
    let l1 = editor.l1()?;
    if l1.iter().all(|entry| *entry & !COPIED == 0) {
        return Ok(());
    }
    let runs = editor.runs(&l1)?;
    let nothing = vec![0; l1.len()];
    storage.write_at(&to_bytes(&nothing), editor.header.l1_table_offset)?;
    storage.flush()?;
    editor.release_all(runs)?;
    editor.trim()?;
    storage.flush()
}

/// Gives back to the host what no cluster of the image in `storage` is in: gaps become
/// holes of the file, and its end is cut off. Nobody else may have it open.
///
/// # Errors
///
/// As [`empty`].
pub fn give_back(storage: &dyn Storage) -> Result<()> {
    let mut editor = Editor::open(storage)?;
    editor.trim()?;
    let geometry = editor.geometry();
    let table = refcount_table(storage, &editor.header)?;
    let mut counts = Counts::new(storage, &table, geometry);
    let end = geometry.clusters_for(storage.size());
    let discard = |first: u64, end: u64| {
        let start = geometry.offset(first);
        let len = geometry.offset(end).saturating_sub(start);
        storage.discard(Span::new(start, len.min(storage.size().saturating_sub(start))))
    };
    let mut gap: Option<u64> = None;
    let per_block = geometry.per_block();
    for number in 0..end.div_ceil(per_block) {
        let first = number.saturating_mul(per_block);
        if counts.is_free(number)? {
            gap.get_or_insert(first);
            continue;
        }
        for cluster in first..first.saturating_add(per_block).min(end) {
            if counts.get(cluster)? == 0 {
                gap.get_or_insert(cluster);
            } else if let Some(start) = gap.take() {
                discard(start, cluster)?;
            }
        }
    }
    if let Some(start) = gap {
        discard(start, end)?;
    }
    storage.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backing, CreateOptions, OpenOptions, Qcow2, check, create, create_snapshot};
    use std::sync::Arc;
    use tranship_block::{BlockDevice, MemoryDevice, Repair};

    const SIZE: u64 = 4 << 20;

    fn contents(image: &Arc<MemoryDevice>, backing: &Arc<MemoryDevice>) -> Vec<u8> {
        let options = OpenOptions {
            backing: Some(Arc::<MemoryDevice>::clone(backing)),
            ..Default::default()
        };
        let disk = Qcow2::open(Arc::<MemoryDevice>::clone(image), options).unwrap();
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        disk.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn an_emptied_image_shows_its_base_and_keeps_its_snapshots() {
        for (version, extended_l2, snapshot) in [
            (2, false, false),
            (3, false, false),
            (3, true, false),
            (3, false, true),
            (2, false, true),
        ] {
            let base = Arc::new(MemoryDevice::new(vec![7; usize::try_from(SIZE).unwrap()]));
            let image = Arc::new(MemoryDevice::new(Vec::new()));
            let mut options = CreateOptions::new(SIZE);
            options.version = version;
            options.extended_l2 = extended_l2;
            options.backing =
                Some(Backing { name: "base".to_owned(), format: Some("raw".to_owned()) });
            create(&*image, &options).unwrap();
            let open = OpenOptions {
                backing: Some(Arc::<MemoryDevice>::clone(&base)),
                ..Default::default()
            };
            let disk = Qcow2::open(Arc::<MemoryDevice>::clone(&image), open).unwrap();
            disk.write_at(&vec![1; 300_000], 70_000).unwrap();
            disk.finish().unwrap();
            if snapshot {
                create_snapshot(&*image, "kept", std::time::UNIX_EPOCH).unwrap();
            }
            let before = image.size();
            empty(&*image).unwrap();
            assert!(contents(&image, &base).iter().all(|byte| *byte == 7));
            let report = check(&*image, Repair::Nothing).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.details);
            if !snapshot {
                assert!(image.size() < before);
            }
            empty(&*image).unwrap();
            give_back(&*image).unwrap();
            let report = check(&*image, Repair::Nothing).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.details);
        }
    }

    #[test]
    fn gaps_become_holes() {
        let image = Arc::new(MemoryDevice::new(Vec::new()));
        create(&*image, &CreateOptions::new(SIZE)).unwrap();
        let disk = Qcow2::open(Arc::<MemoryDevice>::clone(&image), OpenOptions::default()).unwrap();
        disk.write_at(&vec![1; 1 << 20], 0).unwrap();
        disk.write_at(&vec![2; 1 << 16], 3 << 20).unwrap();
        disk.write_zeroes(Span::new(0, 1 << 20), tranship_block::Zeroing::MayUnmap).unwrap();
        disk.finish().unwrap();
        give_back(&*image).unwrap();
        let report = check(&*image, Repair::Nothing).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        let disk = Qcow2::open(image, OpenOptions::default()).unwrap();
        let mut byte = [0];
        disk.read_at(&mut byte, (3 << 20) + 1).unwrap();
        assert_eq!(byte, [2]);
    }
}
