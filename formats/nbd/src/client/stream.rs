// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connecting.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use tranship_block::{Error, ErrorKind, Result};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// At a Unix socket.
    Unix(PathBuf),
    /// At a port of TCP.
    Tcp {
        /// Name or address of the host, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub(super) fn connect(address: &Address, timeout: Duration) -> Result<Self> {
        let stream = match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)
                    .map_err(|error| unreachable_server(error).in_file(path))?;
                Self::over(stream, timeout)?
            }
            Address::Tcp { host, port } => {
                let stream = connect_tcp(host, *port, timeout).map_err(|error| {
                    Error::new(ErrorKind::Busy, format!("cannot connect to {host} port {port}"))
                        .because(error)
                })?;
                // Requests are small, and somebody waits for each.
                stream.set_nodelay(true).map_err(unreachable_server)?;
                stream.set_read_timeout(Some(timeout)).map_err(unreachable_server)?;
                stream.set_write_timeout(Some(timeout)).map_err(unreachable_server)?;
                Self::Tcp(stream)
            }
        };
        Ok(stream)
    }

    /// A socket that is connected already.
    pub(super) fn over(stream: UnixStream, timeout: Duration) -> Result<Self> {
        stream.set_read_timeout(Some(timeout)).map_err(unreachable_server)?;
        stream.set_write_timeout(Some(timeout)).map_err(unreachable_server)?;
        Ok(Self::Unix(stream))
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    /// Ends the connection for everybody who holds a clone.
    pub(super) fn close(&self) {
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

fn connect_tcp(host: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn unreachable_server(error: io::Error) -> Error {
    Error::new(ErrorKind::Busy, "cannot connect to the NBD server").because(error)
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buf),
            Self::Tcp(stream) => stream.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buf),
            Self::Tcp(stream) => stream.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write_vectored(bufs),
            Self::Tcp(stream) => stream.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
