// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From the 28 bytes of a request to a command that is safe to carry out.

use crate::wire::{Errno, REQUEST_MAGIC, command, command_flag};
use tranship_block::{BigEndian, Error, Result, Span, Zeroing};

/// The fields of a request, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

impl Header {
    pub(crate) const BYTES: usize = 28;

    /// Reads the fields; only the magic can be wrong.
    pub(crate) fn parse(raw: &[u8; Self::BYTES]) -> Result<Self> {
        let fields = BigEndian(raw, "request");
        let magic = fields.u32("magic", 0)?;
        if magic != REQUEST_MAGIC {
            return Err(Error::corrupt(format!(
                "request magic is {magic:#x}, expected {REQUEST_MAGIC:#x}"
            )));
        }
        Ok(Self {
            flags: fields.u16("flags", 4)?,
            command: fields.u16("type", 6)?,
            cookie: fields.u64("cookie", 8)?,
            offset: fields.u64("offset", 16)?,
            len: fields.u32("length", 24)?,
        })
    }

    /// How many bytes follow the header.
    pub(crate) fn payload(&self) -> u32 {
        if self.command == command::WRITE { self.len } else { 0 }
    }
}

/// What client and server agreed on, as far as requests depend on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// Bytes of the export.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    /// Reads are answered in chunks.
    pub(crate) structured: bool,
    /// The client selected `base:allocation`.
    pub(crate) allocation: bool,
    /// Longest read or write in bytes.
    pub(crate) payload: u32,
}

/// A request that may be carried out: its span lies within the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read { span: Span, one_chunk: bool },
    Write { span: Span, durable: bool },
    Flush,
    Trim { span: Span, durable: bool },
    Zero { span: Span, mode: Zeroing, durable: bool },
    Status { span: Span, one_extent: bool },
    Disconnect,
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
        let allowed = match header.command {
            command::READ if self.structured => command_flag::FUA | command_flag::DF,
            command::WRITE_ZEROES => command_flag::FUA | command_flag::NO_HOLE,
            command::BLOCK_STATUS => command_flag::FUA | command_flag::REQ_ONE,
            command::DISC => u16::MAX,
            _ => command_flag::FUA,
        };
        if flags & !allowed != 0 {
            return refuse(Errno::Invalid, "request has a flag that was not offered");
        }
        let durable = flags & command_flag::FUA != 0;
        let span = Span::new(offset, u64::from(len));
        match header.command {
            command::DISC => Ok(Command::Disconnect),
            command::READ => {
                self.within(span, Errno::Invalid)?;
                if len > self.payload {
                    return refuse(Errno::Overflow, "read is longer than the payload limit");
                }
                Ok(Command::Read { span, one_chunk: flags & command_flag::DF != 0 })
            }
            command::WRITE => {
                self.writable()?;
                if len > self.payload {
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
            command::WRITE_ZEROES => {
                self.writable()?;
                self.within(span, Errno::NoSpace)?;
                let keep = flags & command_flag::NO_HOLE != 0;
                let mode = if keep { Zeroing::KeepAllocated } else { Zeroing::MayUnmap };
                Ok(Command::Zero { span, mode, durable })
            }
            command::BLOCK_STATUS => {
                if !self.allocation {
                    return refuse(Errno::Invalid, "no metadata context was negotiated");
                }
                if len == 0 {
                    return refuse(Errno::Invalid, "block status needs a length");
                }
                self.within(span, Errno::Invalid)?;
                Ok(Command::Status { span, one_extent: flags & command_flag::REQ_ONE != 0 })
            }
            _ => refuse(Errno::Invalid, "unknown command"),
        }
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
        structured: true,
        allocation: true,
        payload: 32 << 20,
    };

    fn errno(terms: &Terms, command: u16, flags: u16, offset: u64, len: u32) -> u32 {
        let header = Header { flags, command, cookie: 7, offset, len };
        terms.admit(&header).map_or_else(|refusal| refusal.errno.number(), |_| 0)
    }

    #[test]
    fn a_header_is_taken_apart() {
        let mut raw = [0; Header::BYTES];
        raw[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        raw[5] = 1;
        raw[7] = 6;
        raw[15] = 9;
        raw[23] = 5;
        raw[27] = 4;
        let header = Header::parse(&raw).unwrap();
        assert_eq!(header, Header { flags: 1, command: 6, cookie: 9, offset: 5, len: 4 });
        raw[0] = 0;
        let text = Header::parse(&raw).unwrap_err().to_string();
        assert_eq!(text, "request magic is 0x609513, expected 0x25609513");
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
            (5, [22; 4]),
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
        assert_eq!(errno(&TERMS, command::WRITE_ZEROES, 0x3, 0, 1), 0);
        assert_eq!(errno(&TERMS, command::WRITE_ZEROES, 0x10, 0, 1), 22);
        assert_eq!(errno(&TERMS, command::BLOCK_STATUS, 0x9, 0, 1), 0);
        let simple = Terms { structured: false, allocation: false, ..TERMS };
        assert_eq!(errno(&simple, command::READ, 0x4, 0, 1), 22);
        assert_eq!(errno(&simple, command::BLOCK_STATUS, 0, 0, 1), 22);
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
        assert_eq!(errno(&large, command::WRITE_ZEROES, 0, 0, u32::MAX), 0);
    }
}
