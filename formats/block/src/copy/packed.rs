// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copying into an image of compressed units: every core reads and packs, and the results
//! are stored in order by whoever has the one that is next.

use super::piece::{Done, Reader, load, part};
use super::runs::plan;
use super::work::{Kind, Piece, Plan, Run, Work};
use super::{Copied, CopyObserver, CopyOptions, check, failed, grid};
use crate::manifest::hash_chunk;
use crate::{
    Advice, AlignedBuffer, BlockDevice, Error, ErrorKind, PackedTarget, PackedUnit, Result, Span,
};
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes of a piece, if units are not larger.
const LONGEST_CHUNK: u64 = 2 << 20;

/// Packed bytes that may wait for a slower piece below them.
const MOST_WAITING: usize = 16 << 20;

/// Copies `source` into `target`, unit by unit, and finishes the target.
///
/// Units that are all zero are not stored, unless `zero_block` is 0 and the source does
/// not know them as zeroes. Of the options, `target_is_zero`, `ordered`, `offload` and
/// `drop_cache` for the target mean nothing here: such an image is always new, written in
/// order, and its bytes are not those of the disk. Memory is two chunks of at most 2 MiB
/// (or two units) for each thread, and 16 MiB.
///
/// # Errors
///
/// As [`super::copy`]; [`ErrorKind::Usage`] for `start`, `checkpoint_every` and `allocate`
/// as well, which such an image cannot do.
pub fn copy_packed(
    source: &dyn BlockDevice,
    target: &dyn PackedTarget,
    options: &CopyOptions,
    observer: &dyn CopyObserver,
) -> Result<Copied> {
    if target.size() < source.size() {
        return Err(Error::usage(format!(
            "target has {} bytes, expected at least the source's {}",
            target.size(),
            source.size()
        )));
    }
    if options.start > 0 || options.checkpoint_every > 0 || options.allocate {
        return Err(Error::usage(
            "a packed image is written in one go, and gives storage to no zeroes",
        ));
    }
    check(&CopyOptions { target_is_zero: false, ..*options }, source.size())?;
    let unit = u64::from(target.unit()).max(512);
    let end = if options.deepest.is_some() {
        // The backing image would show behind the source's end.
        target.size()
    } else {
        source.size().checked_next_multiple_of(unit).unwrap_or(u64::MAX).min(target.size())
    };
    let chunk = options.chunk.min(LONGEST_CHUNK);
    let grid = grid(&CopyOptions { chunk, ..*options }, unit);
    let CopyOptions { start, deepest, salvage, extents, .. } = *options;
    let job = Job {
        source,
        target,
        options,
        observer,
        unit,
        grid,
        end,
        work: Mutex::new(Work::new(Plan {
            start,
            end,
            grid,
            deepest,
            // What is not stored shows the backing image: zeroes over it have to be.
            zeroes_are_data: deepest.is_some(),
            salvage,
            extents,
        })),
        store: Mutex::new(Store::default()),
        stored: Condvar::new(),
    };
    source.advise(Span::new(0, source.size()), Advice::WillRead);
    std::thread::scope(|scope| {
        for _ in 1..options.threads.max(1) {
            scope.spawn(|| job.run());
        }
        job.run();
    });
    let mut work = job.work();
    if let Some(error) = work.take_failure() {
        return Err(error);
    }
    if work.is_stopped() {
        let done = work.low_watermark();
        return Err(Error::new(ErrorKind::Cancelled, "copy was cancelled").at(done));
    }
    target
        .finish()
        .map_err(|error| Error::new(error.kind(), "finishing the target failed").because(error))?;
    Ok(work.copied())
}

/// A piece that is ready to be stored.
#[derive(Debug)]
struct Packed {
    span: Span,
    arena: Vec<u8>,
    units: Vec<PackedUnit>,
    done: Done,
}

#[derive(Debug, Default)]
struct Store {
    /// Everything below is stored.
    next: u64,
    ready: BTreeMap<u64, Packed>,
    waiting: usize,
    /// Whether somebody is storing.
    busy: bool,
    /// Arenas to be used again.
    spare: Vec<Vec<u8>>,
}

struct Job<'a> {
    source: &'a dyn BlockDevice,
    target: &'a dyn PackedTarget,
    options: &'a CopyOptions,
    observer: &'a dyn CopyObserver,
    unit: u64,
    grid: u64,
    end: u64,
    work: Mutex<Work>,
    store: Mutex<Store>,
    stored: Condvar,
}

impl Job<'_> {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut buffer = AlignedBuffer::new(usize::try_from(self.grid).unwrap_or(usize::MAX));
        while let Some((piece, arena)) = self.take() {
            let span = piece.span();
            let result =
                self.pack(&piece, &mut buffer, arena).and_then(|packed| self.commit(packed));
            if let Err(error) = result {
                // What was stored last may have been another thread's piece.
                let at = Span::new(error.offset().unwrap_or(span.start), 0);
                // Under this lock, so that nobody starts to wait afterwards.
                let _store = self.store();
                self.work().fail(at, error);
                self.stored.notify_all();
                return;
            }
        }
    }

    fn take(&self) -> Option<(Piece, Vec<u8>)> {
        let mut store = self.store();
        while store.waiting > MOST_WAITING && !self.work().is_stopped() {
            store = self.stored.wait(store).unwrap_or_else(PoisonError::into_inner);
        }
        let arena = store.spare.pop().unwrap_or_default();
        drop(store);
        let mut work = self.work();
        if !work.is_stopped() && self.observer.is_cancelled() {
            work.cancel();
            drop(work);
            // Nobody waits for ever for what will not come.
            let _store = self.store();
            self.stored.notify_all();
            return None;
        }
        work.next(self.source).map(|piece| (piece, arena))
    }

    fn pack(&self, piece: &Piece, buffer: &mut [u8], mut arena: Vec<u8>) -> Result<Packed> {
        let options = self.options;
        let span = piece.span();
        let mut done = Done::default();
        let mut units = Vec::new();
        let reader = Reader {
            source: self.source,
            salvage: options.salvage.then_some(options.zero_block.clamp(512, 64 << 10)),
        };
        let single = matches!(piece.runs.as_slice(), [run] if run.kind != Kind::Data);
        let least = u64::from(options.zero_block > 0 && options.deepest.is_none());
        let finding = CopyOptions { zero_block: least, ..*options };
        let runs = if single {
            piece.runs.clone()
        } else {
            let runs = load(&reader, piece, buffer, self.unit, &finding, &mut done)?;
            // It looks for zeroes in steps that a unit may be longer than.
            plan(&Piece { runs }, self.unit, 0)
        };
        if let Some(chunk) = options.hash.filter(|_| !single) {
            let end = self.source.size().min(span.end());
            let there = Span::new(span.start, end.saturating_sub(span.start));
            let data = runs.iter().filter(|run| run.kind == Kind::Data).map(|run| run.span);
            done.hashes = hash_chunk(chunk, there, data, |data| part(buffer, span.start, data));
        }
        for run in &runs {
            let sum = match run.kind {
                Kind::Data => &mut done.copied.bytes_written,
                Kind::Zero => &mut done.copied.bytes_zero,
                Kind::Skip => &mut done.copied.bytes_skipped,
            };
            *sum = sum.saturating_add(run.span.len);
            self.pack_run(*run, span.start, buffer, &mut arena, &mut units)?;
        }
        Ok(Packed { span, arena, units, done })
    }

    fn pack_run(
        &self,
        run: Run,
        start: u64,
        buffer: &[u8],
        arena: &mut Vec<u8>,
        units: &mut Vec<PackedUnit>,
    ) -> Result<()> {
        if run.kind != Kind::Data {
            return Ok(());
        }
        let len = usize::try_from(self.unit).unwrap_or(usize::MAX);
        let mut offset = run.span.start;
        for bytes in part(buffer, start, run.span).chunks(len) {
            let before = arena.len();
            let encoding = self
                .target
                .pack(bytes, arena)
                .map_err(|error| failed("packing a unit failed", Span::new(offset, 0), error))?;
            let len = arena.len().saturating_sub(before);
            units.push(PackedUnit { offset, len, encoding });
            offset = offset.saturating_add(self.unit);
        }
        Ok(())
    }

    /// Stores `packed` and what waits for it, or leaves it to whoever has the piece below.
    fn commit(&self, packed: Packed) -> Result<()> {
        let mut store = self.store();
        store.waiting = store.waiting.saturating_add(packed.arena.len());
        store.ready.insert(packed.span.start, packed);
        if store.busy {
            return Ok(());
        }
        store.busy = true;
        let mut result = Ok(());
        while let Some(mut packed) = {
            let next = store.next;
            store.ready.remove(&next)
        } {
            drop(store);
            if !packed.units.is_empty() {
                result = self
                    .target
                    .store(&packed.arena, &packed.units)
                    .map_err(|error| failed("writing the target failed", packed.span, error));
            }
            if result.is_ok() {
                self.finish(packed.span, std::mem::take(&mut packed.done));
            }
            store = self.store();
            store.waiting = store.waiting.saturating_sub(packed.arena.len());
            if result.is_err() {
                break;
            }
            store.next = packed.span.end();
            packed.arena.clear();
            store.spare.push(packed.arena);
            self.stored.notify_all();
        }
        store.busy = false;
        result
    }

    fn finish(&self, span: Span, done: Done) {
        let mut work = self.work();
        for (span, error) in &done.unreadable {
            self.observer.unreadable(*span, error);
        }
        work.finish(span, done.copied, done.hashes, |chunk| self.observer.hashed(chunk));
        self.observer.progress(work.bytes_done(), self.end);
        drop(work);
        if self.options.drop_cache {
            self.source.advise(span, Advice::DropCache);
        }
    }
}
