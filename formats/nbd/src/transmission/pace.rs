// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a device answers so quickly that handing requests over costs more than it gains.

use super::{Connection, SMALL};
use crate::request::Command;
use crate::socket::Output;
use std::io::Read;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// An operation that came from a cache takes less; one that went to a disk takes more.
const QUICK: Duration = Duration::from_micros(40);
/// Bytes for which an operation may take a microsecond more.
const PER_MICROSECOND: u64 = 1000;
/// Quick operations, each of which counts for one.
const ENOUGH: u32 = 16;
/// A run of quick operations outweighs a few that were interrupted.
const MOST: u32 = 64;
/// What one slow operation costs.
const SLOW: u32 = 12;

/// Workers with something to do besides the reader, beyond which it does not hand over what
/// is in memory: two keep socket and file busy, and more only take turns.
const HELPERS: usize = 2;

/// Remembers how quick the last operations of one kind were.
#[derive(Debug, Default)]
pub(super) struct Pace(AtomicU32);

impl Pace {
    /// Whether the next operation is expected to be quick.
    pub(super) fn is_quick(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= ENOUGH
    }

    /// An operation on `len` bytes took this long. Two at the same time may count as one.
    pub(super) fn note(&self, len: u64, took: Duration) {
        let before = self.0.load(Ordering::Relaxed);
        let extra = Duration::from_micros(len.div_euclid(PER_MICROSECOND));
        let after = if took <= QUICK.saturating_add(extra) {
            before.saturating_add(1).min(MOST)
        } else {
            before.saturating_sub(SLOW)
        };
        if after != before {
            self.0.store(after, Ordering::Relaxed);
        }
    }
}

impl<R: Read + Send, W: Output> Connection<'_, R, W> {
    /// Whether a request that was read is answered soonest if its reader does it: the bytes
    /// are in memory, and enough others are at work for this connection.
    pub(super) fn is_better_alone(&self, command: &Command) -> bool {
        let len = match command {
            Command::Read { span, .. } | Command::Write { span, durable: false } => span.len,
            _ => return false,
        };
        let enough = self.purse.pool.processors().div_euclid(2).max(HELPERS);
        len > SMALL && self.long.is_quick() && self.answering.load(Ordering::Relaxed) >= enough
    }

    /// How quick operations on `len` bytes are.
    pub(super) fn pace_of(&self, len: u64) -> &Pace {
        if len <= SMALL { &self.small } else { &self.long }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_is_won_slowly_and_lost_quickly() {
        let pace = Pace::default();
        let (quick, slow) = (Duration::from_micros(3), Duration::from_micros(90));
        let note = |pace: &Pace, took| pace.note(4096, took);
        assert!(!pace.is_quick());
        (0..16).for_each(|_| note(&pace, quick));
        assert!(pace.is_quick());
        note(&pace, slow);
        assert!(!pace.is_quick());
        (0..200).for_each(|_| note(&pace, quick));
        (0..4).for_each(|_| note(&pace, slow));
        assert!(pace.is_quick());
        note(&pace, slow);
        assert!(!pace.is_quick());
        // A disk that is quick half of the time is no cache.
        (0..100).for_each(|at| note(&pace, if at % 2 == 0 { quick } else { slow }));
        assert!(!pace.is_quick());
    }
    #[test]
    fn long_operations_may_take_the_time_that_memory_takes() {
        for (len, micros, is_quick) in
            [(256_000, 290, true), (256_000, 310, false), (4096, 44, true), (4096, 45, false)]
        {
            let pace = Pace::default();
            (0..ENOUGH).for_each(|_| pace.note(len, Duration::from_micros(micros)));
            assert_eq!(pace.is_quick(), is_quick, "{len} bytes in {micros} us");
        }
    }
}
