// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Options of the handshake and what a server replies to them.

use crate::wire::{OPTION_MAGIC, OPTION_REPLY_MAGIC, option_reply, truncated};
use std::io::{self, Read, Write};
use tranship_block::{BigEndian, Error, ErrorKind, Result};

/// Longest reply to an option that is read: names and texts have at most 4096 bytes.
const LONGEST_REPLY: u32 = 64 << 10;

/// A reply to an option.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

impl Reply {
    /// Why the server says no to `what`.
    pub(super) fn refusal(&self, what: &str) -> Error {
        let (kind, why) = match self.kind {
            option_reply::ERR_TLS_REQD => {
                let text = "the NBD server requires TLS: nbds:// asks for it";
                return Error::new(ErrorKind::Denied, format!("{text}{}", self.text()));
            }
            option_reply::ERR_UNKNOWN => (ErrorKind::NotFound, "does not have"),
            option_reply::ERR_UNSUP => (ErrorKind::Unsupported, "does not know"),
            option_reply::ERR_POLICY => (ErrorKind::Denied, "does not allow"),
            option_reply::ERR_SHUTDOWN => (ErrorKind::Busy, "is shutting down and refuses"),
            _ => (ErrorKind::Denied, "refuses"),
        };
        let number = match kind {
            ErrorKind::Denied => format!(" (reply {:#x})", self.kind),
            _ => String::new(),
        };
        Error::new(kind, format!("the NBD server {why} {what}{number}{}", self.text()))
    }

    /// What a server says to an error, as far as it can be shown.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.data);
        let text: String = truncated(&text, 500).chars().filter(|c| !c.is_control()).collect();
        if text.is_empty() { text } else { format!(": {text}") }
    }
}

/// A string with its length in front.
pub(super) fn string(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

pub(super) fn ask<S: Write>(stream: &mut S, number: u32, data: &[u8]) -> Result<()> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    send(stream, &bytes)
}

pub(super) fn answer<S: Read>(stream: &mut S, asked: u32) -> Result<Reply> {
    let mut head = [0; 20];
    receive(stream, &mut head)?;
    let fields = BigEndian(&head, "reply to an option");
    let (magic, number) = (fields.u64("magic", 0)?, fields.u32("option", 8)?);
    if magic != OPTION_REPLY_MAGIC || number != asked {
        return Err(Error::corrupt(format!(
            "reply to option {asked} has magic {magic:#x} and option {number}"
        )));
    }
    let (kind, len) = (fields.u32("kind", 12)?, fields.u32("length", 16)?);
    if len > LONGEST_REPLY {
        return Err(Error::corrupt(format!(
            "reply to option {asked} has {len} bytes, expected at most {LONGEST_REPLY}"
        )));
    }
    let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
    receive(stream, &mut data)?;
    Ok(Reply { kind, data })
}

/// Asks for something that needs no data; whether the server agreed.
pub(super) fn plain<S: Read + Write>(stream: &mut S, number: u32) -> Result<bool> {
    ask(stream, number, &[])?;
    let reply = answer(stream, number)?;
    match reply.kind {
        option_reply::ACK => Ok(true),
        option_reply::ERR_TLS_REQD => Err(reply.refusal("this")),
        _ => Ok(false),
    }
}

pub(super) fn send<S: Write>(stream: &mut S, bytes: &[u8]) -> Result<()> {
    match stream.write_all(bytes) {
        // Why it hung up may be there to be read.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(broken),
    }
}

pub(super) fn receive<S: Read>(stream: &mut S, bytes: &mut [u8]) -> Result<()> {
    stream.read_exact(bytes).map_err(broken)
}

fn broken(error: io::Error) -> Error {
    let text = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "the NBD server did not answer in time during the handshake"
        }
        // What TLS says has no other way to get here.
        io::ErrorKind::InvalidData => {
            let text = format!("the NBD server broke off the handshake: {error}");
            return Error::new(ErrorKind::Denied, text);
        }
        _ => "the NBD server went away during the handshake",
    };
    Error::new(ErrorKind::Busy, text).because(error)
}
