// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking one sparse extent: both copies of directory and tables, the places of grains,
//! and what is left over.

use crate::SECTOR;
use crate::compressed::max_stored;
use crate::directory::{self, is_usable};
use crate::footer::{self, MARKER};
use crate::layout::{Entries, Layout, Place};
use crate::table::{Table, read_table};
use crate::writer::metadata;
use tranship_block::{
    BlockDevice, CheckReport, Error, Extents, LittleEndian, Repair, Result, Span, Storage, is_zero,
};

/// Grains whose places are compared with each other: 1 GiB of memory.
const MOST_PLACES: usize = 256 << 20;

/// Bytes of a block of a file system, at most.
const LARGEST_BLOCK: u64 = 64 << 10;

/// The check of one extent.
pub(crate) struct Checker<'a> {
    storage: &'a dyn Storage,
    layout: Layout,
    repair: Repair,
    report: &'a mut CheckReport,
    primary: Vec<u32>,
    redundant: Vec<u32>,
    /// Header, descriptor, directories and tables.
    metadata: Vec<Span>,
    /// Sectors at which grains are stored.
    places: Vec<u32>,
    /// Where the next grain would be if it followed the one before.
    expected: Option<u64>,
    /// Contradictions of this extent that are left.
    corruptions: u64,
}

impl<'a> Checker<'a> {
    pub(crate) fn new(
        storage: &'a dyn Storage,
        layout: Layout,
        repair: Repair,
        report: &'a mut CheckReport,
    ) -> Self {
        Self {
            storage,
            layout,
            repair,
            report,
            primary: Vec::new(),
            redundant: Vec::new(),
            metadata: Vec::new(),
            places: Vec::new(),
            expected: None,
            corruptions: 0,
        }
    }

    pub(crate) fn run(mut self) -> Result<()> {
        self.report.total_clusters =
            self.report.total_clusters.saturating_add(self.layout.grains());
        if !self.read_directories() {
            return Ok(());
        }
        if self.layout.descriptor.is_some_and(|at| at.check_within(self.storage.size()).is_err()) {
            self.corruption(|| "the embedded descriptor ends past the end of the file".to_owned());
        }
        self.check_entangled();
        self.mend_directories()?;
        self.metadata = metadata(&self.layout, &self.primary, &self.redundant);
        self.check_shared_tables();
        for index in 0..self.primary.len() {
            self.check_table(index)?;
        }
        self.check_places();
        let end = self.metadata.last().map_or(0, Span::end);
        self.report.image_end_offset = self.report.image_end_offset.max(end);
        if self.corruptions == 0 && !self.layout.compressed {
            self.check_leaks()?;
        }
        Ok(())
    }

    fn corruption(&mut self, detail: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(1);
        self.report.corruption(detail);
    }

    /// A contradiction that was mended, if this is wanted, or stays.
    fn mended(&mut self, detail: impl FnOnce() -> String) {
        if self.repair == Repair::All {
            self.report.corruptions_fixed = self.report.corruptions_fixed.saturating_add(1);
            self.report.note(detail);
        } else {
            self.corruption(detail);
        }
    }

    fn read_directories(&mut self) -> bool {
        let read = |at: Option<u64>, name: &str| {
            let at = at
                .filter(|at| *at != 0)
                .ok_or_else(|| Error::corrupt(format!("the header names no {name}")))?;
            directory::read_at(&self.storage, &self.layout, at, name, false)
        };
        let primary = read(self.layout.directory, "grain directory");
        let redundant = self.layout.redundant.map(|at| read(Some(at), "redundant grain directory"));
        match redundant {
            Some(Ok(redundant)) => self.redundant = redundant,
            Some(Err(error)) => self.corruption(|| error.to_string()),
            None => {}
        }
        match primary {
            Ok(primary) => {
                self.primary = primary;
                true
            }
            Err(error) => {
                self.corruption(|| error.to_string());
                false
            }
        }
    }

    /// Finds directory entries that lead nowhere while their other copy does not.
    fn mend_directories(&mut self) -> Result<()> {
        let size = self.storage.size();
        for index in 0..self.primary.len() {
            let own = self.primary.get(index).copied().unwrap_or(0);
            let copy = self.redundant.get(index).copied().unwrap_or(0);
            let usable = |entry| is_usable(&self.layout, entry, size);
            match (usable(own), usable(copy)) {
                (true, true) => {}
                (false, true) => {
                    self.mended(|| {
                        format!("grain directory entry {index} is {own:#x}: its copy is used")
                    });
                    self.copy_table(index, copy, false)?;
                }
                (true, false) if self.redundant.is_empty() => {}
                (true, false) => {
                    self.mended(|| format!("redundant grain directory entry {index} is {copy:#x}"));
                    self.copy_table(index, own, true)?;
                }
                (false, false) if own == 0 && copy == 0 => {}
                (false, false) => self.corruption(|| {
                    format!("grain directory entry {index} is {own:#x}, which is no table")
                }),
            }
        }
        Ok(())
    }

    /// Gives directory entry `index` a table of its own, the same as the one at `entry`.
    fn copy_table(&mut self, index: usize, entry: u32, redundant: bool) -> Result<()> {
        let (list, directory) = if redundant {
            (&mut self.redundant, self.layout.redundant)
        } else {
            (&mut self.primary, self.layout.directory)
        };
        let (Some(slot), Some(directory)) = (list.get_mut(index), directory) else {
            return Ok(());
        };
        if self.repair != Repair::All {
            *slot = entry;
            return Ok(());
        }
        let mut bytes = vec![0; usize::try_from(self.layout.table_stride()).unwrap_or(0)];
        let from = self.layout.table_at(entry);
        let len = usize::try_from(self.layout.table_len()).unwrap_or(0);
        self.storage.read_at(bytes.get_mut(..len).unwrap_or_default(), from)?;
        let at = self.storage.size().div_ceil(SECTOR).saturating_mul(SECTOR);
        let sector = u32::try_from(at / SECTOR).map_err(|_| {
            Error::unsupported("the file has 2 TiB: there is no room for another grain table")
        })?;
        self.storage.set_len(at.saturating_add(self.layout.table_stride()))?;
        self.storage.write_at(&bytes, at)?;
        self.storage.flush()?;
        *slot = sector;
        let offset = u64::try_from(index).unwrap_or(u64::MAX).saturating_mul(4);
        self.storage.write_at(&sector.to_le_bytes(), directory.saturating_add(offset))?;
        self.storage.flush()
    }

    /// Finds tables and directories that lie on each other. Nothing is mended then: what is
    /// written to one would damage the other.
    fn check_entangled(&mut self) {
        let (layout, size) = (&self.layout, self.storage.size());
        let entries = self.primary.iter().chain(&self.redundant);
        let mut areas: Vec<Span> = entries
            .filter(|entry| is_usable(layout, **entry, size))
            .map(|entry| Span::new(layout.table_at(*entry), layout.table_len()))
            .collect();
        areas.sort_unstable_by_key(|area| area.start);
        // Both directories may name the same table.
        areas.dedup();
        areas.extend(metadata_in_front(layout));
        areas.sort_unstable_by_key(|area| area.start);
        let overlaps =
            areas.windows(2).filter(|pair| matches!(pair, [a, b] if a.end() > b.start)).count();
        if overlaps > 0 {
            self.corruption(|| format!("{overlaps} tables and directories lie on others"));
            self.repair = Repair::Nothing;
        }
    }

    /// Finds tables that several directory entries name.
    fn check_shared_tables(&mut self) {
        let mut tables: Vec<u32> =
            self.primary.iter().copied().filter(|entry| *entry != 0).collect();
        tables.sort_unstable();
        let shared = tables.windows(2).filter(|pair| matches!(pair, [a, b] if a == b)).count();
        if shared > 0 {
            self.corruption(|| format!("{shared} grain tables are named more than once"));
        }
    }

    /// Looks at both copies of table `index`.
    fn check_table(&mut self, index: usize) -> Result<()> {
        let own_entry = self.primary.get(index).copied().unwrap_or(0);
        let copy_entry = self.redundant.get(index).copied().unwrap_or(0);
        if own_entry == 0 || !is_usable(&self.layout, own_entry, self.storage.size()) {
            return Ok(());
        }
        let own = read_table(&self.storage, &self.layout, index, own_entry)?;
        let copy = if copy_entry == 0 || copy_entry == own_entry {
            None
        } else {
            Some(read_table(&self.storage, &self.layout, index, copy_entry)?)
        };
        let same = copy.as_ref().is_none_or(|copy| *copy == own);
        if same && own.uniform() == Some(0) {
            return Ok(());
        }
        let count = self.layout.table_entries.get();
        let first = u64::try_from(index).unwrap_or(u64::MAX).saturating_mul(count);
        let mut merged = own.clone();
        for number in 0..count {
            let grain = first.saturating_add(number);
            if grain >= self.layout.grains() {
                break;
            }
            let entry = self.better(&own, copy.as_ref(), grain, number);
            if entry != own.entry(number)
                && let Some(entries) = merged.narrow(count)
                && let Some(slot) = entries.get_mut(usize::try_from(number).unwrap_or(usize::MAX))
            {
                *slot = u32::try_from(entry).unwrap_or(0);
            }
            self.check_grain(grain, entry);
        }
        if !same || merged != own {
            let differs = !same;
            self.mended(|| {
                format!(
                    "grain table {index} {}",
                    if differs { "differs from its copy" } else { "is damaged" }
                )
            });
            if self.repair == Repair::All {
                self.store(&merged, copy_entry)?;
                self.store(&merged, own_entry)?;
            }
        }
        Ok(())
    }

    fn store(&self, table: &Table, entry: u32) -> Result<()> {
        if entry == 0 {
            return Ok(());
        }
        let mut bytes = Vec::new();
        for number in 0..self.layout.table_entries.get() {
            bytes.extend(u32::try_from(table.entry(number)).unwrap_or(0).to_le_bytes());
        }
        self.storage.write_at(&bytes, self.layout.table_at(entry))?;
        self.storage.flush()
    }

    /// The entry of a grain that can be trusted most: of a table that was lost its copy
    /// knows more, and otherwise the primary table is right.
    fn better(&self, own: &Table, copy: Option<&Table>, grain: u64, number: u64) -> u64 {
        let entry = own.entry(number);
        let Some(copy) = copy else { return entry };
        let other = copy.entry(number);
        let good = |entry| self.fault(grain, entry).is_none();
        if entry != other && other != 0 && good(other) && (entry == 0 || !good(entry)) {
            return other;
        }
        entry
    }

    /// What is wrong with the place of a grain.
    fn fault(&self, grain: u64, entry: u64) -> Option<String> {
        let at = match self.layout.place(entry) {
            Ok(Place::Absent | Place::Zero) => return None,
            Ok(Place::Stored(at)) => at,
            Err(error) => return Some(error.to_string()),
        };
        let len = if self.layout.compressed { MARKER } else { self.layout.needed_len(grain) };
        let span = Span::new(at, len);
        if span.check_within(self.storage.size()).is_err() {
            return Some(format!("grain {grain} at {at:#x} ends past the end of the file"));
        }
        let index = self.metadata.partition_point(|area| area.end() <= at);
        match self.metadata.get(index) {
            Some(area) if area.start < span.end() => {
                Some(format!("grain {grain} at {at:#x} lies in the metadata"))
            }
            _ => None,
        }
    }

    /// Counts a grain and finds what is wrong with its place.
    fn check_grain(&mut self, grain: u64, entry: u64) {
        if let Some(fault) = self.fault(grain, entry) {
            self.corruption(|| fault);
            return;
        }
        let Ok(Place::Stored(at)) = self.layout.place(entry) else { return };
        let report = &mut *self.report;
        report.allocated_clusters = report.allocated_clusters.saturating_add(1);
        let len = if self.layout.compressed {
            report.compressed_clusters = report.compressed_clusters.saturating_add(1);
            match marker(self.storage, &self.layout, grain, at) {
                Ok(len) => len,
                Err(error) => {
                    self.corruption(|| error.to_string());
                    return;
                }
            }
        } else {
            if self.expected.is_some_and(|expected| expected != at) {
                report.fragmented_clusters = report.fragmented_clusters.saturating_add(1);
            }
            self.expected = Some(at.saturating_add(self.layout.grain.get()));
            self.layout.grain.get()
        };
        report.image_end_offset = report.image_end_offset.max(at.saturating_add(len));
        if self.places.len() < MOST_PLACES
            && let Ok(sector) = u32::try_from(at / SECTOR)
        {
            self.places.push(sector);
        }
    }

    /// Finds grains that share bytes.
    fn check_places(&mut self) {
        self.places.sort_unstable();
        let len = if self.layout.compressed { 1 } else { self.layout.grain.get() / SECTOR };
        let shared = self
            .places
            .windows(2)
            .filter(|pair| matches!(pair, [a, b] if u64::from(b.saturating_sub(*a)) < len))
            .count();
        if shared > 0 {
            self.corruption(|| format!("{shared} grains share their place with another one"));
        }
    }

    /// Finds space behind the first tables that belongs to nothing.
    fn check_leaks(&mut self) -> Result<()> {
        if !matches!(self.layout.entries, Entries::Sectors { .. }) {
            return Ok(());
        }
        let grain = self.layout.grain.get();
        let grains = self
            .places
            .iter()
            .map(|sector| Span::new(u64::from(*sector).saturating_mul(SECTOR), grain));
        let mut areas: Vec<Span> = grains.chain(self.metadata.iter().copied()).collect();
        areas.sort_unstable_by_key(|area| area.start);
        let size = self.storage.size();
        let mut end = self.layout.overhead.max(SECTOR);
        let mut gaps = Vec::new();
        for area in areas {
            let start = area.start.min(size);
            if start.saturating_sub(end) >= grain {
                gaps.push(Span::new(end, start.saturating_sub(end)));
            }
            end = end.max(area.end());
        }
        for gap in gaps {
            if takes_space(self.storage, gap)? {
                self.leak(gap, |storage| storage.discard(gap))?;
            }
        }
        if size.saturating_sub(end) >= grain {
            let tail = Span::new(end, size.saturating_sub(end));
            self.leak(tail, |storage| storage.set_len(end))?;
        }
        Ok(())
    }

    fn leak(&mut self, span: Span, give_back: impl Fn(&dyn Storage) -> Result<()>) -> Result<()> {
        let count = span.len / self.layout.grain;
        let text = format!("{count} grains at {:#x} belong to nothing", span.start);
        if self.repair == Repair::Nothing {
            self.report.leak(count, || text);
            return Ok(());
        }
        give_back(self.storage)?;
        self.storage.flush()?;
        self.report.leaks_fixed = self.report.leaks_fixed.saturating_add(count);
        self.report.note(|| text);
        Ok(())
    }
}

/// Header, descriptor and directories.
fn metadata_in_front(layout: &Layout) -> Vec<Span> {
    let len = layout.directory_entries.saturating_mul(layout.entry_len());
    let redundant = layout.redundant.filter(|at| Some(*at) != layout.directory);
    let directories = layout.directory.into_iter().chain(redundant);
    let header = [Span::new(0, SECTOR)];
    header
        .into_iter()
        .chain(layout.descriptor)
        .chain(directories.map(|at| Span::new(at, len)))
        .collect()
}

/// Whether something is stored in `gap`. A hole takes no space: that is where discarded
/// grains were. At its edges are blocks of the file system that it has to itself in part
/// only; after a discard these hold zeroes.
fn takes_space(file: &dyn BlockDevice, gap: Span) -> Result<bool> {
    let mut bytes = Vec::new();
    for (span, kind) in Extents::new(file, gap).filter_map(Result::ok) {
        if kind.reads_zero() {
            continue;
        }
        if span.len > LARGEST_BLOCK {
            return Ok(true);
        }
        bytes.resize(usize::try_from(span.len).unwrap_or(0), 0);
        file.read_at(&mut bytes, span.start)?;
        if !is_zero(&bytes) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Checks the marker of compressed grain `grain` at byte `at`; returns its length with
/// padding.
fn marker(file: &dyn BlockDevice, layout: &Layout, grain: u64, at: u64) -> Result<u64> {
    let mut bytes = [0; 12];
    file.read_at(&mut bytes, at)?;
    let fields = LittleEndian(&bytes, "grain marker");
    let (lba, size) = (fields.u64("lba", 0)?, u64::from(fields.u32("size", 8)?));
    let expected = grain.saturating_mul(layout.grain.get() / SECTOR);
    let end = at.saturating_add(footer::MARKER).saturating_add(size);
    if lba != expected || size == 0 || size > max_stored(layout) || end > file.size() {
        return Err(Error::corrupt(format!(
            "marker of grain {grain} says {size} bytes for guest sector {lba}, expected sector \
             {expected} and bytes within the file"
        ))
        .at(at));
    }
    Ok(end.saturating_sub(at).div_ceil(SECTOR).saturating_mul(SECTOR))
}
