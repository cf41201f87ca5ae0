// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The order in which changes reach the disk.
//!
//! There is no journal, so the order has to make every state on the way a valid one:
//!
//! 1. payload and refcount blocks (counts only rise here), then a flush;
//! 2. the refcount table, and the header if the table has moved, then a flush;
//! 3. L2 tables, then a flush;
//! 4. the L1 table, then a flush;
//! 5. only now the counts of clusters whose last reference has gone are lowered.
//!
//! A crash between two steps leaves clusters that are counted but not referenced: a leak.
//! Never is a cluster referenced that is not counted or whose contents are not there.
//! While lazy refcounts have the image marked as dirty, steps 1, 2 and 5 wait for its end.
//! An image that is no image yet is written in no order: see the module `bulk`.
//!
//! What a batch contains is fixed at one moment under the lock; what changes while it is
//! written belongs to the next one.

use crate::bitmaps::tracking::Tracking;
use crate::bulk;
use crate::geometry::to_u64;
use crate::header::{DIRTY, Encryption};
use crate::image::Qcow2;
use crate::metadata::{Metadata, Run};
use crate::refcounts::{SECTOR_ENTRIES, to_bytes};
use crate::snapshots;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Span, Storage};

/// Runs of freed clusters that may wait for the next flush.
const MOST_FREES: usize = 4096;

/// Bytes for a place in the file.
type Piece = (u64, Vec<u8>);

/// What was changed at one moment, apart from the refcount blocks.
struct Batch {
    refcount_table: Vec<Piece>,
    header: Option<Piece>,
    l2: Vec<(u64, Arc<Vec<u64>>)>,
    l1: Vec<Piece>,
}

impl Qcow2 {
    /// Checks a write and, before the first one, the image.
    pub(crate) fn start_writing(&self, span: Span) -> Result<()> {
        let storage = self.writable(span.start)?;
        span.check_within(self.size())?;
        self.check_alive()?;
        if self.ready.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut tracking = self.tracking.lock().unwrap_or_else(PoisonError::into_inner);
        let mut metadata = self.lock();
        if !metadata.prepared {
            // It may have been prepared before, and finished since.
            metadata.refcounts.metadata.clear();
            self.prepare(&mut metadata, storage, &mut tracking)?;
            metadata.prepared = true;
        }
        tracking.mark(span);
        let is_crowded = metadata.frees.len() > MOST_FREES;
        self.ready.store(tracking.is_empty() && !is_crowded, Ordering::Release);
        drop(tracking);
        if is_crowded {
            drop(metadata);
            self.flush_all()?;
        }
        Ok(())
    }

    /// The image has to be prepared again before the next write.
    pub(crate) fn end_preparation(&self) {
        let mut metadata = self.lock();
        metadata.prepared = false;
        self.ready.store(false, Ordering::Release);
    }

    fn check_alive(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Io,
                "an earlier write of metadata failed: the image takes no more writes",
            ));
        }
        Ok(())
    }

    /// Collects where metadata is, refuses images in which it overlaps, and clears the
    /// feature bits of data that this crate does not keep up to date.
    fn prepare(
        &self,
        metadata: &mut Metadata,
        storage: &Arc<dyn Storage>,
        tracking: &mut Tracking,
    ) -> Result<()> {
        let geometry = self.geometry;
        let header = &self.header;
        let mut claim = |what: &str, offset: u64, bytes: u64| {
            let first = geometry.index(offset);
            let count = geometry.clusters_for(bytes.saturating_add(geometry.within(offset)));
            for cluster in first..first.saturating_add(count) {
                if !metadata.refcounts.metadata.insert(cluster) {
                    return Err(Error::corrupt(format!(
                        "{what} shares cluster {cluster} with other metadata"
                    ))
                    .at(offset));
                }
            }
            Ok(())
        };
        claim("header", 0, geometry.cluster())?;
        let l1_bytes = u64::from(header.l1_size).saturating_mul(8);
        claim("L1 table", header.l1_table_offset, l1_bytes)?;
        let table_bytes = geometry.offset(u64::from(header.refcount_table_clusters));
        claim("refcount table", header.refcount_table_offset, table_bytes)?;
        if let Some(Encryption::Luks { offset, len }) = header.encryption() {
            claim("LUKS header", offset, len)?;
        }
        let snapshots::Table { places: snapshots, bytes, .. } =
            snapshots::read(&self.file, header)?;
        claim("snapshot table", header.snapshots_offset, bytes)?;
        for snapshot in &snapshots {
            // Read for its limits: what a snapshot maps is protected by reference counts.
            let entries = snapshots::l1_entries(&self.file, *snapshot)?;
            let bytes = to_u64(entries.len()).saturating_mul(8);
            claim("L1 table of a snapshot", snapshot.l1_table_offset, bytes)?;
        }
        for entry in &metadata.refcounts.table {
            let offset = geometry.block_offset(*entry)?;
            if offset != 0 {
                claim("refcount block", offset, geometry.cluster())?;
            }
        }
        for (index, entry) in metadata.l1.iter().enumerate() {
            let guest = geometry.offset(geometry.first_of(index));
            if let Some(host) = geometry.l2_offset(*entry, guest)? {
                claim("L2 table", host.offset, geometry.cluster())?;
            }
        }
        if metadata.refcounts.get(&self.file, 0)? == 0 {
            return Err(Error::corrupt(
                "the header's cluster has a reference count of 0: reference counts are missing",
            ));
        }
        let mut must_flush = false;
        if header.autoclear_features != 0 {
            let kept = self.start_tracking(&**storage, tracking)?;
            storage.write_at(&kept.to_be_bytes(), 88)?;
            must_flush = true;
        }
        if header.has_lazy_refcounts() {
            let features = header.incompatible_features | DIRTY;
            storage.write_at(&features.to_be_bytes(), 72)?;
            metadata.lazy = true;
            must_flush = true;
        }
        if must_flush {
            storage.flush()?;
        }
        match &self.data {
            Some(data) if data.size() < header.size => data.set_len(header.size),
            _ => Ok(()),
        }
    }

    /// Writes back when too many tables have changed; nothing is promised to be durable.
    pub(crate) fn make_room(&self) -> Result<()> {
        let mut metadata = self.lock();
        if metadata.frees.len() > MOST_FREES {
            // The next write sees to it: here the clusters are in use.
            self.ready.store(false, Ordering::Release);
        }
        let is_crowded = metadata.l2.is_crowded() || metadata.refcounts.blocks.is_crowded();
        if !is_crowded {
            return Ok(());
        }
        if metadata.bulk.is_some() {
            return bulk::write_tables(&mut metadata, &**self.writable(0)?)
                .inspect_err(|_| self.failed.store(true, Ordering::Release));
        }
        drop(metadata);
        self.write_back(false).map(drop)
    }

    pub(crate) fn flush_all(&self) -> Result<()> {
        let Some(storage) = &self.storage else { return Ok(()) };
        self.check_alive()?;
        let mut metadata = self.lock();
        if !metadata.prepared {
            return Ok(());
        }
        if metadata.bulk.is_some() {
            // Nobody can read it before it is finished: nothing has to be on disk yet.
            let frees = std::mem::take(&mut metadata.frees);
            drop(metadata);
            return self.release(storage, frees);
        }
        drop(metadata);
        let frees = self.write_back(true)?;
        storage.flush().inspect_err(|_| self.failed.store(true, Ordering::Release))?;
        if !frees.is_empty() {
            self.release(storage, frees)?;
        }
        self.trim(storage)
    }

    /// Steps 1 to 4, without the last flush; returns what may be freed after it, if the
    /// caller is going to do that.
    fn write_back(&self, may_free: bool) -> Result<Vec<Run>> {
        let storage = self.writable(0)?;
        let _order = self.writing_back.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_alive()?;
        let mut metadata = self.lock();
        let result = self.collect(&mut metadata, storage);
        let frees = if may_free { std::mem::take(&mut metadata.frees) } else { Vec::new() };
        drop(metadata);
        result
            .and_then(|batch| self.write_batch(&batch, storage))
            .inspect_err(|_| self.failed.store(true, Ordering::Release))?;
        Ok(frees)
    }

    /// Writes the refcount blocks and takes a copy of everything else that has changed.
    fn collect(&self, metadata: &mut Metadata, storage: &Arc<dyn Storage>) -> Result<Batch> {
        self.reach(metadata)?;
        let is_late = metadata.lazy && !metadata.refcounts.blocks.is_crowded();
        if !is_late {
            write_blocks(metadata, storage)?;
        }
        let mut refcount_table = Vec::new();
        let mut header = None;
        let refcounts = &mut metadata.refcounts;
        // While the dirty bit is set, counts on disk are not to be trusted.
        let changed =
            if metadata.lazy { BTreeSet::new() } else { std::mem::take(&mut refcounts.changed) };
        if !metadata.lazy && std::mem::take(&mut refcounts.moved) {
            // Nothing refers to the new place yet, so it may be written with the blocks.
            storage.write_at(&to_bytes(&refcounts.table), refcounts.table_offset)?;
            let bytes = to_u64(refcounts.table.len()).saturating_mul(8);
            let clusters = u32::try_from(self.geometry.clusters_for(bytes)).unwrap_or(u32::MAX);
            let mut fields = refcounts.table_offset.to_be_bytes().to_vec();
            fields.extend(clusters.to_be_bytes());
            header = Some((48, fields));
        } else {
            refcount_table = sectors(&refcounts.table, refcounts.table_offset, &changed);
        }
        let changed = std::mem::take(&mut metadata.l1_changed);
        Ok(Batch {
            refcount_table,
            header,
            l2: metadata.l2.start_writing(),
            l1: sectors(&metadata.l1, metadata.l1_offset, &changed),
        })
    }

    fn write_batch(&self, batch: &Batch, storage: &Arc<dyn Storage>) -> Result<()> {
        if let Some(data) = &self.data {
            data.flush()?;
        }
        let write = |pieces: &[Piece]| {
            pieces.iter().try_for_each(|(offset, bytes)| storage.write_at(bytes, *offset))
        };
        let pieces = || batch.refcount_table.iter().chain(&batch.header);
        if pieces().next().is_some() {
            storage.flush()?;
            pieces().try_for_each(|(offset, bytes)| storage.write_at(bytes, *offset))?;
        }
        if batch.l2.is_empty() && batch.l1.is_empty() {
            return Ok(());
        }
        storage.flush()?;
        for (offset, table) in &batch.l2 {
            storage.write_at(&to_bytes(table), *offset)?;
        }
        let mut metadata = self.lock();
        for (offset, _) in &batch.l2 {
            metadata.l2.written(*offset);
        }
        drop(metadata);
        if !batch.l1.is_empty() {
            storage.flush()?;
            write(&batch.l1)?;
        }
        Ok(())
    }

    /// Writes what a bulk image is written without until now, or the reference counts that
    /// a lazy one has put off.
    pub(crate) fn make_whole(&self) -> Result<()> {
        let Some(storage) = &self.storage else { return Ok(()) };
        let _nobody = self.in_use.write().unwrap_or_else(PoisonError::into_inner);
        let mut metadata = self.lock();
        if metadata.bulk.is_none() {
            drop(metadata);
            return self.end_laziness(storage);
        }
        if let Some(data) = &self.data {
            data.flush()?;
        }
        bulk::finish(&mut metadata, &**storage)
            .inspect_err(|_| self.failed.store(true, Ordering::Release))
    }

    /// Writes the reference counts that were put off, then says that the image is clean.
    fn end_laziness(&self, storage: &Arc<dyn Storage>) -> Result<()> {
        if !std::mem::take(&mut self.lock().lazy) {
            return Ok(());
        }
        self.write_back(false)?;
        storage.flush()?;
        storage.write_at(&self.header.incompatible_features.to_be_bytes(), 72)?;
        storage.flush()?;
        // The next write marks it again.
        self.end_preparation();
        Ok(())
    }

    /// Step 5: waits for those who may still read the clusters, then gives them back.
    fn release(&self, storage: &Arc<dyn Storage>, frees: Vec<Run>) -> Result<()> {
        let _nobody = self.in_use.write().unwrap_or_else(PoisonError::into_inner);
        let mut metadata = self.lock();
        // A place may get other contents from here on.
        self.inflated.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let mut unused: Option<Run> = None;
        let give_back = |run: Run| {
            let start = self.geometry.offset(run.first);
            let end = self.geometry.offset(run.end()).min(storage.size());
            // A hint that fails costs space on the host, nothing else.
            let _ = storage.discard(Span::new(start, end.saturating_sub(start)));
        };
        for run in frees {
            for cluster in metadata.refcounts.release(&self.file, run)? {
                metadata.refcounts.metadata.remove(&cluster);
                metadata.l2.remove(self.geometry.offset(cluster));
                match &mut unused {
                    Some(run) if run.end() == cluster => run.count = run.count.saturating_add(1),
                    _ => {
                        let before = unused.replace(Run { first: cluster, count: 1 });
                        before.map(give_back).unwrap_or_default();
                    }
                }
            }
        }
        unused.map(give_back).unwrap_or_default();
        if metadata.lazy || metadata.bulk.is_some() {
            return Ok(());
        }
        write_blocks(&mut metadata, storage)
    }

    /// Cuts off what the file grew in advance.
    fn trim(&self, storage: &Arc<dyn Storage>) -> Result<()> {
        let metadata = self.lock();
        let end = self.geometry.offset(metadata.refcounts.end).max(self.original_len);
        if storage.size() > end { storage.set_len(end) } else { Ok(()) }
    }
}

/// Writes the refcount blocks that have changed. Counts on disk may be higher than the
/// references there, so this needs no order.
pub(crate) fn write_blocks(metadata: &mut Metadata, storage: &Arc<dyn Storage>) -> Result<()> {
    if !metadata.refcounts.blocks.has_dirty() {
        return Ok(());
    }
    for (offset, block) in metadata.refcounts.blocks.start_writing() {
        storage.write_at(&block, offset)?;
        metadata.refcounts.blocks.written(offset);
    }
    Ok(())
}

/// The changed sectors of a table at `offset`.
fn sectors(table: &[u64], offset: u64, changed: &BTreeSet<usize>) -> Vec<Piece> {
    let sector = |number: &usize| {
        let entries = table.chunks(SECTOR_ENTRIES).nth(*number)?;
        Some((offset.saturating_add(to_u64(*number).saturating_mul(512)), to_bytes(entries)))
    };
    changed.iter().filter_map(sector).collect()
}
