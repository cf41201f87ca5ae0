// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Comparing the counts that the image has with those that were found.

use super::references::PAGE;
use super::walk::Walk;
use crate::geometry::{COPIED, OFFSET, to_u64, to_usize};
use crate::header::Header;
use crate::refcounts::count_at;
use crate::shape::{Reference, read_sparse};
use std::collections::HashSet;
use tranship_block::{BlockDevice, Result, is_zero};

/// Reads single counts, keeping the last block.
pub(crate) struct Counts<'a> {
    file: &'a dyn BlockDevice,
    table: &'a [u64],
    geometry: crate::geometry::Geometry,
    block: (u64, Vec<u8>),
}

impl<'a> Counts<'a> {
    pub(crate) fn new(
        file: &'a dyn BlockDevice,
        table: &'a [u64],
        geometry: crate::geometry::Geometry,
    ) -> Self {
        Self { file, table, geometry, block: (0, Vec::new()) }
    }

    /// The block that counts from `number` times the clusters of a block on, if it is in
    /// the file.
    pub(crate) fn block(&mut self, number: u64) -> Result<Option<(u64, &mut Vec<u8>)>> {
        let entry = self.table.get(to_usize(number)?).copied().unwrap_or(0);
        let Ok(offset) = self.geometry.block_offset(entry) else { return Ok(None) };
        if offset == 0 || offset >= self.file.size() {
            return Ok(None);
        }
        if self.block.0 != offset {
            let mut block = vec![0; self.geometry.cluster_len()];
            let there = to_usize(self.file.size().saturating_sub(offset))?.min(block.len());
            self.file.read_at(block.get_mut(..there).unwrap_or_default(), offset)?;
            self.block = (offset, block);
        }
        Ok(Some((offset, &mut self.block.1)))
    }

    pub(crate) fn get(&mut self, cluster: u64) -> Result<u64> {
        let per_block = self.geometry.per_block();
        let order = self.geometry.refcount_order;
        let index = cluster.checked_rem(per_block).unwrap_or(0);
        Ok(self
            .block(cluster.checked_div(per_block).unwrap_or(0))?
            .map_or(0, |(_, block)| count_at(block, index, order)))
    }

    /// Whether nothing that block `number` counts is in use.
    pub(crate) fn is_free(&mut self, number: u64) -> Result<bool> {
        Ok(self.block(number)?.is_none_or(|(_, block)| is_zero(block)))
    }

    /// The end of the last cluster in use, of those in front of `end`. A file may be far
    /// longer than what is in it: where no block counts, no cluster is looked at.
    pub(crate) fn used_end(&mut self, end: u64) -> Result<u64> {
        let per_block = self.geometry.per_block();
        let listed = self.table.iter().rposition(|entry| *entry != 0);
        let listed = listed.map_or(0, |last| to_u64(last).saturating_add(1));
        let mut end = end.min(listed.saturating_mul(per_block));
        while let Some(last) = end.checked_sub(1) {
            let number = last.checked_div(per_block).unwrap_or(0);
            if self.is_free(number)? {
                end = number.saturating_mul(per_block);
            } else if self.get(last)? == 0 {
                end = last;
            } else {
                break;
            }
        }
        Ok(end)
    }
}

impl Walk<'_> {
    /// Calls `differ` with the cluster, its count and its references wherever they differ,
    /// in order; notes where the image ends.
    pub(super) fn compare(
        &mut self,
        table: &[u64],
        mut differ: impl FnMut(&mut tranship_block::CheckReport, u64, u64, u64),
    ) -> Result<()> {
        let geometry = self.shape.geometry;
        let file_end = geometry.clusters_for(self.file.size());
        let per_block = geometry.per_block();
        let order = geometry.refcount_order;
        let mut counts = Counts::new(self.file, table, geometry);
        let mut last = 0;
        let mut one = |report: &mut tranship_block::CheckReport, cluster: u64, count, found| {
            if count > 0 || found > 0 {
                last = cluster.max(last);
            }
            if count != found {
                differ(report, cluster, count, found);
            }
        };
        // Where there is no block, only what is referenced has to be looked at.
        let mut pages = self.references.pages().into_iter().peekable();
        let mut seen = HashSet::new();
        let blocks = file_end.div_ceil(per_block);
        let mut number = 0;
        while number < blocks {
            let first = number.saturating_mul(per_block);
            let end = first.saturating_add(per_block).min(file_end);
            let is_here = table
                .get(to_usize(number)?)
                .is_some_and(|entry| *entry != 0 && (seen.len() < 1 << 20 && seen.insert(*entry)));
            let block = if is_here { counts.block(number)? } else { None };
            let Some((_, block)) = block else {
                while pages.peek().is_some_and(|page| page.saturating_add(PAGE) <= first) {
                    pages.next();
                }
                while let Some(page) = pages.peek().copied().filter(|page| *page < end) {
                    for cluster in page.max(first)..page.saturating_add(PAGE).min(end) {
                        one(&mut self.report, cluster, 0, self.references.get(cluster));
                    }
                    if page.saturating_add(PAGE) > end {
                        break;
                    }
                    pages.next();
                }
                number = self.next_of_interest(number, table, pages.peek().copied());
                continue;
            };
            let mut at = first;
            while at < end {
                let stop = (at / PAGE).saturating_add(1).saturating_mul(PAGE).min(end);
                if self.references.has_page(at) || !is_blank(block, at, stop, first, order) {
                    for cluster in at..stop {
                        let count = count_at(block, cluster.saturating_sub(first), order);
                        one(&mut self.report, cluster, count, self.references.get(cluster));
                    }
                }
                at = stop;
            }
            number = number.saturating_add(1);
        }
        self.report.image_end_offset = geometry.offset(last.saturating_add(1));
        Ok(())
    }

    /// The next block after `number` that exists or has references in its range.
    fn next_of_interest(&self, number: u64, table: &[u64], page: Option<u64>) -> u64 {
        let next = number.saturating_add(1);
        let at = usize::try_from(next).unwrap_or(usize::MAX);
        let rest = table.get(at..).unwrap_or_default();
        let skipped = rest.iter().position(|entry| *entry != 0);
        let block = skipped.map_or(u64::MAX, |skipped| next.saturating_add(to_u64(skipped)));
        let per_block = self.shape.geometry.per_block();
        let by_page =
            page.map_or(u64::MAX, |page| page.checked_div(per_block).unwrap_or(0).max(next));
        block.min(by_page)
    }

    /// COPIED in the active tables has to mean a count of one. Calls `wrong` with the place
    /// of the entry and what it should be.
    pub(super) fn copied(
        &mut self,
        header: &Header,
        table: &[u64],
        mut wrong: impl FnMut(u64, u64),
    ) -> Result<()> {
        let shape = self.shape;
        let geometry = shape.geometry;
        let mut counts = Counts::new(self.file, table, geometry);
        let l1_at = header.l1_table_offset;
        let Ok(active) = read_sparse(self.file, l1_at, u64::from(header.l1_size)) else {
            return Ok(());
        };
        let mut seen = HashSet::new();
        for (l1_index, entry) in active.into_iter().enumerate() {
            let offset = entry & OFFSET;
            let end = offset.saturating_add(geometry.cluster());
            if geometry.l2_offset(entry, 0).is_err()
                || offset == 0
                || end > self.file.size()
                || !seen.insert(offset)
            {
                continue;
            }
            let count = counts.get(geometry.index(offset))?;
            if (entry & COPIED != 0) != (count == 1) {
                wrong(l1_at.saturating_add(to_u64(l1_index).saturating_mul(8)), entry ^ COPIED);
                self.report.corruption(|| {
                    format!(
                        "ERROR OFLAG_COPIED L2 cluster: l1_index={l1_index} l1_entry={entry:x} \
                         refcount={count}"
                    )
                });
            }
            if shape.has_data_file {
                continue;
            }
            let first = to_u64(l1_index).saturating_mul(shape.entries());
            let table = read_sparse(self.file, offset, geometry.cluster() / 8)?;
            for (number, words) in (0_u64..).zip(table.chunks(shape.words())) {
                let guest = geometry.offset(first.saturating_add(number));
                let Ok(Reference::Cluster { offset: host, copied }) = shape.reference(words, guest)
                else {
                    continue;
                };
                let count = counts.get(geometry.index(host))?;
                if copied != (count == 1) {
                    let entry = words.first().copied().unwrap_or(0);
                    let step = to_u64(shape.words()).saturating_mul(8);
                    wrong(offset.saturating_add(number.saturating_mul(step)), entry ^ COPIED);
                    self.report.corruption(|| {
                        format!(
                            "ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}"
                        )
                    });
                }
            }
        }
        Ok(())
    }
}

/// Whether the counts of clusters `at` to `stop` are all zero; `first` is the block's first.
fn is_blank(block: &[u8], at: u64, stop: u64, first: u64, order: u32) -> bool {
    let byte = |cluster: u64, up: u64| {
        let bits = cluster.saturating_sub(first).wrapping_shl(order).saturating_add(up);
        usize::try_from(bits / 8).unwrap_or(usize::MAX)
    };
    block.get(byte(at, 0)..byte(stop, 7)).is_some_and(is_zero)
}
