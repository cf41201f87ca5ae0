// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changing the metadata of an image that nobody else has open.
//!
//! Every operation keeps one order: clusters are taken and counted, written and flushed;
//! one write of the header puts what they hold in force; only then what it replaced is
//! given back. A crash leaves the old state or the new one, and leaks at worst.

use crate::check::{self, refcount_table};
use crate::first_cluster::{FirstCluster, field};
use crate::geometry::{COPIED, Geometry, to_u64};
use crate::header::Header;
use crate::metadata::Run;
use crate::refcounts::{Refcounts, SECTOR_ENTRIES, to_bytes};
use crate::repair::{rebuild_refcounts, refuse_corruptions};
use crate::shape::{Shape, read_sparse};
use std::collections::{HashMap, HashSet};
use tranship_block::{Error, Result, Span, Storage};

/// An image whose metadata is being changed.
#[derive(Debug)]
pub(crate) struct Editor<'a> {
    pub(crate) storage: &'a dyn Storage,
    /// As it is on disk.
    pub(crate) header: Header,
    pub(crate) first: FirstCluster,
    refcounts: Refcounts,
    /// Clusters that lose a reference when the change is in force.
    frees: Vec<Run>,
}

impl<'a> Editor<'a> {
    /// Opens the image for a change. Images that are corrupt are refused, since a change
    /// would make it worse; an unclean shutdown is repaired.
    pub(crate) fn open(storage: &'a dyn Storage) -> Result<Self> {
        if storage.is_read_only() {
            return Err(Error::usage("image cannot be changed: its file is open for reading only"));
        }
        let header = Header::read(storage)?;
        if header.is_marked_corrupt() {
            return Err(Error::corrupt(
                "image is marked corrupt: it has to be repaired before it is changed",
            )
            .at(72));
        }
        if header.is_dirty() {
            rebuild_refcounts(storage)?;
        }
        let found = check::examine(storage)?;
        refuse_corruptions(&found.report)?;
        let header = found.header;
        let first = FirstCluster::read(storage, &header)?;
        let geometry = header.geometry();
        let mut refcounts = Refcounts::new(geometry, header.refcount_table_offset, found.table);
        refcounts.end = geometry.clusters_for(storage.size());
        Ok(Self { storage, header, first, refcounts, frees: Vec::new() })
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.header.geometry()
    }

    pub(crate) fn shape(&self) -> Shape {
        Shape::new(&self.header)
    }

    /// The active L1 table, all entries that the header gives it.
    pub(crate) fn l1(&self) -> Result<Vec<u64>> {
        read_sparse(self.storage, self.header.l1_table_offset, u64::from(self.header.l1_size))
    }

    /// Takes neighbouring clusters for `bytes` bytes and returns their offset, 0 for none.
    pub(crate) fn allocate(&mut self, bytes: u64) -> Result<u64> {
        let count = self.geometry().clusters_for(bytes);
        if count == 0 {
            return Ok(0);
        }
        let run = self.refcounts.allocate(self.storage, count, &mut self.frees)?;
        if run.count == count {
            return Ok(self.geometry().offset(run.first));
        }
        self.refcounts.release(self.storage, run)?;
        self.append(count)
    }

    /// Takes `count` neighbouring clusters after the end of the file, where nothing has ever
    /// been, and returns their offset.
    pub(crate) fn append(&mut self, count: u64) -> Result<u64> {
        let from = self.refcounts.end.max(self.geometry().clusters_for(self.storage.size()));
        let run = self.refcounts.append(self.storage, from, count, &mut self.frees)?;
        Ok(self.geometry().offset(run.first))
    }

    /// Takes clusters for a copy of `bytes` and writes it; returns its offset, 0 for nothing.
    pub(crate) fn store(&mut self, bytes: &[u8]) -> Result<u64> {
        let offset = self.allocate(to_u64(bytes.len()))?;
        if offset != 0 {
            self.reach()?;
            let mut whole = bytes.to_vec();
            whole.resize(bytes.len().next_multiple_of(self.geometry().cluster_len()), 0);
            self.storage.write_at(&whole, offset)?;
        }
        Ok(offset)
    }

    /// The clusters from `offset` on lose a reference when the change is in force.
    pub(crate) fn free(&mut self, offset: u64, bytes: u64) {
        let geometry = self.geometry();
        let count = geometry.clusters_for(bytes);
        if count > 0 && offset != 0 {
            self.frees.push(Run { first: geometry.index(offset), count });
        }
    }

    pub(crate) fn count(&mut self, cluster: u64) -> Result<u64> {
        self.refcounts.get(self.storage, cluster)
    }

    pub(crate) fn set_count(&mut self, cluster: u64, count: u64) -> Result<()> {
        self.refcounts.set(self.storage, cluster, count)
    }

    /// Makes the file long enough for every cluster that was taken.
    pub(crate) fn reach(&self) -> Result<()> {
        let end = self.geometry().offset(self.refcounts.end);
        if end > self.storage.size() { self.storage.set_len(end) } else { Ok(()) }
    }

    fn write_blocks(&mut self) -> Result<()> {
        for (offset, block) in self.refcounts.blocks.start_writing() {
            self.storage.write_at(&block, offset)?;
            self.refcounts.blocks.written(offset);
        }
        Ok(())
    }

    /// Makes all counts durable, and whatever else was written so far.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.reach()?;
        self.write_blocks()?;
        let changed = std::mem::take(&mut self.refcounts.changed);
        if std::mem::take(&mut self.refcounts.moved) {
            let table = to_bytes(&self.refcounts.table);
            self.storage.write_at(&table, self.refcounts.table_offset)?;
            self.storage.flush()?;
            // On its own, so that what the caller has changed in `first` stays out of it.
            let mut first = FirstCluster::read(self.storage, &self.header)?;
            let clusters = self.geometry().clusters_for(to_u64(table.len()));
            let clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
            for first in [&mut first, &mut self.first] {
                first.set_u64(field::REFCOUNT_TABLE_OFFSET, self.refcounts.table_offset);
                first.set_u32(field::REFCOUNT_TABLE_CLUSTERS, clusters);
            }
            return first.write(self.storage);
        }
        self.storage.flush()?;
        if changed.is_empty() {
            return Ok(());
        }
        for (number, sector) in self.refcounts.table.chunks(SECTOR_ENTRIES).enumerate() {
            if changed.contains(&number) {
                let at = to_u64(number).saturating_mul(512);
                let offset = self.refcounts.table_offset.saturating_add(at);
                self.storage.write_at(&to_bytes(sector), offset)?;
            }
        }
        self.storage.flush()
    }

    /// Puts the change in force: settles, writes the header, and gives back what it
    /// replaced.
    pub(crate) fn commit(&mut self) -> Result<()> {
        self.settle()?;
        self.first.write(self.storage)?;
        self.header = Header::read(self.storage)?;
        let frees = std::mem::take(&mut self.frees);
        for run in frees {
            self.release(run)?;
        }
        self.write_blocks()?;
        self.storage.flush()
    }

    /// Takes a reference away at once; clusters without any are given back to the host.
    fn release(&mut self, run: Run) -> Result<()> {
        let mut unused: Option<Run> = None;
        for cluster in self.refcounts.release(self.storage, run)? {
            match &mut unused {
                Some(run) if run.end() == cluster => run.count = run.count.saturating_add(1),
                _ => {
                    self.discard(unused.replace(Run { first: cluster, count: 1 }));
                }
            }
        }
        self.discard(unused);
        if self.refcounts.blocks.is_crowded() {
            self.write_blocks()?;
        }
        Ok(())
    }

    fn discard(&self, run: Option<Run>) {
        let Some(run) = run else { return };
        let start = self.geometry().offset(run.first);
        let end = self.geometry().offset(run.end()).min(self.storage.size());
        // A hint that fails costs space on the host, nothing else.
        let _ = self.storage.discard(Span::new(start, end.saturating_sub(start)));
    }

    /// Calls `visit` with the L2 tables of `l1` and what each of them touches: its own
    /// cluster, then those of the guest.
    pub(crate) fn each_run(
        &mut self,
        l1: &[u64],
        mut visit: impl FnMut(&mut Self, Run) -> Result<()>,
    ) -> Result<()> {
        let (shape, geometry) = (self.shape(), self.geometry());
        let mut seen = HashSet::new();
        for (index, entry) in l1.iter().enumerate() {
            let first = to_u64(index).saturating_mul(shape.entries());
            let guest = geometry.offset(first);
            let Some(table) = geometry.l2_offset(*entry, guest)? else { continue };
            // Also keeps a small hostile image from being work for days.
            if !seen.insert(table.offset) {
                return Err(Error::corrupt(format!(
                    "two entries of one L1 table refer to the L2 table at {:#x}",
                    table.offset
                ))
                .at(table.offset));
            }
            visit(self, Run { first: geometry.index(table.offset), count: 1 })?;
            let words = read_sparse(self.storage, table.offset, geometry.cluster() / 8)?;
            for (number, words) in (first..).zip(words.chunks(shape.words())) {
                let reference = shape.reference(words, geometry.offset(number))?;
                if let Some((first, count)) = shape.touched(reference, self.storage.size()) {
                    visit(self, Run { first, count })?;
                }
            }
        }
        Ok(())
    }

    /// Makes sure that everything that `l1` maps can have one more reference from each
    /// entry that maps it: to be called before anything is changed.
    pub(crate) fn check_raise(&mut self, l1: &[u64]) -> Result<()> {
        let most = self.geometry().refcount_max();
        // Compressed clusters share what they are in. A count has all of their references in
        // it already, so that only those above the half can become too many.
        let mut added: HashMap<u64, u64> = HashMap::new();
        self.each_run(l1, |editor, run| {
            for cluster in run.first..run.end() {
                let count = editor.count(cluster)?;
                if count <= most / 2 {
                    continue;
                }
                let added = added.entry(cluster).or_default();
                *added = added.saturating_add(1);
                if count.saturating_add(*added) > most {
                    return Err(Error::unsupported(format!(
                        "cluster {cluster} has {count} references, and {} bits cannot count one \
                         more for each that the disk has now",
                        1_u32.wrapping_shl(editor.geometry().refcount_order)
                    )));
                }
            }
            Ok(())
        })
    }

    /// Counts one more reference to everything that `l1` maps, after
    /// [`Self::check_raise`].
    pub(crate) fn raise(&mut self, l1: &[u64]) -> Result<()> {
        self.each_run(l1, |editor, run| {
            for cluster in run.first..run.end() {
                let count = editor.count(cluster)?.saturating_add(1);
                editor.refcounts.set(editor.storage, cluster, count)?;
            }
            if editor.refcounts.blocks.is_crowded() { editor.write_blocks() } else { Ok(()) }
        })
    }

    /// Takes one reference away from everything that `l1` maps, at once.
    pub(crate) fn lower(&mut self, l1: &[u64]) -> Result<()> {
        let runs = self.runs(l1)?;
        self.release_all(runs)
    }

    /// Takes one reference away from each run, at once.
    pub(crate) fn release_all(&mut self, runs: Vec<Run>) -> Result<()> {
        for run in runs {
            self.release(run)?;
        }
        self.write_blocks()?;
        self.storage.flush()
    }

    /// Everything that `l1` maps: the tables have to be read before their clusters go.
    pub(crate) fn runs(&mut self, l1: &[u64]) -> Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        self.each_run(l1, |_, run| {
            match runs.last_mut() {
                Some(last) if last.end() == run.first => {
                    last.count = last.count.saturating_add(run.count);
                }
                _ => runs.push(run),
            }
            Ok(())
        })?;
        Ok(runs)
    }

    /// Clears COPIED in `l1` and, on disk, in all L2 tables that it refers to.
    pub(crate) fn share(&mut self, l1: &mut [u64]) -> Result<()> {
        let (shape, geometry) = (self.shape(), self.geometry());
        for entry in l1 {
            let Some(table) = geometry.l2_offset(*entry, 0)? else { continue };
            *entry &= !COPIED;
            // With a data file the flag is no statement about counts.
            if shape.has_data_file {
                continue;
            }
            let mut words = read_sparse(self.storage, table.offset, geometry.cluster() / 8)?;
            let mut is_changed = false;
            for entry in words.iter_mut().step_by(shape.words()) {
                is_changed |= *entry & COPIED != 0;
                *entry &= !COPIED;
            }
            if is_changed {
                self.storage.write_at(&to_bytes(&words), table.offset)?;
            }
        }
        Ok(())
    }

    /// Cuts off what is free at the end of the file.
    pub(crate) fn trim(&mut self) -> Result<()> {
        let geometry = self.geometry();
        let table = refcount_table(self.storage, &self.header)?;
        let mut counts = check::compare::Counts::new(self.storage, &table, geometry);
        let end = counts.used_end(geometry.clusters_for(self.storage.size()))?;
        let end = geometry.offset(end);
        if end < self.storage.size() { self.storage.set_len(end) } else { Ok(()) }
    }
}
