// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The handshake from the client's side: fixed newstyle, GO, and the older way in.

use super::ClientOptions;
use crate::wire::{
    MAX_STRING, OPTION_MAGIC, OPTION_REPLY_MAGIC, SERVER_MAGIC, allocation, export_flag, handshake,
    info, option, option_reply, truncated,
};
use std::io::{self, Read, Write};
use tranship_block::{BigEndian, Error, ErrorKind, Result};

/// Longest reply to an option that is read: names and texts have at most 4096 bytes.
const LONGEST_REPLY: u32 = 64 << 10;
/// Replies to one option; a server that sends more wants us to wait for ever.
const MOST_REPLIES: usize = 1024;

/// What client and server agreed upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) size: u64,
    flags: u16,
    /// Replies come in chunks.
    pub(super) structured: bool,
    /// `base:allocation` may be asked for.
    pub(super) allocation: bool,
    /// The server's number for it.
    pub(super) allocation_id: u32,
    pub(super) min_block: u32,
    pub(super) preferred_block: u32,
    pub(super) max_payload: u32,
    pub(super) description: Option<String>,
}

impl Agreed {
    fn new(size: u64, flags: u16) -> Self {
        Self {
            size,
            flags,
            structured: false,
            allocation: false,
            allocation_id: 0,
            min_block: 1,
            preferred_block: 4096,
            max_payload: 32 << 20,
            description: None,
        }
    }

    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

/// Says hello and asks for the export.
pub(super) fn run<S: Read + Write>(stream: &mut S, options: &ClientOptions) -> Result<Agreed> {
    if options.export.len() > MAX_STRING {
        return Err(Error::usage(format!(
            "export name has {} bytes, expected at most {MAX_STRING}",
            options.export.len()
        )));
    }
    let mut hello = [0; 18];
    receive(stream, &mut hello)?;
    let fields = BigEndian(&hello, "server's hello");
    if fields.u64("magic", 0)? != SERVER_MAGIC {
        return Err(Error::corrupt("this is no NBD server: its first bytes are not NBDMAGIC"));
    }
    if fields.u64("second magic", 8)? != OPTION_MAGIC {
        return Err(Error::unsupported("the NBD server speaks the oldstyle handshake only"));
    }
    let offered = fields.u16("handshake flags", 16)?;
    let ours = offered & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
    send(stream, &u32::from(ours).to_be_bytes())?;
    if offered & handshake::FIXED_NEWSTYLE == 0 {
        return by_name(stream, options, ours);
    }
    let structured = plain_option(stream, option::STRUCTURED_REPLY)?;
    let context = if structured { set_context(stream, options)? } else { None };
    match go(stream, options)? {
        Some(mut agreed) => {
            agreed.structured = structured;
            agreed.allocation = context.is_some();
            agreed.allocation_id = context.unwrap_or(0);
            Ok(agreed)
        }
        // Old servers know neither INFO nor GO.
        None => by_name(stream, options, ours),
    }
}

/// Asks for something that needs no data; whether the server agreed.
fn plain_option<S: Read + Write>(stream: &mut S, number: u32) -> Result<bool> {
    ask(stream, number, &[])?;
    let reply = answer(stream, number)?;
    if reply.kind == option_reply::ERR_TLS_REQD {
        return Err(wants_tls());
    }
    Ok(reply.kind == option_reply::ACK)
}

/// Asks for `base:allocation`; the server's number for it, if it has it.
fn set_context<S: Read + Write>(stream: &mut S, options: &ClientOptions) -> Result<Option<u32>> {
    let mut data = string(&options.export);
    data.extend(1_u32.to_be_bytes());
    data.extend(string(allocation::NAME));
    ask(stream, option::SET_META_CONTEXT, &data)?;
    let mut id = None;
    for _ in 0..MOST_REPLIES {
        let reply = answer(stream, option::SET_META_CONTEXT)?;
        match reply.kind {
            option_reply::META_CONTEXT => {
                let number = BigEndian(&reply.data, "meta context").u32("context id", 0)?;
                if reply.data.get(4..) == Some(allocation::NAME.as_bytes()) {
                    id = Some(number);
                }
            }
            option_reply::ACK => return Ok(id),
            _ => return Ok(None),
        }
    }
    Err(endless())
}

/// Asks to go on to transmission; `None` if the server does not know how.
fn go<S: Read + Write>(stream: &mut S, options: &ClientOptions) -> Result<Option<Agreed>> {
    let mut data = string(&options.export);
    data.extend(2_u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    data.extend(info::DESCRIPTION.to_be_bytes());
    ask(stream, option::GO, &data)?;
    let mut agreed: Option<Agreed> = None;
    let mut block_size = None;
    let mut description = None;
    for _ in 0..MOST_REPLIES {
        let reply = answer(stream, option::GO)?;
        match reply.kind {
            option_reply::INFO => {
                let fields = BigEndian(&reply.data, "information about the export");
                match fields.u16("kind", 0)? {
                    info::EXPORT => {
                        let (size, flags) = (fields.u64("size", 2)?, fields.u16("flags", 10)?);
                        agreed = Some(Agreed::new(size, flags));
                    }
                    info::BLOCK_SIZE => {
                        block_size = Some((
                            fields.u32("minimum block size", 2)?,
                            fields.u32("preferred block size", 6)?,
                            fields.u32("maximum payload", 10)?,
                        ));
                    }
                    info::DESCRIPTION => {
                        let text = reply.data.get(2..).unwrap_or_default();
                        description = Some(String::from_utf8_lossy(text).into_owned());
                    }
                    _ => {}
                }
            }
            option_reply::ACK => {
                let mut agreed = agreed
                    .ok_or_else(|| Error::corrupt("the server did not tell the export's size"))?;
                check_flags(agreed.flags)?;
                if let Some(sizes) = block_size {
                    (agreed.min_block, agreed.preferred_block, agreed.max_payload) =
                        checked_sizes(sizes)?;
                }
                agreed.description = description;
                return Ok(Some(agreed));
            }
            option_reply::ERR_UNSUP => return Ok(None),
            option_reply::ERR_TLS_REQD => return Err(wants_tls()),
            option_reply::ERR_UNKNOWN => return Err(no_export(options, &reply)),
            _ => {
                return Err(Error::new(
                    ErrorKind::Denied,
                    format!(
                        "the server refuses export {:?} (reply {:#x}){}",
                        options.export,
                        reply.kind,
                        text_of(&reply)
                    ),
                ));
            }
        }
    }
    Err(endless())
}

/// The way in that every server knows, and that cannot fail but by hanging up.
fn by_name<S: Read + Write>(stream: &mut S, options: &ClientOptions, flags: u16) -> Result<Agreed> {
    ask(stream, option::EXPORT_NAME, options.export.as_bytes())?;
    let mut reply = [0; 10];
    receive(stream, &mut reply).map_err(|error| {
        let text = format!("the server hung up when asked for export {:?}", options.export);
        Error::new(ErrorKind::NotFound, text).because(error)
    })?;
    let fields = BigEndian(&reply, "export");
    let (size, export_flags) = (fields.u64("size", 0)?, fields.u16("flags", 8)?);
    check_flags(export_flags)?;
    if flags & handshake::NO_ZEROES == 0 {
        receive(stream, &mut [0; 124])?;
    }
    Ok(Agreed::new(size, export_flags))
}

fn check_flags(flags: u16) -> Result<()> {
    if flags & export_flag::HAS_FLAGS == 0 {
        return Err(Error::corrupt(format!(
            "the export's flags are {flags:#x}, without HAS_FLAGS"
        )));
    }
    Ok(())
}

fn checked_sizes((min, preferred, max): (u32, u32, u32)) -> Result<(u32, u32, u32)> {
    let is_good = min.is_power_of_two() && min <= 64 << 10 && preferred >= min && max >= min;
    if !is_good {
        return Err(Error::corrupt(format!(
            "the export's block sizes are {min}, {preferred} and {max}, expected a power of two \
             up to 65536 and two that are no smaller"
        )));
    }
    Ok((min, preferred, max))
}

fn no_export(options: &ClientOptions, reply: &Reply) -> Error {
    let text = format!("the server has no export {:?}{}", options.export, text_of(reply));
    Error::new(ErrorKind::NotFound, text)
}

fn wants_tls() -> Error {
    Error::new(ErrorKind::Denied, "the NBD server requires TLS, which is not there yet")
}

fn endless() -> Error {
    Error::corrupt(format!("the server sent more than {MOST_REPLIES} replies to one option"))
}

/// What a server says to an error, as far as it can be shown.
fn text_of(reply: &Reply) -> String {
    let text = String::from_utf8_lossy(&reply.data);
    let text: String = truncated(&text, 200).chars().filter(|c| !c.is_control()).collect();
    if text.is_empty() { text } else { format!(": {text}") }
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn ask<S: Write>(stream: &mut S, number: u32, data: &[u8]) -> Result<()> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    send(stream, &bytes)
}

fn answer<S: Read>(stream: &mut S, asked: u32) -> Result<Reply> {
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

fn send<S: Write>(stream: &mut S, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).map_err(broken)
}

fn receive<S: Read>(stream: &mut S, bytes: &mut [u8]) -> Result<()> {
    stream.read_exact(bytes).map_err(broken)
}

fn broken(error: io::Error) -> Error {
    Error::new(ErrorKind::Busy, "the NBD server went away during the handshake").because(error)
}
