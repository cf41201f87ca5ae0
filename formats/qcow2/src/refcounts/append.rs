// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Taking many neighbouring clusters after everything else.

use super::{Refcounts, table_is_full};
use crate::geometry::{to_u64, to_usize};
use crate::header::LARGEST_REFCOUNT_TABLE;
use crate::metadata::Run;
use tranship_block::{BlockDevice, Result};

impl Refcounts {
    /// Takes the `count` clusters from `from` on, which must be past everything in use.
    /// Blocks that are missing for them, and a larger table, follow them.
    ///
    /// Clusters that a larger refcount table replaced are added to `replaced`.
    pub(crate) fn append(
        &mut self,
        file: &dyn BlockDevice,
        from: u64,
        count: u64,
        replaced: &mut Vec<Run>,
    ) -> Result<Run> {
        let geometry = self.geometry;
        let per_block = geometry.per_block();
        let old_len = to_u64(self.table.len());
        let old_clusters = geometry.clusters_for(old_len.saturating_mul(8));
        let mut extra = 0_u64;
        // What is appended has to be counted itself, which may take more of it.
        let (missing, table_clusters, end) = loop {
            let end = from.saturating_add(count).saturating_add(extra);
            let mut missing = Vec::new();
            let last = end.saturating_sub(1).checked_div(per_block).unwrap_or(0);
            for number in from.checked_div(per_block).unwrap_or(0)..=last {
                if number >= old_len || self.block_offset(to_usize(number)?)? == 0 {
                    missing.push(number);
                }
            }
            let mut table_clusters = 0;
            if last >= old_len {
                let needed = geometry.clusters_for(last.saturating_add(1).saturating_mul(8));
                table_clusters = needed.max(old_clusters.saturating_mul(2));
            }
            if geometry.offset(table_clusters) > LARGEST_REFCOUNT_TABLE {
                return Err(table_is_full());
            }
            let needed = to_u64(missing.len()).saturating_add(table_clusters);
            if needed <= extra {
                break (missing, table_clusters, end);
            }
            extra = needed;
        };
        if table_clusters > 0 {
            let old = Run { first: geometry.index(self.table_offset), count: old_clusters };
            replaced.push(old);
            for cluster in old.first..old.end() {
                self.metadata.remove(&cluster);
            }
            self.table.resize(to_usize(geometry.offset(table_clusters) / 8)?, 0);
            let place = end.saturating_sub(table_clusters);
            self.table_offset = geometry.offset(place);
            self.metadata.extend(place..end);
            self.moved = true;
        }
        for (place, number) in (from.saturating_add(count)..).zip(&missing) {
            self.insert_block(to_usize(*number)?, place, [])?;
        }
        for cluster in from..end {
            self.set(file, cluster, 1)?;
        }
        self.end = self.end.max(end);
        Ok(Run { first: from, count })
    }
}
