// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What clients did with an export.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};
use tranship_block::{OperationCounter, OperationStatistics};

/// What clients did with an export since it was added.
///
/// The time of a request runs from its arrival to its reply, or to where its reply joins
/// others that are sent together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// Connections that chose the export.
    pub connections: u64,
    /// Reads; the bytes are those that were asked for, holes included.
    pub reads: OperationStatistics,
    /// Writes.
    pub writes: OperationStatistics,
    /// Ranges made zero.
    pub zeroes: OperationStatistics,
    /// Ranges trimmed.
    pub trims: OperationStatistics,
    /// Flushes.
    pub flushes: OperationStatistics,
    /// Ranges that should be read ahead.
    pub caches: OperationStatistics,
    /// Questions about block status.
    pub statuses: OperationStatistics,
    /// Requests that were refused before any work: out of range, not allowed, not offered.
    pub refused: u64,
    /// Requests of any kind that were answered with an error, the refused ones included.
    pub errors: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) connections: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) reads: OperationCounter,
    pub(crate) writes: OperationCounter,
    pub(crate) zeroes: OperationCounter,
    pub(crate) trims: OperationCounter,
    pub(crate) flushes: OperationCounter,
    pub(crate) caches: OperationCounter,
    pub(crate) statuses: OperationCounter,
}

impl Counters {
    pub(crate) fn snapshot(&self) -> Statistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut statistics = Statistics {
            connections: get(&self.connections),
            reads: self.reads.snapshot(),
            writes: self.writes.snapshot(),
            zeroes: self.zeroes.snapshot(),
            trims: self.trims.snapshot(),
            flushes: self.flushes.snapshot(),
            caches: self.caches.snapshot(),
            statuses: self.statuses.snapshot(),
            refused: get(&self.refused),
            errors: 0,
        };
        let Statistics { reads, writes, zeroes, trims, flushes, caches, statuses, .. } =
            &statistics;
        statistics.errors = [reads, writes, zeroes, trims, flushes, caches, statuses]
            .iter()
            .fold(statistics.refused, |sum, kind| sum.saturating_add(kind.errors));
        statistics
    }
}

/// Adds one to a counter that orders nothing.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
