// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connecting, and the two directions of a connection.

use super::ahead::Ahead;
use crate::tls::{TlsReading, TlsWriting};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
    sockopt::{self, Timeout},
};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tranship_block::{Error, ErrorKind, Result};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// At a Unix socket; a zero byte in front is the sign of an abstract name.
    Unix(PathBuf),
    /// At a port of TCP.
    Tcp {
        /// Name or address of the host, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// At a port of a virtual machine or its host.
    Vsock {
        /// Context id of the machine; 2 is the host.
        cid: u32,
        /// Port.
        port: u32,
    },
}

impl Address {
    /// The name that a certificate of this server has; a socket of this machine is at
    /// `localhost`.
    pub(super) fn host(&self) -> &str {
        match self {
            Self::Tcp { host, .. } => host,
            Self::Unix(_) | Self::Vsock { .. } => "localhost",
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => match path.as_os_str().as_bytes().strip_prefix(b"\0") {
                Some(name) => write!(f, "abstract socket {}", name.escape_ascii()),
                None => write!(f, "{}", path.display()),
            },
            Self::Tcp { host, port } => write!(f, "{host} port {port}"),
            Self::Vsock { cid, port } => write!(f, "vsock {cid} port {port}"),
        }
    }
}

/// A connected stream socket of any family.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    pub(super) fn connect(address: &Address, timeout: Duration) -> Result<Self> {
        let socket = match address {
            Address::Unix(path) => connect_unix(path),
            Address::Tcp { host, port } => connect_tcp(host, *port, timeout).map(OwnedFd::from),
            Address::Vsock { cid, port } => connect_vsock(*cid, *port, timeout),
        };
        let socket = socket.map_err(|error| {
            Error::new(ErrorKind::Busy, format!("cannot connect to the NBD server at {address}"))
                .because(error)
        })?;
        Self::over(socket, timeout)
    }

    /// A socket that is connected already.
    pub(super) fn over(socket: OwnedFd, timeout: Duration) -> Result<Self> {
        for which in [Timeout::Recv, Timeout::Send] {
            sockopt::set_socket_timeout(&socket, which, Some(timeout))
                .map_err(|error| Error::io("cannot set the socket's time-out", error.into()))?;
        }
        Ok(Self(socket))
    }

    pub(super) fn try_clone(&self) -> Result<Self> {
        let clone = self.0.try_clone();
        clone.map(Self).map_err(|error| Error::io("cannot share the connection", error))
    }

    pub(super) fn into_descriptor(self) -> OwnedFd {
        self.0
    }

    /// The process at the other end of a Unix socket, as it was when it began to listen.
    pub(super) fn peer(&self) -> Option<u32> {
        let credentials = sockopt::socket_peercred(&self.0).ok()?;
        u32::try_from(credentials.pid.as_raw_pid()).ok().filter(|pid| *pid > 0)
    }

    /// Ends the connection for everybody who holds a clone.
    pub(super) fn close(&self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}

fn connect_unix(path: &Path) -> io::Result<OwnedFd> {
    let name = path.as_os_str().as_bytes();
    let address = match name.strip_prefix(b"\0") {
        Some(name) => SocketAddrUnix::new_abstract_name(name)?,
        None => SocketAddrUnix::new(name)?,
    };
    let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address))?;
    Ok(socket)
}

fn connect_tcp(host: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                // Requests are small, and somebody waits for each.
                stream.set_nodelay(true)?;
                sockopt::set_socket_keepalive(stream.as_fd(), true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect_vsock(cid: u32, port: u32, timeout: Duration) -> io::Result<OwnedFd> {
    let socket = socket2::Socket::new(socket2::Domain::VSOCK, socket2::Type::STREAM, None)?;
    socket.connect_timeout(&socket2::SockAddr::vsock(cid, port), timeout)?;
    Ok(OwnedFd::from(socket))
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let (received, _) = rustix::net::recv(&self.0, buf, RecvFlags::empty())?;
        Ok(received)
    }

    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        Ok(rustix::io::readv(&self.0, bufs)?)
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&self.0, buf, SendFlags::NOSIGNAL)?)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut control = rustix::net::SendAncillaryBuffer::default();
        Ok(rustix::net::sendmsg(&self.0, bufs, &mut control, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What comes from the server.
#[derive(Debug)]
pub(super) enum Reading {
    Plain(Ahead<Socket>),
    Tls(Box<TlsReading<Socket>>),
}

impl Read for Reading {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buf),
            Self::Tls(tls) => tls.read(buf),
        }
    }
}

impl Reading {
    /// Bytes that can be read without waiting, as far as that is known.
    pub(super) fn buffered(&self) -> &[u8] {
        match self {
            Self::Plain(socket) => socket.buffer(),
            Self::Tls(_) => &[],
        }
    }
}

/// What goes to the server.
#[derive(Debug)]
pub(super) enum Writing {
    Plain(Socket),
    Tls(Box<TlsWriting<Socket>>),
}

impl Write for Writing {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(buf),
            Self::Tls(tls) => tls.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write_vectored(bufs),
            Self::Tls(tls) => tls.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Writing {
    /// Tells the other side that nothing more comes, where there is a way to say it.
    pub(super) fn finish(&mut self) {
        if let Self::Tls(tls) = self {
            let _ = tls.finish();
        }
    }
}

/// Both directions together, as the handshake wants them.
#[derive(Debug)]
pub(super) struct Duplex {
    pub(super) reading: Reading,
    pub(super) writing: Writing,
}

impl Duplex {
    pub(super) fn plain(socket: &Socket) -> Result<Self> {
        Ok(Self {
            reading: Reading::Plain(Ahead::new(socket.try_clone()?)),
            writing: Writing::Plain(socket.try_clone()?),
        })
    }
}

impl Read for Duplex {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.reading.read(buf)
    }
}

impl Write for Duplex {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.writing.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
