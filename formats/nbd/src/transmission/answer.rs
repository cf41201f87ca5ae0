// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What workers do with the requests that were handed to them.

use super::{Accepted, Chain, Connection, Failure, sized};
use crate::reply::{self, Frame, Framing};
use crate::request::{Command, Refusal, Selection, context_id};
use crate::socket::{Output, is_gone};
use crate::status::{LONGEST_COMPACT, extents};
use crate::wire::Errno;
use rustix::fs::{Advice, fadvise};
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Span, Zeroing};

/// Zeroing and trimming begin with parts of this many bytes. After each they look whether
/// anybody still wants it.
const FIRST_STRIDE: u64 = 64 << 20;
/// The longest part.
const LAST_STRIDE: u64 = 16 << 30;
/// Parts grow as long as they take less than this.
const STRIDE_TIME: Duration = Duration::from_millis(50);

impl<R: Read + Send, W: Output> Connection<'_, R, W> {
    /// Carries out a request and replies. Fails if the reply cannot be sent.
    pub(super) fn answer(&self, request: &Accepted<'_>, buffer: &mut Vec<u8>) -> io::Result<()> {
        let frame = request.frame;
        let counters = &self.served.counters;
        let (counter, bytes) = match request.command {
            Command::Read { span, .. } => (&counters.reads, span.len),
            Command::Write { span, .. } => (&counters.writes, span.len),
            Command::Flush => (&counters.flushes, 0),
            Command::Trim { span, .. } => (&counters.trims, span.len),
            Command::Zero { span, .. } => (&counters.zeroes, span.len),
            Command::Cache { span } => (&counters.caches, span.len),
            Command::Status { span, .. } => (&counters.statuses, span.len),
            Command::FilteredStatus { .. } | Command::Disconnect => return Ok(()),
        };
        let done = self.carry_out(frame, &request.command, buffer);
        // Before the reply, so that whoever has got it finds it counted.
        counter.note(bytes, done.is_ok(), request.arrived.elapsed());
        let mut head = Vec::new();
        match &done {
            Ok(true) => Ok(()),
            Ok(false) => {
                frame.done(&mut head);
                self.send(&head, &[])
            }
            Err(Failure::Refused(refusal)) => {
                frame.error(&mut head, refusal.errno, refusal.text, None);
                self.send(&head, &[])
            }
            Err(Failure::Device(error)) => {
                self.report(&mut head, frame, error);
                self.send(&head, &[])
            }
            Err(Failure::Stream(error)) => Err(error.kind().into()),
        }
    }

    /// Carries out a request. True if the reply has been sent.
    fn carry_out(
        &self,
        frame: Frame,
        command: &Command,
        buffer: &mut Vec<u8>,
    ) -> std::result::Result<bool, Failure> {
        let device = &self.served.export.device;
        match *command {
            Command::Read { span, one_chunk } => {
                self.read(frame, span, one_chunk, buffer)?;
                return Ok(true);
            }
            Command::Write { span, durable } => {
                let begun = Instant::now();
                device.write_at(sized(buffer, span.len), span.start)?;
                self.pace_of(span.len).note(span.len, begun.elapsed());
                self.settle(durable)?;
            }
            Command::Flush => device.flush()?,
            Command::Trim { span, durable } => {
                self.in_strides(span, |part| device.discard(part))?;
                self.settle(durable)?;
            }
            Command::Zero { span, mode, durable, fast } => {
                if fast && !device.zeroes_quickly(span, mode) {
                    let text = "zeroing would be as slow as writing";
                    return Err(Failure::Refused(Refusal { errno: Errno::NotSupported, text }));
                }
                self.zero(span, mode)?;
                self.settle(durable)?;
            }
            Command::Cache { span } => self.cache(span),
            Command::Status { span, one_extent, contexts } => {
                self.status(frame, span, one_extent, contexts)?;
                return Ok(true);
            }
            Command::FilteredStatus { .. } | Command::Disconnect => {}
        }
        Ok(false)
    }

    fn settle(&self, durable: bool) -> Result<()> {
        if durable { self.served.export.device.flush() } else { Ok(()) }
    }

    fn zero(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.in_strides(span, |part| self.served.export.device.write_zeroes(part, mode))
    }

    /// Does long work in parts, so that it ends soon after the client is gone.
    fn in_strides(&self, span: Span, work: impl Fn(Span) -> Result<()>) -> Result<()> {
        let mut at = span.start;
        let mut stride = FIRST_STRIDE;
        while at < span.end() {
            let part = Span::new(at, stride.min(span.end().saturating_sub(at)));
            let begun = Instant::now();
            work(part)?;
            at = part.end();
            if at >= span.end() {
                break;
            }
            if self.is_unwanted() {
                return Err(Error::new(ErrorKind::Cancelled, "nobody waits for it").at(at));
            }
            if begun.elapsed() < STRIDE_TIME {
                stride = stride.saturating_mul(2).min(LAST_STRIDE);
            }
        }
        Ok(())
    }

    /// Whether the client has gone, or the server is about to.
    fn is_unwanted(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
            || self.stopping.load(Ordering::Relaxed)
            || self.watched.is_some_and(is_gone)
    }

    /// Has the kernel read what of `span` lies in files.
    fn cache(&self, span: Span) {
        let device = &self.served.export.device;
        let mut at = span.start;
        while let Some(range) = device.file_range(at).filter(|_| at < span.end()) {
            let len = range.len.min(span.end().saturating_sub(at)).max(1);
            // What is refused changes nothing but the time of later reads.
            let _ = fadvise(range.file, range.offset, NonZeroU64::new(len), Advice::WillNeed);
            at = at.saturating_add(len);
        }
        if at < span.end() {
            let rest = Span::new(at, span.end().saturating_sub(at));
            device.advise(rest, tranship_block::Advice::WillRead);
        }
    }

    /// Sends one chunk for each context that was asked for.
    fn status(
        &self,
        frame: Frame,
        span: Span,
        one_extent: bool,
        selection: Selection,
    ) -> std::result::Result<(), Failure> {
        let most = if one_extent { 1 } else { self.limits.status_extents };
        let longest = if frame.framing == Framing::Extended { u64::MAX } else { LONGEST_COMPACT };
        let mut places = selection.places().peekable();
        let mut chunk = Vec::new();
        while let Some(place) = places.next() {
            let Some(context) = self.contexts.get(place) else { continue };
            let extents = extents(&self.served.export, *context, span, most, longest)?;
            frame.status(&mut chunk, places.peek().is_none(), context_id(place), &extents);
            self.send(&chunk, &[])?;
            chunk.clear();
        }
        Ok(())
    }

    /// Logs a failure of the device and adds the reply that tells of it.
    pub(super) fn report(&self, out: &mut Vec<u8>, frame: Frame, error: &Error) {
        if error.kind() != ErrorKind::Cancelled {
            let export = &self.served.export.name;
            tracing::warn!(export, error = %Chain(error), "request failed");
        }
        // The request was within the size that the client knows: it is the device that has
        // lost its end.
        let is_cut = self.served.export.device.size() < self.terms.size;
        let errno = match errno(error) {
            Errno::Invalid if is_cut => Errno::Io,
            errno => errno,
        };
        frame.error(out, errno, error.message(), error.offset());
    }

    pub(super) fn send(&self, head: &[u8], payload: &[u8]) -> io::Result<()> {
        self.with_output(|stream| reply::send(stream, head, payload))
    }

    /// Sends something that must not be mixed with other replies. After a failure nothing
    /// is sent any more.
    pub(super) fn with_output<T>(
        &self,
        send: impl FnOnce(&mut W) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = output.as_mut() else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        send(stream).inspect_err(|_| *output = None)
    }
}

fn errno(error: &Error) -> Errno {
    match error.kind() {
        ErrorKind::Usage => Errno::Invalid,
        ErrorKind::Denied => Errno::Permission,
        ErrorKind::NoSpace => Errno::NoSpace,
        ErrorKind::Cancelled => Errno::Shutdown,
        _ => Errno::Io,
    }
}
