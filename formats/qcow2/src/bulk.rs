// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writing an image that nobody reads yet.
//!
//! Until the header is there the file is no image, so the order of all other writes does
//! not matter: tables stay in memory as long as they fit, go to disk many at a time, and
//! the header comes last. Who is interrupted leaves a file without a magic behind.

use crate::geometry::{COPIED, to_u64};
use crate::metadata::{Metadata, Run};
use crate::refcounts::to_bytes;
use crate::write::reach;
use tranship_block::{Result, Span, Storage, Zeroing};

/// Most bytes of neighbouring tables that are written at once.
const MOST_AT_ONCE: usize = 4 << 20;

/// Writes the tables that have changed, in no order.
pub(crate) fn write_tables(metadata: &mut Metadata, storage: &dyn Storage) -> Result<()> {
    reach(metadata, storage)?;
    let blocks = metadata.refcounts.blocks.start_writing();
    let mut joined = Joined::new(storage);
    for (offset, block) in &blocks {
        joined.add(*offset, block)?;
    }
    joined.write()?;
    for (offset, _) in &blocks {
        metadata.refcounts.blocks.written(*offset);
    }
    let tables = metadata.l2.start_writing();
    for (offset, table) in &tables {
        joined.add(*offset, &to_bytes(table))?;
    }
    joined.write()?;
    for (offset, _) in &tables {
        metadata.l2.written(*offset);
    }
    Ok(())
}

/// Writes all that is missing, and last the header; the image is an ordinary one then.
pub(crate) fn finish(metadata: &mut Metadata, storage: &dyn Storage) -> Result<()> {
    let ahead = std::mem::replace(&mut metadata.tables_ahead, Run { first: 0, count: 0 });
    metadata.refcounts.release(&storage, ahead)?;
    write_tables(metadata, storage)?;
    let Some(mut header) = metadata.bulk.take() else { return Ok(()) };
    let refcounts = &mut metadata.refcounts;
    write_used(storage, &refcounts.table, refcounts.table_offset)?;
    refcounts.changed.clear();
    if std::mem::take(&mut refcounts.moved) {
        let bytes = to_u64(refcounts.table.len()).saturating_mul(8);
        let clusters = metadata.geometry.clusters_for(bytes);
        let fields = refcounts.table_offset.to_be_bytes();
        let clusters = u32::try_from(clusters).unwrap_or(u32::MAX).to_be_bytes();
        let new = fields.into_iter().chain(clusters);
        header.iter_mut().skip(48).zip(new).for_each(|(old, new)| *old = new);
    }
    write_used(storage, &metadata.l1, metadata.l1_offset)?;
    metadata.l1_changed.clear();
    let end = metadata.geometry.offset(metadata.refcounts.end);
    if storage.size() > end {
        storage.set_len(end)?;
    }
    storage.flush()?;
    storage.write_at(&header, 0)?;
    storage.flush()
}

/// Writes a table, whose place is zero, up to its last entry that is not.
fn write_used(storage: &dyn Storage, table: &[u64], offset: u64) -> Result<()> {
    let used = table.iter().rposition(|entry| *entry != 0).map_or(0, |last| last.saturating_add(1));
    let bytes = to_bytes(table.get(..used).unwrap_or_default());
    storage.write_at(&bytes, offset)
}

/// Maps every cluster of a disk of `size` bytes; without `allocated`, no subcluster is.
pub(crate) fn map_all(metadata: &mut Metadata, storage: &dyn Storage, size: u64) -> Result<()> {
    let geometry = metadata.geometry;
    let clusters = geometry.clusters_for(size);
    let mut next = 0;
    while next < clusters {
        let (l1_index, l2_index) = geometry.l1_l2(next);
        metadata.own_table(&storage, l1_index)?;
        let left = geometry.entries().saturating_sub(to_u64(l2_index));
        let want = left.min(clusters.saturating_sub(next));
        let run = if geometry.external {
            Run { first: next, count: want }
        } else {
            metadata.allocate(&storage, want)?
        };
        for number in 0..run.count {
            let host = geometry.offset(run.first.saturating_add(number));
            metadata.set_entry(next.saturating_add(number), host | COPIED, 0)?;
        }
        next = next.saturating_add(run.count);
        if metadata.l2.is_crowded() || metadata.refcounts.blocks.is_crowded() {
            write_tables(metadata, storage)?;
        }
    }
    reach(metadata, storage)
}

/// Reserves `span` of `storage`, or fills it with zeroes.
pub(crate) fn reserve(storage: &dyn Storage, span: Span, fill: bool) -> Result<()> {
    if !fill {
        return storage.write_zeroes(span, Zeroing::KeepAllocated);
    }
    let zeroes = vec![0; 1 << 20];
    let mut offset = span.start;
    while offset < span.end() {
        let left = usize::try_from(span.end().saturating_sub(offset)).unwrap_or(usize::MAX);
        let now = zeroes.get(..left).unwrap_or(&zeroes);
        storage.write_at(now, offset)?;
        offset = offset.saturating_add(to_u64(now.len()));
    }
    Ok(())
}

/// Neighbouring pieces, to be written at once.
struct Joined<'a> {
    storage: &'a dyn Storage,
    offset: u64,
    bytes: Vec<u8>,
}

impl<'a> Joined<'a> {
    fn new(storage: &'a dyn Storage) -> Self {
        Self { storage, offset: 0, bytes: Vec::new() }
    }

    fn add(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let end = self.offset.saturating_add(to_u64(self.bytes.len()));
        if offset != end || self.bytes.len() >= MOST_AT_ONCE {
            self.write()?;
            self.offset = offset;
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        if !self.bytes.is_empty() {
            self.storage.write_at(&self.bytes, self.offset)?;
            self.bytes.clear();
        }
        self.offset = 0;
        Ok(())
    }
}
