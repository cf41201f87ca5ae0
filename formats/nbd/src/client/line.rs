// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connection that is made again when it breaks.
//!
//! Whoever waits for a reply holds all of its request, and so repeats it: nothing else
//! knows which requests were in flight. The first who finds the connection broken connects
//! again while the others wait for it.

use super::connection::{Connection, Failure, Request};
use super::facts::Facts;
use super::reply::{Runs, Want};
use super::stream::Address;
use super::{ClientOptions, length};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tranship_block::{Error, ErrorKind, Result};

/// Before the first attempt; the pauses double from there.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Times that one request may lose its connection. Some servers hang up at a sector that
/// they cannot read, and would do so for ever.
const MOST_BREAKS: u32 = 8;

/// Connects to a server that may not listen yet.
pub(super) fn open_patiently(address: &Address, options: &ClientOptions) -> Result<Connection> {
    let begun = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match Connection::open(address, options) {
            Err(error) if error.kind() == ErrorKind::Busy => error,
            other => return other,
        };
        let left = options.retry.budget.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(error);
        }
        tracing::debug!(%address, %error, "no NBD server yet");
        std::thread::sleep(pause.min(left));
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
}

/// What a request is to give.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted<'a> {
    /// Success or failure alone.
    Done,
    /// Bytes for all of the buffer.
    Bytes,
    /// Extents of the context of this name.
    Status(&'a str),
}

#[derive(Debug)]
pub(super) struct Line {
    /// Where to connect again, if that is possible.
    address: Option<Address>,
    options: ClientOptions,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    connection: Arc<Connection>,
    /// Counts connections.
    generation: u64,
    /// Why nobody tries any more.
    dead: Option<String>,
}

impl Line {
    pub(super) fn new(
        connection: Connection,
        address: Option<Address>,
        options: &ClientOptions,
    ) -> Self {
        let state = State { connection: Arc::new(connection), generation: 0, dead: None };
        Self { address, options: options.clone(), state: Mutex::new(state) }
    }

    /// The connection, unless there is none that works; no request gets one afterwards.
    pub(super) fn close(&self, why: &str) -> Option<Arc<Connection>> {
        let mut state = self.state();
        if state.dead.is_some() {
            return None;
        }
        state.dead = Some(why.to_owned());
        Some(Arc::clone(&state.connection))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries a request out, on as many connections as it takes. `lost` is called when
    /// the server is not, or may not be, the one that it was before.
    pub(super) fn call(
        &self,
        request: Request,
        payload: &[u8],
        wanted: Wanted<'_>,
        buf: &mut [u8],
        lost: &dyn Fn(),
    ) -> Result<Runs> {
        self.call_again(None, request, payload, wanted, buf, lost)
    }

    /// The same, for a request that may have failed already: with the connection of this
    /// number, for this reason.
    pub(super) fn call_again(
        &self,
        mut before: Option<(u64, Error)>,
        request: Request,
        payload: &[u8],
        wanted: Wanted<'_>,
        buf: &mut [u8],
        lost: &dyn Fn(),
    ) -> Result<Runs> {
        let mut outage: Option<Instant> = None;
        let mut breaks = 0_u32;
        loop {
            if let Some((generation, error)) = before.take() {
                let since = *outage.get_or_insert_with(Instant::now);
                breaks = breaks.saturating_add(1);
                self.renew(generation, since, breaks, error, lost)?;
            }
            let (connection, generation) = self.current()?;
            let want = match wanted {
                Wanted::Done => Want::Done,
                Wanted::Bytes => Want::Bytes { offset: request.offset, len: buf.len() },
                Wanted::Status(name) => {
                    let context = connection.agreed.context(name).ok_or_else(|| {
                        Error::usage(format!("the metadata context {name:?} was not agreed upon"))
                    })?;
                    Want::Status { context }
                }
            };
            debug_assert!(payload.is_empty() || length(payload) == request.len);
            match connection.call(request, payload, want, buf) {
                Ok(runs) => return Ok(runs),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Lost(error)) => before = Some((generation, error)),
            }
        }
    }

    /// The connection for new requests, and its number.
    pub(super) fn current(&self) -> Result<(Arc<Connection>, u64)> {
        let state = self.state();
        match &state.dead {
            Some(why) => Err(Error::new(ErrorKind::Busy, why.clone())),
            None => Ok((Arc::clone(&state.connection), state.generation)),
        }
    }

    /// Connects again, unless somebody has done so since `generation`.
    fn renew(
        &self,
        generation: u64,
        since: Instant,
        breaks: u32,
        error: Error,
        lost: &dyn Fn(),
    ) -> Result<()> {
        let budget = self.options.retry.budget;
        let Some(address) = self.address.as_ref().filter(|_| !budget.is_zero()) else {
            return Err(error);
        };
        if breaks > MOST_BREAKS {
            return Err(Error::new(
                ErrorKind::Io,
                format!(
                    "the NBD server hung up {breaks} times when it was asked for this: {}",
                    error.message()
                ),
            ));
        }
        let mut state = self.state();
        if let Some(why) = &state.dead {
            return Err(Error::new(ErrorKind::Busy, why.clone()));
        }
        if state.generation != generation {
            return Ok(());
        }
        tracing::warn!(%address, %error, "the connection to the NBD server broke");
        let mut latest = error;
        let mut pause = paused(breaks);
        loop {
            let left = budget.saturating_sub(since.elapsed());
            if left.is_zero() {
                let seconds = budget.as_secs_f64();
                let why = format!("no answer from the NBD server within {seconds} s: {latest}");
                state.dead = Some(why.clone());
                return Err(Error::new(ErrorKind::Busy, why));
            }
            std::thread::sleep(pause.min(left));
            pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
            match self.open_again(address, &state.connection) {
                Ok(again) => {
                    let (old, new) = (state.connection.peer, again.peer);
                    if old.is_none() || old != new {
                        lost();
                    }
                    tracing::info!(%address, "connected to the NBD server again");
                    state.connection = Arc::new(again);
                    state.generation = state.generation.wrapping_add(1);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Busy => latest = error,
                Err(error) => {
                    state.dead = Some(error.to_string());
                    return Err(error);
                }
            }
        }
    }

    fn open_again(&self, address: &Address, before: &Connection) -> Result<Connection> {
        let connection = Connection::open(address, &self.options)?;
        let (old, new) = (&before.agreed.facts, &connection.agreed.facts);
        if is_same(old, new) {
            return Ok(connection);
        }
        Err(Error::corrupt(format!(
            "the NBD server at {address} came back with another export: {} bytes and flags {:#x} \
             instead of {} bytes and flags {:#x}, or other block sizes or contexts",
            new.size, new.flags, old.size, old.flags
        )))
    }
}

/// Whether requests mean the same for both.
pub(super) fn is_same(a: &Facts, b: &Facts) -> bool {
    let text = |facts: &Facts| Facts { description: None, name: None, ..facts.clone() };
    text(a) == text(b)
}

fn paused(breaks: u32) -> Duration {
    let doublings = breaks.saturating_sub(1).min(16);
    FIRST_PAUSE.saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX)).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit() {
        let pauses = [1, 2, 3, 6, 7, 100].map(|breaks| paused(breaks).as_millis());
        assert_eq!(pauses, [100, 200, 400, 3200, 5000, 5000]);
    }
}
