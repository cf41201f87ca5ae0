// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a device answers so quickly that handing requests over costs more than it gains.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// An operation that came from a cache takes less; one that went to a disk takes more.
const QUICK: Duration = Duration::from_micros(40);
/// Quick operations, each of which counts for one.
const ENOUGH: u32 = 16;
/// A run of quick operations outweighs a few that were interrupted.
const MOST: u32 = 64;
/// What one slow operation costs.
const SLOW: u32 = 12;

/// Remembers how quick the last small operations were.
#[derive(Debug, Default)]
pub(super) struct Pace(AtomicU32);

impl Pace {
    /// Whether the next small operation is expected to be quick.
    pub(super) fn is_quick(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= ENOUGH
    }

    /// A small operation took this long. Two at the same time may count as one.
    pub(super) fn note(&self, took: Duration) {
        let before = self.0.load(Ordering::Relaxed);
        let after = if took <= QUICK {
            before.saturating_add(1).min(MOST)
        } else {
            before.saturating_sub(SLOW)
        };
        if after != before {
            self.0.store(after, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_is_won_slowly_and_lost_quickly() {
        let pace = Pace::default();
        let (quick, slow) = (Duration::from_micros(3), Duration::from_micros(90));
        assert!(!pace.is_quick());
        (0..16).for_each(|_| pace.note(quick));
        assert!(pace.is_quick());
        pace.note(slow);
        assert!(!pace.is_quick());
        (0..200).for_each(|_| pace.note(quick));
        (0..4).for_each(|_| pace.note(slow));
        assert!(pace.is_quick());
        pace.note(slow);
        assert!(!pace.is_quick());
        // A disk that is quick half of the time is no cache.
        (0..100).for_each(|at| pace.note(if at % 2 == 0 { quick } else { slow }));
        assert!(!pace.is_quick());
    }
}
