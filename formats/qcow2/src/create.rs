// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making a new, empty image.

use crate::extensions::BACKING_FORMAT;
use crate::geometry::{Geometry, to_u64};
use crate::header::{Backing, LARGEST_L1, LARGEST_REFCOUNT_TABLE, MAGIC};
use crate::refcounts::to_bytes;
use tranship_block::{Error, Result, Span, Storage, Zeroing};

const HEADER_LENGTH: u32 = 112;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes, rounded up to a multiple of 512.
    pub size: u64,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// The backing file that the header names; its format has to be given.
    pub backing: Option<Backing>,
}

impl CreateOptions {
    /// An image of `size` bytes with clusters of 64 KiB that stands alone.
    pub fn new(size: u64) -> Self {
        Self { size, cluster_bits: 16, backing: None }
    }
}

/// Makes an empty version 3 image in `storage`, whose contents are lost.
///
/// The header comes last: what is left of a creation that was interrupted is no image.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Usage`] for options that no image can have, and what
/// `storage` reports.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    if !(9..=21).contains(&options.cluster_bits) {
        return Err(Error::usage(format!(
            "cluster_bits is {}, expected 9 to 21",
            options.cluster_bits
        )));
    }
    let geometry = Geometry { cluster_bits: options.cluster_bits, refcount_order: 4, version: 3 };
    let cluster = geometry.cluster();
    let size = options
        .size
        .checked_next_multiple_of(512)
        .ok_or_else(|| Error::usage(format!("a size of {} bytes is too large", options.size)))?;
    let l1_entries = geometry.l1_entries(size);
    if l1_entries.saturating_mul(8) > LARGEST_L1 {
        return Err(Error::usage(format!(
            "a size of {size} bytes is too large for clusters of {cluster} bytes"
        )));
    }

    let table_clusters = refcount_table_clusters(geometry, size);
    let l1_clusters = geometry.clusters_for(l1_entries.saturating_mul(8)).max(1);
    // Header, refcount table, L1 table; then the blocks that count all of it.
    let tables = table_clusters.saturating_add(l1_clusters).saturating_add(1);
    let per_block = geometry.per_block();
    let mut blocks = 1_u64;
    while tables.saturating_add(blocks) > blocks.saturating_mul(per_block) {
        blocks = blocks.saturating_add(1);
    }
    let used = tables.saturating_add(blocks);
    let table_offset = cluster;
    let l1_offset = geometry.offset(table_clusters.saturating_add(1));
    let header =
        header(options, geometry, (size, l1_entries, l1_offset), (table_offset, table_clusters))?;

    storage.set_len(0)?;
    let end = geometry.offset(used);
    storage.set_len(end)?;
    // A block device keeps what it had. Nothing that looks like an image may be left.
    storage.write_zeroes(Span::new(0, end), Zeroing::MayUnmap)?;
    let table: Vec<u64> =
        (0..blocks).map(|block| geometry.offset(tables.saturating_add(block))).collect();
    storage.write_at(&to_bytes(&table), table_offset)?;
    for (block, offset) in (0_u64..).zip(&table) {
        let counted = used.saturating_sub(block.saturating_mul(per_block)).min(per_block);
        let counts: Vec<u8> = (0..counted).flat_map(|_| 1_u16.to_be_bytes()).collect();
        storage.write_at(&counts, *offset)?;
    }
    storage.flush()?;
    storage.write_at(&header, 0)?;
    storage.flush()
}

/// Enough for an image of which every cluster is used, so that the table never moves.
fn refcount_table_clusters(geometry: Geometry, size: u64) -> u64 {
    let data = geometry.clusters_for(size);
    let l2 = geometry.l1_entries(size);
    let l1 = geometry.clusters_for(l2.saturating_mul(8));
    let counted = data.saturating_add(l2).saturating_add(l1).saturating_add(1);
    // Blocks and table count themselves: one more block in per_block, and some for the table.
    let blocks = counted.div_ceil(geometry.per_block().saturating_sub(1)).saturating_add(1);
    let table = geometry.clusters_for(blocks.saturating_mul(8)).saturating_add(1);
    let blocks = blocks.saturating_add(table.div_ceil(geometry.per_block()));
    geometry.clusters_for(blocks.saturating_mul(8)).min(geometry.index(LARGEST_REFCOUNT_TABLE))
}

fn header(
    options: &CreateOptions,
    geometry: Geometry,
    (size, l1_entries, l1_offset): (u64, u64, u64),
    (table_offset, table_clusters): (u64, u64),
) -> Result<Vec<u8>> {
    let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
    let mut names = Vec::new();
    if let Some(format) = options.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
        names.extend(BACKING_FORMAT.to_be_bytes());
        names.extend(narrow(to_u64(format.len())));
        names.extend(format.as_bytes());
        names.resize(names.len().next_multiple_of(8), 0);
    }
    // The end of the extensions.
    names.extend([0; 8]);
    let name = options.backing.as_ref().map(|backing| backing.name.as_bytes()).unwrap_or_default();
    let name_offset = u64::from(HEADER_LENGTH).saturating_add(to_u64(names.len()));
    names.extend(name);
    let end = u64::from(HEADER_LENGTH).saturating_add(to_u64(names.len()));
    if let Some(backing) = &options.backing {
        if backing.format.is_none() {
            return Err(Error::usage(format!(
                "backing file {:?} needs a format: guessing it is unsafe",
                backing.name
            )));
        }
        if name.is_empty() || name.len() > 1023 || end > geometry.cluster() {
            return Err(Error::usage(format!(
                "name of the backing file has {} bytes and does not fit into the header",
                name.len()
            )));
        }
    }
    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(geometry.version.to_be_bytes());
    header.extend(if name.is_empty() { 0 } else { name_offset }.to_be_bytes());
    header.extend(narrow(to_u64(name.len())));
    header.extend(geometry.cluster_bits.to_be_bytes());
    header.extend(size.to_be_bytes());
    // crypt_method
    header.extend([0; 4]);
    header.extend(narrow(l1_entries));
    header.extend(l1_offset.to_be_bytes());
    header.extend(table_offset.to_be_bytes());
    header.extend(narrow(table_clusters));
    // nb_snapshots, snapshots_offset, three sets of feature bits
    header.extend([0; 36]);
    header.extend(geometry.refcount_order.to_be_bytes());
    header.extend(HEADER_LENGTH.to_be_bytes());
    // compression_type and padding
    header.extend([0; 8]);
    header.extend(names);
    Ok(header)
}
