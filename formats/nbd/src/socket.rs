// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Unix sockets as the two phases of a connection want them.

use rustix::net::{self, AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::fs;
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tranship_block::{Error, ErrorKind, Result};

/// A listening socket's name in the file system; removed when this is dropped.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode, so that nobody else's socket is removed.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn identity_of(path: &Path) -> Option<(u64, u64)> {
        fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && Self::identity_of(&self.path) == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on a new socket at `path` that only its owner can connect to.
///
/// # Errors
///
/// [`ErrorKind::Busy`] if somebody listens there already, [`ErrorKind::Usage`] if
/// something else than a socket is there. A socket that nobody listens on is replaced.
pub(crate) fn listen(path: &Path) -> Result<(UnixListener, SocketFile)> {
    remove_stale(path)?;
    let bound = || -> io::Result<UnixListener> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Linux gives the file the mode of the socket, so there is no moment in which
        // somebody else could connect.
        rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(0o600))?;
        net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        net::listen(&socket, 128)?;
        Ok(UnixListener::from(socket))
    };
    let listener =
        bound().map_err(|error| Error::io("cannot listen on the socket", error).in_file(path))?;
    let identity = SocketFile::identity_of(path);
    Ok((listener, SocketFile { path: path.to_owned(), identity }))
}

fn remove_stale(path: &Path) -> Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(Error::usage("something else than a socket is there").in_file(path));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|error| Error::io("cannot remove the stale socket", error).in_file(path)),
        Err(error) => {
            Err(Error::io("cannot tell whether the socket is in use", error).in_file(path))
        }
        Ok(_) => {
            let text = "another program listens on this socket";
            Err(Error::new(ErrorKind::Busy, text).in_file(path))
        }
    }
}

/// A stream that has to be done with by some moment, however slowly bytes come.
#[derive(Debug)]
pub(crate) struct Deadline<'a> {
    pub(crate) stream: &'a UnixStream,
    pub(crate) until: Instant,
}

impl Deadline<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.until.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        let mut stream = self.stream;
        stream.read(bytes)
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        send(self.stream, &[IoSlice::new(bytes)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The sending half of a stream. Dropping it ends the connection in both directions,
/// so that a reader does not wait for a client that cannot be answered.
#[derive(Debug)]
pub(crate) struct Sender<'a>(pub(crate) &'a UnixStream);

impl Write for Sender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        send(self.0, &[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        send(self.0, bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Sender<'_> {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Sends without the signal that a client which has left would cause.
fn send(stream: &UnixStream, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
    let mut control = net::SendAncillaryBuffer::default();
    Ok(net::sendmsg(stream, bufs, &mut control, SendFlags::NOSIGNAL)?)
}
