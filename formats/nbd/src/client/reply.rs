// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One request's reply, put together from its chunks.

use crate::wire::{chunk, truncated};
use std::collections::BTreeMap;
use tranship_block::{BigEndian, Error, ErrorKind, Result};

/// Extents in one reply: the protocol's own limit.
const MOST_EXTENTS: usize = 1 << 20;
/// Most pieces of one reply that do not touch: a block each of the longest request.
const MOST_PIECES: usize = 1 << 16;
/// Longest payload of a chunk without data: that many extents of the longer kind.
const LONGEST_CHUNK: u64 = (16 << 20) + 8;
/// Longest error: number, length, text of 4096 bytes, offset.
const LONGEST_ERROR: u64 = 6 + 4096 + 8;

/// Lengths and flags of neighbouring extents.
pub(super) type Runs = Vec<(u64, u64)>;

/// How many bytes of the payload of a chunk are its head, if it may be that long at all.
pub(super) fn head_of(kind: u16, len: u64) -> Result<usize> {
    let (head, most) = match kind {
        chunk::OFFSET_DATA => (len.min(8), u64::MAX),
        kind if kind & chunk::ERROR_BIT != 0 => (len, LONGEST_ERROR),
        _ => (len, LONGEST_CHUNK),
    };
    if len > most {
        return Err(Error::corrupt(format!(
            "reply chunk of kind {kind:#x} has {len} bytes, expected at most {most}"
        )));
    }
    usize::try_from(head).map_err(|_| Error::corrupt("reply chunk does not fit into memory"))
}

/// What a reply must be to fit its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// Success or failure alone.
    Done,
    /// `len` bytes from `offset`.
    Bytes { offset: u64, len: usize },
    /// Extents of the context with this number.
    Status { context: u32 },
}

/// How the other side was asked, and so has to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Simple,
    Structured,
    Extended,
}

/// A reply so far.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) want: Want,
    /// Ranges of the bytes that have come, by their starts; neighbours are joined.
    covered: BTreeMap<usize, usize>,
    /// Ranges that are zero, in the order in which they came.
    holes: Vec<(usize, usize)>,
    runs: Option<Runs>,
    error: Option<Error>,
    /// The error is that the server goes away.
    pub(super) is_shutdown: bool,
}

/// What the payload of a chunk is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It has been dealt with.
    Taken,
    /// The next `len` bytes of the stream belong at byte `at` of what is read.
    Payload { at: usize, len: usize },
}

impl Partial {
    pub(super) fn new(want: Want) -> Self {
        let (covered, holes) = (BTreeMap::new(), Vec::new());
        Self { want, covered, holes, runs: None, error: None, is_shutdown: false }
    }

    /// Starts and lengths of what is zero.
    pub(super) fn holes(&self) -> &[(usize, usize)] {
        &self.holes
    }

    /// Deals with a chunk of `kind`. `head` are the first bytes of its payload: all of
    /// them, but for data its offset alone; `len` is the length of the whole payload.
    pub(super) fn chunk(&mut self, style: Style, kind: u16, head: &[u8], len: u64) -> Result<Step> {
        let fields = BigEndian(head, "reply chunk");
        match (kind, self.want) {
            (chunk::NONE, _) if len == 0 => Ok(Step::Taken),
            (chunk::OFFSET_DATA, Want::Bytes { .. }) if len > 8 => {
                let (at, len) = self.cover(fields.u64("offset", 0)?, len.saturating_sub(8))?;
                Ok(Step::Payload { at, len })
            }
            (chunk::OFFSET_HOLE, Want::Bytes { .. }) if len == 12 => {
                let (at, len) =
                    self.cover(fields.u64("offset", 0)?, fields.u32("length", 8)?.into())?;
                match self.holes.last_mut() {
                    Some((start, before)) if start.saturating_add(*before) == at => {
                        *before = before.saturating_add(len);
                    }
                    _ => self.holes.push((at, len)),
                }
                Ok(Step::Taken)
            }
            (chunk::BLOCK_STATUS, Want::Status { context }) if style != Style::Extended => {
                self.status(fields, (head.len(), 4, 4), context)?;
                Ok(Step::Taken)
            }
            (chunk::BLOCK_STATUS_EXT, Want::Status { context }) if style == Style::Extended => {
                let count = u64::from(fields.u32("number of extents", 4)?);
                if count.checked_mul(16).and_then(|bytes| bytes.checked_add(8)) != Some(len) {
                    return Err(Error::corrupt(format!(
                        "block status has {count} extents in {len} bytes"
                    )));
                }
                self.status(fields, (head.len(), 8, 8), context)?;
                Ok(Step::Taken)
            }
            (kind, _) if kind & chunk::ERROR_BIT != 0 => {
                self.fail(kind, head)?;
                Ok(Step::Taken)
            }
            (kind, want) => Err(Error::corrupt(format!(
                "reply chunk of kind {kind:#x} with {len} bytes does not answer {want:?}"
            ))),
        }
    }

    /// Extents from byte `start` on, whose two fields have `width` bytes each.
    fn status(
        &mut self,
        fields: BigEndian<'_>,
        (len, start, width): (usize, usize, usize),
        context: u32,
    ) -> Result<()> {
        if fields.u32("context id", 0)? != context {
            return Ok(());
        }
        let size = width.saturating_mul(2);
        let payload = len.saturating_sub(start);
        let count = payload.checked_div(size).unwrap_or(0);
        let is_whole = payload.checked_rem(size) == Some(0);
        if self.runs.is_some() || count == 0 || count > MOST_EXTENTS || !is_whole {
            return Err(Error::corrupt(format!(
                "block status with {count} extents in {len} bytes, or sent twice"
            )));
        }
        let field = |name: &'static str, at: usize| match width {
            4 => fields.u32(name, at).map(u64::from),
            _ => fields.u64(name, at),
        };
        let run = |number: usize| {
            let at = number.saturating_mul(size).saturating_add(start);
            let len = field("extent length", at)?;
            if len == 0 {
                return Err(Error::corrupt("block status has an extent without bytes"));
            }
            Ok((len, field("extent flags", at.saturating_add(width))?))
        };
        self.runs = Some((0..count).map(run).collect::<Result<_>>()?);
        Ok(())
    }

    fn fail(&mut self, kind: u16, payload: &[u8]) -> Result<()> {
        let fields = BigEndian(payload, "error chunk");
        let number = fields.u32("error", 0)?;
        let len = usize::from(fields.u16("text length", 4)?);
        let text = payload.get(6..len.saturating_add(6)).unwrap_or_default();
        let text = String::from_utf8_lossy(text);
        if self.error.is_none() {
            let error = error_of(number, &text);
            self.is_shutdown = number == SHUTDOWN;
            let offset = fields.u64("offset", len.saturating_add(6)).ok();
            self.error = Some(match offset {
                Some(offset) if kind == chunk::ERROR_OFFSET => error.at(offset),
                _ => error,
            });
        }
        Ok(())
    }

    /// A simple reply's error number.
    pub(super) fn simple(&mut self, number: u32) {
        if number != 0 {
            self.error = Some(error_of(number, ""));
            self.is_shutdown = number == SHUTDOWN;
        }
    }

    /// Everything of a simple reply to a read comes at once.
    pub(super) fn cover_all(&mut self) {
        if let Want::Bytes { len, .. } = self.want {
            self.covered.insert(0, len);
        }
    }

    /// Notes that a range has come, which none before it may overlap.
    fn cover(&mut self, offset: u64, count: u64) -> Result<(usize, usize)> {
        let Want::Bytes { offset: start, len } = self.want else {
            return Err(Error::corrupt("reply has bytes that nobody asked for").at(offset));
        };
        let at = offset.checked_sub(start).and_then(|at| usize::try_from(at).ok());
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let outside = || {
            Error::corrupt(format!(
                "reply has {count} bytes outside of the {len} that were asked for, or twice"
            ))
            .at(offset)
        };
        let at = at.ok_or_else(outside)?;
        let end = at.checked_add(count).filter(|end| *end <= len).ok_or_else(outside)?;
        let before = self.covered.range(..end).next_back().map(|(start, end)| (*start, *end));
        if count == 0 || before.is_some_and(|(_, before)| before > at) {
            return Err(outside());
        }
        let mut whole = (at, end);
        if let Some((start, before)) = before
            && before == at
        {
            self.covered.remove(&start);
            whole.0 = start;
        }
        if let Some(after) = self.covered.remove(&end) {
            whole.1 = after;
        }
        self.covered.insert(whole.0, whole.1);
        if self.covered.len().max(self.holes.len()) > MOST_PIECES {
            return Err(Error::corrupt(format!("reply comes in more than {MOST_PIECES} pieces")));
        }
        Ok((at, count))
    }

    /// The reply has ended: is it one?
    pub(super) fn finish(self) -> Result<Runs> {
        if let Some(error) = self.error {
            return Err(error);
        }
        match self.want {
            Want::Done => Ok(Vec::new()),
            Want::Bytes { offset, len } => {
                if len == 0 || self.covered.get(&0) == Some(&len) {
                    Ok(Vec::new())
                } else {
                    Err(Error::corrupt("reply ends before all bytes have come").at(offset))
                }
            }
            Want::Status { .. } => self
                .runs
                .ok_or_else(|| Error::corrupt("reply to a block status request has no status")),
        }
    }
}

/// The server goes away, and perhaps comes back.
const SHUTDOWN: u32 = 108;

fn error_of(number: u32, text: &str) -> Error {
    let (kind, name) = match number {
        1 => (ErrorKind::Usage, "EPERM"),
        5 => (ErrorKind::Io, "EIO"),
        12 => (ErrorKind::Io, "ENOMEM"),
        28 => (ErrorKind::NoSpace, "ENOSPC"),
        75 => (ErrorKind::Io, "EOVERFLOW"),
        95 => (ErrorKind::Unsupported, "ENOTSUP"),
        SHUTDOWN => (ErrorKind::Busy, "ESHUTDOWN"),
        // "A client treats any other number as EINVAL."
        _ => (ErrorKind::Io, "EINVAL"),
    };
    let text: String = truncated(text, 500).chars().filter(|c| !c.is_control()).collect();
    let colon = if text.is_empty() { "" } else { ": " };
    Error::new(kind, format!("the NBD server answered {name}{colon}{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> Partial {
        Partial::new(Want::Bytes { offset: 1000, len: 100 })
    }

    fn hole(offset: u64, len: u32) -> Vec<u8> {
        [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()
    }

    #[test]
    fn chunks_in_any_order_make_a_reply() {
        let mut reply = bytes();
        let step = reply.chunk(Style::Structured, chunk::OFFSET_HOLE, &hole(1050, 50), 12).unwrap();
        assert_eq!((step, reply.holes()), (Step::Taken, &[(50, 50)][..]));
        let step = reply
            .chunk(Style::Structured, chunk::OFFSET_DATA, &1000_u64.to_be_bytes(), 58)
            .unwrap();
        assert_eq!(step, Step::Payload { at: 0, len: 50 });
        assert_eq!(reply.chunk(Style::Structured, chunk::NONE, &[], 0).unwrap(), Step::Taken);
        reply.finish().unwrap();
    }

    #[test]
    fn gaps_overlaps_and_strangers_are_refused() {
        let mut reply = bytes();
        reply.chunk(Style::Structured, chunk::OFFSET_HOLE, &hole(1050, 50), 12).unwrap();
        for (offset, len) in
            [(1050, 1), (1099, 1), (1040, 11), (999, 1), (1100, 1), (0, 50), (1010, 0)]
        {
            assert!(
                reply.chunk(Style::Structured, chunk::OFFSET_HOLE, &hole(offset, len), 12).is_err(),
                "{offset} {len}"
            );
        }
        assert!(reply.chunk(Style::Structured, chunk::BLOCK_STATUS, &[0; 12], 12).is_err());
        assert!(reply.chunk(Style::Structured, 77, &[], 0).is_err());
        assert!(reply.finish().unwrap_err().message().contains("before all bytes"));
    }

    #[test]
    fn an_error_has_the_servers_words_without_control_characters() {
        let mut reply = bytes();
        let payload = [&28_u32.to_be_bytes()[..], &[0, 5], b"f\x1bull"].concat();
        reply.chunk(Style::Structured, chunk::ERROR, &payload, 11).unwrap();
        let error = reply.finish().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.message(), "the NBD server answered ENOSPC: full");
    }

    fn status(context: u32, count: u32, extents: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = [context.to_be_bytes(), count.to_be_bytes()].concat();
        for (len, flags) in extents {
            bytes.extend(len.to_be_bytes());
            bytes.extend(flags.to_be_bytes());
        }
        bytes
    }

    #[test]
    fn long_extents_are_read_as_they_are_meant() {
        let mut reply = Partial::new(Want::Status { context: 5 });
        let other = status(6, 1, &[(9, 9)]);
        let extents = [(1 << 46, 3), (512, 0)];
        for payload in [other, status(5, 2, &extents)] {
            let len = u64::try_from(payload.len()).unwrap();
            reply.chunk(Style::Extended, chunk::BLOCK_STATUS_EXT, &payload, len).unwrap();
        }
        assert_eq!(reply.finish().unwrap(), extents);
    }

    #[test]
    fn block_status_that_contradicts_itself_is_refused() {
        let ext = |payload: Vec<u8>| (Style::Extended, chunk::BLOCK_STATUS_EXT, payload);
        let cases = [
            ext(status(5, 3, &[(512, 0), (512, 0)])),
            ext(status(5, u32::MAX, &[(512, 0)])),
            ext(status(5, 0, &[])),
            ext(status(5, 1, &[(0, 0)])),
            (Style::Structured, chunk::BLOCK_STATUS_EXT, status(5, 1, &[(512, 0)])),
            (Style::Extended, chunk::BLOCK_STATUS, vec![0, 0, 0, 5, 0, 0, 2, 0, 0, 0, 0, 0]),
            (Style::Structured, chunk::BLOCK_STATUS, vec![0, 0, 0, 5, 0, 0, 2, 0, 0, 0, 0]),
        ];
        for (style, kind, payload) in cases {
            let mut reply = Partial::new(Want::Status { context: 5 });
            let len = u64::try_from(payload.len()).unwrap();
            reply.chunk(style, kind, &payload, len).unwrap_err();
        }
        let mut twice = Partial::new(Want::Status { context: 5 });
        let payload = status(5, 1, &[(512, 0)]);
        twice.chunk(Style::Extended, chunk::BLOCK_STATUS_EXT, &payload, 24).unwrap();
        twice.chunk(Style::Extended, chunk::BLOCK_STATUS_EXT, &payload, 24).unwrap_err();
    }

    #[test]
    fn chunks_longer_than_their_kind_allows_are_refused_before_they_are_read() {
        assert_eq!(head_of(chunk::OFFSET_DATA, 1 << 40).unwrap(), 8);
        assert_eq!(head_of(chunk::OFFSET_DATA, 3).unwrap(), 3);
        head_of(chunk::ERROR, 4097 + 14).unwrap_err();
        head_of(0xffff, 1 << 20).unwrap_err();
        head_of(chunk::BLOCK_STATUS_EXT, 1 << 30).unwrap_err();
        assert_eq!(head_of(chunk::BLOCK_STATUS_EXT, 8 + (16 << 20)).unwrap(), (16 << 20) + 8);
    }
}
