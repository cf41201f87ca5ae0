// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The transmission phase of one connection.
//!
//! Its workers take turns at reading: whoever holds the input reads requests. What can be
//! answered at once, the reader answers itself, and replies that are ready together are
//! sent together. With a request that may take its time the worker lets go of the input
//! before it answers, and the next worker reads on. So replies come in any order, every
//! worker has a buffer of its own, and a client that sends faster than the device works
//! finds nobody reading. Workers are started only when a request arrives and nobody is
//! waiting to read the next one.
//!
//! Why it is like this, and what it costs: `docs/design/0012-nbd-hot-path.md`.

mod answer;
mod pace;
mod patience;
mod read;

use crate::context::Context;
use crate::export::Served;
use crate::handshake::Agreed;
use crate::input::{GULP, Input};
use crate::limits::{Limits, Pool, Purse, Taken};
use crate::reply::{Frame, Framing};
use crate::request::{Command, Header, Refusal, Terms};
use crate::socket::Output;
use crate::statistics::count;
use crate::wire::Errno;
use pace::Pace;
use patience::Patience;
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope};
use std::time::Instant;
use tranship_block::{BlockDevice, Error, Result};

/// Data that passes through memory travels in chunks of this many bytes, small enough to
/// stay in the cache.
pub(crate) const PIECE: u64 = 512 << 10;
/// Reads and writes up to this length may be answered by the reader itself.
const SMALL: u64 = 32 << 10;
/// Replies that are ready are sent when they are longer than this together.
const BATCH: usize = 128 << 10;

/// What a connection shares with the others of its server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Surroundings<'a> {
    pub(crate) limits: &'a Limits,
    pub(crate) pool: &'a Pool,
    /// The server is about to end: new requests are refused.
    pub(crate) stopping: &'a AtomicBool,
}

/// One client in the transmission phase.
pub(crate) struct Connection<'a, R, W> {
    reader: Mutex<Reader<R>>,
    /// Gone after a failed send: what follows half a reply would not be understood.
    output: Mutex<Option<W>>,
    /// Whether bytes of files can go to the client without passing through here.
    takes_files: bool,
    /// Tells whether the client is there while nobody reads what it sends.
    watched: Option<BorrowedFd<'a>>,
    served: Arc<Served>,
    terms: Terms,
    contexts: Vec<Context>,
    limits: &'a Limits,
    purse: Purse<'a>,
    stopping: &'a AtomicBool,
    /// How quick reads and writes up to [`SMALL`] are.
    small: Pace,
    /// How quick longer ones are.
    long: Pace,
    workers: AtomicUsize,
    /// Workers that answer something.
    answering: AtomicUsize,
    /// Workers that wait for the input or hold it.
    readers: AtomicUsize,
    /// No more requests will be read.
    over: AtomicBool,
    /// Nobody waits for the replies any more, so long work may stop.
    abandoned: AtomicBool,
}

/// The reading end, and the replies that its holder has ready.
struct Reader<R> {
    input: Input<R>,
    batch: Vec<u8>,
    patience: Patience,
    /// Requests since the input was last waited for.
    burst: usize,
}

/// A request that was read completely; the bytes of a write are in the worker's buffer.
struct Accepted<'a> {
    frame: Frame,
    command: Command,
    arrived: Instant,
    _taken: Option<[Taken<'a>; 2]>,
}

/// A failure while answering.
enum Failure {
    /// The device failed; the client can be told.
    Device(Error),
    /// The device was not asked.
    Refused(Refusal),
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

impl<'a, R: Read + Send, W: Output> Connection<'a, R, W> {
    /// `watched` is the socket, if there is one: it tells when the client has gone.
    pub(crate) fn new(
        (input, output): (R, W),
        watched: Option<BorrowedFd<'a>>,
        agreed: Agreed,
        surroundings: Surroundings<'a>,
    ) -> Self {
        let Agreed { served, framing, contexts } = agreed;
        let Surroundings { limits, pool, stopping } = surroundings;
        count(&served.counters.connections);
        let terms = Terms {
            size: served.export.device.size(),
            read_only: served.is_read_only(),
            framing,
            contexts: contexts.len(),
            payload: limits.payload,
        };
        Self {
            reader: Mutex::new(Reader {
                input: Input::new(input),
                batch: Vec::new(),
                patience: Patience::default(),
                burst: 0,
            }),
            takes_files: output.takes_files(),
            output: Mutex::new(Some(output)),
            watched,
            served,
            terms,
            contexts,
            limits,
            purse: Purse::new(limits, pool),
            stopping,
            small: Pace::default(),
            long: Pace::default(),
            workers: AtomicUsize::new(1),
            answering: AtomicUsize::new(0),
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
            self.answering.fetch_add(1, Ordering::Relaxed);
            self.hire(scope);
            if let Err(error) = self.answer(&request, &mut buffer) {
                self.give_up(&error);
            }
            self.answering.fetch_sub(1, Ordering::Relaxed);
            drop(request);
            give_back(&mut buffer);
        }
    }

    /// The client can be told nothing any more.
    fn give_up(&self, error: &io::Error) {
        tracing::debug!(%error, "cannot send a reply");
        self.abandoned.store(true, Ordering::Relaxed);
        self.over.store(true, Ordering::Relaxed);
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

    /// Waits for the input and reads up to a request that is the worker's to answer.
    /// `None` once there will be no more.
    fn accept(&self, buffer: &mut Vec<u8>) -> Option<Accepted<'_>> {
        self.readers.fetch_add(1, Ordering::Relaxed);
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let mut accepted = if self.over.load(Ordering::Relaxed) {
            None
        } else {
            self.next_request(&mut reader, buffer).unwrap_or_else(|error| {
                tracing::debug!(error = %Chain(&error), "client is gone");
                self.abandoned.store(true, Ordering::Relaxed);
                None
            })
        };
        if let Err(error) = self.flush(&mut reader.batch) {
            self.give_up(&error);
            accepted = None;
        }
        if accepted.is_none() {
            self.over.store(true, Ordering::Relaxed);
        }
        self.readers.fetch_sub(1, Ordering::Relaxed);
        accepted
    }

    /// Answers what can be answered at once, and gives back the first request that cannot.
    /// `Ok(None)` is the client's orderly farewell.
    fn next_request(
        &self,
        reader: &mut Reader<R>,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<Accepted<'_>>> {
        let framing = self.terms.framing;
        let header_len = Header::bytes(framing);
        loop {
            if reader.input.buffered().len() < header_len {
                self.flush(&mut reader.batch).map_err(unsent)?;
                let waiting = self.linger(reader);
                if !reader.input.fill(header_len, true).map_err(gone)? {
                    return Err(Error::corrupt("client left without a farewell"));
                }
                if let Some(begun) = waiting {
                    reader.patience.slept(begun.elapsed());
                }
            } else if reader.batch.len() > BATCH {
                self.flush(&mut reader.batch).map_err(unsent)?;
            }
            if self.over.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let raw = reader.input.buffered().get(..header_len).unwrap_or_default();
            let header = Header::parse(raw, framing)?;
            reader.input.consume(header_len);
            reader.burst = reader.burst.saturating_add(1);
            let arrived = Instant::now();
            let frame = Frame { framing, cookie: header.cookie, offset: header.offset };
            let mut command = self.terms.admit(&header);
            if command == Ok(Command::Disconnect) {
                return Ok(None);
            }
            if command.is_ok() && self.stopping.load(Ordering::Relaxed) {
                let text = "server is shutting down";
                command = Err(Refusal { errno: Errno::Shutdown, text });
            }
            if command.is_err() {
                self.drain(reader, header.payload(framing))?;
            }
            if let Ok(Command::FilteredStatus { payload }) = command {
                let len = usize::try_from(payload).unwrap_or(usize::MAX);
                self.flush_and_fill(reader, len)?;
                let payload = reader.input.buffered().get(..len).unwrap_or_default();
                command = self.terms.filtered(&header, payload);
                reader.input.consume(len);
            }
            let refusal = match command {
                Ok(command) => {
                    let Some(taken) = self.at_once(reader, buffer, frame, command, arrived)? else {
                        continue;
                    };
                    let request = Accepted { frame, command, arrived, _taken: taken.0 };
                    if !self.is_better_alone(&command) {
                        return Ok(Some(request));
                    }
                    self.answer(&request, buffer).map_err(unsent)?;
                    drop(request);
                    give_back(buffer);
                    continue;
                }
                Err(refusal) => refusal,
            };
            count(&self.served.counters.refused);
            frame.error(&mut reader.batch, refusal.errno, refusal.text, None);
        }
    }

    /// Reads the payload of a write, and answers the request if it is one to answer at
    /// once. Otherwise gives back what was taken from the budgets for it.
    fn at_once(
        &self,
        reader: &mut Reader<R>,
        buffer: &mut Vec<u8>,
        frame: Frame,
        command: Command,
        arrived: Instant,
    ) -> Result<Option<Handed<'_>>> {
        let cost = match command {
            Command::Read { span, one_chunk } => {
                if self.read_at_once(reader, frame, span, one_chunk, arrived).map_err(unsent)? {
                    return Ok(None);
                }
                let whole = one_chunk || self.terms.framing == Framing::Simple;
                if whole { span.len } else { span.len.min(PIECE) }
            }
            Command::Write { span, durable } if span.len <= SMALL => {
                let len = usize::try_from(span.len).unwrap_or(usize::MAX);
                self.flush_and_fill(reader, len)?;
                let Reader { input, batch, .. } = reader;
                let payload = input.buffered().get(..len).unwrap_or_default();
                if !durable && self.small.is_quick() {
                    let begun = Instant::now();
                    let done = self.served.export.device.write_at(payload, span.start);
                    self.small.note(span.len, begun.elapsed());
                    let note = &self.served.counters.writes;
                    note.note(span.len, done.is_ok(), arrived.elapsed());
                    match done {
                        Ok(()) => frame.done(batch),
                        Err(error) => self.report(batch, frame, &error),
                    }
                    input.consume(len);
                    return Ok(None);
                }
                sized(buffer, span.len).copy_from_slice(payload);
                input.consume(len);
                span.len
            }
            Command::Write { span, .. } => {
                self.flush(&mut reader.batch).map_err(unsent)?;
                let taken = self.purse.take(span.len);
                reader.input.read_payload(sized(buffer, span.len)).map_err(gone)?;
                return Ok(Some(Handed(taken)));
            }
            _ => 0,
        };
        if cost > 0 {
            // It may have to wait.
            self.flush(&mut reader.batch).map_err(unsent)?;
        }
        Ok(Some(Handed(self.purse.take(cost))))
    }

    /// Has the first `len` bytes that follow in the buffer of the input.
    fn flush_and_fill(&self, reader: &mut Reader<R>, len: usize) -> Result<()> {
        if reader.input.buffered().len() < len.min(GULP) {
            self.flush(&mut reader.batch).map_err(unsent)?;
            reader.input.fill(len, false).map_err(gone)?;
        }
        Ok(())
    }

    /// Skips the payload of a refused request, up to what an honest mistake can be.
    fn drain(&self, reader: &mut Reader<R>, payload: u64) -> Result<()> {
        if payload == 0 {
            return Ok(());
        }
        self.flush(&mut reader.batch).map_err(unsent)?;
        if payload > u64::from(self.limits.payload).saturating_mul(2) {
            return Err(Error::corrupt(format!(
                "request with {payload} bytes, expected at most {}",
                self.limits.payload
            )));
        }
        reader.input.skip(payload).map_err(gone)
    }

    /// Sends the replies that are ready.
    fn flush(&self, batch: &mut Vec<u8>) -> io::Result<()> {
        if !batch.is_empty() {
            self.send(batch, &[])?;
            batch.clear();
        }
        Ok(())
    }
}

/// A request is a worker's to answer; what it may have in memory.
struct Handed<'a>(Option<[Taken<'a>; 2]>);

fn gone(error: io::Error) -> Error {
    Error::io("cannot receive a request", error)
}

fn unsent(error: io::Error) -> Error {
    Error::io("cannot send a reply", error)
}

/// The first `len` bytes of `buffer`, which only ever grows.
fn sized(buffer: &mut Vec<u8>, len: u64) -> &mut [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    buffer.get_mut(..len).unwrap_or_default()
}

/// Keeps a buffer only if many of its size do no harm.
fn give_back(buffer: &mut Vec<u8>) {
    if buffer.len() > usize::try_from(PIECE).unwrap_or(usize::MAX) {
        *buffer = Vec::new();
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
