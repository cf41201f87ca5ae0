// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One connection with many requests in flight.
//!
//! There is no thread that reads: of those who wait for replies, one reads, straight into
//! its own buffer what is its own, and into boxes what is the others'. When its own reply
//! is complete it leaves the reading to another.

use super::ClientOptions;
use super::handshake::{Agreed, Greeted};
use super::reply::{Partial, Runs, Step, Style, Want, head_of};
use super::stream::{Address, Reading, Socket, Writing};
use crate::wire::{
    CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC,
    chunk, command, command_flag,
};
use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tranship_block::{BigEndian, Error, ErrorKind, Result};

#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Why a request has no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server said so, or broke the protocol: once more would be no better.
    Final(Error),
    /// The connection is gone; nobody knows whether the request was carried out.
    Lost(Error),
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) agreed: Agreed,
    /// The process that listened, if it is on this machine.
    pub(super) peer: Option<u32>,
    style: Style,
    timeout: Duration,
    /// To end it from either side.
    control: Socket,
    sending: Mutex<Writing>,
    reading: Mutex<Reading>,
    slots: Mutex<Slots>,
    /// A reply is complete, or nobody reads any more.
    news: Condvar,
    cookie: AtomicU64,
}

#[derive(Debug, Default)]
struct Slots {
    waiting: HashMap<u64, Slot>,
    /// Somebody reads.
    has_reader: bool,
    broken: Option<Broken>,
}

/// Why a connection is of no use any more.
#[derive(Clone, Debug)]
struct Broken {
    why: String,
    /// The server lied; it would do so again.
    is_final: bool,
}

impl Broken {
    fn from(error: &Error) -> Self {
        Self { why: error.to_string(), is_final: error.kind() == ErrorKind::Corrupt }
    }

    fn failure(&self) -> Failure {
        let text = format!("the connection to the NBD server broke: {}", self.why);
        if self.is_final {
            Failure::Final(Error::corrupt(text))
        } else {
            Failure::Lost(Error::new(ErrorKind::Busy, text))
        }
    }
}

/// A request that waits for its reply, or for more of it.
#[derive(Debug)]
struct Slot {
    reply: Partial,
    /// What somebody else has read for it.
    bytes: Option<Vec<u8>>,
    is_done: bool,
}

impl Connection {
    pub(super) fn open(address: &Address, options: &ClientOptions) -> Result<Self> {
        Self::over(Socket::connect(address, options.timeout)?, address.host(), options)
    }

    /// Says hello over a socket that is connected to `host`.
    pub(super) fn over(socket: Socket, host: &str, options: &ClientOptions) -> Result<Self> {
        let (agreed, stream) = Greeted::over(&socket, host, options)?.go(options)?;
        let style = match (agreed.facts.extended, agreed.facts.structured) {
            (true, _) => Style::Extended,
            (false, true) => Style::Structured,
            (false, false) => Style::Simple,
        };
        Ok(Self {
            agreed,
            peer: socket.peer(),
            style,
            timeout: options.timeout,
            control: socket,
            sending: Mutex::new(stream.writing),
            reading: Mutex::new(stream.reading),
            slots: Mutex::default(),
            news: Condvar::new(),
            cookie: AtomicU64::new(1),
        })
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request with its payload and waits for the reply, whose bytes go to `buf`.
    pub(super) fn call(
        &self,
        request: Request,
        payload: &[u8],
        want: Want,
        buf: &mut [u8],
    ) -> std::result::Result<Runs, Failure> {
        let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
        let slot = Slot { reply: Partial::new(want), bytes: None, is_done: false };
        {
            let mut slots = self.slots();
            if let Some(broken) = &slots.broken {
                return Err(broken.failure());
            }
            slots.waiting.insert(cookie, slot);
        }
        if let Err(error) = self.transmit(request, cookie, payload) {
            let error = self.explained(&error, "take the request");
            self.break_off(Broken::from(&error));
        }
        self.wait(cookie, buf)
    }

    fn transmit(&self, request: Request, cookie: u64, payload: &[u8]) -> io::Result<()> {
        let is_extended = self.style == Style::Extended;
        let mut flags = request.flags;
        if is_extended && request.command == command::WRITE {
            flags |= command_flag::PAYLOAD_LEN;
        }
        let magic = if is_extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let mut head = Vec::with_capacity(32);
        head.extend(magic.to_be_bytes());
        head.extend(flags.to_be_bytes());
        head.extend(request.command.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(request.offset.to_be_bytes());
        if is_extended {
            head.extend(request.len.to_be_bytes());
        } else {
            let len = u32::try_from(request.len).map_err(|_| io::ErrorKind::InvalidInput)?;
            head.extend(len.to_be_bytes());
        }
        let mut stream = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        crate::reply::send(&mut *stream, &head, payload)
    }

    /// Waits for the reply to `cookie`, reading as long as nobody else does.
    fn wait(&self, cookie: u64, buf: &mut [u8]) -> std::result::Result<Runs, Failure> {
        let mut slots = self.slots();
        loop {
            if slots.waiting.get(&cookie).is_some_and(|slot| slot.is_done)
                && let Some(slot) = slots.waiting.remove(&cookie)
            {
                drop(slots);
                if let Some(bytes) = slot.bytes {
                    let len = buf.len().min(bytes.len());
                    let (front, _) = buf.split_at_mut(len);
                    front.copy_from_slice(bytes.get(..len).unwrap_or_default());
                }
                let is_shutdown = slot.reply.is_shutdown;
                let failure = if is_shutdown { Failure::Lost } else { Failure::Final };
                return slot.reply.finish().map_err(failure);
            }
            if let Some(broken) = &slots.broken {
                let failure = broken.failure();
                slots.waiting.remove(&cookie);
                return Err(failure);
            }
            if slots.has_reader {
                slots = self.news.wait(slots).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            slots.has_reader = true;
            drop(slots);
            let read = self.read_until(cookie, buf);
            slots = self.slots();
            slots.has_reader = false;
            if let Err(error) = read {
                slots.broken.get_or_insert_with(|| Broken::from(&error));
                self.control.close();
            }
            self.news.notify_all();
        }
    }

    fn break_off(&self, broken: Broken) {
        self.slots().broken.get_or_insert(broken);
        self.control.close();
        self.news.notify_all();
    }

    /// Reads replies until that to `own` is complete.
    fn read_until(&self, own: u64, buf: &mut [u8]) -> Result<()> {
        let mut stream = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (cookie, is_done) = self.read_piece(&mut stream, own, buf)?;
            if !is_done {
                continue;
            }
            let mut slots = self.slots();
            if let Some(slot) = slots.waiting.get_mut(&cookie) {
                slot.is_done = true;
            }
            if cookie == own {
                return Ok(());
            }
            self.news.notify_all();
        }
    }

    /// Reads a simple reply or a chunk; whose it was, and whether it was the last of it.
    fn read_piece(&self, stream: &mut Reading, own: u64, buf: &mut [u8]) -> Result<(u64, bool)> {
        let mut magic = [0; 4];
        self.receive(stream, &mut magic)?;
        match (u32::from_be_bytes(magic), self.style) {
            (SIMPLE_REPLY_MAGIC, Style::Simple | Style::Structured) => {
                let cookie = self.read_simple(stream, own, buf)?;
                Ok((cookie, true))
            }
            (CHUNK_MAGIC, Style::Structured) => {
                let mut head = [0; 16];
                self.receive(stream, &mut head)?;
                let len = BigEndian(&head, "reply chunk").u32("length", 12)?;
                self.read_chunk(stream, &head, len.into(), own, buf)
            }
            (EXTENDED_CHUNK_MAGIC, Style::Extended) => {
                let mut head = [0; 28];
                self.receive(stream, &mut head)?;
                // The offset is that of the request, which the cookie has told already.
                let len = BigEndian(&head, "reply chunk").u64("length", 20)?;
                self.read_chunk(stream, &head, len, own, buf)
            }
            (other, style) => {
                Err(Error::corrupt(format!("reply begins with {other:#x}, which is not {style:?}")))
            }
        }
    }

    fn read_simple(&self, stream: &mut Reading, own: u64, buf: &mut [u8]) -> Result<u64> {
        let mut head = [0; 12];
        self.receive(stream, &mut head)?;
        let fields = BigEndian(&head, "simple reply");
        let (errno, cookie) = (fields.u32("error", 0)?, fields.u64("cookie", 4)?);
        let want = self.change(cookie, |slot| {
            slot.reply.simple(errno);
            slot.reply.want
        })?;
        if let Want::Bytes { len, .. } = want {
            if self.style != Style::Simple {
                return Err(Error::corrupt("read was answered by a simple reply"));
            }
            if errno == 0 {
                self.change(cookie, |slot| slot.reply.cover_all())?;
                self.payload(stream, cookie, own, buf, &Step::Payload { at: 0, len })?;
            }
        }
        Ok(cookie)
    }

    fn read_chunk(
        &self,
        stream: &mut Reading,
        head: &[u8],
        len: u64,
        own: u64,
        buf: &mut [u8],
    ) -> Result<(u64, bool)> {
        let fields = BigEndian(head, "reply chunk");
        let flags = fields.u16("flags", 0)?;
        let (kind, cookie) = (fields.u16("kind", 2)?, fields.u64("cookie", 4)?);
        let is_done = flags & chunk::DONE != 0;
        if kind == chunk::NONE && !is_done {
            return Err(Error::corrupt("reply chunk without content is not the last one"));
        }
        let mut start = vec![0; head_of(kind, len)?];
        self.receive(stream, &mut start)?;
        let step =
            self.change(cookie, |slot| slot.reply.chunk(self.style, kind, &start, len))??;
        self.payload(stream, cookie, own, buf, &step)?;
        Ok((cookie, is_done))
    }

    /// Puts bytes where they belong: into the reader's own buffer, or into the box of
    /// whoever waits for them.
    fn payload(
        &self,
        stream: &mut Reading,
        cookie: u64,
        own: u64,
        buf: &mut [u8],
        step: &Step,
    ) -> Result<()> {
        let (at, len) = match step {
            Step::Taken => return Ok(()),
            Step::Payload { at, len } | Step::Zeroes { at, len } => (*at, *len),
        };
        let want = self.change(cookie, |slot| (slot.bytes.take(), slot.reply.want))?;
        let outside = || Error::corrupt("reply has bytes past the end of its request");
        let mut fill = |target: &mut [u8]| -> Result<()> {
            let target = target.get_mut(at..at.saturating_add(len)).ok_or_else(outside)?;
            match step {
                Step::Payload { .. } => self.receive(stream, target)?,
                _ => target.fill(0),
            }
            Ok(())
        };
        match want {
            // Others have read for us before: the rest goes to the same place.
            (Some(mut bytes), _) => {
                fill(&mut bytes)?;
                self.change(cookie, |slot| slot.bytes = Some(bytes))
            }
            (None, _) if cookie == own => fill(buf),
            (None, Want::Bytes { len, .. }) => {
                let mut bytes = vec![0; len];
                fill(&mut bytes)?;
                self.change(cookie, |slot| slot.bytes = Some(bytes))
            }
            (None, _) => Err(outside()),
        }
    }

    /// Changes the slot of a request that is in flight.
    fn change<T>(&self, cookie: u64, change: impl FnOnce(&mut Slot) -> T) -> Result<T> {
        let mut slots = self.slots();
        let slot = slots.waiting.get_mut(&cookie).filter(|slot| !slot.is_done);
        let slot =
            slot.ok_or_else(|| Error::corrupt(format!("reply to {cookie:#x}, which nobody sent")))?;
        Ok(change(slot))
    }

    fn receive(&self, stream: &mut Reading, buf: &mut [u8]) -> Result<()> {
        stream.read_exact(buf).map_err(|error| self.explained(&error, "answer"))
    }

    fn explained(&self, error: &io::Error, what: &str) -> Error {
        let text = match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => "it closed the connection".to_owned(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                format!("it did not {what} within {} s", self.timeout.as_secs_f64())
            }
            _ => format!("it cannot {what}: {error}"),
        };
        Error::new(ErrorKind::Busy, text)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Nothing is in flight: whoever waits for a reply borrows the connection.
        let request = Request { command: command::DISC, flags: 0, offset: 0, len: 0 };
        if self.slots().broken.is_none() && self.transmit(request, 0, &[]).is_ok() {
            self.sending.get_mut().unwrap_or_else(PoisonError::into_inner).finish();
        }
        self.control.close();
    }
}
