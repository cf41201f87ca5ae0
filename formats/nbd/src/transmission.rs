// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The transmission phase of one connection.
//!
//! Its workers take turns at reading: whoever holds the input reads one request with its
//! payload, lets go of the input and answers, while the next worker reads on. So replies
//! come in any order, every worker has a buffer of its own, and a client that sends
//! faster than the device works finds nobody reading. Workers are started only when a
//! request arrives and nobody is waiting to read the next one.

use crate::export::{Served, count};
use crate::handshake::Agreed;
use crate::limits::{Budget, Limits, Taken};
use crate::reply;
use crate::request::{Command, Header, Refusal, Terms};
use crate::wire::{Errno, allocation};
use std::io::{self, BufReader, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, Error, ErrorKind, ExtentKind, Extents, Result, Span, Zeroing};

/// Data travels in chunks of this many bytes, small enough to stay in the cache.
const PIECE: u64 = 512 << 10;
/// A shorter hole is cheaper to read than to describe; shorter reads skip the lookup.
const SHORTEST_HOLE: u64 = 64 << 10;
/// Zeroing and trimming look after this many bytes whether anybody still wants it.
const STRIDE: u64 = 1 << 30;
/// A block status reply is cut short after this time.
const STATUS_TIME: Duration = Duration::from_millis(50);
/// How many bytes are read from the socket at once.
const GULP: usize = 64 << 10;

/// One client in the transmission phase.
pub(crate) struct Connection<'a, R, W> {
    input: Mutex<BufReader<R>>,
    /// Gone after a failed send: what follows half a reply would not be understood.
    output: Mutex<Option<W>>,
    served: Arc<Served>,
    terms: Terms,
    limits: &'a Limits,
    own_budget: Budget,
    server_budget: &'a Budget,
    workers: AtomicUsize,
    /// Workers that wait for the input or hold it.
    readers: AtomicUsize,
    /// No more requests will be read.
    over: AtomicBool,
    /// Nobody waits for the replies any more, so long work may stop.
    abandoned: AtomicBool,
}

/// A request that was read completely; the bytes of a write are in the worker's buffer.
struct Accepted<'a> {
    cookie: u64,
    command: std::result::Result<Command, Refusal>,
    _budget: [Taken<'a>; 2],
}

/// A failure while answering.
enum Failure {
    /// The device failed; the client can be told.
    Device(Error),
    /// The client cannot be told anything any more.
    Stream(io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Device(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Stream(error)
    }
}

impl<'a, R: Read + Send, W: Write + Send> Connection<'a, R, W> {
    pub(crate) fn new(
        (input, output): (R, W),
        agreed: Agreed,
        limits: &'a Limits,
        server_budget: &'a Budget,
    ) -> Self {
        let Agreed { served, structured, allocation } = agreed;
        count(&served.counters.connections, 1);
        let terms = Terms {
            size: served.export.device.size(),
            read_only: served.is_read_only(),
            structured,
            allocation,
            payload: limits.payload,
        };
        Self {
            input: Mutex::new(BufReader::with_capacity(GULP, input)),
            output: Mutex::new(Some(output)),
            served,
            terms,
            limits,
            own_budget: Budget::new(limits.connection_bytes.max(u64::from(limits.payload))),
            server_budget,
            workers: AtomicUsize::new(1),
            readers: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        }
    }

    /// Answers requests until the client leaves and everything in flight is answered.
    pub(crate) fn serve(&self) {
        std::thread::scope(|scope| self.work(scope));
    }

    fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let mut buffer = Vec::new();
        while let Some(request) = self.accept(&mut buffer) {
            self.hire(scope);
            if let Err(error) = self.answer(&request, &mut buffer) {
                tracing::debug!(%error, "cannot send a reply");
                self.abandoned.store(true, Ordering::Relaxed);
                self.over.store(true, Ordering::Relaxed);
            }
            drop(request);
            if buffer.len() > usize::try_from(PIECE).unwrap_or(usize::MAX) {
                buffer = Vec::new();
            }
        }
    }

    /// Starts another worker if nobody is left to read.
    fn hire<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        if self.readers.load(Ordering::Relaxed) > 0 || self.over.load(Ordering::Relaxed) {
            return;
        }
        let one_more = |workers: usize| {
            workers.checked_add(1).filter(|workers| *workers <= self.limits.requests)
        };
        let order = Ordering::Relaxed;
        if self.workers.fetch_update(order, order, one_more).is_err() {
            return;
        }
        let builder = Builder::new().name("nbd worker".to_owned());
        if let Err(error) = builder.spawn_scoped(scope, move || self.work(scope)) {
            // This worker reads on by itself as soon as it has answered.
            tracing::warn!(%error, "cannot start another worker");
            self.workers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Waits for the input and reads one request. `None` once there will be no more.
    fn accept(&self, buffer: &mut Vec<u8>) -> Option<Accepted<'_>> {
        self.readers.fetch_add(1, Ordering::Relaxed);
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        let accepted = if self.over.load(Ordering::Relaxed) {
            None
        } else {
            self.read_request(&mut *input, buffer).unwrap_or_else(|error| {
                tracing::debug!(error = %Chain(&error), "client is gone");
                self.abandoned.store(true, Ordering::Relaxed);
                None
            })
        };
        if accepted.is_none() {
            self.over.store(true, Ordering::Relaxed);
        }
        self.readers.fetch_sub(1, Ordering::Relaxed);
        accepted
    }

    /// Reads one request with its payload. `Ok(None)` is the client's orderly farewell.
    fn read_request(
        &self,
        input: &mut impl Read,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<Accepted<'_>>> {
        let gone = |error| Error::io("cannot receive a request", error);
        let mut raw = [0; Header::BYTES];
        input.read_exact(&mut raw).map_err(gone)?;
        let header = Header::parse(&raw)?;
        let command = self.terms.admit(&header);
        if command == Ok(Command::Disconnect) {
            return Ok(None);
        }
        let cost = match command {
            Ok(Command::Write { span, .. }) => span.len,
            Ok(Command::Read { span, one_chunk }) if one_chunk || !self.terms.structured => {
                span.len
            }
            Ok(Command::Read { span, .. }) => span.len.min(PIECE),
            _ => 0,
        };
        let budget = [self.own_budget.take(cost), self.server_budget.take(cost)];
        if let Ok(Command::Write { span, .. }) = command {
            input.read_exact(sized(buffer, span.len)).map_err(gone)?;
        } else {
            self.drain(input, header.payload())?;
        }
        Ok(Some(Accepted { cookie: header.cookie, command, _budget: budget }))
    }

    /// Skips the payload of a refused write, up to what an honest mistake can be.
    fn drain(&self, input: &mut impl Read, payload: u32) -> Result<()> {
        if payload > self.limits.payload.saturating_mul(2) {
            return Err(Error::corrupt(format!(
                "write of {payload} bytes, expected at most {}",
                self.limits.payload
            )));
        }
        let skipped = io::copy(&mut input.take(u64::from(payload)), &mut io::sink())
            .map_err(|error| Error::io("cannot receive a payload", error))?;
        if skipped < u64::from(payload) {
            return Err(Error::corrupt("client left in the middle of a write"));
        }
        Ok(())
    }

    fn answer(&self, request: &Accepted<'_>, buffer: &mut Vec<u8>) -> io::Result<()> {
        let cookie = request.cookie;
        let done = match &request.command {
            Ok(command) => self.carry_out(cookie, command, buffer),
            Err(refusal) => {
                count(&self.served.counters.errors, 1);
                return self.send_error(cookie, refusal.errno, refusal.text, None);
            }
        };
        match done {
            Ok(()) => Ok(()),
            Err(Failure::Stream(error)) => Err(error),
            Err(Failure::Device(error)) => {
                count(&self.served.counters.errors, 1);
                let name = &self.served.export.name;
                tracing::warn!(export = name, error = %Chain(&error), "request failed");
                self.send_error(cookie, errno(&error), error.message(), error.offset())
            }
        }
    }

    fn carry_out(
        &self,
        cookie: u64,
        command: &Command,
        buffer: &mut Vec<u8>,
    ) -> std::result::Result<(), Failure> {
        let device = &self.served.export.device;
        let counters = &self.served.counters;
        match *command {
            Command::Read { span, one_chunk } => {
                count(&counters.reads, 1);
                count(&counters.bytes_read, span.len);
                return if self.terms.structured {
                    self.read_chunks(cookie, span, one_chunk, buffer)
                } else {
                    let bytes = sized(buffer, span.len);
                    device.read_at(bytes, span.start)?;
                    Ok(self.send(&reply::simple(cookie, 0), bytes)?)
                };
            }
            Command::Write { span, durable } => {
                count(&counters.writes, 1);
                count(&counters.bytes_written, span.len);
                device.write_at(sized(buffer, span.len), span.start)?;
                self.settle(durable)?;
            }
            Command::Flush => {
                count(&counters.flushes, 1);
                device.flush()?;
            }
            Command::Trim { span, durable } => {
                count(&counters.zeroes, 1);
                count(&counters.bytes_zeroed, span.len);
                self.in_strides(span, |part| device.discard(part))?;
                self.settle(durable)?;
            }
            Command::Zero { span, mode, durable } => {
                count(&counters.zeroes, 1);
                count(&counters.bytes_zeroed, span.len);
                self.zero(span, mode)?;
                self.settle(durable)?;
            }
            Command::Status { span, one_extent } => {
                count(&counters.statuses, 1);
                let extents = self.status(span, one_extent)?;
                return Ok(self.send(&reply::status(cookie, &extents), &[])?);
            }
            Command::Disconnect => return Ok(()),
        }
        Ok(self.send(&reply::simple(cookie, 0), &[])?)
    }

    fn settle(&self, durable: bool) -> Result<()> {
        if durable { self.served.export.device.flush() } else { Ok(()) }
    }

    fn zero(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.in_strides(span, |part| self.served.export.device.write_zeroes(part, mode))
    }

    /// Does long work in parts, so that it ends soon after the client is gone.
    fn in_strides(&self, span: Span, work: impl Fn(Span) -> Result<()>) -> Result<()> {
        let mut at = span.start;
        while at < span.end() {
            let part = Span::new(at, STRIDE.min(span.end().saturating_sub(at)));
            work(part)?;
            at = part.end();
            if at < span.end() && self.abandoned.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Cancelled, "the client is gone").at(at));
            }
        }
        Ok(())
    }

    /// Answers a read in chunks; holes are not read.
    fn read_chunks(
        &self,
        cookie: u64,
        span: Span,
        one_chunk: bool,
        buffer: &mut Vec<u8>,
    ) -> std::result::Result<(), Failure> {
        if span.is_empty() {
            return Ok(self.send(&reply::nothing(cookie), &[])?);
        }
        if one_chunk {
            return self.read_data(cookie, span, span, span.len, buffer);
        }
        let mut unsent = span.start;
        if span.len >= SHORTEST_HOLE {
            for run in Extents::new(&self.served.export.device, span) {
                let (run, kind) = run?;
                if !kind.reads_zero() || run.len < SHORTEST_HOLE {
                    continue;
                }
                let before = Span::new(unsent, run.start.saturating_sub(unsent));
                self.read_data(cookie, span, before, PIECE, buffer)?;
                self.send(&reply::hole(cookie, run.end() == span.end(), run), &[])?;
                unsent = run.end();
            }
        }
        let rest = Span::new(unsent, span.end().saturating_sub(unsent));
        self.read_data(cookie, span, rest, PIECE, buffer)
    }

    /// Sends `part` of the read of `whole` as data, in pieces of at most `piece` bytes.
    fn read_data(
        &self,
        cookie: u64,
        whole: Span,
        part: Span,
        piece: u64,
        buffer: &mut Vec<u8>,
    ) -> std::result::Result<(), Failure> {
        let mut at = part.start;
        while at < part.end() {
            let len = piece.min(part.end().saturating_sub(at));
            let bytes = sized(buffer, len);
            self.served.export.device.read_at(bytes, at).map_err(|error| error.at(at))?;
            let next = at.saturating_add(len);
            let wire_len = u32::try_from(len).unwrap_or(u32::MAX);
            self.send(&reply::data(cookie, next == whole.end(), at, wire_len), bytes)?;
            at = next;
        }
        Ok(())
    }

    /// The extents of `span` from its start, as far as one reply goes.
    fn status(&self, span: Span, one_extent: bool) -> Result<Vec<(u32, u32)>> {
        let started = Instant::now();
        let most = if one_extent { 1 } else { self.limits.status_extents.max(1) };
        let mut extents: Vec<(u32, u32)> = Vec::new();
        let mut full = false;
        let mut at = span.start;
        while at < span.end() {
            let extent = match self.served.export.device.extent_at(at) {
                Ok(extent) if extent.len > 0 => extent,
                Ok(_) if extents.is_empty() => {
                    return Err(Error::corrupt("device reported an empty extent").at(at));
                }
                Err(error) if extents.is_empty() => return Err(error.at(at)),
                // What is known so far is a valid answer; the next request meets the error.
                Ok(_) | Err(_) => break,
            };
            let flags = match extent.kind {
                ExtentKind::Data => 0,
                ExtentKind::Zero => allocation::ZERO,
                ExtentKind::Hole => allocation::HOLE | allocation::ZERO,
            };
            let len = extent.len.min(span.end().saturating_sub(at));
            let wire_len = u32::try_from(len).unwrap_or(u32::MAX);
            match extents.last_mut() {
                Some((last, same)) if *same == flags => *last = last.saturating_add(wire_len),
                _ if full => break,
                _ => extents.push((wire_len, flags)),
            }
            full = extents.len() >= most;
            at = at.saturating_add(len);
            if started.elapsed() > STATUS_TIME {
                break;
            }
        }
        Ok(extents)
    }

    fn send_error(
        &self,
        cookie: u64,
        errno: Errno,
        text: &str,
        offset: Option<u64>,
    ) -> io::Result<()> {
        if self.terms.structured {
            self.send(&reply::error(cookie, errno, text, offset), &[])
        } else {
            self.send(&reply::simple(cookie, errno.number()), &[])
        }
    }

    fn send(&self, head: &[u8], payload: &[u8]) -> io::Result<()> {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = output.as_mut() else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        reply::send(stream, head, payload).inspect_err(|_| *output = None)
    }
}

/// The first `len` bytes of `buffer`, which only ever grows.
fn sized(buffer: &mut Vec<u8>, len: u64) -> &mut [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    buffer.get_mut(..len).unwrap_or_default()
}

fn errno(error: &Error) -> Errno {
    match error.kind() {
        ErrorKind::Usage => Errno::Invalid,
        ErrorKind::Denied => Errno::Permission,
        ErrorKind::NoSpace => Errno::NoSpace,
        ErrorKind::Cancelled => Errno::Shutdown,
        _ => Errno::Io,
    }
}

/// An error with its causes on one line, for the log.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
