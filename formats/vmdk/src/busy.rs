// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Grains that a writer is about to map: a second writer to one of them waits instead of
//! losing bytes of the first.

use std::sync::{Condvar, Mutex, PoisonError};

/// Ranges of grains that are in somebody's hands.
#[derive(Debug, Default)]
pub(crate) struct Busy {
    ranges: Mutex<Vec<(u64, u64)>>,
    idle: Condvar,
}

/// A range in its owner's hands until this is dropped.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    busy: &'a Busy,
    range: (u64, u64),
}

impl Busy {
    /// Waits until nobody holds a grain from `first` up to but not including `end`, and
    /// takes them.
    pub(crate) fn hold(&self, first: u64, end: u64) -> Held<'_> {
        let ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ranges = self
            .idle
            .wait_while(ranges, |ranges| ranges.iter().any(|held| held.0 < end && first < held.1))
            .unwrap_or_else(PoisonError::into_inner);
        ranges.push((first, end));
        Held { busy: self, range: (first, end) }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut ranges = self.busy.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = ranges.iter().position(|held| *held == self.range) {
            ranges.swap_remove(index);
        }
        self.busy.idle.notify_all();
    }
}
