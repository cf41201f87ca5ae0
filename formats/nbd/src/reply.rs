// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Replies of the transmission phase, as the bytes before their payload.

use crate::wire::{CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, Errno, SIMPLE_REPLY_MAGIC, chunk, truncated};
use std::io::{self, IoSlice, Write};
use tranship_block::Span;

/// Longest error text that we send; the protocol allows 4096.
const MAX_TEXT: usize = 1024;

/// What requests and replies look like on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// An error number and the bytes.
    Simple,
    /// Reads and block status in chunks.
    Structured,
    /// Everything in chunks, with 64-bit lengths.
    Extended,
}

/// Writes the replies to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) framing: Framing,
    /// The client's number for the request.
    pub(crate) cookie: u64,
    /// The request's offset, which extended chunks repeat.
    pub(crate) offset: u64,
}

impl Frame {
    /// A simple reply; a successful read's bytes follow it.
    fn simple(self, out: &mut Vec<u8>, errno: u32) {
        out.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.extend(errno.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
    }

    fn chunk(self, out: &mut Vec<u8>, kind: u16, last: bool, len: u64) {
        let flags = if last { chunk::DONE } else { 0 };
        let extended = self.framing == Framing::Extended;
        let magic = if extended { EXTENDED_CHUNK_MAGIC } else { CHUNK_MAGIC };
        out.extend(magic.to_be_bytes());
        out.extend(flags.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        if extended {
            out.extend(self.offset.to_be_bytes());
            out.extend(len.to_be_bytes());
        } else {
            // Payloads are bounded by the limits, far below 4 GiB.
            out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        }
    }

    /// Success of a request that has nothing to tell.
    pub(crate) fn done(self, out: &mut Vec<u8>) {
        if self.framing == Framing::Extended { self.nothing(out) } else { self.simple(out, 0) }
    }

    /// The chunk that ends a reply without adding to it.
    pub(crate) fn nothing(self, out: &mut Vec<u8>) {
        self.chunk(out, chunk::NONE, true, 0);
    }

    /// What comes before the `len` bytes from `offset`. A simple reply has one of these.
    pub(crate) fn data(self, out: &mut Vec<u8>, last: bool, offset: u64, len: u64) {
        if self.framing == Framing::Simple {
            return self.simple(out, 0);
        }
        self.chunk(out, chunk::OFFSET_DATA, last, len.saturating_add(8));
        out.extend(offset.to_be_bytes());
    }

    /// A hole; it is never longer than a read request, so its length fits.
    pub(crate) fn hole(self, out: &mut Vec<u8>, last: bool, span: Span) {
        self.chunk(out, chunk::OFFSET_HOLE, last, 12);
        out.extend(span.start.to_be_bytes());
        out.extend(u32::try_from(span.len).unwrap_or(u32::MAX).to_be_bytes());
    }

    /// What one context tells, as lengths and flags.
    pub(crate) fn status(
        self,
        out: &mut Vec<u8>,
        last: bool,
        context: u32,
        extents: &[(u64, u64)],
    ) {
        let count = u64::try_from(extents.len()).unwrap_or(u64::MAX);
        if self.framing == Framing::Extended {
            let len = count.saturating_mul(16).saturating_add(8);
            self.chunk(out, chunk::BLOCK_STATUS_EXT, last, len);
            out.extend(context.to_be_bytes());
            out.extend(u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
            for (len, flags) in extents {
                out.extend(len.to_be_bytes());
                out.extend(flags.to_be_bytes());
            }
        } else {
            self.chunk(out, chunk::BLOCK_STATUS, last, count.saturating_mul(8).saturating_add(4));
            out.extend(context.to_be_bytes());
            for number in extents.iter().flat_map(|(len, flags)| [len, flags]) {
                out.extend(u32::try_from(*number).unwrap_or(u32::MAX).to_be_bytes());
            }
        }
    }

    /// What ends a reply with an error, about `offset` if it is known.
    pub(crate) fn error(self, out: &mut Vec<u8>, errno: Errno, text: &str, offset: Option<u64>) {
        if self.framing == Framing::Simple {
            return self.simple(out, errno.number());
        }
        let text = truncated(text, MAX_TEXT);
        let text_len = u16::try_from(text.len()).unwrap_or_default();
        let kind = if offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
        let tail = if offset.is_some() { 8 } else { 0 };
        let len = u64::from(text_len).saturating_add(6).saturating_add(tail);
        self.chunk(out, kind, true, len);
        out.extend(errno.number().to_be_bytes());
        out.extend(text_len.to_be_bytes());
        out.extend(text.as_bytes());
        out.extend(offset.iter().flat_map(|offset| offset.to_be_bytes()));
    }
}

/// Sends a head and its payload in as few calls as the stream allows.
pub(crate) fn send(stream: &mut impl Write, head: &[u8], payload: &[u8]) -> io::Result<()> {
    let mut bufs = [IoSlice::new(head), IoSlice::new(payload)];
    let mut left = bufs.as_mut_slice();
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match stream.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => IoSlice::advance_slices(&mut left, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Reply<'a> = &'a dyn Fn(&mut Vec<u8>);

    #[test]
    fn chunk_lengths_match_their_payload() {
        let text = "ü".repeat(1000);
        for framing in [Framing::Structured, Framing::Extended] {
            let frame = Frame { framing, cookie: 1, offset: 77 };
            let writers: [Reply<'_>; 5] = [
                &|out| frame.nothing(out),
                &|out| frame.hole(out, true, Span::new(5, 6)),
                &|out| frame.status(out, true, 1, &[(1, 2), (3, 4)]),
                &|out| frame.error(out, Errno::Io, "cannot read", Some(9)),
                &|out| frame.error(out, Errno::Io, &text, None),
            ];
            for write in writers {
                let mut out = Vec::new();
                write(&mut out);
                let (head, len) = if framing == Framing::Extended {
                    assert_eq!(out[16..24], 77u64.to_be_bytes());
                    (32, u64::from_be_bytes(*out[24..].first_chunk().unwrap()))
                } else {
                    (20, u64::from(u32::from_be_bytes(*out[16..].first_chunk().unwrap())))
                };
                assert_eq!(out.len() - head, usize::try_from(len).unwrap());
            }
            let mut out = Vec::new();
            frame.data(&mut out, false, 2, 3);
            let head = out.len() - 8;
            assert_eq!(out[head - 1], 11);
        }
    }

    #[test]
    fn success_is_simple_until_headers_are_extended() {
        for (framing, len) in
            [(Framing::Simple, 16), (Framing::Structured, 16), (Framing::Extended, 32)]
        {
            let mut out = Vec::new();
            Frame { framing, cookie: 1, offset: 2 }.done(&mut out);
            assert_eq!(out.len(), len);
        }
    }

    #[test]
    fn a_stream_that_takes_one_byte_at_a_time_gets_everything() {
        struct Slow(Vec<u8>);
        impl Write for Slow {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.push(bytes[0]);
                Ok(1)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut slow = Slow(Vec::new());
        send(&mut slow, b"head", b"payload").unwrap();
        send(&mut slow, b"!", b"").unwrap();
        assert_eq!(slow.0, b"headpayload!");
    }
}
