// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one client may cost, and the budget that holds it to that.

use std::sync::{Condvar, Mutex, PoisonError};
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
    /// Connections in the handshake at the same time; further clients wait.
    pub handshakes: usize,
    /// Bytes of one read or write request; at least 1 MiB.
    pub payload: u32,
    /// Requests that one connection works on at the same time; then it reads no more.
    pub requests: usize,
    /// Bytes of payload in memory for one connection.
    pub connection_bytes: u64,
    /// Bytes of payload in memory for the whole server.
    pub server_bytes: u64,
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
            handshakes: 16,
            payload: 32 << 20,
            requests: 16,
            connection_bytes: 64 << 20,
            server_bytes: 512 << 20,
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
}

/// Bytes taken from a [`Budget`]; they return when this is dropped.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    pub(crate) fn new(whole: u64) -> Self {
        Self { whole, free: Mutex::new(whole), returned: Condvar::new() }
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
        Taken { budget: self, bytes }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut free = self.budget.free.lock().unwrap_or_else(PoisonError::into_inner);
        *free = free.saturating_add(self.bytes);
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
}
