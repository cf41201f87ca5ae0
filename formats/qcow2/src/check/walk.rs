// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Following every reference in the image.

use super::references::References;
use crate::bitmaps::directory::{Directory, ENTRY_OFFSET};
use crate::first_cluster::FirstCluster;
use crate::geometry::to_u64;
use crate::header::Header;
use crate::shape::{Reference, Shape, crypto_header, each_entry, read_sparse};
use crate::snapshots::{self, Place, Table};
use std::collections::{BTreeMap, BTreeSet};
use tranship_block::{BlockDevice, CheckReport, Result};

/// Bytes of bitmap tables that are looked at.
const MOST_BITMAP_TABLES: u64 = 1 << 30;

/// How often a table is referenced.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    all: u64,
    /// Of these, from the active L1 table.
    active: u64,
    /// Guest cluster that its first entry maps.
    first: u64,
}

/// What following the references has found so far.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    pub(super) file: &'a dyn BlockDevice,
    pub(super) shape: Shape,
    pub(super) references: References,
    pub(super) report: CheckReport,
    /// Something could not be followed: clusters may be in use that were not counted.
    pub(super) is_incomplete: bool,
    /// The refcount table's blocks are where they can be written.
    pub(super) blocks_are_sound: bool,
}

impl<'a> Walk<'a> {
    pub(super) fn new(file: &'a dyn BlockDevice, header: &Header) -> Self {
        let shape = Shape::new(header);
        Self {
            file,
            shape,
            references: References::default(),
            report: CheckReport {
                total_clusters: shape.geometry.clusters_for(header.size),
                ..CheckReport::default()
            },
            is_incomplete: false,
            blocks_are_sound: true,
        }
    }

    /// A reference that cannot be followed.
    fn lost(&mut self, detail: impl FnOnce() -> String) {
        self.is_incomplete = true;
        self.report.corruption(|| format!("ERROR {}", detail()));
    }

    /// Counts `times` references to each cluster of a range; `false` if it is not in the file.
    fn count(&mut self, what: &str, offset: u64, bytes: u64, times: u64) -> Result<bool> {
        let geometry = self.shape.geometry;
        let first = geometry.index(offset);
        let end = geometry.clusters_for(offset.saturating_add(bytes));
        let file_end = geometry.clusters_for(self.file.size());
        if end > file_end {
            let size = self.file.size();
            self.lost(|| format!("{what} at {offset:#x} ends past the file's {size} bytes"));
            return Ok(false);
        }
        for cluster in first..end {
            self.references.add(cluster, times)?;
        }
        Ok(true)
    }

    /// Counts everything but the structures that hold the counts.
    pub(super) fn contents(&mut self, header: &Header) -> Result<()> {
        self.count("header", 0, 1, 1)?;
        let first = FirstCluster::read(self.file, header)?;
        if header.crypt_method == 2
            && let Some((offset, len)) = crypto_header(&first)
        {
            self.count("encryption header", offset, len, 1)?;
        }
        self.bitmaps(&first)?;
        let entries = u64::from(header.l1_size);
        self.count("L1 table", header.l1_table_offset, entries.saturating_mul(8), 1)?;
        let mut l2 = BTreeMap::new();
        let active = Place { l1_table_offset: header.l1_table_offset, l1_size: header.l1_size };
        self.l1(active, true, &mut l2);
        self.snapshots(header, &mut l2)?;
        for (offset, times) in l2 {
            self.l2(offset, times)?;
        }
        Ok(())
    }

    /// Counts the table of snapshots and their L1 tables. Where L1 tables overlap, which
    /// they never do rightly, only the first is followed: many could share one huge table.
    fn snapshots(&mut self, header: &Header, l2: &mut BTreeMap<u64, Times>) -> Result<()> {
        let Table { mut places, bytes, incomplete } = snapshots::read(self.file, header)?;
        if incomplete > 0 && header.version > 2 {
            self.lost(|| {
                format!(
                    "{incomplete} of {} entries of the snapshot table do not tell the sizes of \
                     state and disk, as version 3 demands",
                    places.len()
                )
            });
        }
        if bytes > 0 {
            self.count("snapshot table", header.snapshots_offset, bytes, 1)?;
        }
        places.sort_unstable_by_key(|place| place.l1_table_offset);
        let mut free_from = 0;
        for place in places {
            let bytes = u64::from(place.l1_size).saturating_mul(8);
            let offset = place.l1_table_offset;
            if bytes > crate::header::LARGEST_L1
                || self.shape.geometry.within(offset) != 0
                || (bytes > 0 && offset < free_from)
            {
                self.lost(|| {
                    format!(
                        "a snapshot's L1 table of {} entries at {offset:#x} is unaligned, too \
                         large or overlaps with another one",
                        place.l1_size
                    )
                });
                continue;
            }
            free_from = free_from.max(offset.saturating_add(bytes));
            if self.count("L1 table of a snapshot", offset, bytes, 1)? {
                self.l1(place, false, l2);
            }
        }
        Ok(())
    }

    /// Counts how often each L2 table is referenced: a table that many entries share is
    /// read once, so that a small image cannot keep the check busy for days.
    fn l1(&mut self, place: Place, is_active: bool, l2: &mut BTreeMap<u64, Times>) {
        let geometry = self.shape.geometry;
        let entries = match read_sparse(self.file, place.l1_table_offset, place.l1_size.into()) {
            Ok(entries) => entries,
            Err(error) => {
                self.lost(|| format!("L1 table cannot be read: {error}"));
                return;
            }
        };
        for (index, entry) in entries.iter().enumerate() {
            let first = to_u64(index).saturating_mul(self.shape.entries());
            match geometry.l2_offset(*entry, geometry.offset(first)) {
                Ok(None) => {}
                Ok(Some(host)) => {
                    let times =
                        l2.entry(host.offset).or_insert(Times { first, ..Times::default() });
                    times.all = times.all.saturating_add(1);
                    times.active = times.active.saturating_add(u64::from(is_active));
                }
                Err(error) => self.lost(|| error.to_string()),
            }
        }
    }

    fn l2(&mut self, offset: u64, times: Times) -> Result<()> {
        let geometry = self.shape.geometry;
        let cluster = geometry.cluster();
        if !self.count("L2 table", offset, cluster, times.all)? {
            return Ok(());
        }
        let table = match read_sparse(self.file, offset, cluster / 8) {
            Ok(table) => table,
            Err(error) => {
                self.lost(|| format!("L2 table at {offset:#x} cannot be read: {error}"));
                return Ok(());
            }
        };
        let size = self.file.size();
        let mut next = 0;
        for (number, words) in (times.first..).zip(table.chunks(self.shape.words())) {
            let reference = match self.shape.reference(words, geometry.offset(number)) {
                Ok(reference) => reference,
                Err(error) => {
                    self.lost(|| format!("L2 table at {offset:#x}: {error}"));
                    continue;
                }
            };
            let is_fragmented = match reference {
                Reference::None => continue,
                Reference::Cluster { offset, .. } => {
                    let follows = next == 0 || next == offset;
                    next = offset.saturating_add(cluster);
                    !follows
                }
                // Each shares its sectors with neighbours.
                Reference::Compressed { .. } => true,
            };
            let is_compressed = matches!(reference, Reference::Compressed { .. });
            let report = &mut self.report;
            let add = |sum: &mut u64, is: bool| {
                *sum = sum.saturating_add(if is { times.active } else { 0 });
            };
            add(&mut report.allocated_clusters, true);
            add(&mut report.fragmented_clusters, is_fragmented);
            add(&mut report.compressed_clusters, is_compressed);
            if let Some((first, count)) = self.shape.touched(reference, size) {
                let bytes = geometry.offset(count);
                self.count("cluster of the guest", geometry.offset(first), bytes, times.all)?;
            }
        }
        Ok(())
    }

    fn bitmaps(&mut self, first: &FirstCluster) -> Result<()> {
        let geometry = self.shape.geometry;
        let directory = match Directory::read(self.file, first, geometry) {
            Ok(None) => return Ok(()),
            Ok(Some(directory)) => directory,
            Err(error) => {
                self.lost(|| error.to_string());
                return Ok(());
            }
        };
        self.count("bitmap directory", directory.offset, directory.size, 1)?;
        let mut left = MOST_BITMAP_TABLES;
        for entry in directory.entries {
            let bytes = u64::from(entry.table_size).saturating_mul(8);
            if bytes > left {
                self.lost(|| format!("tables of bitmaps exceed {MOST_BITMAP_TABLES} bytes"));
                return Ok(());
            }
            left = left.saturating_sub(bytes);
            let is_whole = entry.table_offset.saturating_add(bytes) <= self.file.size();
            if !self.count("bitmap table", entry.table_offset, bytes, 1)? || bytes == 0 {
                continue;
            }
            if !is_whole {
                self.lost(|| format!("table of bitmap {:?} ends past the file", entry.name));
                continue;
            }
            let (file, entries) = (self.file, u64::from(entry.table_size));
            each_entry(file, entry.table_offset, entries, |word| {
                let offset = word & ENTRY_OFFSET;
                let is_flag = offset == 0 && word <= 1;
                if !is_flag && (word != offset || geometry.within(offset) != 0) {
                    self.lost(|| format!("bitmap table entry {word:#x} has reserved bits"));
                } else if offset != 0 {
                    self.count("cluster of a bitmap", offset, geometry.cluster(), 1)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Counts the refcount table and its blocks.
    pub(super) fn counts(&mut self, header: &Header, table: &[u64]) -> Result<()> {
        let geometry = self.shape.geometry;
        let bytes = geometry.offset(u64::from(header.refcount_table_clusters));
        self.count("refcount table", header.refcount_table_offset, bytes, 1)?;
        let before = self.is_incomplete;
        let mut blocks = BTreeSet::new();
        for (number, entry) in table.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            match geometry.block_offset(*entry) {
                Err(_) => self.lost(|| {
                    format!(
                        "refcount block {number} is not cluster aligned; refcount table entry \
                         corrupted"
                    )
                }),
                Ok(offset) if geometry.index(offset) >= geometry.clusters_for(self.file.size()) => {
                    self.lost(|| format!("refcount block {number} is outside image"));
                }
                Ok(offset) => {
                    self.count("refcount block", offset, geometry.cluster(), 1)?;
                    blocks.insert((geometry.index(offset), number));
                    continue;
                }
            }
            self.blocks_are_sound = false;
        }
        // What was wrong here is about counts, not about what they count.
        self.is_incomplete = before;
        for (cluster, number) in blocks {
            let count = self.references.get(cluster);
            if count != 1 {
                self.blocks_are_sound = false;
                self.report
                    .corruption(|| format!("ERROR refcount block {number} refcount={count}"));
            }
        }
        Ok(())
    }
}
