// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that says exactly what a test wants it to say.

use crate::client::ACK;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;
use tranship_block::Result;
use tranship_nbd::{ClientOptions, Remote};

pub(crate) const HELLO: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
/// The number of `base:allocation`.
pub(crate) const CONTEXT: u32 = 5;

/// How replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(crate) enum Mode {
    Simple,
    Structured,
    Extended,
}

/// The server's end of a stream of any kind.
pub(crate) struct Peer<S>(pub(crate) S);

/// A request as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

pub(crate) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// A chunk of a structured reply.
pub(crate) fn chunk(cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A chunk of an extended reply.
pub(crate) fn long_chunk(asked: &Asked, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x6e8a_278c_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(asked.cookie.to_be_bytes());
    bytes.extend(asked.offset.to_be_bytes());
    bytes.extend(u64::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend(payload);
    bytes
}

pub(crate) fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes()[..], bytes].concat()
}

pub(crate) fn simple(cookie: u64, errno: u32) -> Vec<u8> {
    [&0x6744_6698_u32.to_be_bytes()[..], &errno.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

impl<S: Read + Write> Peer<S> {
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn take<const LEN: usize>(&mut self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take())
    }

    pub(crate) fn hello(&mut self) {
        self.say(HELLO);
        assert_eq!(self.u32(), 3);
    }

    pub(crate) fn option(&mut self) -> (u32, Vec<u8>) {
        assert_eq!(&self.take::<8>(), b"IHAVEOPT");
        let (number, len) = (self.u32(), self.u32());
        let mut data = vec![0; usize::try_from(len).unwrap()];
        self.0.read_exact(&mut data).unwrap();
        (number, data)
    }

    /// Answers options up to GO for an export of `size` bytes.
    pub(crate) fn negotiate(&mut self, mode: Mode, size: u64, flags: u16) {
        loop {
            let (number, _) = self.option();
            let is_known = match number {
                8 => mode >= Mode::Structured,
                11 => mode == Mode::Extended,
                _ => true,
            };
            match number {
                10 => {
                    let context = [&CONTEXT.to_be_bytes()[..], b"base:allocation"].concat();
                    self.say(&option_reply(10, 4, &context));
                }
                7 => {
                    let mut export = vec![0, 0];
                    export.extend(size.to_be_bytes());
                    export.extend(flags.to_be_bytes());
                    self.say(&option_reply(7, 3, &export));
                }
                _ => {}
            }
            self.say(&option_reply(number, if is_known { ACK } else { 0x8000_0001 }, b""));
            if number == 7 {
                return;
            }
        }
    }

    pub(crate) fn request(&mut self) -> Asked {
        let magic = self.u32();
        let is_long = magic == 0x21e4_1c71;
        assert!(is_long || magic == 0x2560_9513, "{magic:#x}");
        Asked {
            flags: self.u16(),
            command: self.u16(),
            cookie: self.u64(),
            offset: self.u64(),
            len: if is_long { self.u64() } else { self.u32().into() },
        }
    }

    /// Until the client has had enough.
    pub(crate) fn drain(&mut self) {
        let _ = self.0.read_to_end(&mut Vec::new());
    }
}

/// A client of a server that negotiates an export of 1 MiB and then does what `script` says.
pub(crate) fn connect(
    mode: Mode,
    script: impl FnOnce(&mut Peer<UnixStream>) + Send + 'static,
) -> (Result<Remote>, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut peer = Peer(theirs);
        peer.hello();
        peer.negotiate(mode, 1 << 20, 0xd6d);
        script(&mut peer);
        peer.drain();
    });
    let options = ClientOptions { timeout: Duration::from_secs(10), ..ClientOptions::default() };
    (Remote::from_stream(ours, &options), server)
}
