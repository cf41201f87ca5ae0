// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The size of a QCOW2 image that is yet to be made.

use super::Measured;
use crate::failure::Failure;
use crate::image::create::{qcow2_preallocation, qcow2_shape};
use crate::image::options::Options;
use crate::image::source::Source;
use tranship_block::{BlockDevice, ExtentKind};
use tranship_qcow2::Preallocation;

/// Entries of an L1 table take more than this in no image.
const LARGEST_L1: u64 = 32 << 20;

/// What an image of `source`, or of an empty disk of `size` bytes, takes.
pub(super) fn measure(
    source: Option<&Source>,
    size: u64,
    options: &Options,
) -> Result<Measured, Failure> {
    let shape = qcow2_shape(options)?;
    let preallocation = qcow2_preallocation(options)?;
    let cluster = 1_u64 << shape.cluster_bits;
    let device = source.map(|source| &*source.opened.device);
    let size = device.map_or(size, BlockDevice::size).next_multiple_of(512);
    let entry = if shape.extended_l2 { 16 } else { 8 };
    let whole = size.checked_next_multiple_of(cluster).unwrap_or(u64::MAX / cluster * cluster);
    if (whole / cluster).div_ceil(cluster / entry).saturating_mul(8) > LARGEST_L1 {
        return Err(Failure::usage(
            "The image size is too large (try using a larger cluster size)",
        ));
    }
    let reserves = matches!(preallocation, Preallocation::Falloc | Preallocation::Full);
    let data = match device {
        _ if reserves || options.text("backing_file").is_some() => whole,
        Some(device) => used(device, cluster)?,
        None => 0,
    };
    let metadata = metadata(whole, cluster, entry, shape.refcount_order);
    Ok(Measured { required: metadata + data, fully_allocated: metadata + whole, bitmaps: None })
}

/// Bytes of the clusters that hold data.
fn used(device: &dyn BlockDevice, cluster: u64) -> Result<u64, Failure> {
    let (mut at, mut used) = (0_u64, 0_u64);
    while at < device.size() {
        let extent = device.extent_at(at)?;
        let mut end = at.saturating_add(extent.len.max(1));
        if extent.kind == ExtentKind::Data {
            // What follows in the same cluster needs no more.
            end = end.next_multiple_of(cluster);
            used += at % cluster + (end - at);
        }
        at = end;
    }
    Ok(used)
}

/// Bytes of everything but data in an image of which every cluster is used.
fn metadata(whole: u64, cluster: u64, entry: u64, refcount_order: u32) -> u64 {
    let header = cluster;
    let l2 = (whole / cluster).next_multiple_of(cluster / entry) * entry;
    let l1 = (l2 / cluster).next_multiple_of(cluster / 8) * 8;
    let tables = header + l2 + l1;
    let counted = (tables + whole) / cluster;
    let per_block = cluster * 8 >> refcount_order;
    // Reference counts are counted themselves.
    let (mut blocks, mut table) = (0, 0);
    loop {
        let more_blocks = u64::div_ceil(counted + table + blocks, per_block);
        let more_table = u64::div_ceil(more_blocks, cluster / 8);
        if (more_blocks, more_table) == (blocks, table) {
            return tables + (blocks + table) * cluster;
        }
        (blocks, table) = (more_blocks, more_table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_what_qemu_img_calculates() {
        for (size, cluster, entry, expected) in [
            (1 << 30, 65_536, 8, 393_216),
            (1 << 30, 4096, 8, 2_637_824),
            (10 << 40, 65_536, 16, 3_020_488_704),
            (65_536, 65_536, 8, 327_680),
        ] {
            assert_eq!(metadata(size, cluster, entry, 4), expected, "{size} {cluster}");
        }
    }
}
