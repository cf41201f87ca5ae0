// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where clients connect: Unix sockets, TCP, vsock, and sockets that somebody else opened.

use crate::socket::Socket;
use rustix::fs::Mode;
use rustix::net::{self, SocketFlags, sockopt};
use socket2::{Domain, SockAddr, Type};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tranship_block::{Error, ErrorKind, Result};

/// How many clients may wait to be accepted.
const BACKLOG: i32 = 128;
/// Every address of this machine, in the numbers of vsock.
const VSOCK_ANY: u32 = u32::MAX;
/// A TCP client of which nothing was heard for this long is asked whether it lives.
const KEEPALIVE: Duration = Duration::from_mins(1);

/// A socket that clients can connect to. They wait until a server answers them.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    place: Place,
    _file: Option<SocketFile>,
}

/// Where a [`Listener`] can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket with a name in the file system.
    Unix(PathBuf),
    /// A port of TCP.
    Tcp(SocketAddr),
    /// A port between host and guests.
    Vsock {
        /// This machine's number.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// Somewhere that has no name here: an abstract or unnamed Unix socket.
    Other,
}

impl Listener {
    /// A new Unix socket at `path` that only its owner can connect to.
    ///
    /// `path` should be in a folder of the caller's own. A socket left behind by a
    /// program that is gone is replaced; it disappears when the listener is dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if another program listens there, [`ErrorKind::Usage`] if
    /// something else than a socket is there.
    pub fn unix(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        remove_stale(path)?;
        let bound = || -> io::Result<OwnedFd> {
            let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
            // Linux gives the file the mode of the socket, so there is no moment in which
            // somebody else could connect.
            rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600))?;
            listening(socket, &SockAddr::unix(path)?)
        };
        let socket = bound()
            .map_err(|error| Error::io("cannot listen on the socket", error).in_file(path))?;
        let file = SocketFile { path: path.to_owned(), identity: SocketFile::identity_of(path) };
        Ok(Self { socket, place: Place::Unix(path.to_owned()), _file: Some(file) })
    }

    /// A TCP port; port 0 is any that is free.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if the port is taken, and what the operating system reports.
    pub fn tcp(address: SocketAddr) -> Result<Self> {
        let bound = || -> io::Result<OwnedFd> {
            let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            // A port whose last connections are being forgotten is free.
            socket.set_reuse_address(true)?;
            if address.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            listening(socket, &address.into())
        };
        bound().and_then(Self::over).map_err(|error| {
            let text = format!("cannot listen on {address}");
            if error.kind() == io::ErrorKind::AddrInUse {
                Error::new(ErrorKind::Busy, text).because(error)
            } else {
                Error::io(text, error)
            }
        })
    }

    /// A port that guests of this machine can reach, and the machine's own programs.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if this system has no vsock, [`ErrorKind::Busy`] if the
    /// port is taken, and what the operating system reports.
    pub fn vsock(port: u32) -> Result<Self> {
        let bound = || -> io::Result<OwnedFd> {
            let socket = socket2::Socket::new(Domain::VSOCK, Type::STREAM, None)?;
            listening(socket, &SockAddr::vsock(VSOCK_ANY, port))
        };
        bound().and_then(Self::over).map_err(|error| {
            let text = format!("cannot listen on vsock port {port}");
            match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
                Some(
                    rustix::io::Errno::AFNOSUPPORT
                    | rustix::io::Errno::NODEV
                    | rustix::io::Errno::ADDRNOTAVAIL,
                ) => Error::unsupported(text).because(error),
                Some(rustix::io::Errno::ADDRINUSE) => {
                    Error::new(ErrorKind::Busy, text).because(error)
                }
                _ => Error::io(text, error),
            }
        })
    }

    /// A socket that somebody else has opened for us, systemd for example. Whatever name
    /// it has in the file system stays when the listener is dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] if it is no stream socket that listens.
    pub fn inherited(descriptor: OwnedFd) -> Result<Self> {
        let listens = sockopt::socket_type(&descriptor)
            .map(|kind| kind == net::SocketType::STREAM)
            .and_then(|stream| Ok(stream && sockopt::socket_acceptconn(&descriptor)?));
        if !matches!(listens, Ok(true)) {
            return Err(Error::usage("the inherited descriptor is no listening stream socket"));
        }
        let prepared = || -> io::Result<Self> {
            rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&descriptor, true)?;
            Self::over(descriptor)
        };
        prepared().map_err(|error| Error::io("cannot use the inherited socket", error))
    }

    /// Where clients connect; with the port that was chosen.
    pub fn place(&self) -> Place {
        self.place.clone()
    }

    fn over(descriptor: OwnedFd) -> io::Result<Self> {
        let socket = socket2::Socket::from(descriptor);
        let address = socket.local_addr()?;
        let place = if let Some(address) = address.as_socket() {
            Place::Tcp(address)
        } else if let Some(path) = address.as_pathname() {
            Place::Unix(path.to_owned())
        } else if let Some((cid, port)) = address.as_vsock_address() {
            Place::Vsock { cid, port }
        } else {
            Place::Other
        };
        Ok(Self { socket: socket.into(), place, _file: None })
    }

    /// The next client that waits. [`io::ErrorKind::WouldBlock`] if there is none.
    pub(crate) fn accept(&self) -> io::Result<Socket> {
        let socket = net::accept_with(&self.socket, SocketFlags::CLOEXEC)?;
        if matches!(self.place, Place::Tcp(_)) {
            // Replies are whole when they are sent, and somebody waits for each.
            sockopt::set_tcp_nodelay(&socket, true)?;
            sockopt::set_tcp_keepidle(&socket, KEEPALIVE)?;
            sockopt::set_socket_keepalive(&socket, true)?;
        }
        Ok(Socket::new(socket))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn listening(socket: socket2::Socket, address: &SockAddr) -> io::Result<OwnedFd> {
    socket.bind(address)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// A listening socket's name in the file system; removed when this is dropped.
#[derive(Debug)]
struct SocketFile {
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
