// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An encrypted connection as a half to read from and a half to write to.
//!
//! Two threads use them at the same time: what encrypts is locked only while it works on
//! bytes in memory, never while a socket is waited for.

use rustls::Connection;
use rustls::pki_types::CertificateDer;
use std::io::{self, IoSlice, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tranship_block::{Error, ErrorKind, Result};

/// Bytes that a socket is asked for at once: 16 of the longest records.
const GULP: usize = 256 << 10;
/// Bytes that are encrypted before they are sent: four of the longest records. The other
/// side decrypts them while the next are encrypted, and all of them stay in the cache.
const BATCH: usize = 64 << 10;
/// Pieces of memory that are encrypted together: a head and what follows it.
const PIECES: usize = 4;

type Shared = Arc<Mutex<Connection>>;

fn locked(shared: &Shared) -> MutexGuard<'_, Connection> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the other side says.
#[derive(Debug)]
pub struct TlsReading<R> {
    shared: Shared,
    source: R,
    /// Bytes as they came, of which those from `start` to `end` are still encrypted.
    gulp: Vec<u8>,
    start: usize,
    end: usize,
}

/// What is said to the other side.
#[derive(Debug)]
pub struct TlsWriting<W> {
    shared: Shared,
    sink: W,
    records: Vec<u8>,
}

/// Brings a new connection to the point where it carries data, unless the other side is not
/// admitted by its certificates.
pub(super) fn shake_hands<R: Read, W: Write>(
    mut connection: Connection,
    mut reading: R,
    mut writing: W,
    admit: impl FnOnce(&[CertificateDer<'_>]) -> Result<()>,
) -> Result<(TlsReading<R>, TlsWriting<W>)> {
    connection.set_buffer_limit(None);
    while connection.is_handshaking() {
        while connection.wants_write() {
            connection.write_tls(&mut writing).map_err(broken)?;
        }
        if !connection.is_handshaking() {
            break;
        }
        match connection.read_tls(&mut reading) {
            Ok(0) => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(broken(error)),
        }
        if let Err(error) = connection.process_new_packets() {
            // The other side is told why, as far as it still listens.
            while connection.wants_write() && connection.write_tls(&mut writing).is_ok() {}
            return Err(refused(&error));
        }
    }
    while connection.wants_write() {
        connection.write_tls(&mut writing).map_err(broken)?;
    }
    writing.flush().map_err(broken)?;
    admit(connection.peer_certificates().unwrap_or_default())?;
    let shared = Arc::new(Mutex::new(connection));
    let reading = TlsReading {
        shared: Arc::clone(&shared),
        source: reading,
        gulp: vec![0; GULP],
        start: 0,
        end: 0,
    };
    Ok((reading, TlsWriting { shared, sink: writing, records: Vec::new() }))
}

fn broken(error: io::Error) -> Error {
    Error::new(ErrorKind::Busy, "the other side went away during the TLS handshake").because(error)
}

fn refused(error: &rustls::Error) -> Error {
    Error::new(ErrorKind::Denied, format!("the TLS handshake failed: {error}"))
}

impl<R> TlsReading<R> {
    /// Where the encrypted bytes come from.
    pub(crate) fn source_mut(&mut self) -> &mut R {
        &mut self.source
    }
}

impl<R: Read> Read for TlsReading<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            {
                let mut connection = locked(&self.shared);
                match connection.reader().read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
                if self.start < self.end {
                    let mut records = self.gulp.get(self.start..self.end).unwrap_or_default();
                    let taken = connection.read_tls(&mut records)?;
                    self.start = self.start.saturating_add(taken);
                    connection.process_new_packets().map_err(|error| {
                        io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}"))
                    })?;
                    continue;
                }
            }
            self.start = 0;
            self.end = 0;
            self.end = self.source.read(&mut self.gulp)?;
            if self.end == 0 {
                return Ok(0);
            }
        }
    }
}

impl<W> TlsWriting<W> {
    /// Where the encrypted bytes go.
    pub(crate) fn sink_mut(&mut self) -> &mut W {
        &mut self.sink
    }
}

impl<W: Write> TlsWriting<W> {
    /// Says that nothing more comes.
    ///
    /// # Errors
    ///
    /// The connection is broken.
    pub fn finish(&mut self) -> io::Result<()> {
        locked(&self.shared).send_close_notify();
        self.send()
    }

    /// Sends everything that is encrypted already.
    fn send(&mut self) -> io::Result<()> {
        self.records.clear();
        {
            let mut connection = locked(&self.shared);
            while connection.wants_write() {
                connection.write_tls(&mut self.records)?;
            }
        }
        self.sink.write_all(&self.records)
    }
}

impl<W: Write> Write for TlsWriting<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    /// A batch is encrypted and sent before the next, so that both ends work at once.
    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut taken = 0_usize;
        {
            let mut connection = locked(&self.shared);
            let mut parts = [IoSlice::new(&[]); PIECES];
            for (part, buf) in parts.iter_mut().zip(bufs) {
                let now = buf.get(..BATCH.saturating_sub(taken)).unwrap_or(buf);
                taken = taken.saturating_add(now.len());
                *part = IoSlice::new(now);
            }
            // A short head shares a record with what follows it.
            taken = connection.writer().write_vectored(&parts)?;
        }
        self.send()?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()?;
        self.sink.flush()
    }
}
