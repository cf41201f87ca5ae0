// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking for contradictions in the tables, and for clusters without an owner.

use crate::disk::ZERO;
use crate::header::Header;
use crate::table::{PIECE, read};
use std::collections::HashMap;
use tranship_block::{BlockDevice, CheckReport, Result, Span};

/// Checks the image in `file` without changing it: tables and clusters that are outside of
/// the file or used twice, and clusters that nothing refers to. The backing file is not
/// needed.
///
/// # Errors
///
/// Those of [`Header::read`], and I/O errors.
pub fn check(file: &dyn BlockDevice) -> Result<CheckReport> {
    let header = Header::read(file)?;
    let cluster = u64::from(header.cluster_size);
    let report = CheckReport {
        total_clusters: header.image_size.div_ceil(cluster.max(1)),
        ..CheckReport::default()
    };
    let mut walk = Walk { file, header: &header, report, used: Used::default() };
    walk.take(0, u64::from(header.header_size).saturating_mul(cluster), "header");
    walk.take(header.l1_table_offset, header.table_len(), "L1 table");
    walk.l1()?;
    let clusters = file.size().div_ceil(cluster.max(1));
    let leaks = clusters.saturating_sub(walk.used.count);
    if leaks > 0 {
        walk.report.leak(leaks, || format!("Leaked {leaks} clusters that nothing refers to"));
    }
    Ok(walk.report)
}

/// Clusters that something refers to: one bit each, in words.
#[derive(Debug, Default)]
struct Used {
    words: HashMap<u64, u64>,
    count: u64,
}

impl Used {
    /// Whether it was not there before.
    fn insert(&mut self, cluster: u64) -> bool {
        let word = self.words.entry(cluster / 64).or_default();
        let bit = 1_u64.rotate_left(u32::try_from(cluster % 64).unwrap_or(0));
        let is_new = *word & bit == 0;
        *word |= bit;
        self.count = self.count.saturating_add(u64::from(is_new));
        is_new
    }
}

struct Walk<'a> {
    file: &'a dyn BlockDevice,
    header: &'a Header,
    report: CheckReport,
    used: Used,
}

impl Walk<'_> {
    /// Whether `len` bytes at `at` can be a table or data.
    fn is_place(&self, at: u64, len: u64) -> bool {
        let cluster = u64::from(self.header.cluster_size);
        let front = u64::from(self.header.header_size).saturating_mul(cluster);
        let is_within = Span::new(at, len).check_within(self.file.size()).is_ok();
        at >= front && at.is_multiple_of(cluster) && is_within
    }

    /// Notes that `what` has the clusters of `len` bytes at `at`; whether all were free.
    fn take(&mut self, at: u64, len: u64, what: &str) -> bool {
        let shift = self.header.cluster_size.trailing_zeros();
        let first = at.checked_shr(shift).unwrap_or(0);
        let end = at
            .saturating_add(len)
            .min(self.file.size())
            .div_ceil(u64::from(self.header.cluster_size).max(1));
        let mut is_alone = true;
        for cluster in first..end {
            if !self.used.insert(cluster) {
                is_alone = false;
                self.report
                    .corruption(|| format!("ERROR cluster {cluster} of a {what} is used twice"));
            }
        }
        is_alone
    }

    /// Calls `visit` with the entries of the table at `at`, as far as the file has them.
    fn table(&mut self, at: u64, mut visit: impl FnMut(&mut Self, u64, u64)) -> Result<()> {
        let there = self.file.size().saturating_sub(at) / 8;
        let entries = self.header.entries().min(there);
        let mut first = 0;
        while first < entries {
            let count = entries.saturating_sub(first).min(PIECE);
            let piece = read(self.file, at.saturating_add(first.saturating_mul(8)), count)?;
            for (index, entry) in (first..).zip(piece).filter(|(_, entry)| *entry != 0) {
                visit(self, index, entry);
            }
            first = first.saturating_add(count);
        }
        Ok(())
    }

    fn l1(&mut self) -> Result<()> {
        let mut tables = Vec::new();
        let len = self.header.table_len();
        self.table(self.header.l1_table_offset, |walk, index, l2| {
            if !walk.is_place(l2, len) {
                let text = || format!("ERROR L1 entry {index} is {l2:#x}, no place for a table");
                walk.report.corruption(text);
            } else if walk.take(l2, len, "L2 table") {
                // No two of them overlap, so that all are no larger than the file.
                tables.push((index, l2));
            }
        })?;
        for (index, l2) in tables {
            self.l2(index, l2)?;
        }
        Ok(())
    }

    fn l2(&mut self, number: u64, at: u64) -> Result<()> {
        let cluster = u64::from(self.header.cluster_size);
        let start = number.saturating_mul(self.header.covered_by_l2());
        let mut expected = None;
        self.table(at, |walk, index, entry| {
            if entry == ZERO {
                return;
            }
            let report = &mut walk.report;
            report.allocated_clusters = report.allocated_clusters.saturating_add(1);
            let next = entry.saturating_add(cluster);
            if expected.replace(next).is_some_and(|expected| expected != entry) {
                report.fragmented_clusters = report.fragmented_clusters.saturating_add(1);
            }
            let guest = start.saturating_add(index.saturating_mul(cluster));
            // The file may end with the disk, within its last cluster.
            let len = walk.header.image_size.saturating_sub(guest).clamp(1, cluster);
            if walk.is_place(entry, len) {
                walk.take(entry, len, "disk");
            } else {
                let text = || format!("ERROR cluster for {guest:#x} is at {entry:#x}, no place");
                walk.report.corruption(text);
            }
        })
    }
}
