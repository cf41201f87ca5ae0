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

#[derive(Debug)]
pub(crate) struct Metadata {
    pub(crate) geometry: Geometry,
    /// The entries that the virtual size needs; further ones stay as they are on disk.
    pub(crate) l1: Vec<u64>,
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
}

impl Metadata {
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
        let table = read_table(file, offset, self.geometry.entries())?;
        Ok(self.l2.insert(offset, table, false))
    }

    /// What guest cluster `first` is mapped to, and how many of the `most` clusters from
    /// it on continue that mapping: the same kind, and neighbours in the file.
    pub(crate) fn run(
        &mut self,
        file: &dyn BlockDevice,
        first: u64,
        most: u64,
    ) -> Result<(Mapping, u64)> {
        let (l1_index, l2_index) = self.geometry.l1_l2(first);
        let guest = self.geometry.offset(first);
        let Some(table) = self.table(file, l1_index)? else {
            return Ok((Mapping::Unallocated, self.absent(l1_index, l2_index, most)));
        };
        let entries = table.get(l2_index..).unwrap_or_default();
        let mut mappings = entries.iter().zip(0_u64..most.max(1)).map(|(entry, number)| {
            let guest = guest.saturating_add(self.geometry.offset(number));
            (number, self.geometry.mapping(*entry, guest))
        });
        let (_, start) = mappings
            .next()
            .ok_or_else(|| Error::usage("guest cluster past the end of its L2 table").at(guest))?;
        let start = start?;
        // A broken entry ends the run; it is reported when its own turn comes.
        let follows = |(number, next): &(u64, Result<Mapping>)| {
            next.as_ref().is_ok_and(|next| self.continues(start, *number, *next))
        };
        let more = to_u64(mappings.take_while(follows).count());
        Ok((start, more.saturating_add(1)))
    }

    fn continues(&self, start: Mapping, number: u64, next: Mapping) -> bool {
        match (start, next) {
            (Mapping::Data(a), Mapping::Data(b))
            | (Mapping::Zero { reserved: Some(a) }, Mapping::Zero { reserved: Some(b) }) => {
                let distance = self.geometry.offset(number);
                a.copied == b.copied && a.offset.checked_add(distance) == Some(b.offset)
            }
            // Each is read and inflated on its own; for a map they are one extent.
            (Mapping::Compressed { .. }, Mapping::Compressed { .. }) => true,
            (a, b) => a == b,
        }
    }

    /// Clusters from an L2 table that does not exist up to the next one that does.
    fn absent(&self, l1_index: usize, l2_index: usize, most: u64) -> u64 {
        let rest = self.l1.get(l1_index..).unwrap_or_default();
        let enough = most.div_ceil(self.geometry.entries()).saturating_add(1);
        let enough = usize::try_from(enough).unwrap_or(usize::MAX);
        let tables = rest.iter().take(enough).take_while(|entry| **entry == 0).count();
        let clusters = to_u64(tables).saturating_mul(self.geometry.entries());
        clusters.saturating_sub(to_u64(l2_index)).clamp(1, most.max(1))
    }

    /// How many of the `most` clusters from `first` on may be overwritten where they are:
    /// data that only the active image refers to. The offset is that of the first.
    pub(crate) fn in_place(
        &mut self,
        file: &dyn BlockDevice,
        first: u64,
        most: u64,
    ) -> Result<Option<(u64, u64)>> {
        let (Mapping::Data(host), count) = self.run(file, first, most)? else { return Ok(None) };
        if !host.copied {
            return Ok(None);
        }
        let run = Run { first: self.geometry.index(host.offset), count };
        self.check_exclusive(file, run)?;
        Ok(Some((host.offset, count)))
    }

    /// Checks that COPIED tells the truth before anything is overwritten because of it.
    pub(crate) fn check_exclusive(&mut self, file: &dyn BlockDevice, run: Run) -> Result<()> {
        for cluster in run.first..run.end() {
            let count = self.refcounts.get(file, cluster)?;
            let fault = if count != 1 {
                format!("its reference count is {count}")
            } else if self.refcounts.metadata.contains(&cluster) {
                "it holds metadata".to_owned()
            } else {
                continue;
            };
            return Err(Error::corrupt(format!(
                "cluster {cluster} is marked as belonging to one guest cluster, but {fault}"
            ))
            .at(self.geometry.offset(cluster)));
        }
        Ok(())
    }

    /// Takes up to `want` neighbouring clusters of the file.
    pub(crate) fn allocate(&mut self, file: &dyn BlockDevice, want: u64) -> Result<Run> {
        self.refcounts.allocate(file, want, &mut self.frees)
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
            None => vec![0; to_usize(self.geometry.entries())?],
        };
        let run = self.allocate(file, 1)?;
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
