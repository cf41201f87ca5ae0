// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables of an open image, and how a guest cluster is looked up and changed.
//!
//! Everything here happens under one lock and does metadata I/O only; payload is moved
//! by `read` and `write` without it.

use crate::cache::Cache;
use crate::geometry::{COPIED, Geometry, Mapping, to_u64, to_usize};
use crate::refcounts::{Refcounts, SECTOR_ENTRIES, read_table};
use std::collections::BTreeSet;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result};

/// Bytes of neighbouring L2 tables in a new image.
const TABLES_AHEAD: u64 = 64 << 10;

/// Neighbouring clusters, of the guest or of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Run {
    pub(crate) fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }

    pub(crate) fn overlaps(self, other: Run) -> bool {
        self.first < other.end() && other.first < self.end()
    }
}

/// The tables of one image.
#[derive(Debug)]
pub(crate) struct Metadata {
    pub(crate) geometry: Geometry,
    /// The entries that the virtual size needs; further ones stay as they are on disk.
    pub(crate) l1: Vec<u64>,
    /// Where the L1 table is.
    pub(crate) l1_offset: u64,
    /// Sectors of the L1 table that have changed.
    pub(crate) l1_changed: BTreeSet<usize>,
    pub(crate) l2: Cache<Vec<u64>>,
    pub(crate) refcounts: Refcounts,
    /// Guest clusters that a writer is about to map.
    pub(crate) busy: Vec<Run>,
    /// Clusters of the file that lose a reference once that is so on disk.
    pub(crate) frees: Vec<Run>,
    /// The image was checked and marked for writing.
    pub(crate) prepared: bool,
    /// The image is marked as dirty: reference counts are written when it is closed.
    pub(crate) lazy: bool,
    /// The header of an image that is none yet: it is written when all else is.
    pub(crate) bulk: Option<Vec<u8>>,
    /// Clusters taken for the next L2 tables of such an image.
    pub(crate) tables_ahead: Run,
}

impl Metadata {
    pub(crate) fn new(geometry: Geometry, l1: Vec<u64>, refcounts: Refcounts) -> Self {
        Self {
            geometry,
            l1,
            l1_offset: 0,
            l1_changed: BTreeSet::new(),
            l2: Cache::new(geometry.cluster()),
            refcounts,
            busy: Vec::new(),
            frees: Vec::new(),
            prepared: false,
            lazy: false,
            bulk: None,
            tables_ahead: Run { first: 0, count: 0 },
        }
    }

    fn entry(&self, l1_index: usize) -> u64 {
        self.l1.get(l1_index).copied().unwrap_or(0)
    }

    /// The L2 table `l1_index`, `None` if it does not exist.
    pub(crate) fn table(
        &mut self,
        file: &dyn BlockDevice,
        l1_index: usize,
    ) -> Result<Option<Arc<Vec<u64>>>> {
        let guest = self.geometry.offset(self.geometry.first_of(l1_index));
        match self.geometry.l2_offset(self.entry(l1_index), guest)? {
            None => Ok(None),
            Some(host) => self.load(file, host.offset, guest).map(Some),
        }
    }

    /// Where L2 table `l1_index` is, if it exists.
    pub(crate) fn table_offset(&self, l1_index: usize) -> Result<Option<u64>> {
        let guest = self.geometry.offset(self.geometry.first_of(l1_index));
        let host = self.geometry.l2_offset(self.entry(l1_index), guest)?;
        Ok(host.map(|host| host.offset))
    }

    fn load(&mut self, file: &dyn BlockDevice, offset: u64, guest: u64) -> Result<Arc<Vec<u64>>> {
        if let Some(table) = self.l2.get(offset) {
            return Ok(table);
        }
        if offset.saturating_add(self.geometry.cluster()) > file.size() {
            return Err(Error::corrupt(format!(
                "L2 table at {offset:#x} for guest offset {guest:#x} ends past the file's {} bytes",
                file.size()
            ))
            .at(offset));
        }
        let table = read_table(file, offset, self.geometry.cluster() / 8)?;
        Ok(self.l2.insert(offset, table, false))
    }

    /// What piece `first` of the guest is mapped to, and how many of the `most` pieces from
    /// it on continue that mapping: the same kind, and neighbours in the file.
    ///
    /// A piece is what can be mapped on its own: a cluster or a subcluster.
    pub(crate) fn lookup(
        &mut self,
        file: &dyn BlockDevice,
        first: u64,
        most: u64,
    ) -> Result<(Mapping, u64)> {
        let geometry = self.geometry;
        let per_cluster = geometry.units_per_cluster();
        let cluster = first.checked_div(per_cluster).unwrap_or(0);
        let unit = first.checked_rem(per_cluster).unwrap_or(0);
        let (l1_index, l2_index) = geometry.l1_l2(cluster);
        let Some(table) = self.table(file, l1_index)? else {
            let clusters = self.absent(l1_index, l2_index, most.saturating_add(unit));
            let units = clusters.saturating_mul(per_cluster).saturating_sub(unit);
            return Ok((Mapping::Unallocated, units.clamp(1, most.max(1))));
        };
        let mut start = None;
        let mut count = 0_u64;
        let words = geometry.words();
        let entries = table.chunks_exact(words).skip(l2_index);
        for (number, entry) in (cluster..).zip(entries) {
            let from = if number == cluster { unit } else { 0 };
            let word = |index: usize| entry.get(index).copied().unwrap_or(0);
            for unit in from..per_cluster {
                if count >= most.max(1) {
                    break;
                }
                let guest = geometry.offset(number);
                let mapping = geometry.unit_mapping(word(0), word(1), unit, guest);
                match start {
                    None => start = Some(mapping?),
                    // A broken entry ends the run; it is reported when its own turn comes.
                    Some(start) => {
                        let follows =
                            mapping.is_ok_and(|mapping| self.continues(start, count, mapping));
                        if !follows {
                            return Ok((start, count));
                        }
                    }
                }
                count = count.saturating_add(1);
            }
            if count >= most.max(1) {
                break;
            }
        }
        start.map(|start| (start, count)).ok_or_else(|| {
            Error::usage("guest cluster past the end of its L2 table").at(geometry.offset(cluster))
        })
    }

    fn continues(&self, start: Mapping, number: u64, next: Mapping) -> bool {
        match (start, next) {
            (Mapping::Data(a), Mapping::Data(b))
            | (Mapping::Zero { reserved: Some(a) }, Mapping::Zero { reserved: Some(b) }) => {
                let distance = number.saturating_mul(self.geometry.unit());
                a.copied == b.copied && a.offset.checked_add(distance) == Some(b.offset)
            }
            // Each is read and inflated on its own; for a map they are one extent.
            (Mapping::Compressed { .. }, Mapping::Compressed { .. }) => true,
            (a, b) => a == b,
        }
    }

    /// Where up to `most` compressed clusters from `cluster` on are.
    pub(crate) fn compressed(
        &mut self,
        file: &dyn BlockDevice,
        cluster: u64,
        most: usize,
    ) -> Result<Vec<(u64, u64)>> {
        let geometry = self.geometry;
        let (l1_index, l2_index) = geometry.l1_l2(cluster);
        let Some(table) = self.table(file, l1_index)? else { return Ok(Vec::new()) };
        let entries = table.chunks_exact(geometry.words()).skip(l2_index).take(most);
        let places = entries.map_while(|entry| {
            match geometry.mapping(entry.first().copied()?, geometry.offset(cluster)) {
                Ok(Mapping::Compressed { start, len }) => Some((start, len)),
                _ => None,
            }
        });
        Ok(places.collect())
    }

    /// The entry of guest cluster `cluster`: its first word, and the bitmap of its
    /// subclusters, if it has any.
    pub(crate) fn entry_of(&mut self, file: &dyn BlockDevice, cluster: u64) -> Result<(u64, u64)> {
        let (l1_index, l2_index) = self.geometry.l1_l2(cluster);
        let table = self.table(file, l1_index)?;
        let words = self.geometry.words();
        let at = l2_index.saturating_mul(words);
        let word = |index: usize| table.as_ref().and_then(|table| table.get(index)).copied();
        let bitmap = if words == 2 { word(at.saturating_add(1)) } else { None };
        Ok((word(at).unwrap_or(0), bitmap.unwrap_or(0)))
    }

    /// Clusters from an L2 table that does not exist up to the next one that does.
    fn absent(&self, l1_index: usize, l2_index: usize, most: u64) -> u64 {
        let rest = self.l1.get(l1_index..).unwrap_or_default();
        let enough = most.div_ceil(self.geometry.entries()).saturating_add(1);
        let enough = usize::try_from(enough).unwrap_or(usize::MAX);
        let tables = rest.iter().take(enough).take_while(|entry| **entry == 0).count();
        let clusters = to_u64(tables).saturating_mul(self.geometry.entries());
        clusters.saturating_sub(to_u64(l2_index)).max(1)
    }

    /// How many of the `most` pieces from `first` on may be overwritten where they are:
    /// data that only the active image refers to. The offset is that of the first.
    pub(crate) fn in_place(
        &mut self,
        file: &dyn BlockDevice,
        first: u64,
        most: u64,
    ) -> Result<Option<(u64, u64)>> {
        let (Mapping::Data(host), count) = self.lookup(file, first, most)? else {
            return Ok(None);
        };
        if !self.geometry.external {
            if !host.copied {
                return Ok(None);
            }
            let geometry = self.geometry;
            let cluster = geometry.index(host.offset);
            let end = host.offset.saturating_add(count.saturating_mul(geometry.unit()));
            let clusters = geometry.clusters_for(end).saturating_sub(cluster);
            self.check_exclusive(file, Run { first: cluster, count: clusters })?;
        }
        Ok(Some((host.offset, count)))
    }

    /// Checks that COPIED tells the truth before anything is overwritten because of it.
    pub(crate) fn check_exclusive(&mut self, file: &dyn BlockDevice, run: Run) -> Result<()> {
        let fault = if let Some((cluster, count)) = self.refcounts.first_not_one(file, run)? {
            Some((cluster, format!("its reference count is {count}")))
        } else {
            let mut clusters = run.first..run.end();
            let metadata = clusters.find(|cluster| self.refcounts.metadata.contains(cluster));
            metadata.map(|cluster| (cluster, "it holds metadata".to_owned()))
        };
        match fault {
            None => Ok(()),
            Some((cluster, fault)) => Err(Error::corrupt(format!(
                "cluster {cluster} is marked as belonging to one guest cluster, but {fault}"
            ))
            .at(self.geometry.offset(cluster))),
        }
    }

    /// Takes up to `want` neighbouring clusters of the file.
    pub(crate) fn allocate(&mut self, file: &dyn BlockDevice, want: u64) -> Result<Run> {
        self.refcounts.allocate(file, want, &mut self.frees)
    }

    /// Takes `len` bytes, at most a cluster, for a compressed stream.
    pub(crate) fn allocate_bytes(&mut self, file: &dyn BlockDevice, len: u64) -> Result<u64> {
        self.refcounts.allocate_bytes(file, len, &mut self.frees)
    }

    /// A cluster for an L2 table. Tables of a new image are small neighbours if clusters
    /// are small, so that many are written at once.
    fn allocate_table(&mut self, file: &dyn BlockDevice) -> Result<Run> {
        if self.bulk.is_none() {
            return self.allocate(file, 1);
        }
        if self.tables_ahead.count == 0 {
            let want = TABLES_AHEAD.checked_div(self.geometry.cluster()).unwrap_or(1);
            self.tables_ahead = self.allocate(file, want)?;
        }
        let run = Run { count: 1, ..self.tables_ahead };
        self.tables_ahead.first = self.tables_ahead.first.saturating_add(1);
        self.tables_ahead.count = self.tables_ahead.count.saturating_sub(1);
        Ok(run)
    }

    /// Makes sure that L2 table `l1_index` exists and belongs to the active image alone;
    /// returns its offset. It is in the cache afterwards.
    pub(crate) fn own_table(&mut self, file: &dyn BlockDevice, l1_index: usize) -> Result<u64> {
        let guest = self.geometry.offset(self.geometry.first_of(l1_index));
        let old = self.geometry.l2_offset(self.entry(l1_index), guest)?;
        let table = match old {
            Some(host) => {
                let table = self.load(file, host.offset, guest)?;
                let cluster = self.geometry.index(host.offset);
                let count = self.refcounts.get(file, cluster)?;
                if host.copied && count == 1 {
                    return Ok(host.offset);
                }
                if host.copied || count == 0 {
                    return Err(Error::corrupt(format!(
                        "L2 table for guest offset {guest:#x} has COPIED {} and a reference \
                         count of {count}",
                        u8::from(host.copied)
                    ))
                    .at(host.offset));
                }
                Vec::clone(&table)
            }
            None => vec![0; to_usize(self.geometry.cluster() / 8)?],
        };
        let run = self.allocate_table(file)?;
        let offset = self.geometry.offset(run.first);
        self.l2.insert(offset, table, true);
        self.refcounts.metadata.insert(run.first);
        let entry = self
            .l1
            .get_mut(l1_index)
            .ok_or_else(|| Error::usage("guest offset past the end of the L1 table").at(guest))?;
        *entry = offset | COPIED;
        self.l1_changed.insert(l1_index / SECTOR_ENTRIES);
        if let Some(host) = old {
            self.free(Run { first: self.geometry.index(host.offset), count: 1 });
        }
        Ok(offset)
    }

    /// Takes a reference away as soon as the disk no longer has it.
    pub(crate) fn free(&mut self, run: Run) {
        match self.frees.last_mut() {
            Some(last) if last.end() == run.first => {
                last.count = last.count.saturating_add(run.count);
            }
            _ => self.frees.push(run),
        }
    }

    /// The clusters of the file that a mapping refers to.
    pub(crate) fn hosts(&self, mapping: Mapping) -> Option<Run> {
        match mapping {
            Mapping::Unallocated | Mapping::Zero { reserved: None } => None,
            Mapping::Zero { reserved: Some(_) } | Mapping::Data(_) if self.geometry.external => {
                None
            }
            Mapping::Zero { reserved: Some(host) } | Mapping::Data(host) => {
                Some(Run { first: self.geometry.index(host.offset), count: 1 })
            }
            Mapping::Compressed { start, len } => {
                let first = self.geometry.index(start);
                let last = self.geometry.index(start.saturating_add(len).saturating_sub(1));
                Some(Run { first, count: last.saturating_sub(first).saturating_add(1) })
            }
        }
    }
}
