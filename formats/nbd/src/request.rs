// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From the header of a request to a command that is safe to carry out.

use crate::reply::Framing;
use crate::wire::{EXTENDED_REQUEST_MAGIC, Errno, REQUEST_MAGIC, command, command_flag};
use tranship_block::{BigEndian, Error, Result, Span, Zeroing};

/// The fields of a request, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    /// Of the range that the request is about, or of the payload behind the header.
    pub(crate) len: u64,
}

impl Header {
    /// Bytes of a header.
    pub(crate) fn bytes(framing: Framing) -> usize {
        if framing == Framing::Extended { 32 } else { 28 }
    }

    /// Reads the fields; only the magic can be wrong.
    pub(crate) fn parse(raw: &[u8], framing: Framing) -> Result<Self> {
        let extended = framing == Framing::Extended;
        let fields = BigEndian(raw, "request");
        let magic = fields.u32("magic", 0)?;
        let expected = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if magic != expected {
            return Err(Error::corrupt(format!(
                "request magic is {magic:#x}, expected {expected:#x}"
            )));
        }
        Ok(Self {
            flags: fields.u16("flags", 4)?,
            command: fields.u16("type", 6)?,
            cookie: fields.u64("cookie", 8)?,
            offset: fields.u64("offset", 16)?,
            len: if extended {
                fields.u64("length", 24)?
            } else {
                u64::from(fields.u32("length", 24)?)
            },
        })
    }

    /// How many bytes follow the header.
    pub(crate) fn payload(&self, framing: Framing) -> u64 {
        // The specification wants extended writes to set the flag, but QEMU's client (as of
        // 10.0) does not, and sends the payload all the same.
        let flagged = framing == Framing::Extended && self.flags & command_flag::PAYLOAD_LEN != 0;
        if flagged || self.command == command::WRITE { self.len } else { 0 }
    }
}

/// What client and server agreed on, as far as requests depend on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// Bytes of the export.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    pub(crate) framing: Framing,
    /// How many metadata contexts the client selected.
    pub(crate) contexts: usize,
    /// Longest read or write in bytes.
    pub(crate) payload: u32,
}

/// A request that may be carried out: its span lies within the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read {
        span: Span,
        one_chunk: bool,
    },
    Write {
        span: Span,
        durable: bool,
    },
    Flush,
    Trim {
        span: Span,
        durable: bool,
    },
    Zero {
        span: Span,
        mode: Zeroing,
        durable: bool,
        /// Not at all rather than slowly.
        fast: bool,
    },
    Cache {
        span: Span,
    },
    Status {
        span: Span,
        one_extent: bool,
        contexts: Selection,
    },
    /// Block status of which the payload, of this many bytes, tells the rest.
    FilteredStatus {
        payload: u64,
    },
    Disconnect,
}

/// Some of the contexts that a client selected, as one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Selection(u64);

impl Selection {
    /// The first `count` contexts, that is all of them.
    fn all(count: usize) -> Self {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        Self(u64::MAX.checked_shl(count).map_or(u64::MAX, |rest| !rest))
    }

    /// Adds a context. False if it was there before.
    fn add(&mut self, place: usize) -> bool {
        let bit = u32::try_from(place).ok().and_then(|place| 1_u64.checked_shl(place));
        let bit = bit.unwrap_or_default();
        let new = bit != 0 && self.0 & bit == 0;
        self.0 |= bit;
        new
    }

    /// The places of the contexts.
    pub(crate) fn places(self) -> impl Iterator<Item = usize> {
        (0..64)
            .filter(move |place| self.0.checked_shr(*place).is_some_and(|rest| rest & 1 == 1))
            .filter_map(|place| usize::try_from(place).ok())
    }
}

/// The number by which requests and replies name the context at `place`.
pub(crate) fn context_id(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX).saturating_add(1)
}

/// An answer that needs no device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) errno: Errno,
    pub(crate) text: &'static str,
}

fn refuse<T>(errno: Errno, text: &'static str) -> std::result::Result<T, Refusal> {
    Err(Refusal { errno, text })
}

impl Terms {
    /// Decides what a request asks for, or why it is refused.
    pub(crate) fn admit(&self, header: &Header) -> std::result::Result<Command, Refusal> {
        let Header { flags, offset, len, .. } = *header;
        let extended = self.framing == Framing::Extended;
        let payload_len = if extended { command_flag::PAYLOAD_LEN } else { 0 };
        let allowed = match header.command {
            command::READ if self.framing != Framing::Simple => command_flag::DF,
            command::WRITE => payload_len,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS => command_flag::REQ_ONE | payload_len,
            command::DISC => u16::MAX,
            _ => 0,
        } | command_flag::FUA;
        if flags & !allowed != 0 {
            return refuse(Errno::Invalid, "request has a flag that was not offered");
        }
        let durable = flags & command_flag::FUA != 0;
        let span = Span::new(offset, len);
        match header.command {
            command::DISC => Ok(Command::Disconnect),
            command::READ => {
                self.within(span, Errno::Invalid)?;
                if len > u64::from(self.payload) {
                    return refuse(Errno::Overflow, "read is longer than the payload limit");
                }
                Ok(Command::Read { span, one_chunk: flags & command_flag::DF != 0 })
            }
            command::WRITE => {
                self.writable()?;
                if len > u64::from(self.payload) {
                    return refuse(Errno::Invalid, "write is longer than the payload limit");
                }
                self.within(span, Errno::NoSpace)?;
                Ok(Command::Write { span, durable })
            }
            command::FLUSH if offset != 0 || len != 0 => {
                refuse(Errno::Invalid, "flush has an offset or a length")
            }
            command::FLUSH => Ok(Command::Flush),
            command::TRIM => {
                self.writable()?;
                self.within(span, Errno::Invalid)?;
                Ok(Command::Trim { span, durable })
            }
            command::CACHE => {
                self.within(span, Errno::Invalid)?;
                Ok(Command::Cache { span })
            }
            command::WRITE_ZEROES => {
                self.writable()?;
                self.within(span, Errno::NoSpace)?;
                let keep = flags & command_flag::NO_HOLE != 0;
                let mode = if keep { Zeroing::KeepAllocated } else { Zeroing::MayUnmap };
                let fast = flags & command_flag::FAST_ZERO != 0;
                Ok(Command::Zero { span, mode, durable, fast })
            }
            command::BLOCK_STATUS => self.status(header),
            _ => refuse(Errno::Invalid, "unknown command"),
        }
    }

    fn status(&self, header: &Header) -> std::result::Result<Command, Refusal> {
        if self.contexts == 0 {
            return refuse(Errno::Invalid, "no metadata context was negotiated");
        }
        if header.flags & command_flag::PAYLOAD_LEN != 0 {
            // A length, and each context at most once.
            let most = self.contexts.saturating_mul(4).saturating_add(8);
            if header.len > u64::try_from(most).unwrap_or(u64::MAX) {
                return refuse(Errno::Invalid, "more contexts than were negotiated");
            }
            return Ok(Command::FilteredStatus { payload: header.len });
        }
        self.status_of(header, header.len, Selection::all(self.contexts))
    }

    /// Decides on a block status request with a payload.
    pub(crate) fn filtered(
        &self,
        header: &Header,
        payload: &[u8],
    ) -> std::result::Result<Command, Refusal> {
        let invalid = Refusal { errno: Errno::Invalid, text: "payload is not valid" };
        let (len, ids) = payload.split_first_chunk().ok_or(invalid)?;
        let (ids, rest) = ids.as_chunks();
        if ids.is_empty() || !rest.is_empty() {
            return Err(invalid);
        }
        let mut contexts = Selection(0);
        for id in ids {
            let place = usize::try_from(u32::from_be_bytes(*id)).unwrap_or(usize::MAX);
            let place = place.checked_sub(1).filter(|place| *place < self.contexts);
            if !place.is_some_and(|place| contexts.add(place)) {
                return refuse(Errno::Invalid, "payload has an unknown or repeated context");
            }
        }
        self.status_of(header, u64::from_be_bytes(*len), contexts)
    }

    fn status_of(
        &self,
        header: &Header,
        len: u64,
        contexts: Selection,
    ) -> std::result::Result<Command, Refusal> {
        if len == 0 {
            return refuse(Errno::Invalid, "block status needs a length");
        }
        let span = Span::new(header.offset, len);
        self.within(span, Errno::Invalid)?;
        let one_extent = header.flags & command_flag::REQ_ONE != 0;
        Ok(Command::Status { span, one_extent, contexts })
    }

    fn writable(&self) -> std::result::Result<(), Refusal> {
        if self.read_only { refuse(Errno::Permission, "export is read-only") } else { Ok(()) }
    }

    fn within(&self, span: Span, errno: Errno) -> std::result::Result<(), Refusal> {
        span.check_within(self.size)
            .or_else(|_| refuse(errno, "request reaches past the end of the export"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms {
        size: 1000,
        read_only: false,
        framing: Framing::Structured,
        contexts: 1,
        payload: 32 << 20,
    };

    fn errno(terms: &Terms, command: u16, flags: u16, offset: u64, len: u64) -> u32 {
        let header = Header { flags, command, cookie: 7, offset, len };
        terms.admit(&header).map_or_else(|refusal| refusal.errno.number(), |_| 0)
    }

    #[test]
    fn a_header_is_taken_apart() {
        let mut raw = [0; 32];
        raw[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        raw[5] = 1;
        raw[7] = 6;
        raw[15] = 9;
        raw[23] = 5;
        raw[27] = 4;
        let mut expected = Header { flags: 1, command: 6, cookie: 9, offset: 5, len: 4 };
        assert_eq!(Header::parse(&raw[..28], Framing::Simple).unwrap(), expected);
        assert!(Header::parse(&raw[..27], Framing::Simple).is_err());
        assert!(Header::parse(&raw, Framing::Extended).is_err());
        raw[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
        expected.len = 4 << 32;
        assert_eq!(Header::parse(&raw, Framing::Extended).unwrap(), expected);
        raw[0] = 0;
        let text = Header::parse(&raw, Framing::Structured).unwrap_err().to_string();
        assert_eq!(text, "request magic is 0xe41c71, expected 0x25609513");
    }

    #[test]
    fn every_command_at_every_edge_has_its_errno() {
        // (command, errno at: end with length 0, inside, across the end, offset 2^64 - 1)
        let table = [
            (command::READ, [0, 0, 22, 22]),
            (command::WRITE, [0, 0, 28, 28]),
            (command::TRIM, [0, 0, 22, 22]),
            (command::WRITE_ZEROES, [0, 0, 28, 28]),
            (command::BLOCK_STATUS, [22, 0, 22, 22]),
            (command::FLUSH, [22, 22, 22, 22]),
            (command::CACHE, [0, 0, 22, 22]),
            (8, [22; 4]),
            (u16::MAX, [22; 4]),
        ];
        let places = [(1000, 0), (999, 1), (999, 2), (u64::MAX, 1)];
        for (command, expected) in table {
            let seen = places.map(|(offset, len)| errno(&TERMS, command, 0, offset, len));
            assert_eq!(seen, expected, "command {command}");
        }
        assert_eq!(errno(&TERMS, command::FLUSH, 0, 0, 0), 0);
        assert_eq!(errno(&TERMS, command::DISC, 0xffff, 5, 5), 0);
    }

    #[test]
    fn only_offered_flags_are_taken() {
        for (command, allowed) in
            [(command::READ, 0x5), (command::WRITE, 0x1), (command::TRIM, 0x1)]
        {
            for bit in 0..16 {
                let expected = if allowed & (1 << bit) == 0 { 22 } else { 0 };
                assert_eq!(errno(&TERMS, command, 1 << bit, 0, 1), expected, "{command} {bit}");
            }
        }
        assert_eq!(errno(&TERMS, command::WRITE_ZEROES, 0x13, 0, 1), 0);
        assert_eq!(errno(&TERMS, command::WRITE_ZEROES, 0x20, 0, 1), 22);
        assert_eq!(errno(&TERMS, command::CACHE, 0x2, 0, 1), 22);
        assert_eq!(errno(&TERMS, command::BLOCK_STATUS, 0x9, 0, 1), 0);
        let simple = Terms { framing: Framing::Simple, contexts: 0, ..TERMS };
        assert_eq!(errno(&simple, command::READ, 0x4, 0, 1), 22);
        assert_eq!(errno(&simple, command::BLOCK_STATUS, 0, 0, 1), 22);
    }

    const EXTENDED: Terms =
        Terms { framing: Framing::Extended, size: 1 << 40, contexts: 3, ..TERMS };

    #[test]
    fn extended_writes_have_a_payload_and_nothing_else() {
        for (command, plain, with_payload) in [
            (command::READ, 0, 22),
            (command::WRITE, 0, 0),
            (command::TRIM, 0, 22),
            (command::CACHE, 0, 22),
            (command::WRITE_ZEROES, 0, 22),
            (command::FLUSH, 22, 22),
        ] {
            assert_eq!(errno(&EXTENDED, command, 0, 0, 8), plain, "{command}");
            assert_eq!(errno(&EXTENDED, command, 0x20, 0, 8), with_payload, "{command}");
        }
        assert_eq!(errno(&EXTENDED, command::WRITE_ZEROES, 0, 0, 1 << 40), 0);
        assert_eq!(errno(&EXTENDED, command::WRITE_ZEROES, 0, 1, u64::MAX), 28);
        assert_eq!(errno(&EXTENDED, command::READ, 0, 0, 1 << 32), 75);
        let header = |command, flags| Header { flags, command, cookie: 0, offset: 0, len: 5 };
        assert_eq!(header(command::WRITE, 0).payload(Framing::Extended), 5);
        assert_eq!(header(command::FLUSH, 0x20).payload(Framing::Extended), 5);
        assert_eq!(header(command::FLUSH, 0x20).payload(Framing::Structured), 0);
        assert_eq!(header(command::WRITE, 0).payload(Framing::Simple), 5);
    }

    #[test]
    fn a_filter_picks_contexts_by_their_numbers() {
        let header = |len| Header {
            flags: 0x20,
            command: command::BLOCK_STATUS,
            cookie: 0,
            offset: 512,
            len,
        };
        assert_eq!(EXTENDED.admit(&header(20)), Ok(Command::FilteredStatus { payload: 20 }));
        assert!(EXTENDED.admit(&header(21)).is_err());
        let ask = |len: u64, ids: &[u32]| {
            let mut payload = len.to_be_bytes().to_vec();
            payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
            match EXTENDED.filtered(&header(20), &payload) {
                Ok(Command::Status { span, contexts, .. }) => {
                    assert_eq!(span, Span::new(512, len));
                    Ok(contexts.places().map(context_id).collect())
                }
                Ok(other) => panic!("{other:?}"),
                Err(refusal) => Err(refusal.errno.number()),
            }
        };
        assert_eq!(ask(4096, &[3, 1]), Ok(vec![1, 3]));
        for (len, ids) in [
            (4096, &[][..]),
            (0, &[1]),
            (1 << 40, &[1]),
            (4096, &[0]),
            (4096, &[4]),
            (4096, &[2, 2]),
            (4096, &[u32::MAX]),
        ] {
            assert_eq!(ask(len, ids), Err(22), "{len} {ids:?}");
        }
        assert!(EXTENDED.filtered(&header(20), &[0; 13]).is_err());
        assert!(EXTENDED.filtered(&header(20), &[0; 7]).is_err());
        assert_eq!(Selection::all(64).places().count(), 64);
        assert_eq!(Selection::all(2).places().collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn read_only_is_permission_and_long_is_overflow() {
        let read_only = Terms { read_only: true, ..TERMS };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(errno(&read_only, command, 0, 0, 1), 1);
        }
        let large = Terms { size: 1 << 40, ..TERMS };
        assert_eq!(errno(&large, command::READ, 0, 0, 32 << 20), 0);
        assert_eq!(errno(&large, command::READ, 0, 0, (32 << 20) + 1), 75);
        assert_eq!(errno(&large, command::WRITE, 0, 0, (32 << 20) + 1), 22);
        assert_eq!(errno(&large, command::WRITE_ZEROES, 0, 0, u64::from(u32::MAX)), 0);
    }
}
