// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One request's reply, put together from its chunks.

use crate::wire::{chunk, truncated};
use std::collections::BTreeMap;
use tranship_block::{BigEndian, Error, ErrorKind, Result};

/// Extents in one reply: the protocol's own limit is a million.
const MOST_EXTENTS: usize = 1 << 20;

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

/// A reply so far.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) want: Want,
    /// Ranges of the bytes that have come, by their starts; neighbours are joined.
    covered: BTreeMap<usize, usize>,
    runs: Option<Vec<(u32, u32)>>,
    error: Option<Error>,
}

/// What the payload of a chunk is good for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It has been dealt with.
    Taken,
    /// The next `len` bytes of the stream belong at byte `at` of what is read.
    Payload { at: usize, len: usize },
    /// The bytes at `at` are zero.
    Zeroes { at: usize, len: usize },
}

impl Partial {
    pub(super) fn new(want: Want) -> Self {
        Self { want, covered: BTreeMap::new(), runs: None, error: None }
    }

    /// Deals with a chunk of `kind`. `head` are the first bytes of its payload: all of
    /// them, but for data its offset alone; `len` is the length of the whole payload.
    pub(super) fn chunk(&mut self, kind: u16, head: &[u8], len: u32) -> Result<Step> {
        let fields = BigEndian(head, "reply chunk");
        match (kind, self.want) {
            (chunk::NONE, _) if len == 0 => Ok(Step::Taken),
            (chunk::OFFSET_DATA, Want::Bytes { .. }) if len > 8 => {
                let (at, len) = self.cover(fields.u64("offset", 0)?, len.saturating_sub(8))?;
                Ok(Step::Payload { at, len })
            }
            (chunk::OFFSET_HOLE, Want::Bytes { .. }) if len == 12 => {
                let (at, len) = self.cover(fields.u64("offset", 0)?, fields.u32("length", 8)?)?;
                Ok(Step::Zeroes { at, len })
            }
            (chunk::BLOCK_STATUS, Want::Status { context }) => {
                self.status(fields, head.len(), context)?;
                Ok(Step::Taken)
            }
            (kind, _) if kind & chunk::ERROR_BIT != 0 => {
                self.fail(head)?;
                Ok(Step::Taken)
            }
            (kind, want) => Err(Error::corrupt(format!(
                "reply chunk of kind {kind:#x} with {len} bytes does not answer {want:?}"
            ))),
        }
    }

    fn status(&mut self, fields: BigEndian<'_>, len: usize, context: u32) -> Result<()> {
        if fields.u32("context id", 0)? != context {
            return Ok(());
        }
        let count = len.saturating_sub(4).checked_div(8).unwrap_or(0);
        if self.runs.is_some() || count == 0 || count > MOST_EXTENTS {
            return Err(Error::corrupt(format!("block status with {count} extents or sent twice")));
        }
        let run = |number: usize| {
            let at = number.saturating_mul(8).saturating_add(4);
            let len = fields.u32("extent length", at)?;
            if len == 0 {
                return Err(Error::corrupt("block status has an extent without bytes"));
            }
            Ok((len, fields.u32("extent flags", at.saturating_add(4))?))
        };
        self.runs = Some((0..count).map(run).collect::<Result<_>>()?);
        Ok(())
    }

    fn fail(&mut self, payload: &[u8]) -> Result<()> {
        let fields = BigEndian(payload, "error chunk");
        let number = fields.u32("error", 0)?;
        let len = usize::from(fields.u16("text length", 4)?);
        let text = payload.get(6..len.saturating_add(6)).unwrap_or_default();
        let text = String::from_utf8_lossy(text);
        if self.error.is_none() {
            self.error = Some(error_of(number, &text));
        }
        Ok(())
    }

    /// A simple reply's error number.
    pub(super) fn simple(&mut self, number: u32) {
        if number != 0 {
            self.error = Some(error_of(number, ""));
        }
    }

    /// Everything of a simple reply to a read comes at once.
    pub(super) fn cover_all(&mut self) {
        if let Want::Bytes { len, .. } = self.want {
            self.covered.insert(0, len);
        }
    }

    /// Notes that a range has come, which none before it may overlap.
    fn cover(&mut self, offset: u64, count: u32) -> Result<(usize, usize)> {
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
        Ok((at, count))
    }

    /// The reply has ended: is it one?
    pub(super) fn finish(self) -> Result<Vec<(u32, u32)>> {
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

fn error_of(number: u32, text: &str) -> Error {
    let (kind, name) = match number {
        1 => (ErrorKind::Usage, "EPERM"),
        5 => (ErrorKind::Io, "EIO"),
        12 => (ErrorKind::Io, "ENOMEM"),
        28 => (ErrorKind::NoSpace, "ENOSPC"),
        75 => (ErrorKind::Io, "EOVERFLOW"),
        95 => (ErrorKind::Unsupported, "ENOTSUP"),
        108 => (ErrorKind::Busy, "ESHUTDOWN"),
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
        let step = reply.chunk(chunk::OFFSET_HOLE, &hole(1050, 50), 12).unwrap();
        assert_eq!(step, Step::Zeroes { at: 50, len: 50 });
        let step = reply.chunk(chunk::OFFSET_DATA, &1000_u64.to_be_bytes(), 58).unwrap();
        assert_eq!(step, Step::Payload { at: 0, len: 50 });
        assert_eq!(reply.chunk(chunk::NONE, &[], 0).unwrap(), Step::Taken);
        reply.finish().unwrap();
    }

    #[test]
    fn gaps_overlaps_and_strangers_are_refused() {
        let mut reply = bytes();
        reply.chunk(chunk::OFFSET_HOLE, &hole(1050, 50), 12).unwrap();
        for (offset, len) in
            [(1050, 1), (1099, 1), (1040, 11), (999, 1), (1100, 1), (0, 50), (1010, 0)]
        {
            assert!(
                reply.chunk(chunk::OFFSET_HOLE, &hole(offset, len), 12).is_err(),
                "{offset} {len}"
            );
        }
        assert!(reply.chunk(chunk::BLOCK_STATUS, &[0; 12], 12).is_err());
        assert!(reply.chunk(77, &[], 0).is_err());
        assert!(reply.finish().unwrap_err().message().contains("before all bytes"));
    }

    #[test]
    fn an_error_has_the_servers_words_without_control_characters() {
        let mut reply = bytes();
        let payload = [&28_u32.to_be_bytes()[..], &[0, 5], b"f\x1bull"].concat();
        reply.chunk(chunk::ERROR, &payload, 11).unwrap();
        let error = reply.finish().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.message(), "the NBD server answered ENOSPC: full");
    }
}
