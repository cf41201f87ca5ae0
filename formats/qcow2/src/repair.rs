// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Giving back the clusters that an interrupted writer had taken and never used.

use crate::check::examine;
use crate::geometry::to_usize;
use crate::header::Header;
use crate::refcounts::{read_table, set_count};
use tranship_block::{Error, Result, Storage};

/// Bit 0 of the autoclear features: the image has persistent bitmaps.
const BITMAPS: u64 = 1;

/// Frees the clusters of the image in `storage` that nothing references; returns how many.
///
/// A writer that is killed leaves such leaks behind: clusters are counted before anything
/// refers to them. Nothing else may have the image open.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Corrupt`] if the image has more than leaks: then nothing is
/// changed. [`tranship_block::ErrorKind::Unsupported`] if it has bitmaps, whose clusters
/// only look like leaks. I/O errors.
pub fn repair_leaks(storage: &dyn Storage) -> Result<u64> {
    let header = Header::read(&storage)?;
    if header.autoclear_features & BITMAPS != 0 {
        return Err(Error::unsupported("leaks of an image with persistent bitmaps"));
    }
    let (report, unreferenced) = examine(&storage, &header)?;
    if let Some(detail) = report.details.first() {
        return Err(Error::corrupt(format!(
            "the image has {} corruptions, the first one: {detail}",
            report.corruptions
        )));
    }
    let geometry = header.geometry();
    let bytes = geometry.offset(u64::from(header.refcount_table_clusters));
    let table = read_table(&storage, header.refcount_table_offset, bytes / 8)?;
    let per_block = geometry.per_block();
    let mut block = vec![0; to_usize(geometry.cluster())?];
    for leaks in unreferenced.chunk_by(|a, b| a.checked_div(per_block) == b.checked_div(per_block))
    {
        let number = leaks.first().and_then(|cluster| cluster.checked_div(per_block));
        let entry = table.get(to_usize(number.unwrap_or(0))?).copied().unwrap_or(0);
        let offset = geometry.block_offset(entry)?;
        storage.read_at(&mut block, offset)?;
        for cluster in leaks {
            let index = cluster.checked_rem(per_block).unwrap_or(0);
            set_count(&mut block, index, geometry.refcount_order, 0);
        }
        storage.write_at(&block, offset)?;
    }
    storage.flush()?;
    Ok(unreferenced.len().try_into().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CreateOptions, OpenOptions, Qcow2, check, create};
    use std::sync::Arc;
    use tranship_block::{BlockDevice, ErrorKind, MemoryDevice};

    /// An image with data in its first clusters, and where the first refcount block lies.
    fn image() -> (Arc<MemoryDevice>, u64) {
        let storage = Arc::new(MemoryDevice::new(Vec::new()));
        create(&*storage, &CreateOptions::new(8 << 20)).unwrap();
        let options = OpenOptions::default();
        let disk = Qcow2::open(storage.clone(), options).unwrap();
        disk.write_at(&vec![7; 300_000], 1000).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let header = Header::read(&*storage).unwrap();
        let table = read_table(&*storage, header.refcount_table_offset, 1).unwrap();
        (storage, header.geometry().block_offset(table[0]).unwrap())
    }

    #[test]
    fn leaked_clusters_are_free_again_and_data_stays() {
        let (storage, block) = image();
        assert_eq!(repair_leaks(&*storage).unwrap(), 0);
        for cluster in [100, 101, 200] {
            storage.write_at(&1_u16.to_be_bytes(), block + cluster * 2).unwrap();
        }
        assert_eq!(check(&*storage).unwrap().leaks, 3);
        assert_eq!(repair_leaks(&*storage).unwrap(), 3);
        let report = check(&*storage).unwrap();
        assert_eq!((report.leaks, report.corruptions), (0, 0));
        let disk = Qcow2::open_read_only(storage, None).unwrap();
        let mut found = vec![0; 300_000];
        disk.read_at(&mut found, 1000).unwrap();
        assert!(found.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_corrupt_image_is_left_alone() {
        let (storage, block) = image();
        // The header's own cluster is no longer counted.
        storage.write_at(&0_u16.to_be_bytes(), block).unwrap();
        storage.write_at(&1_u16.to_be_bytes(), block + 200).unwrap();
        let before = storage.snapshot();
        assert_eq!(repair_leaks(&*storage).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(storage.snapshot(), before);
    }
}
