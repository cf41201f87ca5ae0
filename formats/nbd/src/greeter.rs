// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Greets clients, counts them, and sends them away.

use crate::export::Exports;
use crate::handshake::{Agreed, Offer, Outcome, negotiate, resume};
use crate::limits::{Limits, Pool};
use crate::listener::Listener;
use crate::server::Streams;
use crate::socket::{Deadline, Output, Sealed, Sender, Socket};
use crate::tls::Encryption;
use crate::transmission::{Connection, Surroundings};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::Shutdown;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};
use tranship_block::{Error, Result};

/// How long an accept that failed for want of resources waits before it tries again.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// A handshake that took this long gives way to a client that waits.
const LONG_HANDSHAKE: Duration = Duration::from_secs(1);

/// What the threads of a server share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) exports: Exports,
    pub(crate) limits: Limits,
    pub(crate) encryption: Option<Encryption>,
    pool: Pool,
    clients: Mutex<Clients>,
    /// Signalled when a client has come, has chosen or has left.
    changed: Condvar,
    stopping: AtomicBool,
    /// Readable when the greeter has to look up: a client has left, or the server stops.
    wake: OwnedFd,
}

#[derive(Debug, Default)]
pub(crate) struct Clients {
    next: u64,
    /// Clients in transmission so far.
    negotiated: u64,
    /// Comings and goings so far.
    changes: u64,
    connected: BTreeMap<u64, Client>,
}

#[derive(Debug)]
struct Client {
    socket: Arc<Socket>,
    since: Instant,
    /// Has chosen an export.
    greeted: bool,
}

impl Clients {
    pub(crate) fn connections(&self) -> usize {
        self.connected.len()
    }

    pub(crate) fn negotiated(&self) -> u64 {
        self.negotiated
    }
}

/// Whether another client may be greeted.
enum Room {
    Free,
    /// Not before a client has left.
    Full,
    /// If the oldest handshake, of this client and this long under way, gives way.
    Taken(Arc<Socket>, Duration),
}

impl Shared {
    pub(crate) fn new(exports: Exports, limits: Limits) -> Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("cannot make an event descriptor", error.into()))?;
        Ok(Self {
            exports,
            pool: Pool::new(&limits),
            limits,
            encryption: None,
            clients: Mutex::default(),
            changed: Condvar::new(),
            stopping: AtomicBool::new(false),
            wake,
        })
    }

    pub(crate) fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the list of clients, and tells those who wait for that.
    fn change<T>(&self, change: impl FnOnce(&mut Clients) -> T) -> T {
        let mut clients = self.clients();
        clients.changes = clients.changes.wrapping_add(1);
        let result = change(&mut clients);
        drop(clients);
        self.changed.notify_all();
        result
    }

    /// Waits until there were other changes than `seen`; tells how many there were.
    pub(crate) fn wait_for_change(&self, seen: u64, time: Option<Duration>) -> u64 {
        let clients = self.clients();
        let unchanged = |clients: &mut Clients| clients.changes == seen;
        let clients = match time {
            None => {
                self.changed.wait_while(clients, unchanged).unwrap_or_else(PoisonError::into_inner)
            }
            Some(time) => {
                self.changed
                    .wait_timeout_while(clients, time, unchanged)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        };
        clients.changes
    }

    /// No more clients and no more requests from now on.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake_greeter();
    }

    fn wake_greeter(&self) {
        // It fails only if the counter is full, and then the greeter is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn room(&self) -> Room {
        let clients = self.clients();
        let handshakes = || clients.connected.values().filter(|client| !client.greeted);
        if clients.connected.len() < self.limits.connections
            && handshakes().count() < self.limits.handshakes
        {
            return Room::Free;
        }
        // Clients are numbered in the order in which they came.
        let oldest = handshakes().next();
        oldest
            .map_or(Room::Full, |client| Room::Taken(client.socket.clone(), client.since.elapsed()))
    }

    /// Greets clients until the server stops.
    pub(crate) fn greet(self: &Arc<Self>, listeners: &[Listener]) {
        let mut pause = None;
        while !self.stopping.load(Ordering::SeqCst) {
            let mut room = self.room();
            if let Room::Taken(_, age) = &room
                && *age < LONG_HANDSHAKE
            {
                pause = Timespec::try_from(LONG_HANDSHAKE.saturating_sub(*age)).ok();
                room = Room::Full;
            }
            let mut events = vec![PollFd::new(&self.wake, PollFlags::IN)];
            if pause.is_none() && !matches!(room, Room::Full) {
                events.extend(listeners.iter().map(|each| PollFd::new(each, PollFlags::IN)));
            }
            match poll(&mut events, pause.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => tracing::warn!(%error, "cannot wait for clients"),
            }
            pause = None;
            let knocking: Vec<bool> =
                events.iter().skip(1).map(|event| !event.revents().is_empty()).collect();
            let mut raised = [0; 8];
            let _ = rustix::io::read(&self.wake, &mut raised);
            if self.stopping.load(Ordering::SeqCst) {
                continue;
            }
            if let Room::Taken(oldest, _) = &room {
                // Its thread ends, and then there is a place.
                if knocking.contains(&true) {
                    oldest.shutdown(Shutdown::Both);
                    pause = Some(ACCEPT_PAUSE);
                }
                continue;
            }
            for (listener, _) in listeners.iter().zip(knocking).filter(|(_, knocks)| *knocks) {
                if !matches!(self.room(), Room::Free) {
                    break;
                }
                match listener.accept() {
                    Ok(socket) => self.receive(socket),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a client");
                        self.dismiss_silent();
                        pause = Some(ACCEPT_PAUSE);
                    }
                }
            }
        }
    }

    /// Where descriptors or memory are short, those who connect and do not say what they want
    /// give theirs to those who wait.
    fn dismiss_silent(&self) {
        for client in self.clients().connected.values() {
            if !client.greeted && client.since.elapsed() >= LONG_HANDSHAKE {
                client.socket.shutdown(Shutdown::Both);
            }
        }
    }

    /// Gives a client a thread.
    fn receive(self: &Arc<Self>, socket: Socket) {
        let socket = Arc::new(socket);
        let client = Client { socket: socket.clone(), since: Instant::now(), greeted: false };
        let number = self.change(|clients| {
            let number = clients.next;
            clients.next = number.wrapping_add(1);
            clients.connected.insert(number, client);
            number
        });
        let leaving = Leaving { shared: self.clone(), number };
        let started = Builder::new().name("nbd client".to_owned()).spawn(move || {
            let leaving = leaving;
            if let Err(error) = leaving.shared.attend(&socket, number) {
                tracing::debug!(%error, "connection ended");
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "cannot start a thread for a client");
        }
    }

    fn attend(&self, socket: &Socket, number: u64) -> Result<()> {
        let now = Instant::now();
        let until = Some(now.checked_add(self.limits.handshake).unwrap_or(now));
        let Self { exports, limits, stopping, .. } = self;
        let encryption = self.encryption.as_ref();
        let offer = Offer { exports, limits, stopping, encryption };
        let mut plain = Deadline { socket, until };
        match negotiate(&mut plain, offer)? {
            Outcome::Left => Ok(()),
            Outcome::Agreed(agreed) => {
                self.transmit(socket, number, agreed, (socket, Sender(socket)))
            }
            Outcome::Encrypt(greeted) => {
                let Some(Encryption { tls, .. }) = encryption else { return Ok(()) };
                let (reading, writing) = tls.accept(Deadline { socket, until }, plain)?;
                let mut stream = Streams(reading, Sealed::new(writing));
                let Outcome::Agreed(agreed) = resume(&mut stream, offer, greeted)? else {
                    return Ok(());
                };
                let Streams(mut reading, mut writing) = stream;
                reading.source_mut().until = None;
                writing.has_no_deadline();
                self.transmit(socket, number, agreed, (reading, writing))
            }
        }
    }

    /// Answers the requests of a client that has chosen an export.
    fn transmit<R: Read + Send, W: Output>(
        &self,
        socket: &Socket,
        number: u64,
        agreed: Agreed,
        streams: (R, W),
    ) -> Result<()> {
        let prepared = |error| Error::io("cannot prepare the connection", error);
        let Self { limits, pool, stopping, .. } = self;
        let at_least = |time: Duration| Some(time.max(Duration::from_millis(1)));
        socket.set_receive_timeout(at_least(limits.receive_stall)).map_err(prepared)?;
        socket.set_send_timeout(at_least(limits.send_stall)).map_err(prepared)?;
        self.change(|clients| {
            clients.negotiated = clients.negotiated.saturating_add(1);
            if let Some(client) = clients.connected.get_mut(&number) {
                client.greeted = true;
            }
        });
        self.wake_greeter();
        let surroundings = Surroundings { limits, pool, stopping };
        Connection::new(streams, Some(socket.as_fd()), agreed, surroundings).serve();
        Ok(())
    }

    /// Lets every client finish what is in flight. False if some took too long.
    pub(crate) fn dismiss(&self) -> bool {
        // First nothing more is read, then nothing more is sent. A device that hangs
        // keeps its thread, which nobody can take away.
        for how in [Shutdown::Read, Shutdown::Both] {
            let clients = self.clients();
            for client in clients.connected.values() {
                client.socket.shutdown(how);
            }
            let (clients, _) = self
                .changed
                .wait_timeout_while(clients, self.limits.stop, |clients| {
                    !clients.connected.is_empty()
                })
                .unwrap_or_else(PoisonError::into_inner);
            if clients.connected.is_empty() {
                return how == Shutdown::Read;
            }
        }
        false
    }
}

/// Takes a client off the list, whichever way its thread ends.
#[derive(Debug)]
struct Leaving {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.shared.change(|clients| clients.connected.remove(&self.number));
        self.shared.wake_greeter();
    }
}
