// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making a new image.

use crate::bulk;
use crate::encode::{HEADER_LENGTH, HEADER_LENGTH_2, encode};
use crate::geometry::{Geometry, to_usize};
use crate::header::{
    Backing, COMPRESSION_TYPE, Compression, DATA_FILE, DATA_FILE_RAW, EXTENDED_L2, Header,
    LARGEST_L1, LARGEST_REFCOUNT_TABLE, LAZY_REFCOUNTS,
};
use crate::image::{OpenOptions, Qcow2};
use crate::metadata::Metadata;
use crate::refcounts::Refcounts;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result, Span, Storage, Zeroing};

/// What is allocated before anything is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every cluster has its place, but takes no space.
    Metadata,
    /// Every cluster has its place, and the space for it is reserved.
    Falloc,
    /// Every cluster has its place and is full of zeroes.
    Full,
}

/// The external data file of a new image.
#[derive(Clone, Debug)]
pub struct DataFile {
    /// The name that the header gives for it.
    pub name: String,
    /// What has the payload; it gets the size of the disk.
    pub storage: Arc<dyn Storage>,
    /// It is the guest's disk at all times, byte for byte; implies at least
    /// [`Preallocation::Metadata`].
    pub raw: bool,
}

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes, rounded up to a multiple of 512.
    pub size: u64,
    /// 2 or 3; version 2 has 16-bit reference counts and none of the features.
    pub version: u32,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a reference count in bits, 0 to 6.
    pub refcount_order: u32,
    /// Writers may put reference counts off; a crash then asks for a repair.
    pub lazy_refcounts: bool,
    /// 32 subclusters per cluster, which has to have 16 KiB at least.
    pub extended_l2: bool,
    /// How compressed clusters are to be compressed.
    pub compression: Compression,
    /// The backing file that the header names; its format has to be given.
    pub backing: Option<Backing>,
    /// The external data file that has the payload.
    pub data_file: Option<DataFile>,
    /// What is allocated before anything is written; over a backing file only with
    /// extended L2 entries, since clusters would hide it.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// An image of `size` bytes with clusters of 64 KiB that stands alone.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Deflate,
            backing: None,
            data_file: None,
            preallocation: Preallocation::Off,
        }
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            version: self.version,
            extended: self.extended_l2,
            external: self.data_file.is_some(),
        }
    }

    fn preallocation(&self) -> Preallocation {
        match (&self.data_file, self.preallocation) {
            (Some(DataFile { raw: true, .. }), Preallocation::Off) => Preallocation::Metadata,
            (_, preallocation) => preallocation,
        }
    }

    /// Refuses what no image can have.
    fn check(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::usage(text));
        if !(9..=21).contains(&self.cluster_bits) {
            return refuse(format!("cluster_bits is {}, expected 9 to 21", self.cluster_bits));
        }
        if !(2..=3).contains(&self.version) {
            return refuse(format!("version is {}, expected 2 or 3", self.version));
        }
        if self.refcount_order > 6 {
            return refuse(format!("refcount_order is {}, expected 0 to 6", self.refcount_order));
        }
        let features = [
            (self.refcount_order != 4, "reference counts of other than 16 bits"),
            (self.lazy_refcounts, "lazy reference counts"),
            (self.extended_l2, "extended L2 entries"),
            (self.compression != Compression::Deflate, "zstd"),
            (self.data_file.is_some(), "an external data file"),
        ];
        if let Some((_, what)) = features.iter().find(|(asked, _)| *asked && self.version < 3) {
            return refuse(format!("version 2 has no place for {what}"));
        }
        if self.extended_l2 && self.cluster_bits < 14 {
            return refuse(format!(
                "cluster_bits is {}, expected at least 14 with extended L2 entries",
                self.cluster_bits
            ));
        }
        let Some(backing) = &self.backing else { return Ok(()) };
        if backing.format.is_none() {
            return refuse(format!(
                "backing file {:?} needs a format: guessing it is unsafe",
                backing.name
            ));
        }
        if backing.name.is_empty() {
            return refuse("backing file has an empty name".to_owned());
        }
        if self.data_file.as_ref().is_some_and(|data| data.raw) {
            return refuse("a raw data file cannot have a backing file below it".to_owned());
        }
        if self.preallocation != Preallocation::Off && !self.extended_l2 {
            return refuse(
                "preallocation would hide the backing file without extended L2 entries".to_owned(),
            );
        }
        Ok(())
    }
}

/// Makes an empty image in `storage`, whose contents are lost.
///
/// The header comes last: what is left of a creation that was interrupted is no image.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Usage`] for options that no image can have, and what
/// `storage` reports.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let (_, mut metadata) = start(storage, options)?;
    bulk::finish(&mut metadata, storage)
}

/// Makes an image in `storage`, whose contents are lost, and opens it to be filled.
///
/// Until [`Qcow2::finish`] the file is no image, and whoever is interrupted leaves none:
/// so nothing is flushed and tables are written late and together. Afterwards it is open
/// like any other image. Flushing it before that does nothing, and dropping it drops it.
///
/// If `options` name a backing file, clusters that are not written read as zero here; who
/// opens the image later finds them in the backing file.
///
/// # Errors
///
/// As [`create`].
pub fn create_for_writing(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<Qcow2> {
    create_over(storage, options, None)
}

/// The same, and clusters that are not written read from `backing`.
///
/// # Errors
///
/// As [`create`].
pub fn create_over(
    storage: Arc<dyn Storage>,
    options: &CreateOptions,
    backing: Option<Arc<dyn BlockDevice>>,
) -> Result<Qcow2> {
    let (header, metadata) = start(&*storage, options)?;
    let file: Arc<dyn BlockDevice> = Arc::<dyn Storage>::clone(&storage);
    let open = OpenOptions {
        backing,
        data_file: options.data_file.as_ref().map(|data| Arc::clone(&data.storage)),
        ..OpenOptions::default()
    };
    Qcow2::with_metadata((file, Some(storage)), open, header, metadata, 0)
}

/// Everything but the header, which is ready to be written.
fn start(storage: &dyn Storage, options: &CreateOptions) -> Result<(Header, Metadata)> {
    options.check()?;
    let (header, mut metadata) = lay_out(options)?;
    let geometry = metadata.geometry;
    // File systems take a file that was cut to nothing for one that is being replaced, and
    // write it out when it is closed: a new file is better not cut.
    if storage.size() > 0 {
        storage.set_len(0)?;
    }
    let end = geometry.offset(metadata.refcounts.end);
    storage.set_len(end)?;
    // A block device keeps what it had. Nothing that looks like an image may be left.
    storage.write_zeroes(Span::new(0, end), Zeroing::MayUnmap)?;
    if let Some(data) = &options.data_file
        && data.storage.size() != header.size
    {
        data.storage.set_len(header.size)?;
    }
    let preallocation = options.preallocation();
    if preallocation == Preallocation::Off {
        return Ok((header, metadata));
    }
    bulk::map_all(&mut metadata, storage, header.size)?;
    if preallocation != Preallocation::Metadata {
        let fill = preallocation == Preallocation::Full;
        let (payload, start, end) = match &options.data_file {
            Some(data) => (&*data.storage, 0, header.size),
            None => (storage, end, geometry.offset(metadata.refcounts.end)),
        };
        bulk::reserve(payload, Span::new(start, end.saturating_sub(start)), fill)?;
    }
    Ok((header, metadata))
}

/// Where everything is: header, refcount table, L1 table; then the blocks that count it.
fn lay_out(options: &CreateOptions) -> Result<(Header, Metadata)> {
    let geometry = options.geometry();
    let cluster = geometry.cluster();
    let size = options
        .size
        .checked_next_multiple_of(512)
        .ok_or_else(|| Error::usage(format!("a size of {} bytes is too large", options.size)))?;
    // A disk without bytes has a table as well: its cluster would belong to nothing.
    let l1_entries = geometry.l1_entries(size).max(1);
    if l1_entries.saturating_mul(8) > LARGEST_L1 {
        return Err(Error::usage(format!(
            "a size of {size} bytes is too large for clusters of {cluster} bytes"
        )));
    }
    let table_clusters = refcount_table_clusters(geometry, size);
    let l1_clusters = geometry.clusters_for(l1_entries.saturating_mul(8)).max(1);
    let tables = table_clusters.saturating_add(l1_clusters).saturating_add(1);
    let per_block = geometry.per_block();
    let mut blocks = 1_u64;
    while tables.saturating_add(blocks) > blocks.saturating_mul(per_block) {
        blocks = blocks.saturating_add(1);
    }
    let used = tables.saturating_add(blocks);
    let header = header(
        options,
        size,
        (l1_entries, geometry.offset(table_clusters.saturating_add(1))),
        (cluster, table_clusters),
    );
    let bytes = encode(&header)?;

    let table = vec![0; to_usize(geometry.offset(table_clusters) / 8)?];
    let mut refcounts = Refcounts::new(geometry, cluster, table);
    for block in 0..blocks {
        let from = block.saturating_mul(per_block);
        let until = from.saturating_add(per_block).min(used);
        refcounts.insert_block(to_usize(block)?, tables.saturating_add(block), from..until)?;
    }
    refcounts.metadata.extend(0..used);
    let mut metadata = Metadata::new(geometry, vec![0; to_usize(l1_entries)?], refcounts);
    metadata.l1_offset = header.l1_table_offset;
    metadata.prepared = true;
    metadata.bulk = Some(bytes);
    Ok((header, metadata))
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
    size: u64,
    (l1_entries, l1_table_offset): (u64, u64),
    (refcount_table_offset, table_clusters): (u64, u64),
) -> Header {
    let is_raw = options.data_file.as_ref().is_some_and(|data| data.raw);
    let bits = |features: &[(bool, u64)]| {
        features.iter().filter(|(set, _)| *set).fold(0, |bits, (_, bit)| bits | bit)
    };
    Header {
        version: options.version,
        cluster_bits: options.cluster_bits,
        size,
        backing: options.backing.clone(),
        crypt_method: 0,
        l1_size: u32::try_from(l1_entries).unwrap_or(u32::MAX),
        l1_table_offset,
        refcount_table_offset,
        refcount_table_clusters: u32::try_from(table_clusters).unwrap_or(u32::MAX),
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible_features: bits(&[
            (options.data_file.is_some(), DATA_FILE),
            (options.compression == Compression::Zstd, COMPRESSION_TYPE),
            (options.extended_l2, EXTENDED_L2),
        ]),
        compatible_features: bits(&[(options.lazy_refcounts, LAZY_REFCOUNTS)]),
        autoclear_features: bits(&[(is_raw, DATA_FILE_RAW)]),
        refcount_order: options.refcount_order,
        header_length: if options.version >= 3 { HEADER_LENGTH } else { HEADER_LENGTH_2 },
        compression: options.compression,
        data_file: options.data_file.as_ref().map(|data| data.name.clone()),
        luks: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_2_has_none_of_the_features() {
        let old = CreateOptions { version: 2, ..CreateOptions::new(1 << 20) };
        old.check().unwrap();
        for options in [
            CreateOptions { refcount_order: 3, ..old.clone() },
            CreateOptions { lazy_refcounts: true, ..old.clone() },
            CreateOptions { extended_l2: true, ..old.clone() },
            CreateOptions { compression: Compression::Zstd, ..old.clone() },
        ] {
            let error = options.check().unwrap_err();
            assert!(error.message().starts_with("version 2 has no place for"), "{error}");
        }
    }
}
