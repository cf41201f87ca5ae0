// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server: what it offers where, and how it is started, watched and stopped.

use crate::export::{Export, Exports};
use crate::greeter::Shared;
use crate::handshake::{Offer, Outcome, negotiate};
use crate::limits::{Limits, Pool};
use crate::listener::{Listener, Place};
use crate::socket::Plain;
use crate::statistics::Statistics;
use crate::tls::{Encryption, ServerTls};
use crate::transmission::{Connection, Surroundings};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;
use tranship_block::{BlockDevice, Error, ErrorKind, Result};

/// A server that listens but does not answer yet: clients wait.
///
/// The kernel sends bytes of files straight to clients, and it raises SIGPIPE if one of
/// them has left. Rust's start-up has programs ignore that signal; one that does not must
/// not serve.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<Listener>,
    shared: Shared,
}

/// A server at work. Dropping it stops it.
#[derive(Debug)]
pub struct Running {
    places: Vec<Place>,
    shared: Arc<Shared>,
    greeter: Option<JoinHandle<()>>,
    /// How many comings and goings the last wait has seen.
    seen: Mutex<u64>,
}

impl Server {
    /// Serves `exports` to clients of all `listeners`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] without a listener, if two exports have one name, if a name or
    /// description cannot travel, or if the limits leave nothing.
    pub fn new(listeners: Vec<Listener>, exports: Vec<Export>, limits: Limits) -> Result<Self> {
        if listeners.is_empty() {
            return Err(Error::usage("server has nothing to listen on"));
        }
        Ok(Self { listeners, shared: shared(exports, limits)? })
    }

    /// Listens on a new Unix socket at `path`, which gets mode 0600.
    ///
    /// # Errors
    ///
    /// As [`Listener::unix`] and [`Self::new`].
    pub fn bind(path: impl AsRef<Path>, exports: Vec<Export>, limits: Limits) -> Result<Self> {
        let shared = shared(exports, limits)?;
        Ok(Self { listeners: vec![Listener::unix(path)?], shared })
    }

    /// Clients may encrypt with `tls`, or have to if `required` is true: then they learn
    /// nothing before they do. The connection of one that may not is closed.
    #[must_use]
    pub fn with_tls(mut self, tls: ServerTls, required: bool) -> Self {
        self.shared.encryption = Some(Encryption { tls, required });
        self
    }

    /// Starts to answer, in threads of its own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] if no thread can be started.
    pub fn start(self) -> Result<Running> {
        let Self { listeners, shared } = self;
        let shared = Arc::new(shared);
        let places = listeners.iter().map(Listener::place).collect();
        let greeter = Builder::new()
            .name("nbd greeter".to_owned())
            .spawn({
                let shared = shared.clone();
                move || shared.greet(&listeners)
            })
            .map_err(|error| Error::io("cannot start the server's thread", error))?;
        Ok(Running { places, shared, greeter: Some(greeter), seen: Mutex::new(0) })
    }
}

fn shared(exports: Vec<Export>, limits: Limits) -> Result<Shared> {
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
    Shared::new(offered, limits)
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
    let stopping = AtomicBool::new(false);
    let offer = Offer { exports: &offered, limits, stopping: &stopping, encryption: None };
    let Outcome::Agreed(agreed) = negotiate(&mut streams, offer)? else {
        return Ok(());
    };
    let surroundings = Surroundings { limits, pool: &Pool::new(limits), stopping: &stopping };
    Connection::new((streams.0, Plain(streams.1)), None, agreed, surroundings).serve();
    Ok(())
}

/// Both directions as one.
pub(crate) struct Streams<R, W>(pub(crate) R, pub(crate) W);

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
    /// Where clients connect, in the order of the listeners.
    pub fn places(&self) -> &[Place] {
        &self.places
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

    /// Takes the export called `name` off the list and flushes its device. Clients that are
    /// connected keep it; no new ones find it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is none, and the device's.
    pub fn remove_export(&self, name: &str) -> Result<()> {
        let served = self.shared.exports.remove(name).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no export {name:?}"))
        })?;
        if served.export.read_only { Ok(()) } else { served.export.device.flush() }
    }

    /// What clients did so far with the export called `name`; `None` if there is none.
    pub fn statistics(&self, name: &str) -> Option<Statistics> {
        self.shared.exports.statistics(name)
    }

    /// How many clients are connected, handshakes included.
    pub fn connections(&self) -> usize {
        self.shared.clients().connections()
    }

    /// How many clients have ever chosen an export.
    pub fn negotiated(&self) -> u64 {
        self.shared.clients().negotiated()
    }

    /// Returns when a client has come, has chosen an export or has left since the last
    /// call, or after `time`; without a time it waits as long as it takes.
    pub fn wait(&self, time: Option<Duration>) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = self.shared.wait_for_change(*seen, time);
    }

    /// Ends the server: no new clients, no new requests, answers for those in flight,
    /// at most for the time that the limits give; then every device is flushed and the
    /// sockets removed.
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
        self.shared.stop();
        if greeter.join().is_err() {
            tracing::warn!("the server's thread panicked");
        }
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
