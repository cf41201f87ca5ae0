// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one client may cost, and the budget that holds it to that.

use crate::transmission::PIECE;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::available_parallelism;
use std::time::Duration;

/// Bounds on what clients can make a server spend. The defaults suit a private socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From accepting a connection to the end of its handshake.
    pub handshake: Duration,
    /// Options that one handshake may have.
    pub options: u32,
    /// Bytes of data that one option may carry; longer ones close the connection.
    pub option_payload: u32,
    /// Queries that one metadata context option may carry.
    pub queries: u32,
    /// Connections at the same time; further clients wait to be greeted.
    pub connections: usize,
    /// Connections in the handshake at the same time; further clients wait, or take the
    /// place of the one that has been at it longest, if that is longer than a second.
    pub handshakes: usize,
    /// Bytes of one read or write request; at least 1 MiB.
    pub payload: u32,
    /// Requests that one connection works on at the same time; then it reads no more.
    pub requests: usize,
    /// Bytes of payload in memory for one connection.
    pub connection_bytes: u64,
    /// Bytes of payload in memory for the whole server. Half of it is divided evenly
    /// among the connections, and of the other half none can take more than it leaves, so
    /// that none, and not even many together, can take everything from the others. Every
    /// connection has 512 KiB at least, even where that is more in all.
    pub server_bytes: u64,
    /// How long a client may send nothing in the middle of a request before it is cut off.
    pub receive_stall: Duration,
    /// How long a client may take nothing of a reply before it is cut off.
    pub send_stall: Duration,
    /// Extents in one block status reply.
    pub status_extents: usize,
    /// How long requests in flight may take to finish when the server stops.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            options: 256,
            option_payload: 256 << 10,
            queries: 64,
            connections: 100,
            handshakes: 64,
            payload: 32 << 20,
            requests: 32,
            connection_bytes: 64 << 20,
            server_bytes: 512 << 20,
            receive_stall: Duration::from_mins(1),
            send_stall: Duration::from_mins(1),
            status_extents: 4096,
            stop: Duration::from_secs(10),
        }
    }
}

/// A number of bytes that can be taken and comes back.
#[derive(Debug)]
pub(crate) struct Budget {
    whole: u64,
    free: Mutex<u64>,
    returned: Condvar,
    /// Bytes that its owner has from a budget that is shared.
    lent: AtomicU64,
}

/// Bytes taken from a [`Budget`]; they return when this is dropped.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    budget: &'a Budget,
    bytes: u64,
    /// Whoever has them besides their own.
    borrower: Option<&'a Budget>,
}

impl Budget {
    pub(crate) fn new(whole: u64) -> Self {
        let free = Mutex::new(whole);
        Self { whole, free, returned: Condvar::new(), lent: AtomicU64::new(0) }
    }

    /// Takes `bytes`, waiting until they are there; never more than the whole budget.
    pub(crate) fn take(&self, bytes: u64) -> Taken<'_> {
        let bytes = bytes.min(self.whole);
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self
            .returned
            .wait_while(free, |free| *free < bytes)
            .unwrap_or_else(PoisonError::into_inner);
        *free = free.saturating_sub(bytes);
        Taken { budget: self, bytes, borrower: None }
    }

    /// Takes `bytes` for `borrower`, waiting until as much as it has then is still left.
    ///
    /// However many there are that take what they can and give nothing back, something is
    /// left for whoever comes next: of `n` of them each gets about one part of `n + 1`.
    fn lend<'a>(&'a self, bytes: u64, borrower: &'a Budget) -> Taken<'a> {
        // Whoever has nothing gets it at the latest when everything is back.
        let bytes = bytes.min(self.whole.div_euclid(2));
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self
            .returned
            .wait_while(free, |free| {
                let lent = borrower.lent.load(Ordering::Relaxed);
                *free < bytes.saturating_mul(2).saturating_add(lent)
            })
            .unwrap_or_else(PoisonError::into_inner);
        *free = free.saturating_sub(bytes);
        borrower.lent.fetch_add(bytes, Ordering::Relaxed);
        Taken { budget: self, bytes, borrower: Some(borrower) }
    }

    /// Takes `bytes` if they are there now.
    fn try_take(&self, bytes: u64) -> Option<Taken<'_>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        *free = free.checked_sub(bytes)?;
        Some(Taken { budget: self, bytes, borrower: None })
    }
}

/// The bytes of a whole server.
#[derive(Debug)]
pub(crate) struct Pool {
    common: Budget,
    /// What each connection has for itself.
    share: u64,
    /// Connections in transmission.
    busy: AtomicUsize,
    /// Processors that this process may use.
    processors: usize,
}

impl Pool {
    pub(crate) fn new(limits: &Limits) -> Self {
        let half = limits.server_bytes.div_euclid(2);
        let connections = u64::try_from(limits.connections).unwrap_or(u64::MAX).max(1);
        Self {
            common: Budget::new(half.max(u64::from(limits.payload))),
            share: half.div_euclid(connections),
            busy: AtomicUsize::new(0),
            processors: available_parallelism().map_or(1, NonZeroUsize::get),
        }
    }

    /// Processors that this process may use.
    pub(crate) fn processors(&self) -> usize {
        self.processors
    }

    /// Whether each connection could keep a processor, and its client another one.
    pub(crate) fn has_processors_to_spare(&self) -> bool {
        self.busy.load(Ordering::Relaxed).saturating_mul(2) <= self.processors
    }
}

/// What one connection may take, of itself and of its server.
#[derive(Debug)]
pub(crate) struct Purse<'a> {
    /// Everything that it has in memory.
    whole: Budget,
    share: Budget,
    pub(crate) pool: &'a Pool,
}

impl<'a> Purse<'a> {
    pub(crate) fn new(limits: &Limits, pool: &'a Pool) -> Self {
        pool.busy.fetch_add(1, Ordering::Relaxed);
        Self {
            whole: Budget::new(limits.connection_bytes.max(u64::from(limits.payload))),
            // Whatever the others hold back, a client that reads gets its next piece.
            share: Budget::new(pool.share.max(PIECE.min(limits.payload.into()))),
            pool,
        }
    }

    /// Takes `bytes`, waiting until they are there.
    pub(crate) fn take(&self, bytes: u64) -> Option<[Taken<'_>; 2]> {
        (bytes > 0).then(|| {
            let whole = self.whole.take(bytes);
            let common = || self.pool.common.lend(bytes, &self.share);
            let server = self.share.try_take(bytes).unwrap_or_else(common);
            [whole, server]
        })
    }
}

impl Drop for Purse<'_> {
    fn drop(&mut self) {
        self.pool.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut free = self.budget.free.lock().unwrap_or_else(PoisonError::into_inner);
        *free = free.saturating_add(self.bytes);
        if let Some(borrower) = self.borrower {
            borrower.lent.fetch_sub(self.bytes, Ordering::Relaxed);
        }
        drop(free);
        self.budget.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_one_taker_never_waits_for_itself() {
        let budget = Budget::new(10);
        drop(budget.take(1000));
        let six = budget.take(6);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| drop(budget.take(5)));
            drop(six);
            other.join().unwrap();
        });
        assert_eq!(*budget.free.lock().unwrap(), 10);
    }

    #[test]
    fn a_connection_that_takes_everything_leaves_the_others_their_shares() {
        let limits = Limits {
            connections: 4,
            payload: 100,
            server_bytes: 800,
            connection_bytes: 10_000,
            ..Limits::default()
        };
        let pool = Pool::new(&limits);
        let greedy = Purse::new(&limits, &pool);
        let modest = Purse::new(&limits, &pool);
        let all: Vec<_> = (0..3).map(|_| greedy.take(100).unwrap()).collect();
        assert_eq!(*pool.common.free.lock().unwrap(), 200);
        drop(modest.take(60));
        drop(modest.take(100));
        assert!(modest.take(0).is_none());
        drop(all);
        assert_eq!(*pool.common.free.lock().unwrap(), 400);
    }
}
