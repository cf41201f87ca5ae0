// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many reads in flight on one connection without a thread for each.

use super::connection::{Connection, Failure};
use super::line::{Line, Wanted};
use super::{Remote, length, request};
use crate::wire::command;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tranship_block::{BlockDevice, ReadQueue, Result, Span};

/// The reads on one line. Nobody but the queue knows them, so they are repeated here if
/// the connection breaks.
#[derive(Debug)]
pub(super) struct Queue<'a> {
    remote: &'a Remote,
    line: &'a Line,
    number: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Connections with reads in flight and their numbers, the oldest first: there are
    /// several while those of a broken one are repeated.
    connections: VecDeque<(Arc<Connection>, u64)>,
    /// Ranges that the server cannot be asked for in one request.
    odd: Vec<Span>,
}

impl<'a> Queue<'a> {
    pub(super) fn new(remote: &'a Remote, line: &'a Line, number: u64) -> Self {
        Self { remote, line, number, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The oldest connection, unless it is this one, to which nothing more is added.
    fn oldest(&self, empty: Option<&Arc<Connection>>) -> Option<(Arc<Connection>, u64)> {
        let mut state = self.state();
        if let (Some(empty), Some((first, _))) = (empty, state.connections.front())
            && Arc::ptr_eq(empty, first)
        {
            if state.connections.len() == 1 {
                return None;
            }
            state.connections.pop_front();
        }
        state.connections.front().map(|(first, number)| (Arc::clone(first), *number))
    }

    /// Reads once more what did not come.
    fn repeat(&self, span: Span, generation: u64, failure: Failure, buf: &mut [u8]) -> Result<()> {
        let read = match failure {
            Failure::Final(error) => Err(error),
            Failure::Lost(error) => {
                let lost = || self.remote.unflushed().server_changed();
                let request = request(command::READ, 0, span);
                let before = Some((generation, error));
                self.line.call_again(before, request, &[], Wanted::Bytes, buf, &lost).map(drop)
            }
        };
        read.map_err(|error| error.at(span.start))
            .or_else(|error| self.remote.read_in_spite_of(error, buf, span.start))
    }
}

impl ReadQueue for Queue<'_> {
    fn start(&self, spans: &[Span]) -> Result<()> {
        let most = self.remote.payload();
        let mut asked = Vec::with_capacity(spans.len());
        let mut odd = Vec::new();
        for span in spans {
            span.check_within(self.remote.facts.size)?;
            let is_whole = self.remote.aligned(*span).is_ok_and(|whole| whole == *span);
            let kind = if is_whole && span.len <= most { &mut asked } else { &mut odd };
            kind.push(*span);
        }
        let (connection, number) = self.line.current()?;
        {
            let mut state = self.state();
            state.odd.extend(odd);
            let last = state.connections.back();
            if last.is_none_or(|(last, _)| !Arc::ptr_eq(last, &connection)) {
                state.connections.push_back((Arc::clone(&connection), number));
            }
        }
        if !asked.is_empty() {
            connection.enqueue(self.number, &asked);
        }
        Ok(())
    }

    fn next(&self, buf: &mut Vec<u8>) -> Option<(Span, Result<()>)> {
        let odd = self.state().odd.pop();
        if let Some(span) = odd {
            return Some((span, self.remote.read_at(room(buf, span), span.start)));
        }
        let mut current = self.oldest(None)?;
        loop {
            let (connection, generation) = &current;
            match connection.wait_any(self.number, buf) {
                Some((span, Ok(()))) => return Some((span, Ok(()))),
                Some((span, Err(failure))) => {
                    let read = self.repeat(span, *generation, failure, room(buf, span));
                    return Some((span, read));
                }
                None => current = self.oldest(Some(connection))?,
            }
        }
    }
}

/// The front of `buf`, as long as `span`.
fn room(buf: &mut Vec<u8>, span: Span) -> &mut [u8] {
    let len = usize::try_from(span.len).unwrap_or(usize::MAX);
    if length(buf) < span.len {
        buf.resize(len, 0);
    }
    buf.get_mut(..len).unwrap_or_default()
}
