// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reading replies, each into the buffer of whoever wants it.
//!
//! There is no thread that does nothing else: of those who wait, one reads. A long payload
//! that is somebody else's is left in the socket, and the turn goes to its owner, who reads
//! it to where it belongs; a short one is not worth that and goes into a box. Replies of a
//! queue belong to nobody in particular, so whoever reads them takes them.

use super::connection::{Connection, Failure};
use super::reply::{Runs, Step, Style, Want, head_of};
use super::slots::{Broken, Owner, Turn};
use super::stream::Reading;
use crate::wire::{CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, SIMPLE_REPLY_MAGIC, chunk};
use std::io::Read;
use std::sync::PoisonError;
use std::thread;
use tranship_block::{BigEndian, Error, Result, Span};

/// Longest payload that somebody else reads for its owner.
const BOXED: usize = 16 << 10;

/// What comes from the server, and the piece whose payload comes next if its head was read.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) stream: Reading,
    pub(super) next: Option<Piece>,
}

/// A simple reply or a chunk without its payload.
#[derive(Debug)]
pub(super) struct Piece {
    cookie: u64,
    is_last: bool,
    step: Step,
}

/// Who reads.
enum Reader<'a> {
    /// The owner of one reply, with its buffer.
    Owner { cookie: u64, buf: &'a mut [u8] },
    /// Somebody who takes any reply of a queue, with memory for it.
    Queue { number: u64, spare: &'a mut Vec<u8> },
}

impl Connection {
    /// Waits for the reply to `cookie`, reading as long as nobody else does.
    pub(super) fn wait(&self, cookie: u64, buf: &mut [u8]) -> std::result::Result<Runs, Failure> {
        let mut slots = self.slots();
        let mut was_woken = false;
        loop {
            let is_broken = slots.broken.is_some();
            if slots.waiting.get(&cookie).is_none_or(|slot| slot.is_done || is_broken) {
                let slot = slots.waiting.remove(&cookie).filter(|slot| slot.is_done);
                let failure = slots.broken.as_ref().map(Broken::failure);
                slots.leave(was_woken);
                drop(slots);
                return match slot {
                    Some(slot) => slot.finish(buf),
                    None => Err(failure.unwrap_or_else(|| lost_track(cookie))),
                };
            }
            if matches!(slots.turn, Turn::Nobody) || slots.turn == Turn::Owner(cookie) {
                slots.turn = Turn::Somebody;
                drop(slots);
                self.read(&mut Reader::Owner { cookie, buf });
                was_woken = false;
            } else {
                if let Some(slot) = slots.waiting.get_mut(&cookie) {
                    slot.is_awaited = true;
                }
                drop(slots);
                thread::park();
                was_woken = true;
            }
            slots = self.slots();
        }
    }

    /// Waits for any reply of the queue `number`, whose bytes are in `buf` then. `None` if
    /// nothing of it is in flight that nobody else has begun to take.
    pub(super) fn wait_any(
        &self,
        number: u64,
        buf: &mut Vec<u8>,
    ) -> Option<(Span, std::result::Result<(), Failure>)> {
        let own = thread::current();
        let mut slots = self.slots();
        let mut was_woken = false;
        loop {
            slots.idle.retain(|thread| thread.id() != own.id());
            if let Some((cookie, mut slot)) = slots.take_from_queue(number) {
                let failure = slots.broken.as_ref().map(Broken::failure);
                slots.leave(was_woken);
                drop(slots);
                let Want::Bytes { offset, len } = slot.reply.want else { return None };
                let span = Span::new(offset, u64::try_from(len).unwrap_or(u64::MAX));
                if !slot.is_done {
                    return Some((span, Err(failure.unwrap_or_else(|| lost_track(cookie)))));
                }
                if let Some(bytes) = slot.bytes.take() {
                    *buf = bytes;
                }
                room(buf, len);
                return Some((span, slot.end(buf).map(drop)));
            }
            if !slots.has_queued(number) {
                // Those who wait for the same have to learn it as well.
                slots.idle.drain(..).for_each(|thread| thread.unpark());
                slots.leave(was_woken);
                return None;
            }
            if slots.turn == Turn::Nobody {
                slots.turn = Turn::Somebody;
                drop(slots);
                self.read(&mut Reader::Queue { number, spare: &mut *buf });
                was_woken = false;
            } else {
                slots.idle.push(own.clone());
                drop(slots);
                thread::park();
                was_woken = true;
            }
            slots = self.slots();
        }
    }

    /// Reads until something is complete that the reader waits for, or the turn is another's.
    fn read(&self, reader: &mut Reader<'_>) {
        let mut input = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let read = self.read_until(&mut input, reader);
        drop(input);
        let mut slots = self.slots();
        match read {
            Ok(None) => slots.pass_on(),
            Ok(Some(owner)) => match slots.waiting.get(&owner).map(|slot| &slot.owner) {
                Some(Owner::Thread(thread)) => {
                    let thread = thread.clone();
                    slots.turn = Turn::Owner(owner);
                    thread.unpark();
                }
                _ => slots.pass_on(),
            },
            Err(error) => {
                slots.turn = Turn::Nobody;
                slots.broken.get_or_insert_with(|| Broken::from(&error));
                slots.wake_all();
                drop(slots);
                self.control.close();
            }
        }
    }

    /// The owner of what comes next, if the turn has to be its own.
    fn read_until(&self, input: &mut Input, reader: &mut Reader<'_>) -> Result<Option<u64>> {
        let mut is_finished = false;
        loop {
            let piece = match input.next.take() {
                Some(piece) => piece,
                None if is_finished && !has_head(input.stream.buffered()) => return Ok(None),
                None => self.read_head(&mut input.stream)?,
            };
            let Piece { cookie, is_last, step } = piece;
            if let Step::Payload { at, len } = step {
                let owner = self.slots().in_flight(cookie)?.owner.clone();
                match (&owner, &mut *reader) {
                    (_, Reader::Owner { cookie: own, buf }) if *own == cookie => {
                        let target = buf.get_mut(at..at.saturating_add(len));
                        self.receive(&mut input.stream, target.ok_or_else(outside)?)?;
                    }
                    (Owner::Thread(_), _) if len > BOXED => {
                        input.next = Some(piece);
                        return Ok(Some(cookie));
                    }
                    (Owner::Queue(_), _) if is_finished => {
                        input.next = Some(piece);
                        return Ok(None);
                    }
                    (Owner::Queue(of), Reader::Queue { number, spare }) if of == number => {
                        self.fill(&mut input.stream, cookie, (at, len), std::mem::take(spare))?;
                    }
                    _ => self.fill(&mut input.stream, cookie, (at, len), Vec::new())?,
                }
            }
            if is_last {
                is_finished |= self.complete(cookie, reader)?;
            }
        }
    }

    /// Marks a reply as complete. `true` if the reader waits for it.
    fn complete(&self, cookie: u64, reader: &Reader<'_>) -> Result<bool> {
        let mut slots = self.slots();
        let slot = slots.in_flight(cookie)?;
        slot.is_done = true;
        match (&slot.owner, reader) {
            (Owner::Thread(_), Reader::Owner { cookie: own, .. }) if *own == cookie => Ok(true),
            (Owner::Queue(of), Reader::Queue { number, .. }) if of == number => Ok(true),
            (Owner::Thread(thread), _) => {
                thread.unpark();
                Ok(false)
            }
            (Owner::Queue(_), _) => {
                if let Some(thread) = slots.idle.pop() {
                    thread.unpark();
                }
                Ok(false)
            }
        }
    }

    /// Receives a part of a reply into memory that stays with its slot.
    fn fill(
        &self,
        stream: &mut Reading,
        cookie: u64,
        (at, len): (usize, usize),
        spare: Vec<u8>,
    ) -> Result<()> {
        let (bytes, want) = {
            let mut slots = self.slots();
            let slot = slots.in_flight(cookie)?;
            (slot.bytes.take(), slot.reply.want)
        };
        let Want::Bytes { len: whole, .. } = want else { return Err(outside()) };
        let mut bytes = bytes.unwrap_or(spare);
        room(&mut bytes, whole);
        let target = bytes.get_mut(at..at.saturating_add(len)).ok_or_else(outside)?;
        self.receive(stream, target)?;
        let mut slots = self.slots();
        let slot = slots.in_flight(cookie)?;
        slot.bytes = Some(bytes);
        slot.parts.push((at, len));
        Ok(())
    }

    /// Reads a simple reply or a chunk up to its payload.
    fn read_head(&self, stream: &mut Reading) -> Result<Piece> {
        let mut magic = [0; 4];
        self.receive(stream, &mut magic)?;
        match (u32::from_be_bytes(magic), self.style) {
            (SIMPLE_REPLY_MAGIC, Style::Simple | Style::Structured) => self.read_simple(stream),
            (CHUNK_MAGIC, Style::Structured) => {
                let mut head = [0; 16];
                self.receive(stream, &mut head)?;
                let len = BigEndian(&head, "reply chunk").u32("length", 12)?;
                self.read_chunk(stream, &head, len.into())
            }
            (EXTENDED_CHUNK_MAGIC, Style::Extended) => {
                let mut head = [0; 28];
                self.receive(stream, &mut head)?;
                // The offset is that of the request, which the cookie has told already.
                let len = BigEndian(&head, "reply chunk").u64("length", 20)?;
                self.read_chunk(stream, &head, len)
            }
            (other, style) => {
                Err(Error::corrupt(format!("reply begins with {other:#x}, which is not {style:?}")))
            }
        }
    }

    fn read_simple(&self, stream: &mut Reading) -> Result<Piece> {
        let mut head = [0; 12];
        self.receive(stream, &mut head)?;
        let fields = BigEndian(&head, "simple reply");
        let (errno, cookie) = (fields.u32("error", 0)?, fields.u64("cookie", 4)?);
        let mut slots = self.slots();
        let slot = slots.in_flight(cookie)?;
        slot.reply.simple(errno);
        let mut step = Step::Taken;
        if let Want::Bytes { len, .. } = slot.reply.want {
            if self.style != Style::Simple {
                return Err(Error::corrupt("read was answered by a simple reply"));
            }
            if errno == 0 {
                slot.reply.cover_all();
                step = Step::Payload { at: 0, len };
            }
        }
        Ok(Piece { cookie, is_last: true, step })
    }

    fn read_chunk(&self, stream: &mut Reading, head: &[u8], len: u64) -> Result<Piece> {
        let fields = BigEndian(head, "reply chunk");
        let flags = fields.u16("flags", 0)?;
        let (kind, cookie) = (fields.u16("kind", 2)?, fields.u64("cookie", 4)?);
        let is_last = flags & chunk::DONE != 0;
        if kind == chunk::NONE && !is_last {
            return Err(Error::corrupt("reply chunk without content is not the last one"));
        }
        let count = head_of(kind, len)?;
        let (mut few, mut many) = ([0; 16], Vec::new());
        let start = if let Some(few) = few.get_mut(..count) {
            few
        } else {
            many.resize(count, 0);
            many.as_mut_slice()
        };
        self.receive(stream, start)?;
        let step = self.slots().in_flight(cookie)?.reply.chunk(self.style, kind, start, len)?;
        Ok(Piece { cookie, is_last, step })
    }

    fn receive(&self, stream: &mut Reading, buf: &mut [u8]) -> Result<()> {
        stream.read_exact(buf).map_err(|error| self.explained(&error, "answer"))
    }
}

/// Whether a piece begins with `bytes`, up to its payload.
fn has_head(bytes: &[u8]) -> bool {
    let magic = bytes.first_chunk().map(|magic| u32::from_be_bytes(*magic));
    let head = match magic {
        None => return false,
        Some(SIMPLE_REPLY_MAGIC) => 16,
        Some(CHUNK_MAGIC) => 28,
        Some(_) => 40,
    };
    bytes.len() >= head
}

fn outside() -> Error {
    Error::corrupt("reply has bytes past the end of its request")
}

fn lost_track(cookie: u64) -> Failure {
    Failure::Final(Error::corrupt(format!("request {cookie:#x} was never sent")))
}

/// Makes `bytes` long enough.
fn room(bytes: &mut Vec<u8>, len: usize) {
    if bytes.len() < len {
        bytes.resize(len, 0);
    }
}
