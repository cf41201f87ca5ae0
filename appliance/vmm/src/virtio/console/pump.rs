// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that moves the bytes of all ports.

use super::{PortState, Streams, receive_queue};
use crate::memory::Ram;
use crate::virtio::chain::{self, Broken, Chain};
use crate::virtio::worker::{MOST_AT_ONCE, descriptor, wait};
use crate::virtio::{ActiveQueue, Link};
use rustix::event::{PollFd, PollFlags};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

/// Events of control messages (section 5.3.6.2).
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const DEVICE_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
/// Bytes of a control message without its text: port, event, value.
const MESSAGE: usize = 8;
/// Messages that wait for the guest: it answers none of ours more than a few times.
const MOST_MESSAGES: usize = 256;
/// Bytes moved at once.
const PIECE: usize = 64 << 10;

/// Bytes of the guest that its stream has not taken yet.
#[derive(Debug)]
pub(super) struct Unsent {
    head: u16,
    bytes: Vec<u8>,
    done: usize,
}

/// Everything that the thread works on.
#[derive(Debug)]
pub(super) struct Pump {
    ram: Ram,
    link: Arc<Link>,
    queues: Vec<Option<ActiveQueue>>,
    ports: Vec<PortState>,
    messages: VecDeque<Vec<u8>>,
    buffer: Vec<u8>,
}

fn message(port: usize, event: u16, value: u16, text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(port).unwrap_or(0).to_le_bytes().to_vec();
    bytes.extend_from_slice(&event.to_le_bytes());
    bytes.extend_from_slice(&value.to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// Tells the guest that our end of a port has hung up, or is there.
pub(super) fn hang_up(port: usize, gone: bool) -> Vec<u8> {
    message(port, event::PORT_OPEN, u16::from(!gone), "")
}

impl Pump {
    pub(super) fn new(
        ram: Ram,
        link: Arc<Link>,
        queues: Vec<Option<ActiveQueue>>,
        streams: Streams,
    ) -> Self {
        let Streams { ports, messages } = streams;
        Self { ram, link, queues, ports, messages, buffer: vec![0; PIECE] }
    }

    /// Works until `stop`; gives everything back.
    pub(super) fn run(mut self, stop: &EventFd) -> (Vec<ActiveQueue>, Streams) {
        loop {
            if !self.link.is_broken()
                && let Err(Broken(why)) = self.step()
            {
                self.link.break_down(why);
            }
            if !self.wait(stop) {
                break;
            }
        }
        let streams = Streams { ports: self.ports, messages: self.messages };
        (self.queues.into_iter().flatten().collect(), streams)
    }

    /// Sleeps until there is something to do; `false` when it is time to stop.
    fn wait(&self, stop: &EventFd) -> bool {
        let kicks: Vec<_> =
            self.queues.iter().flatten().map(|active| Arc::clone(&active.kick)).collect();
        let kick_fds: Vec<_> = kicks.iter().map(|kick| descriptor(kick)).collect();
        let mut polled: Vec<PollFd<'_>> =
            kick_fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        for (index, state) in self.ports.iter().enumerate() {
            let flags = self.interest(index, state);
            // Without flags a stream that has hung up would be reported for ever.
            if !flags.is_empty() {
                polled.push(PollFd::from_borrowed_fd(state.port.stream.as_fd(), flags));
            }
        }
        let Some(ready) = wait(stop, &polled) else { return false };
        for (kick, _) in kicks.iter().zip(ready).filter(|(_, ready)| *ready) {
            let _ = kick.read();
        }
        true
    }

    /// What is waited for on a port's stream. Nothing after the driver broke the rules: what
    /// nobody takes any more would wake the thread for ever.
    fn interest(&self, index: usize, state: &PortState) -> PollFlags {
        let mut flags = PollFlags::empty();
        if self.link.is_broken() {
            return flags;
        }
        if state.open && !state.ended && self.has_room(index) {
            flags |= PollFlags::IN;
        }
        if state.unsent.is_some() {
            flags |= PollFlags::OUT;
        }
        flags
    }

    /// Whether the guest has buffers for what a port receives.
    fn has_room(&self, port: usize) -> bool {
        let index = receive_queue(port);
        let Some(Some(active)) = self.queues.get(index) else { return false };
        let queue = &active.queue;
        let at = vm_memory::GuestAddress(queue.avail_ring());
        let Some(at) = vm_memory::Address::checked_add(&at, 2) else { return false };
        vm_memory::Bytes::read_obj::<u16>(&self.ram, at)
            .is_ok_and(|index| index != queue.next_avail())
    }

    fn step(&mut self) -> Result<(), Broken> {
        self.take_control()?;
        self.send_control()?;
        for port in 0..self.ports.len() {
            self.transmit(port)?;
            self.receive(port)?;
        }
        self.send_control()
    }

    fn next(&mut self, queue: usize) -> Result<Option<Chain>, Broken> {
        match self.queues.get_mut(queue) {
            Some(Some(active)) => {
                // The thread looks at everything after each kick, and a kick that comes in
                // between makes it look again.
                active.queue.enable_notification(&self.ram).map_err(|_| Broken("used ring"))?;
                chain::next(&mut active.queue, &self.ram)
            }
            _ => Ok(None),
        }
    }

    fn used(&mut self, queue: usize, head: u16, written: usize) -> Result<(), Broken> {
        let Some(Some(active)) = self.queues.get_mut(queue) else { return Ok(()) };
        let written = u32::try_from(written).unwrap_or(0);
        active.queue.add_used(&self.ram, head, written).map_err(|_| Broken("used ring"))?;
        if active.queue.needs_notification(&self.ram).map_err(|_| Broken("available ring"))? {
            self.link.queue_used(active.index);
        }
        Ok(())
    }

    /// What the guest says about its ports.
    fn take_control(&mut self) -> Result<(), Broken> {
        for _ in 0..MOST_AT_ONCE {
            let Some(mut chain) = self.next(CONTROL_TRANSMIT)? else { return Ok(()) };
            let mut bytes = [0; MESSAGE];
            if chain::take_front(&mut chain.readable, &self.ram, &mut bytes) {
                let [p0, p1, p2, p3, e0, e1, v0, v1] = bytes;
                let port = usize::try_from(u32::from_le_bytes([p0, p1, p2, p3]));
                let event = u16::from_le_bytes([e0, e1]);
                let value = u16::from_le_bytes([v0, v1]);
                self.heard(port.unwrap_or(usize::MAX), event, value);
            }
            self.used(CONTROL_TRANSMIT, chain.head, 0)?;
        }
        self.later(CONTROL_TRANSMIT);
        Ok(())
    }

    /// Comes back to a queue, after a look whether it is time to stop.
    fn later(&self, queue: usize) {
        if let Some(Some(active)) = self.queues.get(queue) {
            let _ = active.kick.write(1);
        }
    }

    fn heard(&mut self, number: usize, event: u16, value: u16) {
        let mut say = Vec::new();
        match event {
            event::DEVICE_READY if value == 1 => {
                for port in 0..self.ports.len() {
                    say.push(message(port, event::DEVICE_ADD, 0, ""));
                }
            }
            event::PORT_READY if value == 1 => {
                if let Some(state) = self.ports.get(number) {
                    say.push(message(number, event::PORT_NAME, 1, &state.port.name));
                    say.push(hang_up(number, false));
                }
            }
            event::PORT_OPEN => {
                if let Some(state) = self.ports.get_mut(number) {
                    state.open = value == 1;
                    if !state.open {
                        // Whoever speaks with the guest learns that there is nobody any more.
                        let _ = state.port.stream.shutdown(std::net::Shutdown::Write);
                    }
                }
            }
            _ => {}
        }
        for message in say {
            if self.messages.len() < MOST_MESSAGES {
                self.messages.push_back(message);
            }
        }
    }

    fn send_control(&mut self) -> Result<(), Broken> {
        while let Some(message) = self.messages.front().cloned() {
            let Some(chain) = self.next(CONTROL_RECEIVE)? else { break };
            let filled = chain::fill(&chain.writable, &self.ram, &message);
            self.used(CONTROL_RECEIVE, chain.head, filled)?;
            self.messages.pop_front();
        }
        Ok(())
    }

    /// From the guest to the stream.
    fn transmit(&mut self, port: usize) -> Result<(), Broken> {
        let queue = receive_queue(port).saturating_add(1);
        for _ in 0..MOST_AT_ONCE {
            let unsent = if let Some(unsent) =
                self.ports.get_mut(port).and_then(|state| state.unsent.take())
            {
                unsent
            } else {
                let Some(mut chain) = self.next(queue)? else { return Ok(()) };
                let len = chain::total(&chain.readable);
                let mut bytes = vec![0; usize::try_from(len).unwrap_or(PIECE).min(PIECE)];
                if len > PIECE as u64
                    || !chain::take_front(&mut chain.readable, &self.ram, &mut bytes)
                {
                    return Err(Broken("more bytes at once than a port takes"));
                }
                Unsent { head: chain.head, bytes, done: 0 }
            };
            match self.send(port, unsent) {
                Ok(head) => self.used(queue, head, 0)?,
                Err(unsent) => {
                    if let Some(state) = self.ports.get_mut(port) {
                        state.unsent = Some(unsent);
                    }
                    return Ok(());
                }
            }
        }
        self.later(queue);
        Ok(())
    }

    /// Gives bytes to a stream; those that it does not take now come back.
    fn send(&mut self, port: usize, mut unsent: Unsent) -> Result<u16, Unsent> {
        let Some(state) = self.ports.get_mut(port) else { return Ok(unsent.head) };
        while let Some(rest) = unsent.bytes.get(unsent.done..).filter(|rest| !rest.is_empty()) {
            match state.port.stream.write(rest) {
                Ok(count) => unsent.done = unsent.done.saturating_add(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(unsent),
                // Nobody listens any more: what the guest says is lost, as on a closed line.
                Err(_) => break,
            }
        }
        Ok(unsent.head)
    }

    /// From the stream to the guest.
    fn receive(&mut self, port: usize) -> Result<(), Broken> {
        let queue = receive_queue(port);
        loop {
            let ready = self.ports.get(port).is_some_and(|state| state.open && !state.ended);
            if !ready || !self.has_room(port) {
                // The next buffer comes with a kick.
                if let Some(Some(active)) = self.queues.get_mut(queue)
                    && active
                        .queue
                        .enable_notification(&self.ram)
                        .map_err(|_| Broken("used ring"))?
                    && ready
                {
                    continue;
                }
                return Ok(());
            }
            let Some(chain) = self.next(queue)? else { return Ok(()) };
            let room = usize::try_from(chain::total(&chain.writable)).unwrap_or(PIECE);
            let Some(state) = self.ports.get_mut(port) else { return Ok(()) };
            let buffer = self.buffer.get_mut(..room.min(PIECE)).unwrap_or(&mut []);
            if buffer.is_empty() {
                return Err(Broken("a buffer to receive has no room"));
            }
            let count = match state.port.stream.read(buffer) {
                Ok(0) => {
                    state.ended = true;
                    self.messages.push_back(hang_up(port, true));
                    0
                }
                Ok(count) => count,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
                {
                    0
                }
                Err(_) => {
                    state.ended = true;
                    0
                }
            };
            if count == 0 {
                self.put_back(queue);
                return Ok(());
            }
            let bytes = self.buffer.get(..count).unwrap_or(&[]);
            let filled = chain::fill(&chain.writable, &self.ram, bytes);
            self.used(queue, chain.head, filled)?;
        }
    }

    /// The request just taken off a queue was not used after all.
    fn put_back(&mut self, queue: usize) {
        if let Some(Some(active)) = self.queues.get_mut(queue) {
            let before = active.queue.next_avail().wrapping_sub(1);
            active.queue.set_next_avail(before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Port;
    use super::*;
    use crate::memory::{Backing, Memory};
    use crate::pci::Address;
    use crate::pci::msix::Msix;
    use crate::pci::msix::tests::Sent;
    use crate::pci::pin::tests::Changes;
    use crate::pci::pin::{LineSink, Lines};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_broken_device_waits_for_no_stream() {
        let memory = Memory::new(64, &Backing::Anonymous).unwrap();
        let lines: Arc<dyn LineSink> = Arc::new(Changes::default());
        let pin = Lines::new(&lines).pin(Address::of(0).unwrap());
        let msix = Arc::new(Msix::new(1, Arc::new(Sent::default())));
        let link = Arc::new(Link::new(msix, pin, 0));
        let (_near, stream) = UnixStream::pair().unwrap();
        let port = Port { name: "p".into(), stream };
        let unsent = Some(Unsent { head: 0, bytes: vec![1], done: 0 });
        let ports = vec![PortState { open: true, unsent, ..PortState::new(port) }];
        let streams = Streams { ports, messages: VecDeque::new() };
        let pump = Pump::new(memory.ram.clone(), Arc::clone(&link), Vec::new(), streams);
        assert_eq!(pump.interest(0, &pump.ports[0]), PollFlags::OUT);
        link.break_down("a test");
        assert_eq!(pump.interest(0, &pump.ports[0]), PollFlags::empty());
    }
}
