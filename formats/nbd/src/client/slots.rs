// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who waits for replies on a connection, and whose turn it is to read them.

use super::connection::Failure;
use super::reply::{Partial, Runs};
use std::collections::BTreeMap;
use std::thread::Thread;
use tranship_block::{Error, ErrorKind, Result};

#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Requests in flight, the oldest first.
    pub(super) waiting: BTreeMap<u64, Slot>,
    pub(super) turn: Turn,
    /// Threads that take whatever reply of a queue comes next, and wait for their turn.
    pub(super) idle: Vec<Thread>,
    pub(super) broken: Option<Broken>,
}

/// Whose turn it is to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Turn {
    #[default]
    Nobody,
    Somebody,
    /// What comes next goes into the buffer of the thread that waits for this reply.
    Owner(u64),
}

/// Why a connection is of no use any more.
#[derive(Clone, Debug)]
pub(super) struct Broken {
    why: String,
    /// The server lied; it would do so again.
    is_final: bool,
}

impl Broken {
    pub(super) fn from(error: &Error) -> Self {
        Self { why: error.to_string(), is_final: error.kind() == ErrorKind::Corrupt }
    }

    pub(super) fn failure(&self) -> Failure {
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
pub(super) struct Slot {
    pub(super) reply: Partial,
    pub(super) owner: Owner,
    /// What was read by somebody else than the thread that waits for it.
    pub(super) bytes: Option<Vec<u8>>,
    /// Where `bytes` has something, if not everywhere.
    pub(super) parts: Vec<(usize, usize)>,
    /// Its thread has sent the request and does nothing else any more.
    pub(super) is_awaited: bool,
    pub(super) is_done: bool,
}

/// Who wants a reply.
#[derive(Clone, Debug)]
pub(super) enum Owner {
    /// This thread, which has a buffer for it.
    Thread(Thread),
    /// Whoever takes replies from the queue of this number.
    Queue(u64),
}

impl Slot {
    pub(super) fn new(reply: Partial, owner: Owner) -> Self {
        let (bytes, parts) = (None, Vec::new());
        Self { reply, owner, bytes, parts, is_awaited: false, is_done: false }
    }

    /// The end of a reply whose bytes are in `buf`, but for those that are still here.
    pub(super) fn finish(self, buf: &mut [u8]) -> std::result::Result<Runs, Failure> {
        if let Some(bytes) = &self.bytes {
            for (at, len) in &self.parts {
                let range = *at..at.saturating_add(*len);
                if let (Some(to), Some(from)) = (buf.get_mut(range.clone()), bytes.get(range)) {
                    to.copy_from_slice(from);
                }
            }
        }
        self.end(buf)
    }

    /// The end of a reply whose bytes are all in `buf`.
    pub(super) fn end(self, buf: &mut [u8]) -> std::result::Result<Runs, Failure> {
        for (at, len) in self.reply.holes() {
            if let Some(hole) = buf.get_mut(*at..at.saturating_add(*len)) {
                hole.fill(0);
            }
        }
        let is_shutdown = self.reply.is_shutdown;
        self.reply.finish().map_err(if is_shutdown { Failure::Lost } else { Failure::Final })
    }
}

impl Slots {
    /// The slot of a request that is in flight.
    pub(super) fn in_flight(&mut self, cookie: u64) -> Result<&mut Slot> {
        self.waiting
            .get_mut(&cookie)
            .filter(|slot| !slot.is_done)
            .ok_or_else(|| Error::corrupt(format!("reply to {cookie:#x}, which nobody sent")))
    }

    /// Takes the reply of a queue that is complete, or any at all of a broken connection.
    pub(super) fn take_from_queue(&mut self, queue: u64) -> Option<(u64, Slot)> {
        let is_broken = self.broken.is_some();
        let is_ours = |slot: &Slot| matches!(slot.owner, Owner::Queue(number) if number == queue);
        let is_over = |slot: &Slot| is_ours(slot) && (slot.is_done || is_broken);
        let cookie = *self.waiting.iter().find(|(_, slot)| is_over(slot))?.0;
        Some((cookie, self.waiting.remove(&cookie)?))
    }

    pub(super) fn has_queued(&self, queue: u64) -> bool {
        self.waiting
            .values()
            .any(|slot| matches!(slot.owner, Owner::Queue(number) if number == queue))
    }

    /// Lets somebody else read, if anybody waits: best the one whose reply comes next. It
    /// has to be one who does wait, as a request may be stuck until somebody has read.
    pub(super) fn pass_on(&mut self) {
        self.turn = Turn::Nobody;
        let mut in_flight = self.waiting.values().filter(|slot| !slot.is_done);
        let is_first = |slot: &&Slot| matches!(slot.owner, Owner::Queue(_)) || slot.is_awaited;
        let thread = match in_flight.find(is_first).map(|slot| &slot.owner) {
            Some(Owner::Thread(thread)) => Some(thread.clone()),
            _ => self.idle.pop().or_else(|| {
                in_flight.find_map(|slot| match &slot.owner {
                    Owner::Thread(thread) if slot.is_awaited => Some(thread.clone()),
                    _ => None,
                })
            }),
        };
        if let Some(thread) = thread {
            thread.unpark();
        }
    }

    /// Somebody has what it waited for. If it was woken to read and did not, another has to.
    pub(super) fn leave(&mut self, was_woken: bool) {
        if was_woken && self.turn == Turn::Nobody {
            self.pass_on();
        }
    }

    /// Tells everybody that things are no longer what they were.
    pub(super) fn wake_all(&mut self) {
        for slot in self.waiting.values() {
            if let Owner::Thread(thread) = &slot.owner {
                thread.unpark();
            }
        }
        self.idle.drain(..).for_each(|thread| thread.unpark());
    }
}
