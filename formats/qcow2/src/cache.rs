// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bounded cache of tables, which are written back together.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Memory that one cache aims at, in bytes.
const BUDGET: u64 = 4 << 20;
/// Tables that a cache holds at least, however large they are.
const FEWEST: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Same as on disk.
    Clean,
    /// Changed since it was last handed out for writing.
    Dirty,
    /// Handed out for writing, not yet on disk: reading it again would find old bytes.
    Writing,
}

#[derive(Debug)]
struct Slot<T> {
    table: Arc<T>,
    state: State,
    used: u64,
}

/// Tables by their offset in the file. Only clean ones are ever dropped, so that the
/// cache grows past its capacity until the others have been written back.
#[derive(Debug)]
pub(crate) struct Cache<T> {
    slots: HashMap<u64, Slot<T>>,
    /// Offsets by time of last use.
    order: BTreeMap<u64, u64>,
    clock: u64,
    capacity: usize,
    dirty: usize,
}

impl<T: Clone> Cache<T> {
    /// A cache of tables of `table_size` bytes.
    pub(crate) fn new(table_size: u64) -> Self {
        let capacity = BUDGET.checked_div(table_size).unwrap_or(0);
        let capacity = usize::try_from(capacity).unwrap_or(FEWEST).max(FEWEST);
        Self { slots: HashMap::new(), order: BTreeMap::new(), clock: 0, capacity, dirty: 0 }
    }

    /// Tables that it holds at least.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn get(&mut self, offset: u64) -> Option<Arc<T>> {
        let slot = self.slots.get_mut(&offset)?;
        if slot.used == self.clock {
            // It was the last one, too.
            return Some(Arc::clone(&slot.table));
        }
        self.clock = self.clock.saturating_add(1);
        self.order.remove(&slot.used);
        slot.used = self.clock;
        self.order.insert(slot.used, offset);
        Some(Arc::clone(&slot.table))
    }

    pub(crate) fn insert(&mut self, offset: u64, table: T, dirty: bool) -> Arc<T> {
        self.remove(offset);
        self.make_room();
        self.clock = self.clock.saturating_add(1);
        let table = Arc::new(table);
        let state = if dirty { State::Dirty } else { State::Clean };
        self.dirty = self.dirty.saturating_add(usize::from(dirty));
        self.order.insert(self.clock, offset);
        self.slots.insert(offset, Slot { table: Arc::clone(&table), state, used: self.clock });
        table
    }

    /// Changes the table at `offset`; `None` if it is not cached.
    pub(crate) fn modify<R>(&mut self, offset: u64, change: impl FnOnce(&mut T) -> R) -> Option<R> {
        let slot = self.slots.get_mut(&offset)?;
        if slot.state != State::Dirty {
            self.dirty = self.dirty.saturating_add(1);
            slot.state = State::Dirty;
        }
        Some(change(Arc::make_mut(&mut slot.table)))
    }

    /// Forgets a table, changed or not.
    pub(crate) fn remove(&mut self, offset: u64) {
        if let Some(slot) = self.slots.remove(&offset) {
            self.order.remove(&slot.used);
            self.dirty = self.dirty.saturating_sub(usize::from(slot.state == State::Dirty));
        }
    }

    fn make_room(&mut self) {
        while self.slots.len() >= self.capacity {
            let is_clean = |offset: &u64| {
                self.slots.get(offset).is_some_and(|slot| slot.state == State::Clean)
            };
            let Some(oldest) = self.order.values().copied().find(is_clean) else { return };
            self.remove(oldest);
        }
    }

    pub(crate) fn has_dirty(&self) -> bool {
        self.dirty > 0
    }

    /// Whether so much waits to be written that it should be written now.
    pub(crate) fn is_crowded(&self) -> bool {
        self.dirty >= self.capacity
    }

    /// Hands out everything that has changed, ordered by offset; [`Self::written`] ends it.
    pub(crate) fn start_writing(&mut self) -> Vec<(u64, Arc<T>)> {
        if self.dirty == 0 {
            return Vec::new();
        }
        let mut tables = Vec::with_capacity(self.dirty);
        for (offset, slot) in &mut self.slots {
            if slot.state == State::Dirty {
                slot.state = State::Writing;
                tables.push((*offset, Arc::clone(&slot.table)));
            }
        }
        self.dirty = 0;
        tables.sort_unstable_by_key(|(offset, _)| *offset);
        tables
    }

    /// The table at `offset` is on disk as it was handed out; a later change stays dirty.
    pub(crate) fn written(&mut self, offset: u64) {
        if let Some(slot) = self.slots.get_mut(&offset)
            && slot.state == State::Writing
        {
            slot.state = State::Clean;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_tables_stay_until_they_are_written() {
        let mut cache = Cache::new(2 << 20);
        for offset in 0..10 {
            cache.insert(offset, 0, true);
        }
        assert!(cache.is_crowded());
        let tables = cache.start_writing();
        assert_eq!(tables.len(), 10);
        cache.modify(3, |table| *table = 7);
        for (offset, _) in tables {
            cache.written(offset);
        }
        for offset in 10..20 {
            cache.insert(offset, 0, false);
        }
        assert_eq!(cache.get(3).as_deref(), Some(&7));
        assert!(cache.get(4).is_none());
        assert_eq!(cache.slots.len(), FEWEST);
        assert_eq!(cache.start_writing().len(), 1);
    }
}
