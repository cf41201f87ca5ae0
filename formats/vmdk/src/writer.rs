// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Space in a sparse extent that is open for writing, and its tables on their way to the
//! file.
//!
//! What a table entry refers to is on stable storage before the entry is: payload, flush,
//! redundant tables, primary tables, flush. A power cut leaves at worst grains at the end
//! of the file that nothing refers to; to ESX they are taken.

use crate::busy::Busy;
use crate::layout::Layout;
use crate::line::ExtentType;
use crate::table::{Table, Tables};
use crate::{SECTOR, cowd};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Span, Storage};

/// Entries of changed tables that are kept before they are written: 4 MiB.
pub(crate) const MOST_CHANGED: u64 = 1 << 20;
/// Tables next to each other that are written at once.
const LARGEST_WRITE: usize = 1 << 20;
/// Grains whose old places are remembered.
const MOST_RETIRED: usize = 1 << 20;

/// What writing to a sparse extent needs besides reading it.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) storage: Arc<dyn Storage>,
    /// Grains that are about to be mapped.
    pub(crate) busy: Busy,
    /// The byte behind everything that was given out.
    end: Mutex<u64>,
    /// Header, descriptor, directories and tables, ascending.
    metadata: RwLock<Vec<Span>>,
    /// Where grains were before they were declared zero: only they go there again.
    retired: Mutex<HashMap<u64, u64>>,
    turn: Mutex<()>,
    /// The `freeSector` that the header of a COWD extent has, once it was written.
    free_sector: AtomicU32,
    failed: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writer {
    /// New grains go behind the end of the file, and behind byte `end`.
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        layout: &Layout,
        tables: &Tables,
        end: u64,
    ) -> Self {
        let grain = layout.grain.get();
        let end = storage.size().max(end).div_ceil(grain).saturating_mul(grain);
        let load = |list: &[AtomicU32]| -> Vec<u32> {
            list.iter().map(|entry| entry.load(Ordering::Acquire)).collect()
        };
        let metadata = metadata(layout, &load(&tables.primary), &load(&tables.redundant));
        let metadata = RwLock::new(metadata);
        Self {
            storage,
            busy: Busy::default(),
            end: Mutex::new(end),
            metadata,
            retired: Mutex::default(),
            turn: Mutex::default(),
            free_sector: AtomicU32::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// Space for `len` bytes, whole grains, at the end of the file.
    pub(crate) fn allocate(&self, layout: &Layout, len: u64) -> Result<u64> {
        let grain = layout.grain.get();
        let len = len.div_ceil(grain).saturating_mul(grain);
        let mut end = lock(&self.end);
        let start = *end;
        let next = start.saturating_add(len);
        if u32::try_from(next / SECTOR).is_err() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "a sparse extent cannot grow beyond 2 TiB, which its table entries can express",
            )
            .at(start));
        }
        if next > self.storage.size() {
            self.storage.set_len(next)?;
        }
        *end = next;
        Ok(start)
    }

    /// Refuses a grain whose place is also that of metadata.
    pub(crate) fn check(&self, span: Span) -> Result<()> {
        let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
        let index = metadata.partition_point(|area| area.end() <= span.start);
        match metadata.get(index) {
            Some(area) if area.start < span.end() => Err(Error::corrupt(format!(
                "a grain lies in the metadata at {:#x}: check the disk before it is written",
                area.start
            ))
            .at(span.start)),
            _ => Ok(()),
        }
    }

    /// Remembers where grain `index` was.
    pub(crate) fn retire(&self, index: u64, at: u64) {
        let mut retired = lock(&self.retired);
        if retired.len() < MOST_RETIRED {
            retired.insert(index, at);
        }
    }

    /// Where grain `index` was, if that is known.
    pub(crate) fn retired(&self, index: u64) -> Option<u64> {
        lock(&self.retired).get(&index).copied()
    }

    /// Grain `index` is where it was.
    pub(crate) fn revive(&self, index: u64) {
        lock(&self.retired).remove(&index);
    }

    /// Makes sure that there is a table `index`.
    pub(crate) fn need_table(&self, layout: &Layout, tables: &Tables, index: usize) -> Result<()> {
        let missing = |list: &[AtomicU32]| {
            list.get(index).is_some_and(|entry| entry.load(Ordering::Acquire) == 0)
        };
        if !missing(&tables.primary) {
            return Ok(());
        }
        let _turn = lock(&self.turn);
        if !missing(&tables.primary) {
            return Ok(());
        }
        let stride = layout.table_stride();
        let copies = if tables.redundant.is_empty() { 1 } else { 2 };
        let len = stride.saturating_mul(copies);
        let start = self.allocate(layout, len)?;
        self.storage.write_at(&vec![0; usize::try_from(len).unwrap_or(0)], start)?;
        self.store_end(layout)?;
        self.storage.flush()?;
        let mut added = Span::new(start, stride);
        let copies = [(&tables.redundant, layout.redundant), (&tables.primary, layout.directory)];
        let mut place = start;
        for (list, directory) in copies {
            let (Some(entry), Some(directory)) = (list.get(index), directory) else { continue };
            let sector = u32::try_from(place / SECTOR).unwrap_or(0);
            let offset = u64::try_from(index).unwrap_or(u64::MAX).saturating_mul(4);
            self.storage.write_at(&sector.to_le_bytes(), directory.saturating_add(offset))?;
            entry.store(sector, Ordering::Release);
            added.len = place.saturating_add(stride).saturating_sub(start);
            place = place.saturating_add(stride);
        }
        // It is at the end of the file, and so of the list.
        self.metadata.write().unwrap_or_else(PoisonError::into_inner).push(added);
        Ok(())
    }

    /// Tells ESX that what was given out is not free any more, before anything refers to
    /// it.
    fn store_end(&self, layout: &Layout) -> Result<()> {
        if layout.kind != ExtentType::VmfsSparse {
            return Ok(());
        }
        let sector = u32::try_from(*lock(&self.end) / SECTOR).unwrap_or(u32::MAX);
        if self.free_sector.load(Ordering::Acquire) != sector {
            self.storage.write_at(&sector.to_le_bytes(), cowd::FREE_SECTOR)?;
            self.free_sector.store(sector, Ordering::Release);
        }
        Ok(())
    }

    /// Brings everything to stable storage.
    pub(crate) fn flush(&self, layout: &Layout, tables: &Tables) -> Result<()> {
        let _turn = lock(&self.turn);
        if self.failed.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Io,
                "an earlier flush of the disk failed: what was written since is lost",
            ));
        }
        let changed = tables.lock().changed();
        let result = self.write_tables(layout, tables, &changed);
        if result.is_err() {
            self.failed.store(true, Ordering::Release);
            return result;
        }
        tables.lock().written(changed);
        Ok(())
    }

    fn write_tables(
        &self,
        layout: &Layout,
        tables: &Tables,
        changed: &BTreeMap<usize, Arc<Table>>,
    ) -> Result<()> {
        if !changed.is_empty() {
            self.store_end(layout)?;
        }
        self.storage.flush()?;
        if changed.is_empty() {
            return Ok(());
        }
        for copy in [&tables.redundant, &tables.primary] {
            let mut run: Vec<u8> = Vec::new();
            let mut start = 0_u64;
            for (index, table) in changed {
                let Some(entry) = copy.get(*index) else { continue };
                let at = layout.table_at(entry.load(Ordering::Acquire));
                // A copy that was lost is not brought back by writing: check does that.
                if Span::new(at, layout.table_len()).check_within(self.storage.size()).is_err()
                    || at < SECTOR
                {
                    continue;
                }
                let len = u64::try_from(run.len()).unwrap_or(u64::MAX);
                if at != start.saturating_add(len) || run.len() >= LARGEST_WRITE {
                    self.write_run(&run, start)?;
                    run.clear();
                    start = at;
                }
                for entry in 0..layout.table_entries.get() {
                    let entry = u32::try_from(table.entry(entry)).unwrap_or(0);
                    run.extend(entry.to_le_bytes());
                }
            }
            self.write_run(&run, start)?;
        }
        self.storage.flush()
    }

    fn write_run(&self, run: &[u8], start: u64) -> Result<()> {
        if run.is_empty() { Ok(()) } else { self.storage.write_at(run, start) }
    }
}

/// Bytes of the header at the front.
pub(crate) fn header_len(layout: &Layout) -> u64 {
    if layout.kind == ExtentType::VmfsSparse { cowd::HEADER_LEN } else { SECTOR }
}

/// Where the metadata is, ascending and joined; `primary` and `redundant` are the two
/// directories.
pub(crate) fn metadata(layout: &Layout, primary: &[u32], redundant: &[u32]) -> Vec<Span> {
    let directory_len = layout.directory_entries.saturating_mul(layout.entry_len());
    let mut areas = vec![Span::new(0, header_len(layout))];
    areas.extend(layout.descriptor);
    areas.extend(layout.directory.map(|at| Span::new(at, directory_len)));
    areas.extend(layout.redundant.map(|at| Span::new(at, directory_len)));
    let entries = primary.iter().chain(redundant).filter(|entry| **entry != 0);
    areas.extend(entries.map(|entry| Span::new(layout.table_at(*entry), layout.table_len())));
    areas.sort_by_key(|area| area.start);
    let mut joined: Vec<Span> = Vec::new();
    for area in areas {
        match joined.last_mut() {
            Some(last) if area.start <= last.end() => {
                last.len = area.end().max(last.end()).saturating_sub(last.start);
            }
            _ => joined.push(area),
        }
    }
    joined
}
