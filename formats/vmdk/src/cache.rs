// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The grain tables in memory: a bounded number of clean ones, and those that have been
//! changed and not been written yet.

use crate::layout::Layout;
use crate::table::Table;
use std::collections::{BTreeMap, HashMap};
use std::mem;
use std::sync::Arc;

/// Bytes of full tables in each of the cache's two generations.
const GENERATION: u64 = 4 << 20;

/// A cache that forgets the older half of what it holds: new tables go into `young`; when
/// that is full it becomes `old`, and what was in `old` and not asked for is dropped.
#[derive(Debug)]
pub(crate) struct Cache {
    young: HashMap<usize, Arc<Table>>,
    old: HashMap<usize, Arc<Table>>,
    most: usize,
    /// Tables that are newer than those in the file.
    dirty: BTreeMap<usize, Arc<Table>>,
    /// Times that tables in the file were replaced.
    changes: u64,
}

impl Cache {
    pub(crate) fn new(layout: &Layout) -> Self {
        let most = GENERATION.checked_div(layout.table_len()).unwrap_or(1).max(1);
        Self {
            young: HashMap::new(),
            old: HashMap::new(),
            most: usize::try_from(most).unwrap_or(1),
            dirty: BTreeMap::new(),
            changes: 0,
        }
    }

    /// The table with this number if it is in memory.
    pub(crate) fn get(&mut self, index: usize) -> Option<Arc<Table>> {
        if let Some(table) = self.dirty.get(&index).or_else(|| self.young.get(&index)) {
            return Some(Arc::clone(table));
        }
        let table = self.old.remove(&index)?;
        self.insert(index, Arc::clone(&table));
        Some(table)
    }

    /// Keeps a table as it is in the file; one that is there already may be newer and stays.
    pub(crate) fn insert(&mut self, index: usize, table: Arc<Table>) {
        if self.dirty.contains_key(&index) || self.old.contains_key(&index) {
            return;
        }
        if self.young.len() >= self.most {
            self.old = mem::take(&mut self.young);
        }
        self.young.entry(index).or_insert(table);
    }

    /// The table with this number, to be changed: `table` if it was not changed before.
    pub(crate) fn dirty(&mut self, index: usize, table: Arc<Table>) -> &mut Table {
        self.young.remove(&index);
        self.old.remove(&index);
        Arc::make_mut(self.dirty.entry(index).or_insert(table))
    }

    /// The changed tables.
    pub(crate) fn changed(&self) -> BTreeMap<usize, Arc<Table>> {
        self.dirty.clone()
    }

    /// How many tables have been changed.
    pub(crate) fn changed_len(&self) -> usize {
        self.dirty.len()
    }

    /// These tables are in the file now; those that were changed again stay changed.
    pub(crate) fn written(&mut self, tables: BTreeMap<usize, Arc<Table>>) {
        self.changes = self.changes.wrapping_add(1);
        for (index, table) in tables {
            if self.dirty.get(&index).is_some_and(|now| Arc::ptr_eq(now, &table)) {
                self.dirty.remove(&index);
                self.young.remove(&index);
                self.old.remove(&index);
                self.insert(index, table);
            }
        }
    }

    /// Changes whenever tables in the file do.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::{self, tests::header};

    fn cache() -> Cache {
        Cache::new(&header::parse(&header(2048, 0, 0, 1)).unwrap())
    }

    #[test]
    fn the_cache_stays_within_two_generations_and_keeps_what_is_used() {
        let mut cache = cache();
        for index in 0..10 * cache.most {
            cache.insert(index, Arc::new(Table::Uniform(1)));
            assert!(cache.get(0).is_some(), "table 0 is used all the time");
        }
        assert!(cache.young.len() + cache.old.len() <= 2 * cache.most);
        assert!(cache.get(1).is_none());
    }

    #[test]
    fn a_table_that_changes_while_it_is_written_stays_changed() {
        let mut cache = cache();
        cache.dirty(3, Arc::new(Table::Uniform(0))).narrow(512).unwrap()[1] = 7;
        let writing = cache.changed();
        cache.dirty(3, Arc::new(Table::Uniform(0))).narrow(512).unwrap()[2] = 8;
        cache.written(writing);
        assert_eq!(cache.changed_len(), 1);
        let writing = cache.changed();
        assert_eq!((writing[&3].entry(1), writing[&3].entry(2)), (7, 8));
        // Somebody has read the table before it was changed.
        cache.insert(3, Arc::new(Table::Uniform(0)));
        cache.written(writing);
        assert_eq!(cache.changed_len(), 0);
        assert_eq!(cache.get(3).unwrap().entry(2), 8);
    }
}
