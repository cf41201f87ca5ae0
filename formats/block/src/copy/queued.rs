// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copying from a source that answers many requests at a time: more are in flight than
//! there are threads, and each thread works on whatever answer comes next.

use super::failed;
use super::job::Job;
use super::piece::{Done, length, part, part_mut, step};
use super::runs::{find_zeroes, plan};
use super::work::{Kind, Piece, Run};
use crate::{ReadQueue, Result, Span};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One way to the source, and what is asked for there.
struct Lane<'a> {
    queue: Box<dyn ReadQueue + 'a>,
    /// Reads in flight at most.
    window: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the starts of what is read, the starts of their pieces.
    reads: HashMap<u64, u64>,
    pieces: HashMap<u64, Loading>,
    in_flight: usize,
}

/// A piece whose bytes are not all there.
struct Loading {
    piece: Piece,
    /// What is read and what is not.
    runs: Vec<Run>,
    /// Reads that are still under way.
    missing: usize,
    /// The bytes from the piece's start on, if they come in several parts.
    bytes: Vec<u8>,
    done: Done,
}

/// Copies everything with so many threads.
pub(super) fn run(job: &Job<'_>, queues: Vec<Box<dyn ReadQueue + '_>>, threads: usize) {
    let each = job.options.in_flight.checked_div(queues.len()).unwrap_or(0).max(1);
    let lane = |queue| Lane { queue, window: each, state: Mutex::default() };
    let lanes: Vec<Lane<'_>> = queues.into_iter().map(lane).collect();
    let threads = threads.max(lanes.len());
    std::thread::scope(|scope| {
        for lane in lanes.iter().cycle().take(threads) {
            scope.spawn(|| lane.run(job));
        }
    });
}

impl Lane<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what comes until there is nothing more. Whoever fails goes on as well, so that
    /// nothing stays in flight.
    fn run(&self, job: &Job<'_>) {
        let mut buffer = Vec::new();
        loop {
            let (is_over, others) = self.refill(job);
            for (piece, runs) in others {
                job.settle(piece.span(), |job| job.deliver(&piece, runs, 0, &[], Done::default()));
            }
            let Some((span, read)) = self.queue.next(&mut buffer) else {
                if is_over {
                    return;
                }
                // Another thread has the last answer, and is about to ask for more.
                std::thread::yield_now();
                continue;
            };
            let Some((start, loading)) = self.arrived(span, &buffer, &read) else { continue };
            let piece = loading.piece.span();
            if job.has_use_for(piece) {
                job.settle(piece, |job| {
                    read.map_err(|error| failed("reading the source failed", span, error))?;
                    let Loading { piece, runs, bytes, done, .. } = loading;
                    let bytes = if bytes.is_empty() { &mut buffer } else { &mut { bytes } };
                    let runs = job.look(runs, start, bytes);
                    job.deliver(&piece, runs, start, bytes, done)
                });
            }
        }
    }

    /// Asks for more once half of what may be in flight is there. Whether there is nothing
    /// more to ask for, and pieces of which nothing has to be read.
    fn refill(&self, job: &Job<'_>) -> (bool, Vec<(Piece, Vec<Run>)>) {
        let mut others = Vec::new();
        // Locked until the requests are out: whoever waits for an answer finds them.
        let mut state = self.state();
        if state.in_flight > self.window.checked_div(2).unwrap_or(0) {
            return (false, others);
        }
        let mut spans = Vec::new();
        let mut is_over = false;
        while state.in_flight.saturating_add(spans.len()) < self.window && others.is_empty() {
            let is_idle = state.in_flight == 0 && spans.is_empty();
            let Some(piece) = (if is_idle { job.take() } else { job.take_now() }) else {
                is_over = is_idle || job.is_over();
                break;
            };
            let reads = state.add(job, piece, &mut others);
            spans.extend(reads);
        }
        state.in_flight = state.in_flight.saturating_add(spans.len());
        if let Err(error) = self.queue.start(&spans) {
            state.in_flight = state.in_flight.saturating_sub(spans.len());
            for span in &spans {
                if let Some(loading) =
                    state.reads.remove(&span.start).and_then(|piece| state.pieces.remove(&piece))
                {
                    let text = error.message().to_owned();
                    let error = crate::Error::new(error.kind(), text);
                    let error = failed("reading the source failed", *span, error);
                    job.settle(loading.piece.span(), |_| Err(error));
                }
            }
        }
        (is_over, others)
    }

    /// Takes an answer; the piece that is complete with it, and where its bytes start.
    fn arrived(&self, span: Span, bytes: &[u8], read: &Result<()>) -> Option<(u64, Loading)> {
        let mut state = self.state();
        state.in_flight = state.in_flight.saturating_sub(1);
        let start = state.reads.remove(&span.start)?;
        let loading = state.pieces.get_mut(&start)?;
        loading.missing = loading.missing.saturating_sub(1);
        let sum = &mut loading.done.copied.bytes_read;
        *sum = sum.saturating_add(span.len);
        let is_whole = loading.bytes.is_empty();
        if !is_whole && read.is_ok() {
            let len = usize::try_from(span.len).unwrap_or(usize::MAX);
            let target = part_mut(&mut loading.bytes, start, span);
            if let Some(bytes) = bytes.get(..len).filter(|bytes| bytes.len() == target.len()) {
                target.copy_from_slice(bytes);
            }
        }
        // One that failed is told at once; what else comes of its piece is of no use.
        if loading.missing > 0 && read.is_ok() {
            return None;
        }
        let loading = state.pieces.remove(&start)?;
        Some((if is_whole { span.start } else { start }, loading))
    }
}

impl State {
    /// Plans a piece; what has to be read of it.
    fn add(
        &mut self,
        job: &Job<'_>,
        piece: Piece,
        others: &mut Vec<(Piece, Vec<Run>)>,
    ) -> Vec<Span> {
        let size = job.source.size();
        let is_single = matches!(piece.runs.as_slice(), [run] if run.kind != Kind::Data);
        let runs = if is_single {
            piece.runs.clone()
        } else {
            plan(&piece, job.block, job.options.zero_block)
        };
        let most = u64::try_from(step(job.options)).unwrap_or(u64::MAX);
        let mut reads = Vec::new();
        for run in runs.iter().filter(|run| run.kind == Kind::Data) {
            let end = run.span.end().min(size);
            let mut at = run.span.start;
            while at < end {
                let now = Span::new(at, end.saturating_sub(at).min(most));
                reads.push(now);
                at = now.end();
            }
        }
        if reads.is_empty() {
            others.push((piece, runs));
            return reads;
        }
        let span = piece.span();
        let len = if reads.len() > 1 { usize::try_from(span.len).unwrap_or(0) } else { 0 };
        self.reads.extend(reads.iter().map(|read| (read.start, span.start)));
        let (missing, bytes) = (reads.len(), vec![0; len]);
        let loading = Loading { piece, runs, missing, bytes, done: Done::default() };
        self.pieces.insert(span.start, loading);
        reads
    }
}

impl Job<'_> {
    /// Finds the zeroes in what was read: bytes from `start` on.
    fn look(&self, runs: Vec<Run>, start: u64, bytes: &mut Vec<u8>) -> Vec<Run> {
        let mut found = Vec::new();
        for run in runs {
            if run.kind != Kind::Data {
                found.push(run);
                continue;
            }
            self.clear_past_end(run.span, start, bytes);
            let bytes = part(bytes, start, run.span);
            find_zeroes(&mut found, bytes, run.span, self.block, self.options.zero_block);
        }
        found
    }

    /// Whole blocks may reach past the source's end, where nothing was read.
    fn clear_past_end(&self, span: Span, start: u64, bytes: &mut Vec<u8>) {
        let size = self.source.size();
        if span.end() <= size {
            return;
        }
        let whole = usize::try_from(span.end().saturating_sub(start)).unwrap_or(usize::MAX);
        if length(bytes) < span.end().saturating_sub(start) {
            bytes.resize(whole, 0);
        }
        let from = size.max(span.start);
        part_mut(bytes, start, Span::new(from, span.end().saturating_sub(from))).fill(0);
    }
}
