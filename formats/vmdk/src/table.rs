// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Grain tables: read in bulk, kept in a cache of bounded size.

use crate::SECTOR;
use crate::header::Header;
use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{BlockDevice, Error, Result, Span};

/// Tables that one read brings in where they follow each other: 512 KiB of full tables.
const TABLES_PER_READ: usize = 256;
/// Tables in each of the cache's two generations: 4 MiB of full tables.
const GENERATION: usize = 2048;

/// One grain table.
#[derive(Debug)]
pub(crate) struct Table {
    entries: Vec<u32>,
    uniform: Option<u32>,
}

impl Table {
    fn new(entries: Vec<u32>) -> Self {
        let uniform =
            entries.first().copied().filter(|first| entries.iter().all(|entry| entry == first));
        Self { entries, uniform }
    }

    /// The entry at `index`; 0 past the table's end.
    pub(crate) fn entry(&self, index: u64) -> u32 {
        usize::try_from(index).ok().and_then(|i| self.entries.get(i)).copied().unwrap_or(0)
    }

    /// The value that every entry has, if they agree.
    pub(crate) fn uniform(&self) -> Option<u32> {
        self.uniform
    }
}

/// The tables of one extent.
#[derive(Debug)]
pub(crate) struct Tables {
    directory: Vec<u32>,
    cache: Mutex<Generations>,
}

/// A cache that forgets the older half of what it holds: new tables go into `young`; when
/// that is full it becomes `old`, and what was in `old` and not asked for is dropped.
#[derive(Debug, Default)]
struct Generations {
    young: HashMap<usize, Arc<Table>>,
    old: HashMap<usize, Arc<Table>>,
}

impl Generations {
    fn get(&mut self, index: usize) -> Option<Arc<Table>> {
        if let Some(table) = self.young.get(&index) {
            return Some(Arc::clone(table));
        }
        let table = self.old.remove(&index)?;
        self.insert(index, Arc::clone(&table));
        Some(table)
    }

    fn insert(&mut self, index: usize, table: Arc<Table>) {
        if self.young.len() >= GENERATION {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(index, table);
    }
}

impl Tables {
    /// The tables that `directory` names.
    pub(crate) fn new(directory: Vec<u32>) -> Self {
        Self { directory, cache: Mutex::default() }
    }

    /// Table number `index`, or none if the directory has no such table.
    pub(crate) fn get(
        &self,
        file: &dyn BlockDevice,
        header: &Header,
        index: u64,
    ) -> Result<Option<Arc<Table>>> {
        let Ok(index) = usize::try_from(index) else { return Ok(None) };
        let Some(sector) = self.directory.get(index).copied().filter(|sector| *sector != 0) else {
            return Ok(None);
        };
        let cached = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(index);
        if let Some(table) = cached {
            return Ok(Some(table));
        }
        let loaded = self.load(file, header, index, sector)?;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let first = loaded.first().map(Arc::clone);
        for (index, table) in (index..).zip(loaded) {
            cache.insert(index, table);
        }
        Ok(first)
    }

    /// Reads table `index` and those behind it that the directory lists back to back.
    fn load(
        &self,
        file: &dyn BlockDevice,
        header: &Header,
        index: usize,
        sector: u32,
    ) -> Result<Vec<Arc<Table>>> {
        let stride = header.table_len().div_ceil(SECTOR).saturating_mul(SECTOR);
        let start = u64::from(sector).saturating_mul(SECTOR);
        let within = |at: u64| Span::new(at, header.table_len()).check_within(file.size()).is_ok();
        if !within(start) {
            return Err(Error::corrupt(format!(
                "grain table {index} ends past the file's size of {} bytes",
                file.size()
            ))
            .at(start));
        }
        let expected = std::iter::successors(Some(start), |at| at.checked_add(stride));
        let run = self.directory.iter().skip(index).take(TABLES_PER_READ).zip(expected);
        let starts: Vec<u64> = run
            .map_while(|(sector, at)| {
                let follows = u64::from(*sector).saturating_mul(SECTOR) == at;
                (follows && within(at)).then_some(at)
            })
            .collect();
        let end = starts.last().map_or(start, |at| at.saturating_add(header.table_len()));
        let mut bytes = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or(0)];
        file.read_at(&mut bytes, start)?;
        let stride = usize::try_from(stride).unwrap_or(usize::MAX).max(1);
        let entries = usize::try_from(header.table_entries.get()).unwrap_or(0);
        Ok(bytes
            .chunks(stride)
            .map(|table| {
                let numbers = table.as_chunks().0.iter().map(|entry| u32::from_le_bytes(*entry));
                Arc::new(Table::new(numbers.take(entries).collect()))
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_stays_within_two_generations_and_keeps_what_is_used() {
        let mut cache = Generations::default();
        for index in 0..10 * GENERATION {
            cache.insert(index, Arc::new(Table::new(vec![1])));
            assert!(cache.get(0).is_some(), "table 0 is used all the time");
        }
        assert!(cache.young.len() + cache.old.len() <= 2 * GENERATION);
        assert!(cache.get(1).is_none());
    }
}
