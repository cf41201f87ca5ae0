// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Grain tables: read in bulk, kept in a cache of bounded size.

use crate::cache::Cache;
use crate::directory::{Directory, is_usable};
use crate::layout::{Entries, LOST, Layout};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tranship_block::{BlockDevice, Error, Result, Span, is_zero};

/// Bytes of tables that one read brings in where they follow each other and a caller
/// walks through them.
const WALKED: u64 = 1 << 20;
/// The same for a caller who jumps about.
const JUMPED: u64 = 32 << 10;

/// One grain table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    /// All entries have this value.
    Uniform(u64),
    /// Entries of 32 bits.
    Narrow(Vec<u32>),
    /// Entries of 64 bits.
    Wide(Vec<u64>),
}

impl Table {
    /// The table in `bytes`.
    fn parse(layout: &Layout, bytes: &[u8]) -> Self {
        if is_zero(bytes) {
            return Self::Uniform(0);
        }
        match layout.entries {
            Entries::Sectors { .. } => {
                let (entries, _) = bytes.as_chunks();
                let first = entries.first().copied().unwrap_or_default();
                if entries.iter().all(|entry| *entry == first) {
                    return Self::Uniform(u64::from(u32::from_le_bytes(first)));
                }
                Self::Narrow(entries.iter().map(|entry| u32::from_le_bytes(*entry)).collect())
            }
            Entries::SeSparse { .. } => {
                let (entries, _) = bytes.as_chunks();
                // Both are invalid, but one of them means that the table is lost.
                let number = |entry: &[u8; 8]| u64::from_le_bytes(*entry).min(LOST - 1);
                Self::Wide(entries.iter().map(number).collect())
            }
        }
    }

    /// The entry at `index`; 0 past the table's end.
    pub(crate) fn entry(&self, index: u64) -> u64 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        match self {
            Self::Uniform(entry) => *entry,
            Self::Narrow(entries) => entries.get(index).copied().map_or(0, u64::from),
            Self::Wide(entries) => entries.get(index).copied().unwrap_or(0),
        }
    }

    /// The value that every entry has, if they are known to agree.
    pub(crate) fn uniform(&self) -> Option<u64> {
        match self {
            Self::Uniform(entry) => Some(*entry),
            Self::Narrow(_) | Self::Wide(_) => None,
        }
    }

    /// All entries as 32-bit numbers, of which a table of `len` entries has that many;
    /// none if they are wider.
    pub(crate) fn narrow(&mut self, len: u64) -> Option<&mut Vec<u32>> {
        if let Self::Uniform(entry) = *self {
            let entry = u32::try_from(entry).unwrap_or(0);
            *self = Self::Narrow(vec![entry; usize::try_from(len).unwrap_or(0)]);
        }
        match self {
            Self::Narrow(entries) => Some(entries),
            Self::Uniform(_) | Self::Wide(_) => None,
        }
    }
}

/// The tables of one extent.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) primary: Vec<AtomicU32>,
    pub(crate) redundant: Vec<AtomicU32>,
    /// Number and sector of every grain, if the directory is lost and markers were read.
    scanned: Option<Vec<(u32, u32)>>,
    pub(crate) cache: Mutex<Cache>,
    /// The table that a caller who walks the disk will ask for.
    expected: AtomicUsize,
    salvage: bool,
}

impl Tables {
    /// The tables that `directory` names; in salvaged disks, lost ones are [`LOST`].
    pub(crate) fn new(layout: &Layout, directory: Directory, salvage: bool) -> Self {
        Self {
            primary: directory.primary.into_iter().map(AtomicU32::new).collect(),
            redundant: directory.redundant.into_iter().map(AtomicU32::new).collect(),
            scanned: None,
            cache: Mutex::new(Cache::new(layout)),
            expected: AtomicUsize::new(0),
            salvage,
        }
    }

    /// The tables of a stream whose markers have been read: number and sector of every
    /// grain, ascending.
    pub(crate) fn scanned(layout: &Layout, grains: Vec<(u32, u32)>) -> Self {
        let nothing = Directory { primary: Vec::new(), redundant: Vec::new(), warning: None };
        Self { scanned: Some(grains), ..Self::new(layout, nothing, false) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where table `index` is; 0 if there is none.
    fn place(&self, index: usize) -> u32 {
        self.primary.get(index).map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// Table number `index`, or none if the directory has no such table.
    pub(crate) fn get(
        &self,
        file: &dyn BlockDevice,
        layout: &Layout,
        index: u64,
    ) -> Result<Option<Arc<Table>>> {
        let Ok(index) = usize::try_from(index) else { return Ok(None) };
        if let Some(grains) = &self.scanned {
            return Ok(Some(self.gather(layout, grains, index)));
        }
        if self.place(index) == 0 {
            return Ok(None);
        }
        let changes = {
            let mut cache = self.lock();
            if let Some(table) = cache.get(index) {
                return Ok(Some(table));
            }
            cache.changes()
        };
        let walks = self.expected.load(Ordering::Relaxed) == index;
        let loaded = self.load(file, layout, index, if walks { WALKED } else { JUMPED })?;
        self.expected.store(index.saturating_add(loaded.len()), Ordering::Relaxed);
        let first = loaded.first().map(Arc::clone);
        let mut cache = self.lock();
        // A table that was written back in the meantime may be older here than on disk.
        if cache.changes() == changes {
            for (index, table) in (index..).zip(loaded) {
                cache.insert(index, table);
            }
        }
        Ok(first)
    }

    /// The table `index` out of grains that were found one by one.
    fn gather(&self, layout: &Layout, grains: &[(u32, u32)], index: usize) -> Arc<Table> {
        if let Some(table) = self.lock().get(index) {
            return table;
        }
        let count = layout.table_entries.get();
        let first = u64::try_from(index).unwrap_or(u64::MAX).saturating_mul(count);
        let from = grains.partition_point(|(grain, _)| u64::from(*grain) < first);
        let mut entries = vec![0; usize::try_from(count).unwrap_or(0)];
        for (grain, sector) in grains.get(from..).unwrap_or_default() {
            let within = u64::from(*grain).saturating_sub(first);
            let slot = usize::try_from(within).ok().and_then(|within| entries.get_mut(within));
            let Some(slot) = slot else { break };
            *slot = *sector;
        }
        let table = if entries.iter().all(|entry| *entry == 0) {
            Table::Uniform(0)
        } else {
            Table::Narrow(entries)
        };
        let table = Arc::new(table);
        self.lock().insert(index, Arc::clone(&table));
        table
    }

    /// Reads table `index` and those behind it that the directory lists back to back.
    fn load(
        &self,
        file: &dyn BlockDevice,
        layout: &Layout,
        index: usize,
        most: u64,
    ) -> Result<Vec<Arc<Table>>> {
        let size = file.size();
        let stride = layout.table_stride();
        let start = layout.table_at(self.place(index));
        let most = usize::try_from(most.checked_div(stride).unwrap_or(0)).unwrap_or(0).max(1);
        let expected = std::iter::successors(Some(start), |at| at.checked_add(stride));
        let run = self.primary.iter().skip(index).take(most).zip(expected);
        let count = run
            .take_while(|(entry, at)| {
                let entry = entry.load(Ordering::Acquire);
                layout.table_at(entry) == *at && is_usable(layout, entry, size)
            })
            .count();
        let last = u64::try_from(count.saturating_sub(1)).unwrap_or(0).saturating_mul(stride);
        let len = last.saturating_add(layout.table_len());
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        if count == 0 || file.read_at(&mut bytes, start).is_err() {
            return self.load_one(file, layout, index).map(|table| vec![Arc::new(table)]);
        }
        let stride = usize::try_from(stride).unwrap_or(usize::MAX).max(1);
        let len = usize::try_from(layout.table_len()).unwrap_or(0);
        let mut tables: Vec<Arc<Table>> = Vec::with_capacity(count);
        let parse = |chunk: &[u8]| Table::parse(layout, chunk.get(..len).unwrap_or(chunk));
        for table in bytes.chunks(stride).map(parse) {
            // Millions of empty tables share one.
            let same = tables.last().filter(|last| table.uniform().is_some() && ***last == table);
            let table = match same {
                Some(same) => Arc::clone(same),
                None => Arc::new(table),
            };
            tables.push(table);
        }
        Ok(tables)
    }

    /// Changes entries of table `index` from `first` on, in memory.
    pub(crate) fn put(
        &self,
        file: &dyn BlockDevice,
        layout: &Layout,
        index: usize,
        first: u64,
        values: impl Iterator<Item = u64>,
    ) -> Result<()> {
        let mut cache = self.lock();
        let table = match cache.get(index) {
            Some(table) => table,
            None => Arc::new(self.load_one(file, layout, index)?),
        };
        let entries = cache
            .dirty(index, table)
            .narrow(layout.table_entries.get())
            .ok_or_else(|| Error::unsupported("tables of this kind are not written"))?;
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        for (slot, value) in entries.iter_mut().skip(first).zip(values) {
            *slot = u32::try_from(value).map_err(|_| {
                Error::unsupported(format!("sector {value} does not fit into a table entry"))
            })?;
        }
        Ok(())
    }

    /// Reads table `index`, or its redundant copy if it is lost.
    pub(crate) fn load_one(
        &self,
        file: &dyn BlockDevice,
        layout: &Layout,
        index: usize,
    ) -> Result<Table> {
        let error = match read_table(file, layout, index, self.place(index)) {
            Ok(table) => return Ok(table),
            Err(error) => error,
        };
        let copy = self.redundant.get(index).map_or(0, |entry| entry.load(Ordering::Acquire));
        if copy != 0
            && copy != self.place(index)
            && let Ok(table) = read_table(file, layout, index, copy)
        {
            return Ok(table);
        }
        if self.salvage { Ok(Table::Uniform(LOST)) } else { Err(error) }
    }
}

/// Reads the table that directory entry `entry` with number `index` names.
pub(crate) fn read_table(
    file: &dyn BlockDevice,
    layout: &Layout,
    index: usize,
    entry: u32,
) -> Result<Table> {
    let start = layout.table_at(entry);
    if Span::new(start, layout.table_len()).check_within(file.size()).is_err() {
        return Err(Error::corrupt(format!(
            "grain table {index} ends past the file's size of {} bytes",
            file.size()
        ))
        .at(start));
    }
    let mut bytes = vec![0; usize::try_from(layout.table_len()).unwrap_or(0)];
    file.read_at(&mut bytes, start)?;
    Ok(Table::parse(layout, &bytes))
}
