// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server: greets clients and keeps count of them until it is told to stop.

use crate::export::{Export, Exports, Statistics};
use crate::handshake::negotiate;
use crate::limits::{Budget, Limits};
use crate::socket::{Deadline, Sender, SocketFile, listen};
use crate::transmission::Connection;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};
use tranship_block::{Error, ErrorKind, Result};

/// How long an accept that failed for want of resources waits before it tries again.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A server that listens but does not answer yet: clients wait.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: UnixListener,
    file: SocketFile,
    shared: Arc<Shared>,
}

/// A server at work. Dropping it stops it.
#[derive(Debug)]
pub struct Running {
    path: PathBuf,
    shared: Arc<Shared>,
    greeter: Option<JoinHandle<()>>,
    file: Option<SocketFile>,
}

#[derive(Debug)]
struct Shared {
    exports: Exports,
    limits: Limits,
    budget: Budget,
    clients: Mutex<Clients>,
    /// Signalled when a client has left.
    left: Condvar,
    stopping: AtomicBool,
    /// Readable when the greeter has to look up: a client has left, or the server stops.
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Clients {
    next: u64,
    connected: BTreeMap<u64, Client>,
}

#[derive(Debug)]
struct Client {
    stream: Arc<UnixStream>,
    /// Has chosen an export.
    greeted: bool,
}

impl Server {
    /// Listens on a new Unix socket at `path`, which gets mode 0600.
    ///
    /// `path` should be in a folder of the caller's own. A socket left behind by a
    /// program that is gone is replaced; it disappears when the server ends.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if another program listens there, [`ErrorKind::Usage`] if
    /// something else than a socket is there, if two exports have one name, or if a name
    /// or description cannot travel.
    pub fn bind(path: impl AsRef<Path>, exports: Vec<Export>, limits: Limits) -> Result<Self> {
        let path = path.as_ref();
        if limits.payload < 1 << 20 || limits.requests == 0 || limits.connections == 0 {
            return Err(Error::usage(format!(
                "limits allow {} connections, {} requests and {} bytes of payload, \
                 expected at least 1, 1 and 1048576",
                limits.connections, limits.requests, limits.payload
            )));
        }
        let offered = Exports::default();
        for export in exports {
            if offered.all().iter().any(|other| other.export.name == export.name) {
                return Err(Error::usage(format!("two exports are called {:?}", export.name)));
            }
            offered.add(export)?;
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("cannot make an event descriptor", error.into()))?;
        let (listener, file) = listen(path)?;
        let shared = Arc::new(Shared {
            exports: offered,
            budget: Budget::new(limits.server_bytes.max(u64::from(limits.payload))),
            limits,
            clients: Mutex::default(),
            left: Condvar::new(),
            stopping: AtomicBool::new(false),
            wake,
        });
        Ok(Self { path: path.to_owned(), listener, file, shared })
    }

    /// Starts to answer, in threads of its own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if no thread can be started.
    pub fn start(self) -> Result<Running> {
        let Self { path, listener, file, shared } = self;
        let greeter = Builder::new()
            .name("nbd greeter".to_owned())
            .spawn({
                let shared = shared.clone();
                move || shared.greet(&listener)
            })
            .map_err(|error| Error::io("cannot start the server's thread", error))?;
        Ok(Running { path, shared, greeter: Some(greeter), file: Some(file) })
    }
}

/// Serves one client: what it sends comes from `input`, and replies go to `output`. Returns
/// when it leaves or breaks the protocol, and every request of it is answered. Whoever
/// calls this sees to it that a client which falls silent does not stay.
///
/// # Errors
///
/// As [`Server::bind`] for the exports; a handshake that broke the protocol or a limit.
pub fn serve<R: Read + Send, W: Write + Send>(
    input: R,
    output: W,
    exports: Vec<Export>,
    limits: &Limits,
) -> Result<()> {
    let offered = Exports::default();
    for export in exports {
        offered.add(export)?;
    }
    let mut streams = Streams(input, output);
    let Some(agreed) = negotiate(&mut streams, &offered, limits)? else {
        return Ok(());
    };
    let budget = Budget::new(limits.server_bytes.max(u64::from(limits.payload)));
    Connection::new((streams.0, streams.1), agreed, limits, &budget).serve();
    Ok(())
}

/// Both directions as one.
struct Streams<R, W>(R, W);

impl<R: Read, W> Read for Streams<R, W> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl<R, W: Write> Write for Streams<R, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

impl Running {
    /// Where clients connect.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Offers another export, in place of one of the same name if there is one.
    ///
    /// Clients that are connected keep the device that they chose.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] if the name or the description cannot travel.
    pub fn add_export(&self, export: Export) -> Result<()> {
        self.shared.exports.add(export)
    }

    /// What clients did so far with the export called `name`; `None` if there is none.
    pub fn statistics(&self, name: &str) -> Option<Statistics> {
        self.shared.exports.statistics(name)
    }

    /// How many clients are connected, handshakes included.
    pub fn connections(&self) -> usize {
        self.shared.clients().connected.len()
    }

    /// Ends the server: no new clients, no new requests, answers for those in flight,
    /// at most for the time that the limits give; then every device is flushed and the
    /// socket removed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if a request did not end in time, otherwise the first device
    /// that could not be flushed.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(greeter) = self.greeter.take() else {
            return Ok(());
        };
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.wake_greeter();
        if greeter.join().is_err() {
            tracing::warn!("the server's thread panicked");
        }
        self.file = None;
        let in_time = self.shared.dismiss();
        let flushed = self
            .shared
            .exports
            .all()
            .iter()
            .filter(|served| !served.is_read_only())
            .map(|served| served.export.device.flush())
            .fold(Ok(()), Result::and);
        if !in_time {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("requests in flight did not end in {:?}", self.shared.limits.stop),
            ));
        }
        flushed
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!(%error, "cannot stop the server in good order");
        }
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_greeter(&self) {
        // It fails only if the counter is full, and then the greeter is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Whether another client may be greeted.
    fn has_room(&self) -> bool {
        let clients = self.clients();
        let handshakes = clients.connected.values().filter(|client| !client.greeted).count();
        clients.connected.len() < self.limits.connections && handshakes < self.limits.handshakes
    }

    fn greet(self: &Arc<Self>, listener: &UnixListener) {
        let mut pause = None;
        while !self.stopping.load(Ordering::SeqCst) {
            let mut events = vec![PollFd::new(&self.wake, PollFlags::IN)];
            if pause.is_none() && self.has_room() {
                events.push(PollFd::new(listener, PollFlags::IN));
            }
            match poll(&mut events, pause.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => tracing::warn!(%error, "cannot wait for clients"),
            }
            pause = None;
            let mut raised = [0; 8];
            let _ = rustix::io::read(&self.wake, &mut raised);
            if self.stopping.load(Ordering::SeqCst) || !self.has_room() {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => self.receive(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client");
                    pause = Some(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Gives a client a thread.
    fn receive(self: &Arc<Self>, stream: UnixStream) {
        let stream = Arc::new(stream);
        let number = {
            let mut clients = self.clients();
            let number = clients.next;
            clients.next = number.wrapping_add(1);
            clients.connected.insert(number, Client { stream: stream.clone(), greeted: false });
            number
        };
        let leaving = Leaving { shared: self.clone(), number };
        let started = Builder::new().name("nbd client".to_owned()).spawn(move || {
            let leaving = leaving;
            if let Err(error) = leaving.shared.attend(&stream, number) {
                tracing::debug!(%error, "connection ended");
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "cannot start a thread for a client");
        }
    }

    fn attend(&self, stream: &UnixStream, number: u64) -> Result<()> {
        let prepared = |error| Error::io("cannot prepare the connection", error);
        stream.set_nonblocking(false).map_err(prepared)?;
        let now = Instant::now();
        let until = now.checked_add(self.limits.handshake).unwrap_or(now);
        let agreed = negotiate(&mut Deadline { stream, until }, &self.exports, &self.limits)?;
        let Some(agreed) = agreed else {
            return Ok(());
        };
        stream.set_read_timeout(None).map_err(prepared)?;
        let stall = self.limits.send_stall.max(Duration::from_millis(1));
        stream.set_write_timeout(Some(stall)).map_err(prepared)?;
        if let Some(client) = self.clients().connected.get_mut(&number) {
            client.greeted = true;
        }
        self.wake_greeter();
        Connection::new((stream, Sender(stream)), agreed, &self.limits, &self.budget).serve();
        Ok(())
    }

    /// Lets every client finish what is in flight. False if some took too long.
    fn dismiss(&self) -> bool {
        // First nothing more is read, then nothing more is sent. A device that hangs
        // keeps its thread, which nobody can take away.
        for how in [Shutdown::Read, Shutdown::Both] {
            let clients = self.clients();
            for client in clients.connected.values() {
                let _ = client.stream.shutdown(how);
            }
            let (clients, _) = self
                .left
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
        self.shared.clients().connected.remove(&self.number);
        self.shared.left.notify_all();
        self.shared.wake_greeter();
    }
}
