// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one thread does with one piece.

use super::job::Job;
use super::runs::{find_zeroes, plan};
use super::salvage::read_around_damage;
use super::work::{Kind, Piece, Run};
use super::{Copied, CopyOptions, failed};
use crate::manifest::hash_chunk;
use crate::{BlockDevice, Error, FileRange, HashedChunk, Result, Span, Zeroing};
use std::sync::atomic::Ordering;

/// The shortest reads.
const SHORTEST_STEP: u64 = 4096;

/// Bytes that are read at a time.
pub(super) fn step(options: &CopyOptions) -> usize {
    usize::try_from(options.step.max(SHORTEST_STEP)).unwrap_or(usize::MAX)
}

/// A piece that is copied.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) copied: Copied,
    pub(super) hashes: Vec<HashedChunk>,
    pub(super) unreadable: Vec<(Span, Error)>,
}

/// Reads with the error that a copy reports, or around damage if that is wanted.
pub(super) struct Reader<'a> {
    pub(super) source: &'a dyn BlockDevice,
    /// What unreadable ranges are narrowed to, if they shall be survived.
    pub(super) salvage: Option<u64>,
}

impl Reader<'_> {
    /// Fills `buf`, with zeroes past the source's end.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64, done: &mut Done) -> Result<()> {
        let left = self.source.size().saturating_sub(offset);
        let there = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let Some((buf, past)) = buf.split_at_mut_checked(there) else { return Ok(()) };
        past.fill(0);
        if buf.is_empty() {
            return Ok(());
        }
        let span = Span::new(offset, length(buf));
        let read = match self.salvage {
            Some(unit) => read_around_damage(self.source, buf, offset, unit, done),
            None => self.source.read_at(buf, offset),
        };
        done.copied.bytes_read = done.copied.bytes_read.saturating_add(span.len);
        read.map_err(|error| failed("reading the source failed", span, error))
    }
}

/// The bytes of `span` in a buffer that begins with byte `start` of the disk.
pub(super) fn part(buffer: &[u8], start: u64, span: Span) -> &[u8] {
    let from = usize::try_from(span.start.saturating_sub(start)).unwrap_or(usize::MAX);
    let len = usize::try_from(span.len).unwrap_or(usize::MAX);
    buffer.get(from..).and_then(|tail| tail.get(..len)).unwrap_or_default()
}

pub(super) fn part_mut(buffer: &mut [u8], start: u64, span: Span) -> &mut [u8] {
    let from = usize::try_from(span.start.saturating_sub(start)).unwrap_or(usize::MAX);
    let len = usize::try_from(span.len).unwrap_or(usize::MAX);
    buffer.get_mut(from..).and_then(|tail| tail.get_mut(..len)).unwrap_or_default()
}

pub(super) fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Reads the data of a piece into `buffer` and tells what is left to be written.
pub(super) fn load(
    reader: &Reader<'_>,
    piece: &Piece,
    buffer: &mut [u8],
    block: u64,
    options: &CopyOptions,
    done: &mut Done,
) -> Result<Vec<Run>> {
    let start = piece.span().start;
    let zero_block = options.zero_block;
    let mut found = Vec::new();
    for run in plan(piece, block, zero_block) {
        if run.kind != Kind::Data {
            found.push(run);
            continue;
        }
        let mut at = run.span.start;
        for bytes in part_mut(buffer, start, run.span).chunks_mut(step(options)) {
            let span = Span::new(at, length(bytes));
            reader.read(bytes, at, done)?;
            find_zeroes(&mut found, bytes, span, block, zero_block);
            at = span.end();
        }
    }
    Ok(found)
}

impl Job<'_> {
    /// Copies a piece; `None` if its turn never came.
    pub(super) fn copy_piece(&self, piece: &Piece, buffer: &mut [u8]) -> Result<Option<Done>> {
        let mut done = Done::default();
        let options = self.options;
        let reader = Reader {
            source: self.source,
            salvage: options.salvage.then_some(options.zero_block.clamp(512, 64 << 10)),
        };
        let single = matches!(piece.runs.as_slice(), [run] if run.kind != Kind::Data);
        let offload = self.offload.load(Ordering::Relaxed);
        let runs = if single {
            piece.runs.clone()
        } else if offload {
            plan(piece, self.block, 0)
        } else {
            load(&reader, piece, buffer, self.block, options, &mut done)?
        };
        if offload && !single {
            return self.copy_inside_kernel(&reader, piece.span(), runs, buffer, done);
        }
        self.deliver(piece, runs, piece.span().start, buffer, done)
    }

    /// Copies a piece as far as possible without its bytes passing through here.
    fn copy_inside_kernel(
        &self,
        reader: &Reader<'_>,
        span: Span,
        mut runs: Vec<Run>,
        buffer: &mut [u8],
        mut done: Done,
    ) -> Result<Option<Done>> {
        if let Some(turn) = &self.turn
            && !turn.wait(span)
        {
            return Ok(None);
        }
        for run in &mut runs {
            if run.kind == Kind::Data {
                run.span = self.offload(run.span, &mut done)?;
                for bytes in part_mut(buffer, span.start, run.span).chunks_mut(step(self.options)) {
                    reader.read(bytes, run.span.start, &mut done)?;
                    let now = Span::new(run.span.start, length(bytes));
                    self.write(bytes, now, &mut done)?;
                    run.span = Span::new(now.end(), run.span.len.saturating_sub(now.len));
                }
            } else {
                self.write_run(*run, &[], &mut done)?;
            }
        }
        if let Some(turn) = &self.turn {
            turn.passed(span);
        }
        Ok(Some(done))
    }

    /// Hashes and writes a piece whose data is in `buffer`, which begins with byte `start`
    /// of the disk; `None` if its turn never came.
    pub(super) fn deliver(
        &self,
        piece: &Piece,
        runs: Vec<Run>,
        start: u64,
        buffer: &[u8],
        mut done: Done,
    ) -> Result<Option<Done>> {
        let span = piece.span();
        let single = matches!(piece.runs.as_slice(), [run] if run.kind != Kind::Data);
        if let Some(chunk) = self.options.hash.filter(|_| !single) {
            done.hashes = self.hash(chunk, span, &runs, (start, buffer));
        }
        if let Some(turn) = &self.turn
            && !turn.wait(span)
        {
            return Ok(None);
        }
        for run in runs {
            self.write_run(run, part(buffer, start, run.span), &mut done)?;
        }
        if let Some(turn) = &self.turn {
            turn.passed(span);
        }
        Ok(Some(done))
    }

    fn write_run(&self, run: Run, bytes: &[u8], done: &mut Done) -> Result<()> {
        match run.kind {
            Kind::Data => self.write(bytes, run.span, done),
            Kind::Zero => self.zero(run.span, done),
            Kind::Skip => {
                let sum = &mut done.copied.bytes_skipped;
                *sum = sum.saturating_add(run.span.len);
                Ok(())
            }
        }
    }

    /// Lets the kernel copy as much of the front of `span` as it can, and returns the rest.
    fn offload(&self, mut span: Span, done: &mut Done) -> Result<Span> {
        while !span.is_empty() && self.offload.load(Ordering::Relaxed) {
            let left = self.source.size().saturating_sub(span.start);
            let Some(range) = self.source.file_range(span.start).filter(|_| left > 0) else {
                break;
            };
            let len = range.len.min(span.len).min(left);
            let copied = self
                .target
                .write_from_file(span.start, &FileRange { len, ..range })
                .map_err(|error| failed("copying inside the kernel failed", span, error))?;
            if !copied || len == 0 {
                self.offload.store(false, Ordering::Relaxed);
                break;
            }
            done.copied.bytes_offloaded = done.copied.bytes_offloaded.saturating_add(len);
            span = Span::new(span.start.saturating_add(len), span.len.saturating_sub(len));
        }
        Ok(span)
    }

    fn write(&self, bytes: &[u8], span: Span, done: &mut Done) -> Result<()> {
        done.copied.bytes_written = done.copied.bytes_written.saturating_add(span.len);
        self.target
            .write_at(bytes, span.start)
            .map_err(|error| failed("writing the target failed", span, error))
    }

    fn zero(&self, span: Span, done: &mut Done) -> Result<()> {
        done.copied.bytes_zero = done.copied.bytes_zero.saturating_add(span.len);
        let mode = if self.options.allocate {
            Zeroing::KeepAllocated
        } else if self.options.target_is_zero {
            return Ok(());
        } else {
            Zeroing::MayUnmap
        };
        self.target
            .write_zeroes(span, mode)
            .map_err(|error| failed("zeroing the target failed", span, error))
    }

    /// The hashes of a piece's chunks that are not all zero.
    fn hash(
        &self,
        chunk: u64,
        piece: Span,
        runs: &[Run],
        (start, buffer): (u64, &[u8]),
    ) -> Vec<HashedChunk> {
        let end = piece.end().min(self.source.size());
        let data = runs.iter().filter(|run| run.kind == Kind::Data).map(|run| run.span);
        hash_chunk(chunk, Span::new(piece.start, end.saturating_sub(piece.start)), data, |span| {
            part(buffer, start, span)
        })
    }
}
