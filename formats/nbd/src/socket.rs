// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connected sockets as the two phases of a connection want them.

use crate::tls::TlsWriting;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{self, SendFlags, Shutdown};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Bytes of a file that are encrypted together: four records.
const RECORDS: usize = 64 << 10;

/// One call of `sendfile` moves no more than this.
const MOST_SENT: u64 = 1 << 30;

/// A stream socket of any family.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// How long one receive may wait.
    pub(crate) fn set_receive_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        Ok(set_socket_timeout(&self.0, Timeout::Recv, time)?)
    }

    /// How long one send may wait.
    pub(crate) fn set_send_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        Ok(set_socket_timeout(&self.0, Timeout::Send, time)?)
    }

    /// Ends one direction or both, for everybody who uses the socket.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        // It fails only if the peer has done so already.
        let _ = net::shutdown(&self.0, how);
    }

    /// Sends without the signal that a client which has left would cause.
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut control = net::SendAncillaryBuffer::default();
        Ok(net::sendmsg(&self.0, bufs, &mut control, SendFlags::NOSIGNAL)?)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Read for &Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, bytes)?)
    }

    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        Ok(rustix::io::readv(&self.0, bufs)?)
    }
}

/// Whether the other side of `socket` has gone, without reading what it left behind.
pub(crate) fn is_gone(socket: BorrowedFd<'_>) -> bool {
    let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP;
    let mut events = [PollFd::new(&socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut events, Some(&now)), Ok(1..))
        && events.iter().any(|event| event.revents().intersects(gone))
}

/// Whether reading from `socket` gives something at once, be it its end.
pub(crate) fn has_bytes(socket: BorrowedFd<'_>) -> bool {
    let mut events = [PollFd::new(&socket, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // What cannot be polled is better slept on.
    !matches!(poll(&mut events, Some(&now)), Ok(0))
}

/// A stream that has to be done with by some moment, however slowly bytes come; without
/// one, the socket's own time-outs hold.
#[derive(Debug)]
pub(crate) struct Deadline<'a> {
    pub(crate) socket: &'a Socket,
    pub(crate) until: Option<Instant>,
}

impl Deadline<'_> {
    /// Sets a time-out with what is left of the time.
    fn limit(&self, set: fn(&Socket, Option<Duration>) -> io::Result<()>) -> io::Result<()> {
        let Some(until) = self.until else { return Ok(()) };
        match until.checked_duration_since(Instant::now()) {
            // The kernel counts in microseconds and takes 0 for no limit.
            Some(left) if left >= Duration::from_micros(1) => set(self.socket, Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.limit(Socket::set_receive_timeout)?;
        let mut socket = self.socket;
        socket.read(bytes)
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.limit(Socket::set_send_timeout)?;
        self.socket.send(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where replies go.
pub(crate) trait Output: Write + Send {
    /// Whether [`Self::send_file`] does more than nothing.
    fn takes_files(&self) -> bool {
        false
    }

    /// Sends `head` and then `len` bytes of `file` from `offset` onward without touching
    /// them. Returns how many of the file's bytes went: fewer if the file ends or fails.
    fn send_file(
        &mut self,
        head: &[u8],
        _file: BorrowedFd<'_>,
        _offset: u64,
        _len: u64,
    ) -> io::Result<u64> {
        self.write_all(head)?;
        Ok(0)
    }
}

/// The sending half of a socket. Dropping it ends the connection in both directions,
/// so that a reader does not wait for a client that cannot be answered.
#[derive(Debug)]
pub(crate) struct Sender<'a>(pub(crate) &'a Socket);

impl Write for Sender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.send(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for Sender<'_> {
    fn takes_files(&self) -> bool {
        true
    }

    fn send_file(
        &mut self,
        mut head: &[u8],
        file: BorrowedFd<'_>,
        mut offset: u64,
        len: u64,
    ) -> io::Result<u64> {
        while !head.is_empty() {
            match net::send(&self.0.0, head, SendFlags::NOSIGNAL | SendFlags::MORE) {
                Ok(sent) => head = head.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut gone = 0_u64;
        while gone < len {
            let left = len.saturating_sub(gone).min(MOST_SENT);
            let left = usize::try_from(left).unwrap_or(usize::MAX);
            match rustix::fs::sendfile(&self.0.0, file, Some(&mut offset), left) {
                Ok(0) => break,
                Ok(sent) => {
                    gone = gone.saturating_add(u64::try_from(sent).unwrap_or(u64::MAX));
                }
                Err(Errno::INTR) => {}
                Err(
                    errno @ (Errno::PIPE
                    | Errno::CONNRESET
                    | Errno::NOTCONN
                    | Errno::TIMEDOUT
                    | Errno::AGAIN),
                ) => return Err(errno.into()),
                // The file's own trouble, or a file that cannot be sent like this.
                Err(_) => break,
            }
        }
        Ok(gone)
    }
}

impl Drop for Sender<'_> {
    fn drop(&mut self) {
        self.0.shutdown(Shutdown::Both);
    }
}

/// The sending half of an encrypted socket. Dropping it says so to the client, and ends the
/// connection in both directions.
#[derive(Debug)]
pub(crate) struct Sealed<'a> {
    writing: TlsWriting<Deadline<'a>>,
    /// Nothing more can be said after a failed send.
    is_broken: bool,
    /// Bytes of files on their way.
    piece: Vec<u8>,
}

impl<'a> Sealed<'a> {
    pub(crate) fn new(writing: TlsWriting<Deadline<'a>>) -> Self {
        Self { writing, is_broken: false, piece: Vec::new() }
    }

    /// The handshake is over.
    pub(crate) fn has_no_deadline(&mut self) {
        self.writing.sink_mut().until = None;
    }
}

impl Write for Sealed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.writing.write_vectored(bufs).inspect_err(|_| self.is_broken = true)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for Sealed<'_> {
    fn takes_files(&self) -> bool {
        true
    }

    /// The bytes come through memory, in pieces that are encrypted and sent while they are
    /// in the processor's cache.
    fn send_file(
        &mut self,
        mut head: &[u8],
        file: BorrowedFd<'_>,
        offset: u64,
        len: u64,
    ) -> io::Result<u64> {
        let mut piece = std::mem::take(&mut self.piece);
        piece.resize(RECORDS, 0);
        let mut gone = 0_u64;
        while gone < len {
            let left = usize::try_from(len.saturating_sub(gone)).unwrap_or(usize::MAX);
            // With the head, the records are full.
            let room = RECORDS.saturating_sub(head.len()).clamp(1, RECORDS).min(left);
            let bytes = piece.get_mut(..room).unwrap_or_default();
            let read = match rustix::io::pread(file, bytes, offset.saturating_add(gone)) {
                // The file's own trouble.
                Ok(0) => break,
                Ok(read) => read,
                Err(Errno::INTR) => continue,
                Err(_) => break,
            };
            crate::reply::send(self, head, piece.get(..read).unwrap_or_default())?;
            head = &[];
            gone = gone.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
        }
        self.piece = piece;
        if !head.is_empty() {
            self.write_all(head)?;
        }
        Ok(gone)
    }
}

impl Drop for Sealed<'_> {
    fn drop(&mut self) {
        if !self.is_broken {
            // The client may have left without waiting for it.
            let _ = self.writing.finish();
        }
        self.writing.sink_mut().socket.shutdown(Shutdown::Both);
    }
}

/// Output of any kind, through which files cannot go.
#[derive(Debug)]
pub(crate) struct Plain<W>(pub(crate) W);

impl<W: Write> Write for Plain<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<W: Write + Send> Output for Plain<W> {}
