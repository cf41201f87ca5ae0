// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An export of somebody else's server as a device like any other.

mod ahead;
mod connection;
mod device;
mod dialer;
mod extents;
mod facts;
mod handshake;
mod line;
mod list;
mod moving;
mod option;
mod queue;
mod receive;
mod reply;
mod slots;
mod stream;
mod unflushed;

use crate::tls::ClientTls;
use crate::wire::command;
use connection::{Connection, Request};
pub use dialer::Dialer;
use extents::Known;
pub use facts::Facts;
use line::{Line, Wanted};
pub use list::{ListedExport, Listing, describe_export, list_exports};
pub use moving::Moved;
use reply::Runs;
pub use stream::Address;
use stream::Socket;
use unflushed::Unflushed;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tranship_block::{Error, ErrorKind, Result, Span};

/// Longest request without payload: 32 bits of length, less what keeps it aligned.
const LONGEST: u64 = (1 << 32) - (64 << 10);
/// Longest payload for servers that do not tell theirs ("Size constraints").
const LONGEST_PAYLOAD: u64 = 32 << 20;

/// Pauses before a request is repeated that the server answered with an I/O error.
const AFTER_ERROR: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(500)];
/// What cannot be read is not looked for in smaller parts than this.
const SMALLEST_READ: usize = 4096;

/// How a server is spoken to.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Name of the export; the empty one is the server's default.
    pub export: String,
    /// Refuse writes, even if the server takes them.
    pub read_only: bool,
    /// Connections that are used at the same time, if the server says that they see the
    /// same disk; at least 1.
    pub connections: usize,
    /// How long connecting may take, and how long a reply may be waited for.
    pub timeout: Duration,
    /// Encrypt, and refuse a server that does not.
    pub tls: Option<ClientTls>,
    /// What is done when a connection breaks.
    pub retry: Retry,
    /// Metadata contexts to ask for, besides `base:allocation`.
    pub contexts: Vec<String>,
    /// Ask for 64-bit lengths.
    pub extended: bool,
    /// Ask for replies in chunks. Without them there is neither an extent nor anything of
    /// 64 bits.
    pub structured: bool,
    /// Who makes the connections instead of this process, which may not.
    pub dialer: Option<Arc<Dialer>>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            read_only: false,
            connections: 4,
            timeout: Duration::from_mins(1),
            tls: None,
            retry: Retry::default(),
            contexts: Vec::new(),
            extended: true,
            structured: true,
            dialer: None,
        }
    }
}

/// What is done when a connection breaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retry {
    /// How long a request may take from the moment at which it lost its connection. Until
    /// then the client connects again and repeats what was in flight; 0 means never.
    ///
    /// All requests can be repeated, as long as nobody else writes to the same place. What
    /// the server had acknowledged and not flushed may be lost if it is not the same
    /// process any more (which is known for Unix sockets alone): the next flush fails then
    /// with [`ErrorKind::Lost`].
    ///
    /// The first connection is waited for as long. A read or write that the server answers
    /// with an I/O error is repeated twice, and a read then in halves, until the error is
    /// about no more than 4 KiB.
    pub budget: Duration,
}

/// A disk that an NBD server exports.
///
/// Any number of threads may use it: their requests are in flight at the same time, on
/// one connection or several. If a connection breaks and does not come back within
/// [`Retry::budget`], all that is in flight on it and everything after it fails with
/// [`tranship_block::ErrorKind::Busy`].
#[derive(Debug)]
pub struct Remote {
    facts: Facts,
    read_only: bool,
    lines: Vec<Line>,
    /// Line of the next request.
    turn: AtomicUsize,
    /// Number of the next queue.
    queues: AtomicU64,
    retry: Retry,
    /// What is known about zeroes, until something is written.
    known: Mutex<Known>,
    /// Held while an unaligned write reads what is around it.
    unaligned: Mutex<()>,
    /// Held while a flush is under way.
    flushing: Mutex<()>,
    unflushed: Mutex<Unflushed>,
}

impl Remote {
    /// Connects to the server at `address`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Busy`] if there is nobody or the connection broke,
    /// [`tranship_block::ErrorKind::NotFound`] if the server has no such export,
    /// [`tranship_block::ErrorKind::Denied`] if the two do not agree about TLS,
    /// [`tranship_block::ErrorKind::Corrupt`] if it breaks the protocol.
    pub fn connect(address: &Address, options: &ClientOptions) -> Result<Self> {
        let first = line::open_patiently(address, options)?;
        let facts = first.agreed.facts.clone();
        let mut connections = vec![first];
        if facts.can_multi_conn() {
            for _ in 1..options.connections {
                // One is enough to work with: a server may have a limit.
                match Connection::open(address, options) {
                    Ok(again) if line::is_same(&again.agreed.facts, &facts) => {
                        connections.push(again);
                    }
                    _ => break,
                }
            }
        }
        tracing::debug!(size = facts.size, connections = connections.len(), "connected to NBD");
        let line = |connection| Line::new(connection, Some(address.clone()), options);
        Ok(Self::new(facts, connections.into_iter().map(line).collect(), options))
    }

    /// Uses the server at the other end of `stream`, on this one connection, which is not
    /// made again if it breaks.
    ///
    /// # Errors
    ///
    /// As [`Self::connect`].
    pub fn from_stream(stream: UnixStream, options: &ClientOptions) -> Result<Self> {
        let socket = Socket::over(OwnedFd::from(stream), options.timeout)?;
        let connection = Connection::over(socket, "localhost", options)?;
        let facts = connection.agreed.facts.clone();
        Ok(Self::new(facts, vec![Line::new(connection, None, options)], options))
    }

    fn new(facts: Facts, lines: Vec<Line>, options: &ClientOptions) -> Self {
        Self {
            read_only: options.read_only || facts.is_read_only(),
            facts,
            lines,
            turn: AtomicUsize::new(0),
            queues: AtomicU64::new(0),
            retry: options.retry,
            known: Mutex::default(),
            unaligned: Mutex::new(()),
            flushing: Mutex::new(()),
            unflushed: Mutex::default(),
        }
    }

    /// What the server says about the export, and what was agreed upon.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// What the server says about the export.
    pub fn description(&self) -> Option<&str> {
        self.facts.description.as_deref()
    }

    /// Connections in use.
    pub fn connections(&self) -> usize {
        self.lines.len()
    }

    /// Lengths and flags of the extents from `offset` on, as the metadata context `context`
    /// sees them. They cover `len` bytes or less, but never nothing.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] for a range past the end and for a context that
    /// was not agreed upon ([`ClientOptions::contexts`]), and what the server answers.
    pub fn status(&self, context: &str, offset: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        let span = Span::new(offset, len);
        span.check_within(self.facts.size)?;
        if len == 0 {
            return Err(Error::usage("block status of no bytes").at(offset));
        }
        let unit = u64::from(self.facts.min_block).max(1);
        let start = offset.saturating_sub(offset.checked_rem(unit).unwrap_or(0));
        let end = span.end().checked_next_multiple_of(unit).unwrap_or(u64::MAX);
        let most = if self.facts.extended { u64::MAX } else { LONGEST };
        let end = if end > self.facts.size {
            self.facts.size.saturating_sub(self.facts.size.checked_rem(unit).unwrap_or(0))
        } else {
            end
        };
        let asked = Span::new(start, end.saturating_sub(start).min(most));
        if asked.end() <= offset {
            return Err(Error::unsupported(
                "the server has no block status for the end of its disk, which is no whole block",
            )
            .at(offset));
        }
        let request = request(command::BLOCK_STATUS, 0, asked);
        let runs = self.call(request, &[], Wanted::Status(context), &mut [])?;
        let mut skip = offset.saturating_sub(start);
        let mut left = len;
        let mut clipped: Vec<(u64, u64)> = Vec::new();
        for (len, flags) in runs {
            let part = len.saturating_sub(skip).min(left);
            skip = skip.saturating_sub(len);
            left = left.saturating_sub(part);
            match clipped.last_mut() {
                _ if part == 0 => {}
                Some((before, same)) if *same == flags => *before = before.saturating_add(part),
                _ => clipped.push((part, flags)),
            }
        }
        if clipped.is_empty() {
            return Err(Error::corrupt(
                "the server's block status has nothing about the start of its range",
            )
            .at(offset));
        }
        Ok(clipped)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unflushed(&self) -> MutexGuard<'_, Unflushed> {
        self.unflushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(
        &self,
        request: Request,
        payload: &[u8],
        wanted: Wanted<'_>,
        buf: &mut [u8],
    ) -> Result<Runs> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let number = turn.checked_rem(self.lines.len()).unwrap_or(0);
        let line = self.lines.get(number).ok_or_else(|| Error::usage("client has no line"))?;
        let lost = || self.unflushed().server_changed();
        line.call(request, payload, wanted, buf, &lost).map_err(|error| error.at(request.offset))
    }

    /// Sends a request whose answer is only whether it worked.
    fn send(&self, request: Request, payload: &[u8]) -> Result<()> {
        self.call(request, payload, Wanted::Done, &mut []).map(drop)
    }

    fn payload(&self) -> u64 {
        let unit = u64::from(self.facts.min_block);
        let most = u64::from(self.facts.max_payload).min(LONGEST_PAYLOAD);
        most.saturating_sub(most.checked_rem(unit).unwrap_or(0)).max(unit)
    }

    /// Longest request without payload.
    fn longest(&self) -> u64 {
        // A server may need minutes for what is longer, and nothing else tells that it works.
        if self.facts.extended { 64 << 30 } else { LONGEST }
    }

    /// The smallest range of whole blocks of the server that has `span` in it.
    fn aligned(&self, span: Span) -> Result<Span> {
        let unit = u64::from(self.facts.min_block).max(1);
        let start = span.start.saturating_sub(span.start.checked_rem(unit).unwrap_or(0));
        let end = span.end().checked_next_multiple_of(unit).unwrap_or(u64::MAX);
        if end > self.facts.size {
            // "The odd tail of an export is unreachable": the server says so by its sizes.
            return Err(Error::unsupported(format!(
                "the server takes requests of {unit} bytes at least, and its disk of {} bytes \
                 ends within one",
                self.facts.size
            ))
            .at(span.start));
        }
        Ok(Span::new(start, end.saturating_sub(start)))
    }

    fn read_aligned(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        for piece in pieces(Span::new(offset, length(rest)), self.payload()) {
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            self.read_once(now, piece.start)
                .or_else(|error| self.read_in_spite_of(error, now, piece.start))?;
            rest = later;
        }
        Ok(())
    }

    fn read_once(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let request = request(command::READ, 0, Span::new(offset, length(buf)));
        self.call(request, &[], Wanted::Bytes, buf).map(drop)
    }

    /// Reads again what the server could not read, if anything is to be tried again at all.
    fn read_in_spite_of(&self, error: Error, buf: &mut [u8], offset: u64) -> Result<()> {
        let read = self.in_spite_of(error, || self.read_once(buf, offset));
        read.or_else(|error| match error.kind() {
            ErrorKind::Io if !self.retry.budget.is_zero() => self.narrowed(error, buf, offset),
            _ => Err(error),
        })
    }

    /// Reads in ever smaller parts, so that the error is about those bytes alone that the
    /// server really does not have.
    fn narrowed(&self, error: Error, buf: &mut [u8], offset: u64) -> Result<()> {
        let unit = usize::try_from(self.facts.min_block).unwrap_or(usize::MAX).max(SMALLEST_READ);
        let half = buf.len().checked_div(2).and_then(|half| half.checked_next_multiple_of(unit));
        let len = buf.len();
        let parts = half.filter(|half| *half < len).and_then(|half| buf.split_at_mut_checked(half));
        let Some((low, high)) = parts else {
            let latest = self.in_spite_of(error, || self.read_once(buf, offset));
            return latest.map_err(|error| {
                let text = format!("{} (a read of {len} bytes)", error.message());
                Error::new(error.kind(), text).at(offset)
            });
        };
        let middle = offset.saturating_add(length(low));
        for (part, at) in [(low, offset), (high, middle)] {
            match self.read_once(part, at) {
                Err(error) if error.kind() == ErrorKind::Io => self.narrowed(error, part, at)?,
                other => other?,
            }
        }
        Ok(())
    }

    /// Does something again that the server could not do, after a while.
    fn in_spite_of(&self, error: Error, mut work: impl FnMut() -> Result<()>) -> Result<()> {
        let mut latest = error;
        for pause in AFTER_ERROR {
            if latest.kind() != ErrorKind::Io || self.retry.budget < pause {
                break;
            }
            std::thread::sleep(pause);
            match work() {
                Ok(()) => return Ok(()),
                Err(error) => latest = error,
            }
        }
        Err(latest)
    }

    fn write_aligned(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        for piece in pieces(Span::new(offset, length(rest)), self.payload()) {
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at(len);
            let write = || self.send(request(command::WRITE, 0, piece), now);
            write().or_else(|error| self.in_spite_of(error, write))?;
            self.unflushed().wrote(piece);
            rest = later;
        }
        Ok(())
    }

    /// Checks that `span` may be changed, and forgets what was known about it.
    fn start_writing(&self, span: Span) -> Result<()> {
        if self.read_only {
            return Err(Error::usage("device is read-only").at(span.start));
        }
        span.check_within(self.facts.size)?;
        self.known().clear();
        Ok(())
    }
}

fn request(command: u16, flags: u16, span: Span) -> Request {
    Request { command, flags, offset: span.start, len: span.len }
}

/// Splits `span` into requests of at most `most` bytes.
fn pieces(span: Span, most: u64) -> impl Iterator<Item = Span> {
    let most = most.max(1);
    let mut at = span.start;
    std::iter::from_fn(move || {
        let left = span.end().saturating_sub(at);
        let piece = Span::new(at, left.min(most));
        at = piece.end();
        (left > 0).then_some(piece)
    })
}

fn length(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

fn size_of_span(span: Span) -> Result<usize> {
    usize::try_from(span.len).map_err(|_| Error::usage("range does not fit into memory"))
}
