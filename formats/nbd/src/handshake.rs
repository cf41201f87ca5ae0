// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The fixed newstyle handshake, from the greeting to the choice of an export.
//!
//! It reads exactly what it needs and never ahead, so that a stream can be handed to
//! TLS or to the transmission phase between any two options.

use crate::context::Context;
use crate::export::{Exports, Served};
use crate::limits::Limits;
use crate::option::{InfoRequest, MetaRequest, text};
use crate::reply::Framing;
use crate::request::context_id;
use crate::tls::Encryption;
use crate::wire::{
    MAX_STRING, OPTION_MAGIC, OPTION_REPLY_MAGIC, SERVER_MAGIC, handshake, info, option,
    option_reply, truncated,
};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tranship_block::{BigEndian, Error, ErrorKind, Result};

/// What client and server agreed on.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub(crate) served: Arc<Served>,
    pub(crate) framing: Framing,
    /// What the client may ask for as block status.
    pub(crate) contexts: Vec<Context>,
}

/// What a server offers, and whether it still does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer<'a> {
    pub(crate) exports: &'a Exports,
    pub(crate) limits: &'a Limits,
    /// The server is about to end.
    pub(crate) stopping: &'a AtomicBool,
    pub(crate) encryption: Option<&'a Encryption>,
}

/// Where a handshake has led.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The client left in good order.
    Left,
    Agreed(Agreed),
    /// The client has been told to begin with TLS, under which [`resume`] goes on.
    Encrypt(Greeted),
}

/// All that stays valid when a connection is encrypted. What somebody in between has put
/// into the plain text before is in none of it, but for the flags of the client, which decide
/// nothing but the form of replies to EXPORT_NAME.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Greeted {
    /// The client knows more options than EXPORT_NAME.
    fixed: bool,
    /// EXPORT_NAME is answered with padding.
    zeroes: bool,
    /// Options so far.
    options: u32,
    encrypted: bool,
}

/// Leads the handshake on `stream`.
///
/// # Errors
///
/// The client broke the protocol or a limit, or the stream failed: either way nothing
/// more can be said to it and the stream has to be closed.
pub(crate) fn negotiate(stream: &mut (impl Read + Write), offer: Offer<'_>) -> Result<Outcome> {
    let offered = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(SERVER_MAGIC.to_be_bytes());
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend(offered.to_be_bytes());
    send(stream, &greeting)?;
    let flags = u32::from_be_bytes(receive(stream)?);
    if flags & !u32::from(offered) != 0 {
        return Err(Error::corrupt(format!("client flags are {flags:#x}, offered {offered:#x}")));
    }
    let fixed = flags & u32::from(handshake::FIXED_NEWSTYLE) != 0;
    let zeroes = flags & u32::from(handshake::NO_ZEROES) == 0;
    let greeted = Greeted { fixed, zeroes, options: 0, encrypted: false };
    resume(stream, offer, greeted)
}

/// Leads the handshake on from the first option, or the first one on an encrypted `stream`.
///
/// # Errors
///
/// As [`negotiate`].
pub(crate) fn resume(
    stream: &mut (impl Read + Write),
    offer: Offer<'_>,
    greeted: Greeted,
) -> Result<Outcome> {
    let mut negotiation =
        Negotiation { stream, offer, greeted, framing: Framing::Simple, selected: None };
    for options in greeted.options..offer.limits.options {
        match negotiation.next_option()? {
            Step::Next => {}
            Step::Left => return Ok(Outcome::Left),
            Step::Agreed(agreed) => return Ok(Outcome::Agreed(agreed)),
            Step::Encrypt => {
                let options = options.saturating_add(1);
                return Ok(Outcome::Encrypt(Greeted { options, encrypted: true, ..greeted }));
            }
        }
    }
    Err(Error::corrupt(format!("client sent {} options without choosing", offer.limits.options)))
}

fn send(stream: &mut impl Write, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).map_err(|error| Error::io("cannot send to the client", error))
}

fn receive<const N: usize>(stream: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream
        .read_exact(&mut bytes)
        .map_err(|error| Error::io("cannot receive from the client", error))?;
    Ok(bytes)
}

enum Step {
    Next,
    Left,
    Agreed(Agreed),
    Encrypt,
}

struct Negotiation<'a, S> {
    stream: &'a mut S,
    offer: Offer<'a>,
    greeted: Greeted,
    framing: Framing,
    selected: Option<Selected>,
}

/// What the last SET_META_CONTEXT selected.
struct Selected {
    /// As the client said it.
    name: String,
    served: Arc<Served>,
    contexts: Vec<Context>,
}

impl<S: Read + Write> Negotiation<'_, S> {
    fn next_option(&mut self) -> Result<Step> {
        let raw: [u8; 16] = receive(self.stream)?;
        let fields = BigEndian(&raw, "option");
        let magic = fields.u64("magic", 0)?;
        let number = fields.u32("option", 8)?;
        let len = fields.u32("length", 12)?;
        if magic != OPTION_MAGIC {
            return Err(Error::corrupt(format!(
                "option magic is {magic:#x}, expected {OPTION_MAGIC:#x}"
            )));
        }
        if !self.greeted.fixed && number != option::EXPORT_NAME {
            return Err(Error::corrupt(format!(
                "option {number} from a client without fixed newstyle"
            )));
        }
        if len > self.offer.limits.option_payload {
            return Err(Error::corrupt(format!(
                "option {number} carries {len} bytes, expected at most {}",
                self.offer.limits.option_payload
            )));
        }
        let mut data = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.stream
            .read_exact(&mut data)
            .map_err(|error| Error::io("cannot receive from the client", error))?;
        if self.offer.stopping.load(Ordering::Relaxed) && number != option::ABORT {
            self.refuse(number, option_reply::ERR_SHUTDOWN, "server is shutting down")?;
            return Ok(Step::Next);
        }
        if self.lacks_encryption() && !matches!(number, option::STARTTLS | option::ABORT) {
            let text = "server wants TLS first";
            if number == option::EXPORT_NAME {
                // There is no error reply to it.
                return Err(Error::new(ErrorKind::Denied, "client uses EXPORT_NAME without TLS"));
            }
            self.refuse(number, option_reply::ERR_TLS_REQD, text)?;
            return Ok(Step::Next);
        }
        match number {
            option::EXPORT_NAME => return self.export_name(&data),
            option::ABORT => {
                self.reply(number, option_reply::ACK, &[])?;
                return Ok(Step::Left);
            }
            option::LIST => self.list(&data)?,
            option::INFO | option::GO => return self.info(number, &data),
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                self.refuse(number, option_reply::ERR_INVALID, "option takes no data")?;
            }
            option::STRUCTURED_REPLY if self.framing == Framing::Extended => {
                let text = "extended headers are in force already";
                self.refuse(number, option_reply::ERR_EXT_HEADER_REQD, text)?;
            }
            option::STRUCTURED_REPLY => {
                self.framing = Framing::Structured;
                self.reply(number, option_reply::ACK, &[])?;
            }
            option::EXTENDED_HEADERS => {
                self.framing = Framing::Extended;
                self.reply(number, option_reply::ACK, &[])?;
            }
            option::STARTTLS => return self.start_tls(&data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta(number, &data)?,
            _ => self.refuse(number, option_reply::ERR_UNSUP, "unknown option")?,
        }
        Ok(Step::Next)
    }

    /// Nothing may be told to this client as long as others can read it.
    fn lacks_encryption(&self) -> bool {
        !self.greeted.encrypted && self.offer.encryption.is_some_and(|offered| offered.required)
    }

    fn start_tls(&mut self, data: &[u8]) -> Result<Step> {
        let (kind, text) = if self.offer.encryption.is_none() {
            (option_reply::ERR_UNSUP, "server has no TLS")
        } else if self.greeted.encrypted {
            (option_reply::ERR_INVALID, "connection is encrypted already")
        } else if !data.is_empty() {
            (option_reply::ERR_INVALID, "option takes no data")
        } else {
            self.reply(option::STARTTLS, option_reply::ACK, &[])?;
            return Ok(Step::Encrypt);
        };
        self.refuse(option::STARTTLS, kind, text)?;
        Ok(Step::Next)
    }

    fn reply(&mut self, number: u32, kind: u32, data: &[u8]) -> Result<()> {
        let len = u32::try_from(data.len())
            .map_err(|_| Error::usage("reply to an option is longer than 4 GiB"))?;
        let mut bytes = Vec::with_capacity(data.len().saturating_add(20));
        bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        bytes.extend(number.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(data);
        send(self.stream, &bytes)
    }

    fn refuse(&mut self, number: u32, kind: u32, text: &str) -> Result<()> {
        self.reply(number, kind, truncated(text, MAX_STRING).as_bytes())
    }

    fn export_name(&mut self, data: &[u8]) -> Result<Step> {
        if self.framing == Framing::Extended {
            return Err(Error::corrupt("client uses EXPORT_NAME after EXTENDED_HEADERS"));
        }
        let name = text("export name", data)?;
        let served = self.offer.exports.find(name).ok_or_else(|| {
            // There is no way to tell the client: this option has no error reply.
            Error::new(ErrorKind::NotFound, format!("client asks for unknown export {name:?}"))
        })?;
        let mut bytes = Vec::with_capacity(134);
        bytes.extend(served.export.device.size().to_be_bytes());
        bytes.extend(served.flags(self.framing).to_be_bytes());
        if self.greeted.zeroes {
            bytes.extend([0; 124]);
        }
        send(self.stream, &bytes)?;
        Ok(Step::Agreed(self.agreed(served, name)))
    }

    fn agreed(&self, served: Arc<Served>, name: &str) -> Agreed {
        // The name has to be the same one, and an export may have been replaced meanwhile.
        let contexts = self
            .selected
            .as_ref()
            .filter(|selected| selected.name == name && Arc::ptr_eq(&selected.served, &served));
        let contexts = contexts.map_or_else(Vec::new, |selected| selected.contexts.clone());
        Agreed { served, framing: self.framing, contexts }
    }

    fn list(&mut self, data: &[u8]) -> Result<()> {
        if !data.is_empty() {
            return self.refuse(option::LIST, option_reply::ERR_INVALID, "option takes no data");
        }
        for served in self.offer.exports.all() {
            let mut entry = Vec::new();
            let name = &served.export.name;
            entry.extend(u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes());
            entry.extend(name.as_bytes());
            entry.extend(served.export.description.as_bytes());
            self.reply(option::LIST, option_reply::SERVER, &entry)?;
        }
        self.reply(option::LIST, option_reply::ACK, &[])
    }

    fn info(&mut self, number: u32, data: &[u8]) -> Result<Step> {
        let request = match InfoRequest::parse(data) {
            Ok(request) => request,
            Err(error) => {
                self.refuse(number, option_reply::ERR_INVALID, error.message())?;
                return Ok(Step::Next);
            }
        };
        let Some(served) = self.offer.exports.find(request.name) else {
            self.refuse(number, option_reply::ERR_UNKNOWN, "no export of this name")?;
            return Ok(Step::Next);
        };
        let export = &served.export;
        let mut payload = info::EXPORT.to_be_bytes().to_vec();
        payload.extend(export.device.size().to_be_bytes());
        payload.extend(served.flags(self.framing).to_be_bytes());
        self.reply(number, option_reply::INFO, &payload)?;
        // Block sizes go to everybody: a client that did not ask may ignore them.
        let mut payload = info::BLOCK_SIZE.to_be_bytes().to_vec();
        payload.extend(1u32.to_be_bytes());
        payload.extend(preferred_block(export.device.preferred_block()).to_be_bytes());
        payload.extend(self.offer.limits.payload.to_be_bytes());
        self.reply(number, option_reply::INFO, &payload)?;
        for (kind, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if request.kinds.contains(&kind) {
                let payload = [&kind.to_be_bytes()[..], text.as_bytes()].concat();
                self.reply(number, option_reply::INFO, &payload)?;
            }
        }
        self.reply(number, option_reply::ACK, &[])?;
        if number == option::GO {
            let agreed = self.agreed(served.clone(), request.name);
            return Ok(Step::Agreed(agreed));
        }
        Ok(Step::Next)
    }

    fn meta(&mut self, number: u32, data: &[u8]) -> Result<()> {
        let select = number == option::SET_META_CONTEXT;
        if select {
            // The earlier selection is gone even if this one fails.
            self.selected = None;
            if self.framing == Framing::Simple {
                let text = "metadata contexts need structured replies";
                return self.refuse(number, option_reply::ERR_INVALID, text);
            }
        }
        let request = match MetaRequest::parse(data, self.offer.limits.queries) {
            Ok(request) => request,
            Err(error) => {
                return self.refuse(number, option_reply::ERR_INVALID, error.message());
            }
        };
        if request.count > self.offer.limits.queries {
            return self.refuse(number, option_reply::ERR_TOO_BIG, "too many queries");
        }
        let Some(served) = self.offer.exports.find(request.name) else {
            return self.refuse(number, option_reply::ERR_UNKNOWN, "no export of this name");
        };
        let export = &served.export;
        let contexts = if select {
            Context::selected(export, &request.queries)
        } else {
            Context::listed(export, &request.queries)
        };
        for (place, context) in contexts.iter().enumerate() {
            // The number means something only where the context is selected.
            let id = if select { context_id(place) } else { 0 };
            let payload = [&id.to_be_bytes()[..], context.name(export).as_bytes()].concat();
            self.reply(number, option_reply::META_CONTEXT, &payload)?;
        }
        if select {
            let name = request.name.to_owned();
            self.selected = Some(Selected { name, served, contexts });
        }
        self.reply(number, option_reply::ACK, &[])
    }
}

/// A power of two that every client takes: from 4 KiB to 2 MiB.
fn preferred_block(device: u32) -> u32 {
    device.checked_next_power_of_two().unwrap_or(u32::MAX).clamp(4096, 2 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preferred_blocks_are_powers_of_two_in_range() {
        for (device, expected) in
            [(0, 4096), (512, 4096), (65536, 65536), (65537, 131_072), (u32::MAX, 2 << 20)]
        {
            assert_eq!(preferred_block(device), expected);
        }
    }
}
