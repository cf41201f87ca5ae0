// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Replies of the transmission phase, as the bytes before their payload.

use crate::wire::{CHUNK_MAGIC, Errno, SIMPLE_REPLY_MAGIC, allocation, chunk, truncated};
use std::io::{self, IoSlice, Write};
use tranship_block::Span;

/// Longest error text that we send; the protocol allows 4096.
const MAX_TEXT: usize = 1024;

/// A simple reply; a successful read's bytes follow it.
pub(crate) fn simple(cookie: u64, errno: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16);
    bytes.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes.extend(errno.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

fn head(cookie: u64, kind: u16, last: bool, len: u32) -> Vec<u8> {
    let flags = if last { chunk::DONE } else { 0 };
    let mut bytes = Vec::with_capacity(32);
    bytes.extend(CHUNK_MAGIC.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// The chunk that ends a reply without adding to it.
pub(crate) fn nothing(cookie: u64) -> Vec<u8> {
    head(cookie, chunk::NONE, true, 0)
}

/// What comes before the `len` bytes from `offset`.
pub(crate) fn data(cookie: u64, last: bool, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = head(cookie, chunk::OFFSET_DATA, last, len.saturating_add(8));
    bytes.extend(offset.to_be_bytes());
    bytes
}

/// A hole; it is never longer than a read request, so its length fits.
pub(crate) fn hole(cookie: u64, last: bool, span: Span) -> Vec<u8> {
    let mut bytes = head(cookie, chunk::OFFSET_HOLE, last, 12);
    bytes.extend(span.start.to_be_bytes());
    bytes.extend(u32::try_from(span.len).unwrap_or(u32::MAX).to_be_bytes());
    bytes
}

/// The one chunk that answers a block status request.
pub(crate) fn status(cookie: u64, extents: &[(u32, u32)]) -> Vec<u8> {
    let len = extents.len().saturating_mul(8).saturating_add(4);
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    let mut bytes = head(cookie, chunk::BLOCK_STATUS, true, len);
    bytes.extend(allocation::ID.to_be_bytes());
    for (len, flags) in extents {
        bytes.extend(len.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

/// The chunk that ends a reply with an error, about `offset` if it is known.
pub(crate) fn error(cookie: u64, errno: Errno, text: &str, offset: Option<u64>) -> Vec<u8> {
    let text = truncated(text, MAX_TEXT);
    let text_len = u16::try_from(text.len()).unwrap_or_default();
    let kind = if offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
    let tail = if offset.is_some() { 8 } else { 0 };
    let len = u32::from(text_len).saturating_add(6).saturating_add(tail);
    let mut bytes = head(cookie, kind, true, len);
    bytes.extend(errno.number().to_be_bytes());
    bytes.extend(text_len.to_be_bytes());
    bytes.extend(text.as_bytes());
    bytes.extend(offset.iter().flat_map(|offset| offset.to_be_bytes()));
    bytes
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

    #[test]
    fn chunk_lengths_match_their_payload() {
        let text = "ü".repeat(1000);
        for bytes in [
            nothing(1),
            hole(1, true, Span::new(5, 6)),
            status(1, &[(1, 2), (3, 4)]),
            error(1, Errno::Io, "cannot read", Some(9)),
            error(1, Errno::Io, &text, None),
        ] {
            let len = u32::from_be_bytes(*bytes[16..].first_chunk().unwrap());
            assert_eq!(bytes.len() - 20, usize::try_from(len).unwrap());
        }
        assert_eq!(data(1, false, 2, 3)[16..20], [0, 0, 0, 11]);
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
