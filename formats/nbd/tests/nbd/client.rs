// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client that says exactly what a test wants it to say.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tranship_block::{BlockDevice, MemoryDevice};
use tranship_nbd::{Export, Limits, Place as ListensAt, Running, Server};

pub(crate) const ACK: u32 = 1;
pub(crate) const UNSUP: u32 = 0x8000_0001;
pub(crate) const INVALID: u32 = 0x8000_0003;
pub(crate) const UNKNOWN: u32 = 0x8000_0006;
pub(crate) const TOO_BIG: u32 = 0x8000_0009;

/// A server in a folder of its own.
pub(crate) struct Place {
    pub(crate) running: Running,
    pub(crate) folder: tempfile::TempDir,
}

pub(crate) fn export(name: &str, device: Arc<dyn BlockDevice>) -> Export {
    Export { description: "a test".to_owned(), ..Export::new(name, device) }
}

pub(crate) fn serve(exports: Vec<Export>, limits: Limits) -> Place {
    let folder = tempfile::tempdir().unwrap();
    let running =
        Server::bind(folder.path().join("socket"), exports, limits).unwrap().start().unwrap();
    Place { running, folder }
}

pub(crate) fn serve_one(device: Arc<dyn BlockDevice>) -> Place {
    serve(vec![export("vda", device)], Limits::default())
}

/// 1 MiB of zeroes with 256 KiB of data from 512 KiB onward.
pub(crate) fn sample() -> Arc<MemoryDevice> {
    let mut bytes = vec![0; 1 << 20];
    for (at, byte) in bytes[512 << 10..768 << 10].iter_mut().enumerate() {
        *byte = u8::try_from(at % 251).unwrap() | 1;
    }
    Arc::new(MemoryDevice::new(bytes))
}

impl Place {
    pub(crate) fn socket(&self) -> PathBuf {
        match self.running.places() {
            [ListensAt::Unix(path)] => path.clone(),
            other => panic!("listens at {other:?}"),
        }
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect(&self.socket())
    }
}

/// A connection of either kind. A file is the one thing that both can become.
pub(crate) struct Client(pub(crate) File, bool);

/// No test waits longer for an answer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A frame of the transmission phase.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Simple { errno: u32, cookie: u64 },
    Chunk { done: bool, kind: u16, cookie: u64, payload: Vec<u8> },
}

impl Client {
    /// Connects and reads the greeting.
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self::over(stream.into())
    }

    pub(crate) fn connect_tcp(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self::over(stream.into())
    }

    fn over(descriptor: OwnedFd) -> Self {
        let mut client = Self(descriptor.into(), false);
        assert_eq!(client.take(16), b"NBDMAGICIHAVEOPT");
        assert_eq!(client.take(2), [0, 3]);
        client
    }

    /// Goes on over another stream of the same connection.
    pub(crate) fn resumed(descriptor: OwnedFd) -> Self {
        Self(descriptor.into(), false)
    }

    pub(crate) fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Whether the server has closed the connection, with nothing more said.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(len) => len == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn send_option(&mut self, number: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        self.say(&[b"IHAVEOPT", &number.to_be_bytes()[..], &len.to_be_bytes(), data].concat());
    }

    pub(crate) fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        assert_eq!(self.u64(), 0x0003_e889_0455_65a9);
        let (number, kind, len) = (self.u32(), self.u32(), self.u32());
        (number, kind, self.take(usize::try_from(len).unwrap()))
    }

    /// Sends an option and collects the replies up to the one that ends it.
    pub(crate) fn option(&mut self, number: u32, data: &[u8]) -> (u32, Vec<Vec<u8>>) {
        self.send_option(number, data);
        let mut payloads = Vec::new();
        loop {
            let (of, kind, payload) = self.option_reply();
            assert_eq!(of, number);
            if kind == ACK || kind & 0x8000_0000 != 0 {
                return (kind, payloads);
            }
            payloads.push(payload);
        }
    }

    /// As [`Self::go`], with extended headers and these contexts.
    pub(crate) fn go_extended(&mut self, contexts: &[&str]) {
        self.say(&3u32.to_be_bytes());
        assert_eq!(self.option(11, b"").0, ACK);
        let (kind, selected) = self.option(10, &meta("vda", contexts));
        assert_eq!((kind, selected.len()), (ACK, contexts.len()));
        assert_eq!(self.option(7, &info("vda", &[])).0, ACK);
        self.1 = true;
    }

    /// Goes through the whole handshake for the export `vda`.
    pub(crate) fn go(&mut self, structured: bool) {
        self.say(&3u32.to_be_bytes());
        if structured {
            assert_eq!(self.option(8, b"").0, ACK);
            assert_eq!(self.option(10, &meta("vda", &["base:allocation"])).0, ACK);
        }
        assert_eq!(self.option(7, &info("vda", &[])).0, ACK);
    }

    pub(crate) fn request(&mut self, flags: u16, command: u16, offset: u64, len: u32) {
        if self.1 {
            self.say(&extended(flags, command, 7, offset, len.into()));
        } else {
            self.say(&header(flags, command, 7, offset, len));
        }
    }

    pub(crate) fn reply(&mut self) -> Reply {
        match self.u32() {
            0x6744_6698 => Reply::Simple { errno: self.u32(), cookie: self.u64() },
            0x668e_33ef => {
                let (flags, kind, cookie, len) = (self.u16(), self.u16(), self.u64(), self.u32());
                let payload = self.take(usize::try_from(len).unwrap());
                Reply::Chunk { done: flags == 1, kind, cookie, payload }
            }
            0x6e8a_278c => {
                let (flags, kind, cookie) = (self.u16(), self.u16(), self.u64());
                let (_offset, len) = (self.u64(), self.u64());
                let payload = self.take(usize::try_from(len).unwrap());
                Reply::Chunk { done: flags == 1, kind, cookie, payload }
            }
            magic => panic!("{magic:#x} is no reply"),
        }
    }

    /// The error number of a request, whichever kind of reply carries it.
    pub(crate) fn errno(&mut self, flags: u16, command: u16, offset: u64, len: u32) -> u32 {
        self.request(flags, command, offset, len);
        loop {
            match self.reply() {
                Reply::Simple { errno, cookie } => {
                    assert_eq!(cookie, 7);
                    if errno == 0 && command == 0 {
                        self.take(usize::try_from(len).unwrap());
                    }
                    return errno;
                }
                Reply::Chunk { done, kind, payload, .. } => {
                    if kind & 0x8000 != 0 {
                        return u32::from_be_bytes(*payload.first_chunk().unwrap());
                    }
                    if done {
                        return 0;
                    }
                }
            }
        }
    }
}

pub(crate) fn header(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

pub(crate) fn extended(flags: u16, command: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = 0x21e4_1c71u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap();
    [&len.to_be_bytes()[..], text.as_bytes()].concat()
}

/// Data of INFO and GO.
pub(crate) fn info(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u16::try_from(kinds.len()).unwrap().to_be_bytes());
    data.extend(kinds.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

/// Data of the metadata context options.
pub(crate) fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}
