// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Letting threads pass in the order of what they carry.

use crate::Span;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A gate that pieces pass in ascending order, one at a time.
#[derive(Debug)]
pub(super) struct Turn {
    /// Where the next piece starts; `None` once nobody passes any more.
    next: Mutex<Option<u64>>,
    moved: Condvar,
}

impl Turn {
    pub(super) fn new(start: u64) -> Self {
        Self { next: Mutex::new(Some(start)), moved: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<u64>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all pieces below `piece` have passed; `false` if they never will.
    pub(super) fn wait(&self, piece: Span) -> bool {
        let mut next = self.lock();
        loop {
            match *next {
                None => return false,
                Some(start) if start >= piece.start => return true,
                Some(_) => {}
            }
            next = self.moved.wait(next).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// `piece` has passed.
    pub(super) fn passed(&self, piece: Span) {
        if let Some(start) = &mut *self.lock() {
            *start = piece.end();
        }
        self.moved.notify_all();
    }

    /// Sends everybody home.
    pub(super) fn close(&self) {
        *self.lock() = None;
        self.moved.notify_all();
    }
}
