// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the image keeps its metadata, apart from L2 tables.

use crate::bitmaps::directory::Directory;
use crate::check::refcount_table;
use crate::first_cluster::FirstCluster;
use crate::header::Header;
use crate::metadata::Run;
use crate::shape::crypto_header;
use crate::snapshots;
use tranship_block::{BlockDevice, Result};

/// What clusters hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Header,
    EncryptionHeader,
    ActiveL1,
    SnapshotL1,
    SnapshotTable,
    RefcountTable,
    RefcountBlock,
    BitmapDirectory,
    BitmapTable,
}

/// Neighbouring clusters with metadata.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) what: What,
    pub(crate) run: Run,
}

/// All of them. Pieces outside of the file are left out: nobody can write there.
pub(crate) fn metadata(file: &dyn BlockDevice, header: &Header) -> Result<Vec<Piece>> {
    let geometry = header.geometry();
    let mut pieces = Vec::new();
    let mut add = |what, offset: u64, bytes: u64| {
        let end = offset.saturating_add(bytes).min(file.size());
        if offset < end {
            let first = geometry.index(offset);
            let count = geometry.clusters_for(end).saturating_sub(first);
            pieces.push(Piece { what, run: Run { first, count } });
        }
    };
    add(What::Header, 0, geometry.cluster());
    let first = FirstCluster::read(file, header)?;
    if let Some((offset, len)) = crypto_header(&first).filter(|_| header.crypt_method == 2) {
        add(What::EncryptionHeader, offset, len);
    }
    let l1_bytes = u64::from(header.l1_size).saturating_mul(8);
    add(What::ActiveL1, header.l1_table_offset, l1_bytes);
    let table_bytes = geometry.offset(u64::from(header.refcount_table_clusters));
    add(What::RefcountTable, header.refcount_table_offset, table_bytes);
    for entry in refcount_table(file, header)? {
        if let Ok(offset) = geometry.block_offset(entry)
            && offset != 0
        {
            add(What::RefcountBlock, offset, geometry.cluster());
        }
    }
    let snapshots::Table { places: snapshots, bytes, .. } = snapshots::read(file, header)?;
    add(What::SnapshotTable, header.snapshots_offset, bytes);
    for place in snapshots {
        let bytes = u64::from(place.l1_size).saturating_mul(8);
        add(What::SnapshotL1, place.l1_table_offset, bytes.min(crate::header::LARGEST_L1));
    }
    // A broken directory protects nothing.
    if let Ok(Some(directory)) = Directory::read(file, &first, geometry) {
        add(What::BitmapDirectory, directory.offset, directory.size);
        for entry in directory.entries {
            let bytes = u64::from(entry.table_size).saturating_mul(8);
            add(What::BitmapTable, entry.table_offset, bytes);
        }
    }
    Ok(pieces)
}
