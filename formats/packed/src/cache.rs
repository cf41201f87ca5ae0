// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bytes that were decompressed last, and who is decompressing which at the moment.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes that are kept.
const CACHE: usize = 128 << 20;

/// Which bytes: number of the piece, and part of it if it is too large to be kept whole.
pub(crate) type Key = (usize, u64);

#[derive(Debug)]
enum Entry {
    /// Somebody is at it.
    Loading,
    /// There, and when it was used last.
    Ready(Arc<Vec<u8>>, u64),
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<Key, Entry>,
    bytes: usize,
    clock: u64,
}

/// What a reader has to do next.
pub(crate) enum Turn {
    /// Use these bytes.
    Ready(Arc<Vec<u8>>),
    /// Decompress them; everybody else waits for that.
    Mine,
    /// Somebody else is at it.
    Theirs,
}

/// A reader's turn, which ends with this: others wait until then, so it has to end even if
/// decompressing fails or panics.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    cache: &'a Cache,
    key: Key,
    /// What came of it.
    pub(crate) bytes: Option<Arc<Vec<u8>>>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.cache.put(self.key, self.bytes.take());
    }
}

#[derive(Debug, Default)]
pub(crate) struct Cache {
    state: Mutex<State>,
    changed: Condvar,
}

impl Cache {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes if they are there.
    pub(crate) fn get(&self, key: Key) -> Option<Arc<Vec<u8>>> {
        self.state().get(key)
    }

    /// The bytes, or whose turn it is to make them.
    pub(crate) fn turn(&self, key: Key) -> Turn {
        let mut state = self.state();
        if let Some(bytes) = state.get(key) {
            return Turn::Ready(bytes);
        }
        if state.entries.contains_key(&key) {
            return Turn::Theirs;
        }
        state.entries.insert(key, Entry::Loading);
        Turn::Mine
    }

    /// The turn that [`Self::turn`] has just given to this reader.
    pub(crate) fn taken(&self, key: Key) -> Taken<'_> {
        Taken { cache: self, key, bytes: None }
    }

    /// Waits until nobody is decompressing `key` any more.
    pub(crate) fn wait(&self, key: Key) {
        let mut state = self.state();
        while matches!(state.entries.get(&key), Some(Entry::Loading)) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Keeps bytes, or notes that they could not be had.
    pub(crate) fn put(&self, key: Key, bytes: Option<Arc<Vec<u8>>>) {
        let mut state = self.state();
        if let Some(Entry::Ready(old, _)) = state.entries.remove(&key) {
            state.bytes = state.bytes.saturating_sub(old.len());
        }
        if let Some(bytes) = bytes {
            state.make_room(bytes.len());
            state.clock = state.clock.saturating_add(1);
            state.bytes = state.bytes.saturating_add(bytes.len());
            let now = state.clock;
            state.entries.insert(key, Entry::Ready(bytes, now));
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl State {
    fn get(&mut self, key: Key) -> Option<Arc<Vec<u8>>> {
        let Some(Entry::Ready(bytes, used)) = self.entries.get_mut(&key) else { return None };
        self.clock = self.clock.saturating_add(1);
        *used = self.clock;
        Some(Arc::clone(bytes))
    }

    /// Drops what was used longest ago until `more` bytes fit.
    fn make_room(&mut self, more: usize) {
        while self.bytes.saturating_add(more) > CACHE {
            let oldest = self.entries.iter().filter_map(|(key, entry)| match entry {
                Entry::Ready(_, used) => Some((*used, *key)),
                Entry::Loading => None,
            });
            let Some((_, key)) = oldest.min() else { return };
            if let Some(Entry::Ready(old, _)) = self.entries.remove(&key) {
                self.bytes = self.bytes.saturating_sub(old.len());
            }
        }
    }
}
