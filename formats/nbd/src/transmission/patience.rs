// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether it is worth to look out for the next request for a moment before sleeping.
//!
//! To wake a thread on a processor that has gone idle takes longer than to answer a small
//! request. A client that waits for each reply before it sends the next request pays for
//! that every time; looking out costs processor time instead, and only pays if the request
//! comes soon, and if it would not have come sooner still: while other work keeps the
//! processors awake, waking up takes no time worth mentioning.

use super::{Connection, Reader};
use crate::socket::{Output, has_bytes};
use std::io::Read;
use std::time::{Duration, Instant};

/// How long to look out.
const LONGEST: Duration = Duration::from_micros(50);
/// A sleep that took no longer would have been shorter without the waking up.
const SHORT: Duration = Duration::from_micros(100);
/// A sleep that took no longer had nothing of it.
const SHORTEST: Duration = Duration::from_micros(25);
/// Short sleeps after which looking out begins.
const FIRST: u32 = 8;
/// The most that disappointments make of that.
const LAST: u32 = 1 << 13;
/// What a disappointment outweighs.
const REWARDS: u32 = 8;
/// The most rewards that are remembered.
const MOST: u32 = 64;
/// Rewards after which a few sleeps show whether they are what they were.
const TERM: u32 = 4096;

/// Remembers how soon the last requests came.
#[derive(Debug)]
pub(super) struct Patience {
    /// Short sleeps, less the shortest ones.
    short: u32,
    /// How many of them it takes.
    needed: u32,
    /// Rewards, less what disappointments took away.
    credit: u32,
    /// Rewards since the last sleep.
    rewards: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self { short: 0, needed: FIRST, credit: 0, rewards: 0 }
    }
}

impl Patience {
    /// Whether to look out for the next request.
    fn is_willing(&self) -> bool {
        self.short >= self.needed
    }

    /// A sleep took this long until a request came.
    pub(super) fn slept(&mut self, time: Duration) {
        self.short = if time > SHORT {
            0
        } else if time > SHORTEST {
            self.short.saturating_add(1)
        } else {
            self.short.saturating_sub(1)
        };
        self.rewards = 0;
        if self.is_willing() {
            self.credit = REWARDS;
        }
    }

    /// Several requests came together. They were answered together, and would not be if each
    /// were looked out for.
    fn crowded(&mut self) {
        self.short = 0;
    }

    /// A request came while looking out for it.
    fn rewarded(&mut self) {
        self.credit = self.credit.saturating_add(1).min(MOST);
        if self.credit == MOST {
            self.needed = FIRST;
        }
        self.rewards = self.rewards.saturating_add(1);
        if self.rewards >= TERM {
            self.short = 0;
        }
    }

    /// None came, and the time is lost.
    fn disappointed(&mut self) {
        self.credit = self.credit.saturating_sub(REWARDS);
        if self.credit == 0 {
            self.short = 0;
            self.needed = self.needed.saturating_mul(2).min(LAST);
        }
    }
}

impl<R: Read + Send, W: Output> Connection<'_, R, W> {
    /// Looks out for the next request a moment before sleeping, if that has been worth it:
    /// a client with one request in flight is served sooner when nobody has to be woken.
    /// Gives back when the wait began if it is not over.
    pub(super) fn linger(&self, reader: &mut Reader<R>) -> Option<Instant> {
        let socket = self.watched.filter(|_| self.takes_files)?;
        if !reader.input.buffered().is_empty() || !self.purse.pool.has_processors_to_spare() {
            return None;
        }
        if std::mem::take(&mut reader.burst) > 1 {
            reader.patience.crowded();
            return None;
        }
        let begun = Instant::now();
        if reader.patience.is_willing() {
            while begun.elapsed() < LONGEST {
                if has_bytes(socket) {
                    reader.patience.rewarded();
                    return None;
                }
            }
            reader.patience.disappointed();
            return None;
        }
        Some(begun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(60);
    const LATE: Duration = Duration::from_micros(200);
    const AT_ONCE: Duration = Duration::from_micros(10);

    #[test]
    fn only_a_run_of_short_sleeps_makes_willing() {
        let mut patience = Patience::default();
        for round in 0..40 {
            patience.slept(if round % FIRST == 0 { LATE } else { SOON });
            assert!(!patience.is_willing());
        }
        patience.slept(SOON);
        assert!(patience.is_willing());
    }

    #[test]
    fn nothing_is_gained_where_sleeping_costs_nothing() {
        let mut patience = Patience::default();
        for round in 0..1000 {
            patience.slept(if round % 2 == 0 { AT_ONCE } else { SOON });
            assert!(!patience.is_willing());
        }
        (0..FIRST).for_each(|_| patience.slept(SOON));
        assert!(patience.is_willing());
        // It is found out again from time to time.
        let rewards = std::iter::repeat_with(|| patience.rewarded());
        rewards.take(4096).for_each(drop);
        assert!(!patience.is_willing());
        (0..FIRST).for_each(|_| patience.slept(SOON));
        assert!(patience.is_willing());
    }

    #[test]
    fn requests_that_come_together_end_it() {
        let mut patience = Patience::default();
        (0..FIRST).for_each(|_| patience.slept(SOON));
        patience.crowded();
        assert!(!patience.is_willing());
    }

    #[test]
    fn a_client_that_never_comes_in_time_costs_less_and_less() {
        let mut patience = Patience::default();
        let lost = (0..10_000)
            .filter(|_| {
                let willing = patience.is_willing();
                if willing {
                    patience.disappointed();
                } else {
                    patience.slept(SOON);
                }
                willing
            })
            .count();
        assert!(lost < 12, "{lost} times of 10000");
        // It is trusted again after it was in time for long.
        (0..LAST).for_each(|_| patience.slept(SOON));
        assert!(patience.is_willing());
        (0..MOST).for_each(|_| patience.rewarded());
        assert_eq!(patience.needed, FIRST);
    }

    #[test]
    fn a_few_late_requests_among_many_in_time_are_forgiven() {
        let mut patience = Patience::default();
        (0..FIRST).for_each(|_| patience.slept(SOON));
        for round in 0..1000 {
            assert!(patience.is_willing(), "{round}");
            if round % 16 == 15 { patience.disappointed() } else { patience.rewarded() }
        }
        for _ in 0..MOST / REWARDS {
            assert!(patience.is_willing());
            patience.disappointed();
        }
        assert!(!patience.is_willing());
    }
}
