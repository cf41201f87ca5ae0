// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copying one device onto another: only what is there, with every core, restartable.

mod work;

use crate::{BlockDevice, Error, ErrorKind, Result, Span, Zeroing, is_zero};
use std::sync::{Mutex, MutexGuard, PoisonError};
use work::{Kind, Work};

/// How to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOptions {
    /// First byte to copy; everything below counts as done by an earlier run.
    pub start: u64,
    /// How many pieces are in flight at the same time; at least 1.
    pub threads: usize,
    /// Bytes of one piece; rounded up to whole preferred blocks of the target.
    pub chunk: u64,
    /// The target reads as zero from `start` onward, so zeroes need not be written.
    pub target_is_zero: bool,
    /// Looks for zeroes in the data, in blocks of the target.
    pub detect_zeroes: bool,
    /// Flushes the target and reports a checkpoint each time this many bytes more are
    /// done; 0 never does.
    pub checkpoint_every: u64,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            start: 0,
            threads: 4,
            chunk: 1 << 20,
            target_is_zero: false,
            detect_zeroes: true,
            checkpoint_every: 0,
        }
    }
}

/// What somebody who waits for a copy is told. Every call can come from any thread,
/// but never two at the same time, and holds up the copy.
pub trait CopyObserver: Sync {
    /// `done` of `total` bytes need no more work; `done` never goes back.
    fn progress(&self, _done: u64, _total: u64) {}

    /// Everything below `offset` is on stable storage: a copy may start again there.
    fn checkpoint(&self, _offset: u64) {}

    /// Asked before each piece; once it is true the copy ends.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Nobody waits.
impl CopyObserver for () {}

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes written to the target.
    pub bytes_written: u64,
    /// Bytes that are zero and were not written: known so from the source's extents,
    /// found so in its data, or behind the source's end.
    pub bytes_zero: u64,
}

impl Copied {
    fn add(&mut self, other: Self) {
        self.bytes_read = self.bytes_read.saturating_add(other.bytes_read);
        self.bytes_written = self.bytes_written.saturating_add(other.bytes_written);
        self.bytes_zero = self.bytes_zero.saturating_add(other.bytes_zero);
    }
}

/// Copies `source` onto `target` and flushes the target.
///
/// The target may be larger; what it has behind the source's end becomes zero. Memory is
/// one chunk per thread, however large the disks are.
///
/// # Errors
///
/// [`ErrorKind::Usage`] if the target is smaller than the source, or if `start` lies
/// behind its end. [`ErrorKind::Cancelled`] if the observer said so. Otherwise the
/// failure with the lowest offset; its text tells the side, and its cause what happened.
/// In every case the target holds what was done until then, and the last checkpoint
/// stands.
pub fn copy(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    options: &CopyOptions,
    observer: &dyn CopyObserver,
) -> Result<Copied> {
    let end = if options.target_is_zero { source.size() } else { target.size() };
    if target.size() < source.size() {
        return Err(Error::usage(format!(
            "target has {} bytes, expected at least the source's {}",
            target.size(),
            source.size()
        )));
    }
    if options.start > end {
        return Err(Error::usage(format!("copy cannot start behind its end at byte {end}"))
            .at(options.start));
    }
    let block = u64::from(target.preferred_block()).max(4096);
    let chunk = options.chunk.max(1).checked_next_multiple_of(block).unwrap_or(block);
    let job = Job {
        source,
        target,
        options,
        observer,
        block,
        chunk,
        end,
        work: Mutex::new(Work::new(Span::new(options.start, end.saturating_sub(options.start)))),
        checkpoint: Mutex::new(options.start),
    };
    std::thread::scope(|scope| {
        for _ in 1..options.threads.max(1) {
            scope.spawn(|| job.run());
        }
        job.run();
    });
    job.finish()
}

struct Job<'a> {
    source: &'a dyn BlockDevice,
    target: &'a dyn BlockDevice,
    options: &'a CopyOptions,
    observer: &'a dyn CopyObserver,
    /// Zeroes are looked for in whole multiples of this.
    block: u64,
    chunk: u64,
    end: u64,
    work: Mutex<Work>,
    /// Where the last checkpoint was; locked while one is made.
    checkpoint: Mutex<u64>,
}

impl Job<'_> {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes pieces in ascending order until there are no more or somebody failed.
    fn run(&self) {
        let mut buffer = Vec::new();
        loop {
            let piece = {
                let mut work = self.work();
                if !work.is_stopped() && self.observer.is_cancelled() {
                    work.cancel();
                }
                work.next(self.source, self.chunk)
            };
            let Some((span, kind)) = piece else {
                return;
            };
            match self.copy_piece(span, kind, &mut buffer) {
                Ok(copied) => {
                    let mut work = self.work();
                    work.finish(span, copied);
                    let done = self.options.start.saturating_add(work.bytes_done());
                    self.observer.progress(done, self.end);
                }
                Err(error) => {
                    self.work().fail(span, error);
                    return;
                }
            }
            if let Err(error) = self.checkpoint_if_due() {
                self.work().fail(span, error);
                return;
            }
        }
    }

    fn copy_piece(&self, span: Span, kind: Kind, buffer: &mut Vec<u8>) -> Result<Copied> {
        if kind == Kind::Zero {
            self.zero(span)?;
            return Ok(Copied { bytes_zero: span.len, ..Copied::default() });
        }
        let len = usize::try_from(span.len)
            .map_err(|_| Error::usage("chunk does not fit into memory").at(span.start))?;
        buffer.resize(len, 0);
        self.source
            .read_at(buffer, span.start)
            .map_err(|error| failed("reading the source failed", span, error))?;
        let mut copied = Copied { bytes_read: span.len, ..Copied::default() };
        if !self.options.detect_zeroes {
            self.write(buffer, span)?;
            copied.bytes_written = span.len;
            return Ok(copied);
        }
        let mut rest = buffer.as_slice();
        let mut at = span.start;
        while !rest.is_empty() {
            let (run, zero) = self.run_of_blocks(rest, at);
            let Some((bytes, tail)) = rest.split_at_checked(run) else { break };
            let part = Span::new(at, u64::try_from(run).unwrap_or(u64::MAX));
            if zero {
                self.zero(part)?;
                copied.bytes_zero = copied.bytes_zero.saturating_add(part.len);
            } else {
                self.write(bytes, part)?;
                copied.bytes_written = copied.bytes_written.saturating_add(part.len);
            }
            rest = tail;
            at = part.end();
        }
        Ok(copied)
    }

    /// How many bytes from the start of `bytes`, at `offset` of the target, lie in blocks
    /// that are all zero or all not, and which of the two.
    fn run_of_blocks(&self, bytes: &[u8], offset: u64) -> (usize, bool) {
        let mut run = 0usize;
        let mut kind = None;
        let mut at = offset;
        while let Some(rest) = bytes.get(run..).filter(|rest| !rest.is_empty()) {
            let into_block = at.checked_rem(self.block).unwrap_or(0);
            let to_end = usize::try_from(self.block.saturating_sub(into_block));
            let block = rest.get(..to_end.unwrap_or(usize::MAX)).unwrap_or(rest);
            let zero = is_zero(block);
            if *kind.get_or_insert(zero) != zero {
                break;
            }
            run = run.saturating_add(block.len());
            at = at.saturating_add(u64::try_from(block.len()).unwrap_or(u64::MAX));
        }
        (run, kind.unwrap_or(false))
    }

    fn write(&self, bytes: &[u8], span: Span) -> Result<()> {
        self.target
            .write_at(bytes, span.start)
            .map_err(|error| failed("writing the target failed", span, error))
    }

    fn zero(&self, span: Span) -> Result<()> {
        if self.options.target_is_zero {
            return Ok(());
        }
        self.target
            .write_zeroes(span, Zeroing::MayUnmap)
            .map_err(|error| failed("zeroing the target failed", span, error))
    }

    /// Makes a checkpoint if enough is done and nobody else is at it.
    fn checkpoint_if_due(&self) -> Result<()> {
        let every = self.options.checkpoint_every;
        if every == 0 {
            return Ok(());
        }
        let Ok(mut last) = self.checkpoint.try_lock() else {
            return Ok(());
        };
        let done = self.work().low_watermark();
        if done.saturating_sub(*last) < every {
            return Ok(());
        }
        self.make_checkpoint(&mut last, done)
    }

    /// Flushes and reports `done`, which must have been finished before the flush.
    fn make_checkpoint(&self, last: &mut u64, done: u64) -> Result<()> {
        self.target.flush().map_err(|error| {
            Error::new(error.kind(), "flushing the target failed").because(error)
        })?;
        if self.options.checkpoint_every > 0 && done > *last {
            let _quiet = self.work();
            self.observer.checkpoint(done);
            *last = done;
        }
        Ok(())
    }

    /// The end of a copy, good or bad; all threads are gone.
    fn finish(self) -> Result<Copied> {
        let work = self.work();
        let done = work.low_watermark();
        drop(work);
        let mut last = *self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner);
        let flushed = self.make_checkpoint(&mut last, done);
        let mut work = self.work();
        match work.take_failure() {
            // What stopped the copy is worth more than that the flush failed as well.
            Some(failure) => Err(failure),
            None if work.is_stopped() => {
                Err(Error::new(ErrorKind::Cancelled, "copy was cancelled").at(done))
            }
            None => flushed.map(|()| work.copied()),
        }
    }
}

fn failed(what: &str, span: Span, cause: Error) -> Error {
    // The cause's own offset may be one of a file: this one is the disk's.
    Error::new(cause.kind(), what).at(span.start).because(cause)
}

#[cfg(test)]
mod tests;
