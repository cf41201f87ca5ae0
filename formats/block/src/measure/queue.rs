// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counting reads of which many are under way.

use super::counter::Counters;
use crate::{ReadQueue, Result, Span};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A queue whose reads are counted when their answers come.
#[derive(Debug)]
pub(super) struct MeasuredQueue<'a> {
    pub(super) queue: Box<dyn ReadQueue + 'a>,
    pub(super) counters: &'a Counters,
    /// When each read began, by its start.
    pub(super) begun: Mutex<HashMap<u64, Instant>>,
}

impl MeasuredQueue<'_> {
    fn begun(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadQueue for MeasuredQueue<'_> {
    fn start(&self, spans: &[Span]) -> Result<()> {
        let now = Instant::now();
        self.begun().extend(spans.iter().map(|span| (span.start, now)));
        self.queue.start(spans)
    }

    fn next(&self, buf: &mut Vec<u8>) -> Option<(Span, Result<()>)> {
        let (span, result) = self.queue.next(buf)?;
        let begun = self.begun().remove(&span.start);
        let took = begun.map(|begun| begun.elapsed()).unwrap_or_default();
        self.counters.reads.note(span.len, result.is_ok(), took);
        Some((span, result))
    }
}
