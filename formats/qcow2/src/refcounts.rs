// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reference counts: the table, its blocks, and finding clusters that nobody uses.

mod append;

use crate::cache::Cache;
use crate::geometry::{Geometry, to_u64, to_usize};
use crate::header::LARGEST_REFCOUNT_TABLE;
use crate::metadata::Run;
use std::collections::{BTreeSet, HashSet};
use tranship_block::{BlockDevice, Error, ErrorKind, Result};

/// Entries of a table that are written together: one sector of 512 bytes.
pub(crate) const SECTOR_ENTRIES: usize = 64;

#[derive(Debug)]
pub(crate) struct Refcounts {
    geometry: Geometry,
    pub(crate) table: Vec<u64>,
    pub(crate) table_offset: u64,
    /// Sectors of the table that have changed.
    pub(crate) changed: BTreeSet<usize>,
    /// The table has grown and moved: the header does not point to it yet.
    pub(crate) moved: bool,
    pub(crate) blocks: Cache<Vec<u8>>,
    /// No cluster below is free.
    free_from: u64,
    /// The cluster after the last one that was given out.
    pub(crate) end: u64,
    /// The byte after the last compressed stream; more fits into its cluster unless it is
    /// the first byte of one.
    packed_end: u64,
    /// Clusters of tables and blocks: never given out, never written as payload.
    pub(crate) metadata: HashSet<u64>,
}

/// Reads a table of 64-bit entries at `offset`.
pub(crate) fn read_table(file: &dyn BlockDevice, offset: u64, entries: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; to_usize(entries.saturating_mul(8))?];
    file.read_at(&mut bytes, offset)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|raw| u64::from_be_bytes(*raw)).collect())
}

/// A table's entries as they are on disk.
pub(crate) fn to_bytes(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

impl Refcounts {
    pub(crate) fn new(geometry: Geometry, table_offset: u64, table: Vec<u64>) -> Self {
        Self {
            geometry,
            table,
            table_offset,
            changed: BTreeSet::new(),
            moved: false,
            blocks: Cache::new(geometry.cluster()),
            free_from: 1,
            end: 0,
            packed_end: 0,
            metadata: HashSet::new(),
        }
    }

    /// Which block counts `cluster`, and where in it.
    fn place(&self, cluster: u64) -> (usize, u64) {
        let per_block = self.geometry.per_block();
        let block = cluster.checked_div(per_block).unwrap_or(0);
        let index = cluster.checked_rem(per_block).unwrap_or(0);
        (usize::try_from(block).unwrap_or(usize::MAX), index)
    }

    /// The offset of block `number`, 0 if there is none.
    fn block_offset(&self, number: usize) -> Result<u64> {
        self.geometry.block_offset(self.table.get(number).copied().unwrap_or(0))
    }

    fn load(&mut self, file: &dyn BlockDevice, offset: u64) -> Result<std::sync::Arc<Vec<u8>>> {
        if let Some(block) = self.blocks.get(offset) {
            return Ok(block);
        }
        if offset.saturating_add(self.geometry.cluster()) > file.size() {
            return Err(Error::corrupt(format!(
                "refcount block at {offset:#x} ends past the file's {} bytes",
                file.size()
            ))
            .at(offset));
        }
        let mut block = vec![0; self.geometry.cluster_len()];
        file.read_at(&mut block, offset)?;
        Ok(self.blocks.insert(offset, block, false))
    }

    /// How often `cluster` is referenced, as the image counts it.
    pub(crate) fn get(&mut self, file: &dyn BlockDevice, cluster: u64) -> Result<u64> {
        let (number, index) = self.place(cluster);
        match self.block_offset(number)? {
            0 => Ok(0),
            offset => {
                let block = self.load(file, offset)?;
                Ok(count_at(&block, index, self.geometry.refcount_order))
            }
        }
    }

    /// Stores the reference count of `cluster`, whose block must exist.
    pub(crate) fn set(&mut self, file: &dyn BlockDevice, cluster: u64, count: u64) -> Result<()> {
        let (number, index) = self.place(cluster);
        let offset = self.block_offset(number)?;
        if offset == 0 || count > self.geometry.refcount_max() {
            return Err(Error::corrupt(format!(
                "cluster {cluster} cannot have a reference count of {count}"
            ))
            .at(self.geometry.offset(cluster)));
        }
        self.load(file, offset)?;
        let order = self.geometry.refcount_order;
        self.blocks.modify(offset, |block| set_count(block, index, order, count));
        if count == 0 {
            self.free_from = self.free_from.min(cluster.max(1));
            // Whoever gets the cluster next may not share it.
            if self.geometry.index(self.packed_end) == cluster {
                self.packed_end = 0;
            }
        }
        Ok(())
    }

    /// Takes one reference to each cluster of `run` away; returns those that are free now.
    pub(crate) fn release(&mut self, file: &dyn BlockDevice, run: Run) -> Result<Vec<u64>> {
        let mut free = Vec::new();
        for cluster in run.first..run.first.saturating_add(run.count) {
            let count = self.get(file, cluster)?.checked_sub(1).ok_or_else(|| {
                Error::corrupt(format!("cluster {cluster} is freed, but its reference count is 0"))
                    .at(self.geometry.offset(cluster))
            })?;
            self.set(file, cluster, count)?;
            if count == 0 {
                free.push(cluster);
            }
        }
        Ok(free)
    }

    /// Takes up to `want` neighbouring free clusters and counts one reference to each.
    ///
    /// Clusters that a larger refcount table replaced are added to `replaced`.
    pub(crate) fn allocate(
        &mut self,
        file: &dyn BlockDevice,
        want: u64,
        replaced: &mut Vec<Run>,
    ) -> Result<Run> {
        let order = self.geometry.refcount_order;
        let want = want.max(1);
        let mut run = Run { first: self.free_from, count: 0 };
        while run.count < want {
            let (number, index) = self.place(run.end());
            let offset = self.block_offset(number)?;
            if offset == 0 {
                if run.count > 0 {
                    break;
                }
                self.add_block(number, replaced)?;
                continue;
            }
            let block = self.load(file, offset)?;
            let end = self.geometry.per_block();
            let is_free = |index: &u64| count_at(&block, *index, order) == 0;
            let most = end.min(index.saturating_add(want.saturating_sub(run.count)));
            let free = to_u64((index..most).take_while(is_free).count());
            if free == 0 {
                if run.count > 0 {
                    break;
                }
                let used = (index..end).take_while(|index| !is_free(index)).count();
                run.first = run.first.saturating_add(to_u64(used));
                continue;
            }
            run.count = run.count.saturating_add(free);
            if index.saturating_add(free) < most {
                break;
            }
        }
        let mut taken = run.first..run.end();
        if let Some(cluster) = taken.find(|cluster| self.metadata.contains(cluster)) {
            return Err(Error::corrupt(format!(
                "cluster {cluster} holds metadata, but its reference count is 0"
            ))
            .at(self.geometry.offset(cluster)));
        }
        self.set_ones(file, run)?;
        self.free_from = run.end();
        self.end = self.end.max(run.end());
        Ok(run)
    }

    /// Counts one reference to each cluster of a run whose blocks exist.
    fn set_ones(&mut self, file: &dyn BlockDevice, run: Run) -> Result<()> {
        let order = self.geometry.refcount_order;
        let mut next = run.first;
        while next < run.end() {
            let (number, index) = self.place(next);
            let offset = self.block_offset(number)?;
            let left = run.end().saturating_sub(next);
            let end = self.geometry.per_block().min(index.saturating_add(left));
            self.load(file, offset)?;
            self.blocks.modify(offset, |block| {
                for index in index..end {
                    set_count(block, index, order, 1);
                }
            });
            next = next.saturating_add(end.saturating_sub(index));
        }
        Ok(())
    }

    /// The first cluster of `run` that is not referenced exactly once, and its count.
    pub(crate) fn first_not_one(
        &mut self,
        file: &dyn BlockDevice,
        run: Run,
    ) -> Result<Option<(u64, u64)>> {
        let order = self.geometry.refcount_order;
        let mut next = run.first;
        while next < run.end() {
            let (number, index) = self.place(next);
            let offset = self.block_offset(number)?;
            if offset == 0 {
                return Ok(Some((next, 0)));
            }
            let block = self.load(file, offset)?;
            let left = run.end().saturating_sub(next);
            let end = self.geometry.per_block().min(index.saturating_add(left));
            for (cluster, index) in (next..).zip(index..end) {
                let count = count_at(&block, index, order);
                if count != 1 {
                    return Ok(Some((cluster, count)));
                }
            }
            next = next.saturating_add(end.saturating_sub(index));
        }
        Ok(None)
    }

    /// Takes `len` bytes, at most a cluster, for a compressed stream; returns their offset.
    ///
    /// Streams follow each other without gaps as long as the clusters do: each cluster
    /// counts the streams that touch it.
    pub(crate) fn allocate_bytes(
        &mut self,
        file: &dyn BlockDevice,
        len: u64,
        replaced: &mut Vec<Run>,
    ) -> Result<u64> {
        let geometry = self.geometry;
        let start = self.packed_end;
        let within = geometry.within(start);
        let cluster = geometry.index(start);
        let count = if within == 0 { 0 } else { self.get(file, cluster)? };
        let can_share = count > 0 && count < geometry.refcount_max();
        if can_share && within.saturating_add(len) <= geometry.cluster() {
            self.set(file, cluster, count.saturating_add(1))?;
            self.packed_end = start.saturating_add(len);
            return Ok(start);
        }
        let next = self.allocate(file, 1, replaced)?;
        let mut start = start;
        if can_share && next.first == cluster.saturating_add(1) {
            self.set(file, cluster, count.saturating_add(1))?;
        } else {
            start = geometry.offset(next.first);
        }
        self.packed_end = start.saturating_add(len);
        Ok(start)
    }

    /// Adds the missing block `number`, which counts itself as its first cluster.
    fn add_block(&mut self, number: usize, replaced: &mut Vec<Run>) -> Result<()> {
        if number >= self.table.len() {
            return self.grow_table(replaced);
        }
        let cluster = to_u64(number).saturating_mul(self.geometry.per_block());
        if cluster == 0 || self.metadata.contains(&cluster) {
            return Err(Error::corrupt(format!(
                "clusters from {cluster} on are used, but have no reference counts"
            )));
        }
        self.insert_block(number, cluster, [cluster])
    }

    /// Makes block `number` in `cluster`, with a reference to each of `counted`.
    pub(crate) fn insert_block(
        &mut self,
        number: usize,
        cluster: u64,
        counted: impl IntoIterator<Item = u64>,
    ) -> Result<()> {
        let offset = self.geometry.offset(cluster);
        let mut block = vec![0; self.geometry.cluster_len()];
        for cluster in counted {
            let (_, index) = self.place(cluster);
            set_count(&mut block, index, self.geometry.refcount_order, 1);
        }
        *self.table.get_mut(number).ok_or_else(table_is_full)? = offset;
        self.changed.insert(number / SECTOR_ENTRIES);
        self.blocks.insert(offset, block, true);
        self.metadata.insert(cluster);
        self.end = self.end.max(cluster.saturating_add(1));
        Ok(())
    }

    /// Moves the full table to where the clusters that it cannot count begin, twice as large.
    ///
    /// New blocks come first, then the table; both are counted by these blocks. Nothing
    /// of it is referenced on disk until the header is.
    fn grow_table(&mut self, replaced: &mut Vec<Run>) -> Result<()> {
        let geometry = self.geometry;
        let old_clusters = geometry.clusters_for(to_u64(self.table.len()).saturating_mul(8));
        let table_clusters = old_clusters.saturating_mul(2);
        if geometry.offset(table_clusters) > LARGEST_REFCOUNT_TABLE {
            return Err(table_is_full());
        }
        let per_block = geometry.per_block();
        let mut blocks = 1_u64;
        while table_clusters.saturating_add(blocks) > blocks.saturating_mul(per_block) {
            blocks = blocks.saturating_add(1);
        }
        let old_len = self.table.len();
        let first = to_u64(old_len).saturating_mul(per_block);
        let end = first.saturating_add(blocks).saturating_add(table_clusters);
        let new_len = to_usize(geometry.offset(table_clusters) / 8)?;
        self.table.resize(new_len, 0);
        for block in 0..blocks {
            let number = old_len.saturating_add(to_usize(block)?);
            let from = to_u64(number).saturating_mul(per_block);
            let until = from.saturating_add(per_block).min(end);
            self.insert_block(number, first.saturating_add(block), from..until)?;
        }
        let old = Run { first: geometry.index(self.table_offset), count: old_clusters };
        replaced.push(old);
        for cluster in old.first..old.end() {
            self.metadata.remove(&cluster);
        }
        self.table_offset = geometry.offset(first.saturating_add(blocks));
        self.metadata.extend(first.saturating_add(blocks)..end);
        self.moved = true;
        self.end = self.end.max(end);
        Ok(())
    }
}

fn table_is_full() -> Error {
    Error::new(
        ErrorKind::NoSpace,
        format!("refcount table cannot grow past {LARGEST_REFCOUNT_TABLE} bytes"),
    )
}

/// The reference count at `index` of a block whose counts have `1 << order` bits.
pub(crate) fn count_at(block: &[u8], index: u64, order: u32) -> u64 {
    let Ok(index) = usize::try_from(index) else { return 0 };
    if order < 3 {
        let (byte, shift, mask) = packed(index, order);
        return block.get(byte).map_or(0, |byte| u64::from(byte.wrapping_shr(shift) & mask));
    }
    let width = 1_usize.wrapping_shl(order.wrapping_sub(3));
    let at = index.saturating_mul(width);
    let bytes = block.get(at..at.saturating_add(width)).unwrap_or_default();
    bytes.iter().fold(0, |count, byte| count.wrapping_shl(8) | u64::from(*byte))
}

pub(crate) fn set_count(block: &mut [u8], index: u64, order: u32, count: u64) {
    let Ok(index) = usize::try_from(index) else { return };
    let raw = count.to_be_bytes();
    if order < 3 {
        let (at, shift, mask) = packed(index, order);
        let [.., low] = raw;
        if let Some(byte) = block.get_mut(at) {
            *byte = (*byte & !mask.wrapping_shl(shift)) | (low & mask).wrapping_shl(shift);
        }
        return;
    }
    let width = 1_usize.wrapping_shl(order.wrapping_sub(3));
    let at = index.saturating_mul(width);
    let source = raw.get(raw.len().saturating_sub(width)..).unwrap_or_default();
    if let Some(bytes) = block.get_mut(at..at.saturating_add(width)) {
        bytes.copy_from_slice(source);
    }
}

/// Byte, shift and mask of a count narrower than a byte; the first is in the lowest bits.
fn packed(index: usize, order: u32) -> (usize, u32, u8) {
    let bits = 1_u32.wrapping_shl(order);
    let in_byte = 3_u32.wrapping_sub(order);
    let number = index & 1_usize.wrapping_shl(in_byte).wrapping_sub(1);
    let shift = u32::try_from(number).unwrap_or(0).wrapping_mul(bits);
    (index.wrapping_shr(in_byte), shift, u8::MAX.wrapping_shr(8_u32.wrapping_sub(bits)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_keep_their_neighbours() {
        for order in 0..=6 {
            let geometry = Geometry {
                cluster_bits: 9,
                refcount_order: order,
                version: 3,
                extended: false,
                external: false,
            };
            let max = geometry.refcount_max();
            let mut block = vec![0; 512];
            for index in 0..geometry.per_block() {
                let count = (index.wrapping_mul(0x9e37_79b9_7f4a_7c15)) & max;
                set_count(&mut block, index, order, count);
            }
            for index in 0..geometry.per_block() {
                let count = (index.wrapping_mul(0x9e37_79b9_7f4a_7c15)) & max;
                assert_eq!(count_at(&block, index, order), count, "order {order} at {index}");
            }
        }
    }

    #[test]
    fn narrow_counts_start_at_the_lowest_bit() {
        assert_eq!(count_at(&[0b0000_0001], 0, 0), 1);
        assert_eq!(count_at(&[0b0000_0110], 1, 1), 1);
        assert_eq!(count_at(&[0x21], 1, 2), 2);
        assert_eq!(count_at(&[0x12, 0x34], 0, 4), 0x1234);
    }
}
