// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An export of somebody else's server as a device like any other.

mod connection;
mod extents;
mod handshake;
mod reply;
mod stream;

use crate::wire::{allocation, command, command_flag, export_flag};
use connection::{Connection, Request};
use extents::Known;
use handshake::Agreed;
pub use stream::Address;
use stream::Stream;

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tranship_block::{
    BlockDevice, Error, ErrorKind, Extent, ExtentKind, Result, Span, Storage, Zeroing,
};

/// Longest request without payload: 32 bits of length, less what keeps it aligned.
const LONGEST: u64 = (1 << 32) - (64 << 10);
/// Longest payload for servers that do not tell theirs ("Size constraints").
const LONGEST_PAYLOAD: u64 = 32 << 20;

/// How a server is spoken to.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Name of the export; the empty one is the server's default.
    pub export: String,
    /// Refuse writes, even if the server takes them.
    pub read_only: bool,
    /// Connections that are used at the same time, if the server says that they see the
    /// same disk; at least 1.
    pub connections: usize,
    /// How long connecting may take, and how long a reply may be waited for.
    pub timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            read_only: false,
            connections: 4,
            timeout: Duration::from_mins(1),
        }
    }
}

/// A disk that an NBD server exports.
///
/// Any number of threads may use it: their requests are in flight at the same time, on
/// one connection or several. A connection that breaks fails all that is in flight on it
/// and everything after it with [`ErrorKind::Busy`].
#[derive(Debug)]
pub struct Remote {
    agreed: Agreed,
    read_only: bool,
    connections: Vec<Connection>,
    /// Connection of the next request.
    turn: AtomicUsize,
    /// What is known about zeroes, until something is written.
    known: Mutex<Known>,
    /// Held while an unaligned write reads what is around it.
    unaligned: Mutex<()>,
}

impl Remote {
    /// Connects to the server at `address`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if there is nobody or the connection broke,
    /// [`ErrorKind::NotFound`] if the server has no such export,
    /// [`ErrorKind::Denied`] if it wants TLS, [`ErrorKind::Corrupt`] if it breaks the
    /// protocol.
    pub fn connect(address: &Address, options: &ClientOptions) -> Result<Self> {
        let (agreed, first) = Connection::open(address, options)?;
        let mut connections = vec![first];
        if agreed.has(export_flag::CAN_MULTI_CONN) {
            for _ in 1..options.connections {
                // One is enough to work with: a server may have a limit.
                match Connection::open(address, options) {
                    Ok((again, connection)) if again.size == agreed.size => {
                        connections.push(connection);
                    }
                    _ => break,
                }
            }
        }
        tracing::debug!(size = agreed.size, connections = connections.len(), "connected to NBD");
        Ok(Self::new(agreed, connections, options))
    }

    /// Uses the server at the other end of `stream`, on this one connection.
    ///
    /// # Errors
    ///
    /// As [`Self::connect`].
    pub fn from_stream(stream: UnixStream, options: &ClientOptions) -> Result<Self> {
        let stream = Stream::over(stream, options.timeout)?;
        let (agreed, connection) = Connection::over(stream, options)?;
        Ok(Self::new(agreed, vec![connection], options))
    }

    fn new(agreed: Agreed, connections: Vec<Connection>, options: &ClientOptions) -> Self {
        Self {
            read_only: options.read_only || agreed.has(export_flag::READ_ONLY),
            agreed,
            connections,
            turn: AtomicUsize::new(0),
            known: Mutex::default(),
            unaligned: Mutex::new(()),
        }
    }

    /// What the server says about the export.
    pub fn description(&self) -> Option<&str> {
        self.agreed.description.as_deref()
    }

    /// Connections in use.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connection(&self) -> Result<&Connection> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let number = turn.checked_rem(self.connections.len()).unwrap_or(0);
        self.connections.get(number).ok_or_else(|| Error::usage("client has no connection"))
    }

    fn payload(&self) -> u64 {
        let unit = u64::from(self.agreed.min_block);
        let most = u64::from(self.agreed.max_payload).min(LONGEST_PAYLOAD);
        most.saturating_sub(most.checked_rem(unit).unwrap_or(0)).max(unit)
    }

    /// The smallest range of whole blocks of the server that has `span` in it.
    fn aligned(&self, span: Span) -> Result<Span> {
        let unit = u64::from(self.agreed.min_block).max(1);
        let start = span.start.saturating_sub(span.start.checked_rem(unit).unwrap_or(0));
        let end = span.end().checked_next_multiple_of(unit).unwrap_or(u64::MAX);
        if end > self.agreed.size {
            // "The odd tail of an export is unreachable": the server says so by its sizes.
            return Err(Error::unsupported(format!(
                "the server takes requests of {unit} bytes at least, and its disk of {} bytes \
                 ends within one",
                self.agreed.size
            ))
            .at(span.start));
        }
        Ok(Span::new(start, end.saturating_sub(start)))
    }

    fn read_aligned(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        for piece in pieces(Span::new(offset, length(rest)), self.payload()) {
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            self.connection()?.read(request(command::READ, 0, piece), now)?;
            rest = later;
        }
        Ok(())
    }

    fn write_aligned(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        for piece in pieces(Span::new(offset, length(rest)), self.payload()) {
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at(len);
            self.connection()?.send(request(command::WRITE, 0, piece), now)?;
            rest = later;
        }
        Ok(())
    }

    /// Checks that `span` may be changed, and forgets what was known about it.
    fn start_writing(&self, span: Span) -> Result<()> {
        if self.read_only {
            return Err(Error::usage("device is read-only").at(span.start));
        }
        span.check_within(self.agreed.size)?;
        self.known().clear();
        Ok(())
    }
}

impl BlockDevice for Remote {
    fn size(&self) -> u64 {
        self.agreed.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn preferred_block(&self) -> u32 {
        self.agreed.preferred_block.max(4096)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let span = Span::new(offset, length(buf));
        span.check_within(self.agreed.size)?;
        let whole = self.aligned(span)?;
        if whole == span {
            return self.read_aligned(buf, offset);
        }
        let mut bounce = vec![0; size_of_span(whole)?];
        self.read_aligned(&mut bounce, whole.start)?;
        let skip = usize::try_from(span.start.saturating_sub(whole.start)).unwrap_or(usize::MAX);
        let end = skip.saturating_add(buf.len());
        let wanted = bounce.get(skip..end).ok_or_else(|| Error::usage("read past its blocks"))?;
        buf.copy_from_slice(wanted);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let span = Span::new(offset, length(buf));
        self.start_writing(span)?;
        let whole = self.aligned(span)?;
        if whole == span {
            return self.write_aligned(buf, offset);
        }
        let _alone = self.unaligned.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bounce = vec![0; size_of_span(whole)?];
        self.read_aligned(&mut bounce, whole.start)?;
        let skip = usize::try_from(span.start.saturating_sub(whole.start)).unwrap_or(usize::MAX);
        let end = skip.saturating_add(buf.len());
        bounce
            .get_mut(skip..end)
            .ok_or_else(|| Error::usage("write past its blocks"))?
            .copy_from_slice(buf);
        self.write_aligned(&bounce, whole.start)
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.start_writing(span)?;
        let is_aligned = self.aligned(span).is_ok_and(|whole| whole == span);
        if !self.agreed.has(export_flag::SEND_WRITE_ZEROES) || !is_aligned {
            let zeroes = vec![0; usize::try_from(span.len.min(1 << 20)).unwrap_or(0)];
            for piece in pieces(span, 1 << 20) {
                let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
                self.write_at(zeroes.get(..len).unwrap_or(&zeroes), piece.start)?;
            }
            return Ok(());
        }
        let flags = match mode {
            Zeroing::MayUnmap => 0,
            Zeroing::KeepAllocated => command_flag::NO_HOLE,
        };
        for piece in pieces(span, LONGEST) {
            self.connection()?.send(request(command::WRITE_ZEROES, flags, piece), &[])?;
        }
        Ok(())
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.start_writing(span)?;
        let is_aligned = self.aligned(span).is_ok_and(|whole| whole == span);
        if !self.agreed.has(export_flag::SEND_TRIM) || !is_aligned {
            return Ok(());
        }
        for piece in pieces(span, LONGEST) {
            self.connection()?.send(request(command::TRIM, 0, piece), &[])?;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Span::new(offset, 1).check_within(self.agreed.size)?;
        let left = self.agreed.size.saturating_sub(offset);
        if !self.agreed.allocation {
            return Ok(Extent::new(ExtentKind::Data, left));
        }
        if let Some(extent) = self.known().at(offset) {
            return Ok(extent.limited_to(left));
        }
        let unit = u64::from(self.agreed.min_block).max(1);
        let start = offset.saturating_sub(offset.checked_rem(unit).unwrap_or(0));
        let len = self.agreed.size.saturating_sub(start).min(LONGEST);
        let span = Span::new(start, len.saturating_sub(len.checked_rem(unit).unwrap_or(0)));
        if span.end() <= offset {
            return Ok(Extent::new(ExtentKind::Data, left));
        }
        let generation = self.known().generation();
        let runs = self.connection()?.block_status(request(command::BLOCK_STATUS, 0, span))?;
        let mut known = Known::new(start);
        for (len, flags) in runs {
            let kind = match (flags & allocation::ZERO != 0, flags & allocation::HOLE != 0) {
                (true, true) => ExtentKind::Hole,
                (true, false) => ExtentKind::Zero,
                (false, _) => ExtentKind::Data,
            };
            known.push(u64::from(len), kind);
        }
        let found = known.at(offset).ok_or_else(|| {
            Error::corrupt("the server's block status has nothing about the start of its range")
                .at(offset)
        })?;
        self.known().replace(known, generation);
        Ok(found.limited_to(left))
    }

    fn flush(&self) -> Result<()> {
        if self.read_only || !self.agreed.has(export_flag::SEND_FLUSH) {
            return Ok(());
        }
        // With several connections, the server promised that one flush covers them all.
        self.connection()?.send(request(command::FLUSH, 0, Span::new(0, 0)), &[])
    }
}

impl Storage for Remote {
    fn set_len(&self, len: u64) -> Result<()> {
        if len <= self.agreed.size {
            return Ok(());
        }
        let size = self.agreed.size;
        Err(Error::new(
            ErrorKind::NoSpace,
            format!("NBD export has {size} bytes and cannot grow, {len} are needed"),
        ))
    }
}

fn request(command: u16, flags: u16, span: Span) -> Request {
    Request { command, flags, offset: span.start, len: u32::try_from(span.len).unwrap_or(0) }
}

/// Splits `span` into requests of at most `most` bytes.
fn pieces(span: Span, most: u64) -> impl Iterator<Item = Span> {
    let most = most.max(1);
    let mut at = span.start;
    std::iter::from_fn(move || {
        let left = span.end().saturating_sub(at);
        let piece = Span::new(at, left.min(most));
        at = piece.end();
        (left > 0).then_some(piece)
    })
}

fn length(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

fn size_of_span(span: Span) -> Result<usize> {
    usize::try_from(span.len).map_err(|_| Error::usage("range does not fit into memory"))
}
