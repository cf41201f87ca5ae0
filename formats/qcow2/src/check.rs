// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Comparing reference counts with references.

use crate::geometry::{COPIED, Geometry, Mapping, OFFSET, to_u64, to_usize};
use crate::header::Header;
use crate::image::Qcow2;
use crate::refcounts::{count_at, read_table};
use crate::snapshots;
use std::collections::{BTreeMap, HashMap, HashSet};
use tranship_block::{BlockDevice, Result};

/// Descriptions of corruptions that a report keeps.
const MOST_DETAILS: usize = 100;
/// Clusters that are counted in one piece of memory.
const PAGE: u64 = 4096;

/// What a check has found; all numbers count clusters unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// References that are wrong or that are not counted: writing would lose data.
    pub corruptions: u64,
    /// The first of them in words.
    pub details: Vec<String>,
    /// Clusters with a higher count than references: wasted space.
    pub leaks: u64,
    /// Clusters that the virtual size has.
    pub total_clusters: u64,
    /// Guest clusters that are stored in the image.
    pub allocated_clusters: u64,
    /// Of these, compressed ones.
    pub compressed_clusters: u64,
    /// The byte after the last cluster that is in use.
    pub image_end_offset: u64,
}

impl Report {
    fn corruption(&mut self, detail: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(1);
        if self.details.len() < MOST_DETAILS {
            self.details.push(detail());
        }
    }
}

/// Counts every reference in the image in `file` and compares; changes nothing.
///
/// Persistent bitmaps are not looked into: their clusters count as leaks.
///
/// # Errors
///
/// What keeps the image from being opened, and I/O errors.
pub fn check(file: &dyn BlockDevice) -> Result<Report> {
    let header = Header::read(file)?;
    examine(file, &header).map(|(report, _)| report)
}

/// The report, and the clusters that are counted but referenced by nothing, in order.
pub(crate) fn examine(file: &dyn BlockDevice, header: &Header) -> Result<(Report, Vec<u64>)> {
    header.check_supported()?;
    let geometry = header.geometry();
    let mut walk = Walk {
        file,
        geometry,
        counts: HashMap::new(),
        report: Report { total_clusters: geometry.clusters_for(header.size), ..Report::default() },
        unreferenced: Vec::new(),
    };
    walk.tables(header)?;
    walk.compare(header)?;
    Ok((walk.report, walk.unreferenced))
}

impl Qcow2 {
    /// Checks the image's reference counts, after a flush if it is writable.
    ///
    /// # Errors
    ///
    /// I/O errors.
    pub fn check(&self) -> Result<Report> {
        self.flush_all()?;
        check(&self.file)
    }
}

struct Walk<'a> {
    file: &'a dyn BlockDevice,
    geometry: Geometry,
    /// References per cluster, in pages: the file may be huge and hollow.
    counts: HashMap<u64, Vec<u64>>,
    report: Report,
    /// Clusters that nothing references although they are counted.
    unreferenced: Vec<u64>,
}

impl Walk<'_> {
    /// Counts `times` references to each cluster of a range; `false` if it is not in the file.
    fn count(&mut self, what: &str, offset: u64, bytes: u64, times: u64) -> bool {
        let size = self.file.size();
        if offset.checked_add(bytes).is_none_or(|end| end > size.next_multiple_of(512)) {
            self.report
                .corruption(|| format!("{what} at {offset:#x} ends past the file's {size} bytes"));
            return false;
        }
        let first = self.geometry.index(offset);
        let last = self.geometry.clusters_for(offset.saturating_add(bytes));
        for cluster in first..last {
            let page = self
                .counts
                .entry(cluster / PAGE)
                .or_insert_with(|| vec![0; usize::try_from(PAGE).unwrap_or(0)]);
            let index = usize::try_from(cluster % PAGE).unwrap_or(0);
            if let Some(count) = page.get_mut(index) {
                *count = count.saturating_add(times);
            }
        }
        true
    }

    fn counted(&self, cluster: u64) -> u64 {
        let index = usize::try_from(cluster % PAGE).unwrap_or(0);
        self.counts.get(&(cluster / PAGE)).and_then(|page| page.get(index)).copied().unwrap_or(0)
    }

    fn tables(&mut self, header: &Header) -> Result<()> {
        let cluster = self.geometry.cluster();
        self.count("header", 0, 1, 1);
        let clusters = u64::from(header.refcount_table_clusters);
        let bytes = self.geometry.offset(clusters);
        self.count("refcount table", header.refcount_table_offset, bytes, 1);
        let (snapshots, bytes) = snapshots::read(self.file, header)?;
        if bytes > 0 {
            self.count("snapshot table", header.snapshots_offset, bytes, 1);
        }
        for entry in
            read_table(self.file, header.refcount_table_offset, self.geometry.offset(clusters) / 8)?
        {
            match self.geometry.block_offset(entry) {
                Ok(0) => {}
                Ok(offset) => {
                    self.count("refcount block", offset, cluster, 1);
                }
                Err(error) => self.report.corruption(|| error.to_string()),
            }
        }
        let entries = u64::from(header.l1_size);
        self.count("L1 table", header.l1_table_offset, entries.saturating_mul(8), 1);
        let active = read_table(self.file, header.l1_table_offset, entries)?;
        let mut l2 = BTreeMap::new();
        self.l1(&active, &mut l2);
        for snapshot in snapshots {
            match snapshots::l1_entries(self.file, snapshot) {
                Ok(entries) => {
                    let bytes = to_u64(entries.len()).saturating_mul(8);
                    self.count("L1 table of a snapshot", snapshot.l1_table_offset, bytes, 1);
                    self.l1(&entries, &mut l2);
                }
                Err(error) => self.report.corruption(|| error.to_string()),
            }
        }
        let active: HashSet<u64> = active.iter().map(|entry| entry & OFFSET).collect();
        for (offset, times) in l2 {
            self.l2(offset, times, active.contains(&offset))?;
        }
        Ok(())
    }

    /// Counts how often each L2 table is referenced: a table that many entries share is
    /// read once, so that a small image cannot keep the check busy for days.
    fn l1(&mut self, entries: &[u64], l2: &mut BTreeMap<u64, u64>) {
        for (index, entry) in entries.iter().enumerate() {
            let guest = self.geometry.offset(self.geometry.first_of(index));
            match self.geometry.l2_offset(*entry, guest) {
                Ok(None) => {}
                Ok(Some(host)) => {
                    let times = l2.entry(host.offset).or_insert(0_u64);
                    *times = times.saturating_add(1);
                }
                Err(error) => self.report.corruption(|| error.to_string()),
            }
        }
    }

    fn l2(&mut self, offset: u64, times: u64, is_active: bool) -> Result<()> {
        let cluster = self.geometry.cluster();
        if !self.count("L2 table", offset, cluster, times) {
            return Ok(());
        }
        for (index, entry) in (0_u64..).zip(read_table(self.file, offset, self.geometry.entries())?)
        {
            let mapping = match self.geometry.mapping(entry, self.geometry.offset(index)) {
                Ok(mapping) => mapping,
                Err(error) => {
                    self.report.corruption(|| format!("L2 table at {offset:#x}: {error}"));
                    continue;
                }
            };
            let (start, len) = match mapping {
                Mapping::Unallocated | Mapping::Zero { reserved: None } => continue,
                Mapping::Zero { reserved: Some(host) } | Mapping::Data(host) => {
                    (host.offset, cluster)
                }
                Mapping::Compressed { start, len } => (start, len),
            };
            // The last cluster of a file may be shorter than others.
            let len = len.min(self.file.size().saturating_sub(start)).max(1);
            if is_active {
                let report = &mut self.report;
                report.allocated_clusters = report.allocated_clusters.saturating_add(1);
                let compressed = u64::from(matches!(mapping, Mapping::Compressed { .. }));
                report.compressed_clusters = report.compressed_clusters.saturating_add(compressed);
            }
            self.count("cluster of the guest", start, len, times);
        }
        Ok(())
    }

    fn compare(&mut self, header: &Header) -> Result<()> {
        let per_block = self.geometry.per_block();
        let bytes = self.geometry.offset(u64::from(header.refcount_table_clusters));
        let table = read_table(self.file, header.refcount_table_offset, bytes / 8)?;
        let mut seen = HashSet::new();
        for (number, entry) in (0_u64..).zip(&table) {
            let Ok(offset) = self.geometry.block_offset(*entry) else { continue };
            let end = offset.saturating_add(self.geometry.cluster());
            if offset == 0 || end > self.file.size() || !seen.insert(offset) {
                continue;
            }
            let mut block = vec![0; to_usize(self.geometry.cluster())?];
            self.file.read_at(&mut block, offset)?;
            for index in 0..per_block {
                let cluster = number.saturating_mul(per_block).saturating_add(index);
                let count = count_at(&block, index, self.geometry.refcount_order);
                self.compare_one(cluster, count);
            }
        }
        let mut uncounted: Vec<u64> = Vec::new();
        for (page, counts) in &self.counts {
            for (index, count) in (0_u64..).zip(counts) {
                let cluster = page.saturating_mul(PAGE).saturating_add(index);
                let number = cluster.checked_div(per_block).unwrap_or(0);
                let entry = table.get(to_usize(number)?).copied().unwrap_or(0);
                if *count > 0 && entry == 0 {
                    uncounted.push(cluster);
                }
            }
        }
        uncounted.sort_unstable();
        for cluster in uncounted {
            self.compare_one(cluster, 0);
        }
        self.copied(header, &table)
    }

    fn compare_one(&mut self, cluster: u64, count: u64) {
        let references = self.counted(cluster);
        if count > 0 || references > 0 {
            let end = self.geometry.offset(cluster.saturating_add(1));
            self.report.image_end_offset = self.report.image_end_offset.max(end);
        }
        if count > references {
            self.report.leaks = self.report.leaks.saturating_add(1);
            if references == 0 {
                self.unreferenced.push(cluster);
            }
        } else if count < references {
            self.report.corruption(|| {
                format!("cluster {cluster} has {references} references, but a count of {count}")
            });
        }
    }

    /// COPIED in the active tables has to mean a count of one.
    fn copied(&mut self, header: &Header, table: &[u64]) -> Result<()> {
        let entries = u64::from(header.l1_size);
        let active = read_table(self.file, header.l1_table_offset, entries)?;
        let mut seen = HashSet::new();
        let mut blocks = HashMap::new();
        for entry in active {
            let offset = entry & OFFSET;
            let end = offset.saturating_add(self.geometry.cluster());
            if offset == 0 || end > self.file.size() || !seen.insert(offset) {
                continue;
            }
            self.copied_entry("L1", entry, table, &mut blocks)?;
            for entry in read_table(self.file, offset, self.geometry.entries())? {
                let reserved = matches!(
                    self.geometry.mapping(entry, 0),
                    Ok(Mapping::Data(_) | Mapping::Zero { reserved: Some(_) })
                );
                if reserved {
                    self.copied_entry("L2", entry, table, &mut blocks)?;
                }
            }
        }
        Ok(())
    }

    fn copied_entry(
        &mut self,
        level: &str,
        entry: u64,
        table: &[u64],
        blocks: &mut HashMap<u64, Vec<u8>>,
    ) -> Result<()> {
        let cluster = self.geometry.index(entry & OFFSET);
        let per_block = self.geometry.per_block();
        let number = cluster.checked_div(per_block).unwrap_or(0);
        let offset = table.get(to_usize(number)?).copied().unwrap_or(0);
        let end = offset.saturating_add(self.geometry.cluster());
        if offset == 0 || end > self.file.size() {
            return Ok(());
        }
        if !blocks.contains_key(&offset) {
            blocks.clear();
            let mut block = vec![0; to_usize(self.geometry.cluster())?];
            self.file.read_at(&mut block, offset)?;
            blocks.insert(offset, block);
        }
        let index = cluster.checked_rem(per_block).unwrap_or(0);
        let order = self.geometry.refcount_order;
        let count = blocks.get(&offset).map_or(0, |block| count_at(block, index, order));
        if (entry & COPIED != 0) != (count == 1) {
            self.report.corruption(|| {
                format!("{level} entry {entry:#x} has the wrong COPIED flag for a count of {count}")
            });
        }
        Ok(())
    }
}
