// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One connection with many requests in flight.
//!
//! There is no thread that reads: of those who wait for replies, one reads, straight into
//! its own buffer what is its own, and into boxes what is the others'. When its own reply
//! is complete it leaves the reading to another.

use super::ClientOptions;
use super::handshake::{self, Agreed};
use super::reply::{Partial, Step, Want};
use super::stream::{Address, Stream};
use crate::wire::{CHUNK_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, chunk, command};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use tranship_block::{BigEndian, Error, ErrorKind, Result};

/// Longest payload of a chunk without data: a million extents.
const LONGEST_CHUNK: u32 = (8 << 20) + 4;

#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) len: u32,
}

#[derive(Debug)]
pub(super) struct Connection {
    agreed: Agreed,
    /// To end it from either side.
    control: Stream,
    sending: Mutex<Stream>,
    reading: Mutex<Stream>,
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
    broken: Option<String>,
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
    pub(super) fn open(address: &Address, options: &ClientOptions) -> Result<(Agreed, Self)> {
        Self::over(Stream::connect(address, options.timeout)?, options)
    }

    /// Says hello over a stream that is connected.
    pub(super) fn over(mut stream: Stream, options: &ClientOptions) -> Result<(Agreed, Self)> {
        let agreed = handshake::run(&mut stream, options)?;
        let clone =
            || stream.try_clone().map_err(|error| Error::io("cannot share the connection", error));
        let connection = Self {
            agreed: agreed.clone(),
            control: clone()?,
            sending: Mutex::new(clone()?),
            reading: Mutex::new(clone()?),
            slots: Mutex::default(),
            news: Condvar::new(),
            cookie: AtomicU64::new(1),
        };
        Ok((agreed, connection))
    }

    /// Reads into all of `buf`.
    pub(super) fn read(&self, request: Request, buf: &mut [u8]) -> Result<()> {
        let want = Want::Bytes { offset: request.offset, len: buf.len() };
        self.call(request, &[], want, buf).map(drop)
    }

    /// Sends a request whose answer is only whether it worked.
    pub(super) fn send(&self, request: Request, payload: &[u8]) -> Result<()> {
        self.call(request, payload, Want::Done, &mut []).map(drop)
    }

    /// Lengths and flags of extents from the start of the range on.
    pub(super) fn block_status(&self, request: Request) -> Result<Vec<(u32, u32)>> {
        let want = Want::Status { context: self.agreed.allocation_id };
        self.call(request, &[], want, &mut [])
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(
        &self,
        request: Request,
        payload: &[u8],
        want: Want,
        buf: &mut [u8],
    ) -> Result<Vec<(u32, u32)>> {
        let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
        let slot = Slot { reply: Partial::new(want), bytes: None, is_done: false };
        {
            let mut slots = self.slots();
            if let Some(why) = &slots.broken {
                return Err(gone(why));
            }
            slots.waiting.insert(cookie, slot);
        }
        if let Err(error) = self.transmit(request, cookie, payload) {
            self.break_off(&error.to_string());
        }
        self.wait(cookie, buf).map_err(|error| error.at(request.offset))
    }

    fn transmit(&self, request: Request, cookie: u64, payload: &[u8]) -> io::Result<()> {
        let mut head = Vec::with_capacity(28);
        head.extend(REQUEST_MAGIC.to_be_bytes());
        head.extend(request.flags.to_be_bytes());
        head.extend(request.command.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(request.offset.to_be_bytes());
        head.extend(request.len.to_be_bytes());
        let mut stream = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        crate::reply::send(&mut *stream, &head, payload)
    }

    /// Waits for the reply to `cookie`, reading as long as nobody else does.
    fn wait(&self, cookie: u64, buf: &mut [u8]) -> Result<Vec<(u32, u32)>> {
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
                return slot.reply.finish();
            }
            if let Some(why) = &slots.broken {
                let error = gone(why);
                slots.waiting.remove(&cookie);
                return Err(error);
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
                slots.broken.get_or_insert_with(|| error.to_string());
                self.control.close();
            }
            self.news.notify_all();
        }
    }

    fn break_off(&self, why: &str) {
        self.slots().broken.get_or_insert_with(|| why.to_owned());
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
    fn read_piece(&self, stream: &mut Stream, own: u64, buf: &mut [u8]) -> Result<(u64, bool)> {
        let mut magic = [0; 4];
        receive(stream, &mut magic)?;
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC => {
                let mut head = [0; 12];
                receive(stream, &mut head)?;
                let fields = BigEndian(&head, "simple reply");
                let (errno, cookie) = (fields.u32("error", 0)?, fields.u64("cookie", 4)?);
                let want = self.change(cookie, |slot| {
                    slot.reply.simple(errno);
                    slot.reply.want
                })?;
                if let Want::Bytes { len, .. } = want
                    && errno == 0
                {
                    if self.agreed.structured {
                        return Err(Error::corrupt("read was answered by a simple reply"));
                    }
                    self.change(cookie, |slot| slot.reply.cover_all())?;
                    self.payload(stream, cookie, own, buf, &Step::Payload { at: 0, len })?;
                }
                Ok((cookie, true))
            }
            CHUNK_MAGIC if self.agreed.structured => {
                let mut head = [0; 16];
                receive(stream, &mut head)?;
                let fields = BigEndian(&head, "reply chunk");
                let flags = fields.u16("flags", 0)?;
                let (kind, cookie) = (fields.u16("kind", 2)?, fields.u64("cookie", 4)?);
                let len = fields.u32("length", 12)?;
                let before_payload = if kind == chunk::OFFSET_DATA { len.min(8) } else { len };
                if before_payload > LONGEST_CHUNK {
                    return Err(Error::corrupt(format!("reply chunk has {len} bytes")));
                }
                let mut start = vec![0; usize::try_from(before_payload).unwrap_or(0)];
                receive(stream, &mut start)?;
                let step = self.change(cookie, |slot| slot.reply.chunk(kind, &start, len))??;
                self.payload(stream, cookie, own, buf, &step)?;
                Ok((cookie, flags & chunk::DONE != 0))
            }
            other => Err(Error::corrupt(format!("reply begins with {other:#x}"))),
        }
    }

    /// Puts bytes where they belong: into the reader's own buffer, or into the box of
    /// whoever waits for them.
    fn payload(
        &self,
        stream: &mut Stream,
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
                Step::Payload { .. } => receive(stream, target)?,
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
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Nothing is in flight: whoever waits for a reply borrows the connection.
        let request = Request { command: command::DISC, flags: 0, offset: 0, len: 0 };
        let _ = self.transmit(request, 0, &[]);
        if let Ok(stream) = self.sending.get_mut() {
            let _ = stream.flush();
        }
        self.control.close();
    }
}

fn gone(why: &str) -> Error {
    Error::new(ErrorKind::Busy, format!("the connection to the NBD server broke: {why}"))
}

fn receive<S: Read>(stream: &mut S, buf: &mut [u8]) -> Result<()> {
    stream.read_exact(buf).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::new(ErrorKind::Busy, "the NBD server closed the connection")
        }
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            Error::new(ErrorKind::Busy, "the NBD server did not answer in time")
        }
        _ => Error::io("cannot read from the NBD server", error),
    })
}
