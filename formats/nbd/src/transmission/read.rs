// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads: from memory, and past it.
//!
//! What the kernel has in its cache is answered by the reader itself: short reads straight
//! into the batch of replies, longer ones from the file to the socket without a copy.

use super::{Connection, Failure, PIECE, Reader, SMALL, sized};
use crate::reply::{self, Frame, Framing};
use crate::socket::Output;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::io::{self, IoSliceMut, Read};
use std::time::Instant;
use tranship_block::{BlockDevice, Error, Extents, FileRange, Span};

/// A shorter hole is cheaper to read than to describe; shorter reads skip the lookup.
const SHORTEST_HOLE: u64 = 64 << 10;

/// A part of a read that becomes one chunk or more.
#[derive(Clone, Copy, Debug)]
struct Part {
    span: Span,
    hole: bool,
}

/// What came of an attempt to read without waiting for a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cached {
    Read,
    Missing,
    /// This file system cannot tell.
    Unknown,
}

impl<R: Read + Send, W: Output> Connection<'_, R, W> {
    /// Answers a read if it takes no waiting for a disk. False if it might.
    pub(super) fn read_at_once(
        &self,
        reader: &mut Reader<R>,
        frame: Frame,
        span: Span,
        one_chunk: bool,
        arrived: Instant,
    ) -> io::Result<bool> {
        let batch = &mut reader.batch;
        let answered = if span.is_empty() {
            if frame.framing == Framing::Simple {
                frame.done(batch);
            } else {
                frame.nothing(batch);
            }
            Some(true)
        } else if span.len <= SMALL {
            self.read_into(batch, frame, span)
        } else {
            self.read_past(batch, frame, span, one_chunk)?
        };
        if let Some(good) = answered {
            self.served.counters.reads.note(span.len, good, arrived.elapsed());
        }
        Ok(answered.is_some())
    }

    /// Adds the whole reply to `batch`. Tells whether it is a good one; `None` if the
    /// bytes would have to be waited for.
    fn read_into(&self, batch: &mut Vec<u8>, frame: Frame, span: Span) -> Option<bool> {
        let device = &self.served.export.device;
        let before = batch.len();
        frame.data(batch, true, span.start, span.len);
        let start = batch.len();
        let len = usize::try_from(span.len).unwrap_or(usize::MAX);
        batch.resize(start.saturating_add(len), 0);
        let bytes = batch.get_mut(start..).unwrap_or_default();
        let range = device.file_range(span.start).filter(|range| range.len >= span.len);
        let cached = range.map_or(Cached::Unknown, |range| read_cached(&range, 0, bytes));
        if cached == Cached::Read {
            return Some(true);
        }
        if cached == Cached::Unknown && self.small.is_quick() {
            let begun = Instant::now();
            let done = device.read_at(bytes, span.start);
            self.small.note(span.len, begun.elapsed());
            if let Err(error) = &done {
                batch.truncate(before);
                self.report(batch, frame, error);
            }
            return Some(done.is_ok());
        }
        batch.truncate(before);
        None
    }

    /// Sends the bytes from their file to the client. As [`Self::read_into`].
    fn read_past(
        &self,
        batch: &mut Vec<u8>,
        frame: Frame,
        span: Span,
        one_chunk: bool,
    ) -> io::Result<Option<bool>> {
        let device = &self.served.export.device;
        let range = device.file_range(span.start).filter(|range| range.len >= span.len);
        let Some(range) = range.filter(|_| self.takes_files) else { return Ok(None) };
        let parts = self.parts(span, one_chunk);
        let within = |part: &Part| part.span.start.saturating_sub(span.start);
        let ready = |part: &Part| {
            let last = within(part).saturating_add(part.span.len).saturating_sub(1);
            // The first and the last byte stand for all of them.
            part.hole
                || [within(part), last]
                    .iter()
                    .all(|at| read_cached(&range, *at, &mut [0]) != Cached::Missing)
        };
        if !parts.iter().all(ready) {
            return Ok(None);
        }
        for part in &parts {
            let last = part.span.end() == span.end();
            if part.hole {
                frame.hole(batch, last, part.span);
                continue;
            }
            // Not the last chunk: it can still turn out that the file has lost its end.
            frame.data(batch, false, part.span.start, part.span.len);
            let from = FileRange {
                offset: range.offset.saturating_add(within(part)),
                len: part.span.len,
                ..range
            };
            let failed = self.with_output(|stream| self.pass(stream, batch, &from, part.span))?;
            batch.clear();
            if let Some(error) = failed {
                if frame.framing == Framing::Simple {
                    // Success has been promised, and there is no way to take it back.
                    return self.with_output(|_| Err(io::Error::other(error)));
                }
                self.report(batch, frame, &error);
                return Ok(Some(false));
            }
            if last && frame.framing != Framing::Simple {
                frame.nothing(batch);
            }
        }
        Ok(Some(true))
    }

    /// Sends `head` and the bytes of `range`, which are those of `span`. Bytes that the
    /// file does not give are sent as zeroes, and the error is returned.
    fn pass(
        &self,
        stream: &mut W,
        head: &[u8],
        range: &FileRange<'_>,
        span: Span,
    ) -> io::Result<Option<Error>> {
        let sent = stream.send_file(head, range.file, range.offset, span.len)?;
        let mut at = span.start.saturating_add(sent);
        let mut failed = None;
        let mut buffer = Vec::new();
        while at < span.end() {
            let len = PIECE.min(span.end().saturating_sub(at));
            let bytes = sized(&mut buffer, len);
            if failed.is_none()
                && let Err(error) = self.served.export.device.read_at(bytes, at)
            {
                failed = Some(error.at(at));
            }
            if failed.is_some() {
                bytes.fill(0);
            }
            reply::send(stream, bytes, &[])?;
            at = at.saturating_add(len);
        }
        Ok(failed)
    }

    /// Divides a read into data and holes worth telling.
    fn parts(&self, span: Span, one_chunk: bool) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut unsent = span.start;
        if !one_chunk && self.terms.framing != Framing::Simple && span.len >= SHORTEST_HOLE {
            // Where the metadata cannot be read, the read itself tells what is wrong.
            let runs = Extents::new(&self.served.export.device, span).map_while(Result::ok);
            for (run, _) in runs.filter(|(run, kind)| kind.reads_zero() && run.len >= SHORTEST_HOLE)
            {
                let before = run.start.saturating_sub(unsent);
                if before > 0 {
                    parts.push(Part { span: Span::new(unsent, before), hole: false });
                }
                parts.push(Part { span: run, hole: true });
                unsent = run.end();
            }
        }
        let rest = span.end().saturating_sub(unsent);
        if rest > 0 {
            parts.push(Part { span: Span::new(unsent, rest), hole: false });
        }
        parts
    }

    /// Answers a read in a worker.
    pub(super) fn read(
        &self,
        frame: Frame,
        span: Span,
        one_chunk: bool,
        buffer: &mut Vec<u8>,
    ) -> std::result::Result<(), Failure> {
        let device = &self.served.export.device;
        let whole = one_chunk || frame.framing == Framing::Simple;
        let most = if whole { span.len } else { PIECE };
        let mut head = Vec::with_capacity(64);
        for part in self.parts(span, one_chunk) {
            let mut at = part.span.start;
            while at < part.span.end() {
                head.clear();
                if part.hole {
                    frame.hole(&mut head, part.span.end() == span.end(), part.span);
                    self.send(&head, &[])?;
                    break;
                }
                let len = most.min(part.span.end().saturating_sub(at));
                let bytes = sized(buffer, len);
                let begun = Instant::now();
                device.read_at(bytes, at).map_err(|error| error.at(at))?;
                self.pace_of(len).note(len, begun.elapsed());
                let next = at.saturating_add(len);
                frame.data(&mut head, next == span.end(), at, len);
                self.send(&head, bytes)?;
                at = next;
            }
        }
        Ok(())
    }
}

/// Fills `bytes` from byte `at` of `range` if the kernel has all of them in its cache.
fn read_cached(range: &FileRange<'_>, at: u64, bytes: &mut [u8]) -> Cached {
    let len = bytes.len();
    let offset = range.offset.saturating_add(at);
    let mut bufs = [IoSliceMut::new(bytes)];
    match preadv2(range.file, &mut bufs, offset, ReadWriteFlags::NOWAIT) {
        Ok(read) if read == len => Cached::Read,
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Cached::Unknown,
        Ok(_) | Err(_) => Cached::Missing,
    }
}
