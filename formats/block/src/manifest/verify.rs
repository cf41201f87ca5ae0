// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Comparing a disk with its manifest.

use super::{HashedChunk, ManifestReader, ManifestSummary, hash_chunk};
use crate::copy::default_threads;
use crate::{
    AlignedBuffer, BlockDevice, CopyObserver, Error, ErrorKind, Extents, Result, Span, is_zero,
};
use std::io::BufRead;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes without a chunk in the manifest that one thread looks at.
const LONGEST_GAP: u64 = 256 << 20;

/// How to verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyOptions {
    /// How many chunks are looked at at the same time; at least 1.
    pub threads: usize,
    /// Stops at the first chunk that differs.
    pub first_only: bool,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self { threads: default_threads(), first_only: false }
    }
}

/// What verifying found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Chunks that were looked at.
    pub chunks: u64,
    /// Chunks that differ.
    pub mismatches: u64,
    /// The first of them.
    pub first: Option<Span>,
    /// The manifest's last line; none if verifying ended before it.
    pub summary: Option<ManifestSummary>,
}

/// Compares `device` with `manifest`. The observer is told of each chunk that differs, in
/// any order, but of the lowest one in any case.
///
/// # Errors
///
/// [`ErrorKind::Corrupt`] if the disk's size is not the manifest's, and for a manifest that
/// is damaged or incomplete. [`ErrorKind::Cancelled`]; what reading reports.
pub fn verify<R: BufRead + Send>(
    device: &dyn BlockDevice,
    manifest: ManifestReader<R>,
    options: &VerifyOptions,
    observer: &dyn CopyObserver,
) -> Result<Verified> {
    let header = manifest.header().clone();
    if header.size != device.size() {
        return Err(Error::corrupt(format!(
            "disk has {} bytes, its manifest {}",
            device.size(),
            header.size
        )));
    }
    let job = Job {
        device,
        chunk: header.chunk,
        chunks: header.chunks(),
        options,
        observer,
        state: Mutex::new(State {
            manifest,
            row: None,
            next: 0,
            stopped: false,
            failure: None,
            verified: Verified { chunks: 0, mismatches: 0, first: None, summary: None },
        }),
    };
    std::thread::scope(|scope| {
        for _ in 1..options.threads.max(1) {
            scope.spawn(|| job.run());
        }
        job.run();
    });
    let mut state = job.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    match state.failure.take() {
        Some((_, error)) => Err(error),
        None => Ok(state.verified),
    }
}

/// Chunks to look at: one that is listed, or some that are not.
struct Task {
    first: u64,
    count: u64,
    row: Option<HashedChunk>,
}

struct State<R> {
    manifest: ManifestReader<R>,
    row: Option<HashedChunk>,
    next: u64,
    stopped: bool,
    failure: Option<(u64, Error)>,
    verified: Verified,
}

struct Job<'a, R> {
    device: &'a dyn BlockDevice,
    chunk: u64,
    chunks: u64,
    options: &'a VerifyOptions,
    observer: &'a dyn CopyObserver,
    state: Mutex<State<R>>,
}

impl<R: BufRead + Send> Job<'_, R> {
    fn state(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn span(&self, first: u64, count: u64) -> Span {
        let start = first.saturating_mul(self.chunk);
        let end = first.saturating_add(count).saturating_mul(self.chunk).min(self.device.size());
        Span::new(start, end.saturating_sub(start))
    }

    fn run(&self) {
        let len = usize::try_from(self.chunk).unwrap_or(usize::MAX);
        let mut buffer = AlignedBuffer::new(len);
        while let Some(task) = self.take() {
            let at = self.span(task.first, 1).start;
            match self.look(&task, &mut buffer) {
                Ok(differ) => self.finish(&task, &differ),
                Err(error) => self.fail(at, error),
            }
        }
    }

    fn fail(&self, at: u64, error: Error) {
        let mut state = self.state();
        state.stopped = true;
        if state.failure.as_ref().is_none_or(|(offset, _)| at < *offset) {
            state.failure = Some((at, error));
        }
    }

    fn take(&self) -> Option<Task> {
        let mut state = self.state();
        if state.stopped {
            return None;
        }
        match self.cut(&mut state) {
            Ok(task) => task,
            Err(error) => {
                let at = self.span(state.next, 1).start;
                drop(state);
                self.fail(at, error);
                None
            }
        }
    }

    fn cut(&self, state: &mut State<R>) -> Result<Option<Task>> {
        if self.observer.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "verifying was cancelled"));
        }
        if state.row.is_none() && state.verified.summary.is_none() {
            state.row = state.manifest.row()?;
            if state.row.is_none() {
                state.verified.summary = Some(state.manifest.summary().ok_or_else(|| {
                    Error::corrupt("manifest has no last line: it is of an unfinished copy")
                })?);
            }
        }
        if state.next >= self.chunks {
            return Ok(None);
        }
        let first = state.next;
        let row = state.row.take_if(|row| row.index == first);
        let count = if row.is_some() {
            1
        } else {
            let most = LONGEST_GAP.checked_div(self.chunk).unwrap_or(1).max(1);
            let end = state.row.map_or(self.chunks, |row| row.index);
            end.saturating_sub(first).min(most)
        };
        state.next = first.saturating_add(count);
        Ok(Some(Task { first, count, row }))
    }

    /// The chunks of a task that differ.
    fn look(&self, task: &Task, buffer: &mut [u8]) -> Result<Vec<Span>> {
        let span = self.span(task.first, task.count);
        if let Some(row) = task.row {
            let bytes = self.read(span, buffer)?;
            let hashes = hash_chunk(self.chunk, span, std::iter::once(span), |_| bytes);
            return Ok(if hashes == [row] { Vec::new() } else { vec![span] });
        }
        let mut differ: Vec<Span> = Vec::new();
        for run in Extents::new(self.device, span) {
            let (run, kind) = run?;
            let mut at = if kind.reads_zero() { run.end() } else { run.start };
            while at < run.end() {
                let chunk = self.span(at.checked_div(self.chunk).unwrap_or(0), 1);
                let part = Span::new(at, chunk.end().min(run.end()).saturating_sub(at));
                if differ.last() != Some(&chunk) && !is_zero(self.read(part, buffer)?) {
                    differ.push(chunk);
                }
                at = part.end();
            }
        }
        Ok(differ)
    }

    fn read<'b>(&self, span: Span, buffer: &'b mut [u8]) -> Result<&'b [u8]> {
        let len = usize::try_from(span.len).unwrap_or(usize::MAX);
        let bytes = buffer.get_mut(..len).unwrap_or_default();
        self.device.read_at(bytes, span.start).map_err(|error| {
            Error::new(error.kind(), "reading the disk failed").at(span.start).because(error)
        })?;
        Ok(bytes)
    }

    fn finish(&self, task: &Task, differ: &[Span]) {
        let mut state = self.state();
        let verified = &mut state.verified;
        verified.chunks = verified.chunks.saturating_add(task.count);
        for span in differ {
            verified.mismatches = verified.mismatches.saturating_add(1);
            if verified.first.is_none_or(|first| span.start < first.start) {
                verified.first = Some(*span);
            }
            self.observer.mismatch(*span);
        }
        let done = verified.chunks.saturating_mul(self.chunk).min(self.device.size());
        self.observer.progress(done, self.device.size());
        if self.options.first_only && !differ.is_empty() {
            state.stopped = true;
        }
    }
}
