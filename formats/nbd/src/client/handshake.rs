// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The handshake from the client's side: fixed newstyle, GO, and the older way in.

use super::ClientOptions;
use super::facts::{Facts, Pieces};
use super::option::{self, answer, ask, receive, send, string};
use super::stream::{Duplex, Reading, Socket, Writing};
use crate::wire::{
    MAX_STRING, OPTION_MAGIC, SERVER_MAGIC, allocation, handshake, info, option as number,
    option_reply,
};
use serde::{Deserialize, Serialize};
use tranship_block::{BigEndian, Error, ErrorKind, Result};

/// Replies to one option; a server that sends more wants us to wait for ever.
pub(super) const MOST_REPLIES: usize = 4096;

/// What client and server agreed upon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Agreed {
    pub(super) facts: Facts,
    /// The server's numbers for the contexts, which hold for this connection alone.
    pub(super) contexts: Vec<(u32, String)>,
}

impl Agreed {
    /// The server's number for the context `name`, if it may be asked for.
    pub(super) fn context(&self, name: &str) -> Option<u32> {
        self.contexts.iter().find(|(_, known)| known == name).map(|(id, _)| *id)
    }
}

/// A connection on which options can be asked for.
#[allow(clippy::struct_excessive_bools, reason = "each was agreed upon on its own")]
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) stream: Duplex,
    pub(super) tls: bool,
    pub(super) structured: bool,
    pub(super) extended: bool,
    /// Server and client know how to say more than the export's name.
    pub(super) fixed: bool,
    has_zeroes: bool,
}

impl Greeted {
    /// Says hello, encrypts if that is wanted, and agrees upon the kind of replies.
    pub(super) fn over(socket: &Socket, host: &str, options: &ClientOptions) -> Result<Self> {
        if options.export.len() > MAX_STRING {
            return Err(Error::usage(format!(
                "export name has {} bytes, expected at most {MAX_STRING}",
                options.export.len()
            )));
        }
        let mut stream = Duplex::plain(socket)?;
        let mut hello = [0; 18];
        receive(&mut stream, &mut hello)?;
        let fields = BigEndian(&hello, "server's hello");
        if fields.u64("magic", 0)? != SERVER_MAGIC {
            return Err(Error::corrupt("this is no NBD server: its first bytes are not NBDMAGIC"));
        }
        if fields.u64("second magic", 8)? != OPTION_MAGIC {
            return Err(Error::unsupported("the NBD server speaks the oldstyle handshake only"));
        }
        let offered = fields.u16("handshake flags", 16)?;
        let ours = offered & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        let fixed = ours & handshake::FIXED_NEWSTYLE != 0;
        if options.tls.is_some() && !fixed {
            return Err(no_tls("its handshake is too old for it"));
        }
        send(&mut stream, &u32::from(ours).to_be_bytes())?;
        let has_zeroes = ours & handshake::NO_ZEROES == 0;
        let mut greeted =
            Self { stream, tls: false, structured: false, extended: false, fixed, has_zeroes };
        if let Some(tls) = &options.tls {
            // "The first option": nothing that was said before it may count.
            ask(&mut greeted.stream, number::STARTTLS, &[])?;
            let reply = answer(&mut greeted.stream, number::STARTTLS)?;
            if reply.kind != option_reply::ACK {
                return Err(no_tls(&reply.refusal("STARTTLS").to_string()));
            }
            greeted.stream =
                encrypted(greeted.stream, |reading, writing| tls.connect(host, reading, writing))?;
            greeted.tls = true;
        }
        if fixed && options.structured {
            let stream = &mut greeted.stream;
            greeted.extended = options.extended && option::plain(stream, number::EXTENDED_HEADERS)?;
            // Extended headers bring chunks with them.
            greeted.structured =
                greeted.extended || option::plain(stream, number::STRUCTURED_REPLY)?;
        }
        Ok(greeted)
    }

    /// Asks for the export; requests may follow.
    pub(super) fn go(mut self, options: &ClientOptions) -> Result<(Agreed, Duplex)> {
        if !self.fixed {
            let facts = self.by_name(options)?;
            return Ok((Agreed { facts, contexts: Vec::new() }, self.stream));
        }
        let contexts = if self.structured { self.set_contexts(options)? } else { Vec::new() };
        let (facts, contexts) = match self.info(number::GO, &options.export) {
            Ok(facts) => (facts, contexts),
            // Old servers know neither INFO nor GO. Under TLS there is no other way: the
            // zeroes in the older one were agreed upon in plain text.
            Err(error) if error.kind() == ErrorKind::Unsupported && !self.tls && !self.extended => {
                (self.by_name(options)?, Vec::new())
            }
            Err(error) => return Err(error),
        };
        let names = contexts.iter().map(|(_, name)| name.clone()).collect();
        let facts = Facts { contexts: names, ..facts };
        Ok((Agreed { facts, contexts }, self.stream))
    }

    /// INFO or GO.
    pub(super) fn info(&mut self, which: u32, export: &str) -> Result<Facts> {
        let mut data = string(export);
        let kinds = [info::BLOCK_SIZE, info::DESCRIPTION, info::NAME];
        data.extend(3_u16.to_be_bytes());
        data.extend(kinds.iter().flat_map(|kind| kind.to_be_bytes()));
        ask(&mut self.stream, which, &data)?;
        let mut pieces = Pieces::default();
        for _ in 0..MOST_REPLIES {
            let reply = answer(&mut self.stream, which)?;
            match reply.kind {
                option_reply::INFO => pieces.add(&reply.data)?,
                option_reply::ACK => {
                    let mut facts = pieces.facts()?;
                    (facts.structured, facts.extended) = (self.structured, self.extended);
                    facts.tls = self.tls;
                    return Ok(facts);
                }
                _ => return Err(reply.refusal(&format!("export {export:?}"))),
            }
        }
        Err(endless())
    }

    /// Asks for `base:allocation` and what else is wanted.
    fn set_contexts(&mut self, options: &ClientOptions) -> Result<Vec<(u32, String)>> {
        let mut wanted = vec![allocation::NAME];
        for name in &options.contexts {
            if !wanted.contains(&name.as_str()) {
                wanted.push(name);
            }
        }
        let found = self.contexts(number::SET_META_CONTEXT, &options.export, &wanted)?;
        // Some servers answer with more than was asked for.
        let is_wanted = |name: &str| {
            wanted
                .iter()
                .any(|query| name == *query || (query.ends_with(':') && name.starts_with(*query)))
        };
        Ok(found.into_iter().filter(|(_, name)| is_wanted(name)).collect())
    }

    /// The contexts that fit `queries`; none if the server does not want to say.
    pub(super) fn contexts(
        &mut self,
        which: u32,
        export: &str,
        queries: &[&str],
    ) -> Result<Vec<(u32, String)>> {
        let mut data = string(export);
        data.extend(u32::try_from(queries.len()).unwrap_or(u32::MAX).to_be_bytes());
        data.extend(queries.iter().flat_map(|query| string(query)));
        ask(&mut self.stream, which, &data)?;
        let mut found: Vec<(u32, String)> = Vec::new();
        for _ in 0..MOST_REPLIES {
            let reply = answer(&mut self.stream, which)?;
            match reply.kind {
                option_reply::META_CONTEXT => {
                    let id = BigEndian(&reply.data, "meta context").u32("context id", 0)?;
                    let name = reply.data.get(4..).unwrap_or_default();
                    let name = String::from_utf8_lossy(name).into_owned();
                    if !found.iter().any(|(_, known)| *known == name) {
                        found.push((id, name));
                    }
                }
                option_reply::ACK => return Ok(found),
                _ => return Ok(Vec::new()),
            }
        }
        Err(endless())
    }

    /// The way in that every server knows, and that cannot fail but by hanging up.
    fn by_name(&mut self, options: &ClientOptions) -> Result<Facts> {
        ask(&mut self.stream, number::EXPORT_NAME, options.export.as_bytes())?;
        let mut reply = [0; 10];
        receive(&mut self.stream, &mut reply).map_err(|error| {
            let text = format!("the server hung up when asked for export {:?}", options.export);
            Error::new(ErrorKind::NotFound, text).because(error)
        })?;
        let fields = BigEndian(&reply, "export");
        let mut facts = Facts::new(fields.u64("size", 0)?, fields.u16("flags", 8)?)?;
        facts.structured = self.structured;
        if self.has_zeroes {
            receive(&mut self.stream, &mut [0; 124])?;
        }
        Ok(facts)
    }

    /// Leaves without having used an export.
    pub(super) fn abort(mut self) {
        if self.fixed && ask(&mut self.stream, number::ABORT, &[]).is_ok() {
            let _ = answer(&mut self.stream, number::ABORT);
        }
        self.stream.writing.finish();
    }
}

/// Changes from plain text to TLS. What came in plain text and was not read yet was not
/// said by the server that is about to prove who it is.
fn encrypted(
    stream: Duplex,
    shake: impl FnOnce(
        Socket,
        Socket,
    ) -> Result<(crate::tls::TlsReading<Socket>, crate::tls::TlsWriting<Socket>)>,
) -> Result<Duplex> {
    let (Reading::Plain(reading), Writing::Plain(writing)) = (stream.reading, stream.writing)
    else {
        return Err(Error::usage("the connection is encrypted already"));
    };
    if !reading.buffer().is_empty() {
        return Err(Error::new(
            ErrorKind::Denied,
            "the NBD server sent more in plain text after it had agreed to TLS: somebody may be \
             in the middle",
        ));
    }
    let (reading, writing) = shake(reading.into_inner(), writing)?;
    Ok(Duplex {
        reading: Reading::Tls(Box::new(reading)),
        writing: Writing::Tls(Box::new(writing)),
    })
}

fn no_tls(why: &str) -> Error {
    Error::new(
        ErrorKind::Denied,
        format!("TLS is asked for and the NBD server does not have it: {why}"),
    )
}

pub(super) fn endless() -> Error {
    Error::corrupt(format!("the server sent more than {MOST_REPLIES} replies to one option"))
}
