// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The threads of a copy, and what they share.

use super::piece::Done;
use super::queued;
use super::turn::Turn;
use super::work::{Piece, Plan, Work};
use super::{Copied, CopyObserver, CopyOptions, grid};
use crate::{Advice, AlignedBuffer, BlockDevice, Error, ErrorKind, Result, Span};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes after which the page cache is told what became of them.
const CACHE_WINDOW: u64 = 32 << 20;

/// Pieces with hashes that may wait for a slower one below them.
const MOST_WAITING: usize = 4096;

pub(super) struct Job<'a> {
    pub(super) source: &'a dyn BlockDevice,
    pub(super) target: &'a dyn BlockDevice,
    pub(super) options: &'a CopyOptions,
    observer: &'a dyn CopyObserver,
    /// Data is written in whole multiples of this.
    pub(super) block: u64,
    plan: Plan,
    work: Mutex<Work>,
    /// Told when a piece is finished.
    finished: Condvar,
    /// Where the last checkpoint was; locked while one is made.
    checkpoint: Mutex<u64>,
    /// Up to where the page cache was told.
    behind: Mutex<u64>,
    pub(super) turn: Option<Turn>,
    /// Whether the kernel copies for us; cleared when it turns out not to.
    pub(super) offload: AtomicBool,
}

impl<'a> Job<'a> {
    pub(super) fn new(
        source: &'a dyn BlockDevice,
        target: &'a dyn BlockDevice,
        options: &'a CopyOptions,
        observer: &'a dyn CopyObserver,
        block: u64,
        end: u64,
    ) -> Self {
        let block = if block.is_power_of_two() { block } else { 4096 };
        let CopyOptions { start, deepest, salvage, extents, .. } = *options;
        let grid = grid(options, block);
        let plan = Plan { start, end, grid, deepest, zeroes_are_data: false, salvage, extents };
        let offload =
            options.offload && options.zero_block == 0 && options.hash.is_none() && !salvage;
        Self {
            source,
            target,
            options,
            observer,
            block,
            plan,
            work: Mutex::new(Work::new(plan)),
            finished: Condvar::new(),
            checkpoint: Mutex::new(start),
            behind: Mutex::new(start),
            turn: options.ordered.then(|| Turn::new(start)),
            offload: AtomicBool::new(offload),
        }
    }

    /// Copies everything.
    pub(super) fn run_all(self) -> Result<Copied> {
        self.source.advise(self.whole(), Advice::WillRead);
        let CopyOptions { threads, in_flight, ordered, salvage, .. } = *self.options;
        let queues = if in_flight > 0 && !ordered && !salvage && !self.offloads() {
            self.source.read_queues()
        } else {
            Vec::new()
        };
        if queues.is_empty() {
            std::thread::scope(|scope| {
                for _ in 1..threads.max(in_flight).max(1) {
                    scope.spawn(|| self.run());
                }
                self.run();
            });
        } else {
            queued::run(&self, queues, threads);
        }
        self.end()
    }

    /// Whether the kernel may copy what there is.
    fn offloads(&self) -> bool {
        let start = self.options.start;
        self.offload.load(Ordering::Relaxed)
            && start < self.source.size()
            && self.source.file_range(start).is_some()
    }

    fn whole(&self) -> Span {
        Span::new(self.plan.start, self.plan.end.saturating_sub(self.plan.start))
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece, once there is room for its hashes.
    pub(super) fn take(&self) -> Option<Piece> {
        let mut work = self.work();
        while work.waiting() > MOST_WAITING && !work.is_stopped() {
            work = self.finished.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
        self.take_from(work)
    }

    /// The next piece, if there is one for which nobody has to wait.
    pub(super) fn take_now(&self) -> Option<Piece> {
        let work = self.work();
        if work.waiting() > MOST_WAITING { None } else { self.take_from(work) }
    }

    /// Whether there are no more pieces.
    pub(super) fn is_over(&self) -> bool {
        self.work().is_over()
    }

    /// Whether it still matters what becomes of a piece.
    pub(super) fn has_use_for(&self, piece: Span) -> bool {
        self.work().has_use_for(piece)
    }

    fn take_from(&self, mut work: MutexGuard<'_, Work>) -> Option<Piece> {
        if !work.is_stopped() && self.observer.is_cancelled() {
            work.cancel();
        }
        work.next(self.source)
    }

    /// Takes pieces in ascending order until there are no more or somebody failed.
    fn run(&self) {
        let len = usize::try_from(self.plan.grid).unwrap_or(usize::MAX);
        let mut buffer = AlignedBuffer::new(len);
        while let Some(piece) = self.take() {
            if !self.settle(piece.span(), |job| job.copy_piece(&piece, &mut buffer)) {
                return;
            }
        }
    }

    /// Carries `work` out for the piece at `span` and writes down what became of it.
    /// `false` if that ends the copy.
    pub(super) fn settle(
        &self,
        span: Span,
        work: impl FnOnce(&Self) -> Result<Option<Done>>,
    ) -> bool {
        let result = match work(self) {
            // Somebody below has failed: this piece will never have its turn.
            Ok(None) => return false,
            Ok(Some(done)) => {
                self.finish(span, done);
                self.checkpoint_if_due()
            }
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.work().fail(span, error);
            self.finished.notify_all();
            if let Some(turn) = &self.turn {
                turn.close();
            }
            return false;
        }
        self.tend_cache();
        true
    }

    fn finish(&self, span: Span, done: Done) {
        let mut work = self.work();
        for (span, error) in &done.unreadable {
            self.observer.unreadable(*span, error);
        }
        work.finish(span, done.copied, done.hashes, |chunk| self.observer.hashed(chunk));
        let done = self.options.start.saturating_add(work.bytes_done());
        self.observer.progress(done, self.plan.end);
        drop(work);
        // Hashes are all that anybody waits for.
        if self.options.hash.is_some() {
            self.finished.notify_all();
        }
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
            // What was written before may be lost, even if the next flush works.
            *last = u64::MAX;
            Error::new(error.kind(), "flushing the target failed").because(error)
        })?;
        if self.options.checkpoint_every > 0 && done > *last {
            let _quiet = self.work();
            self.observer.checkpoint(done);
            *last = done;
        }
        Ok(())
    }

    /// Drops what was read, starts writing what was written, and drops what was written
    /// a window ago and so is on the disk by now.
    fn tend_cache(&self) {
        if !self.options.drop_cache {
            return;
        }
        let Ok(mut behind) = self.behind.try_lock() else { return };
        let done = self.work().low_watermark();
        if done.saturating_sub(*behind) < CACHE_WINDOW {
            return;
        }
        let window = Span::new(*behind, done.saturating_sub(*behind));
        self.source.advise(window, Advice::DropCache);
        self.target.advise(window, Advice::StartWriteback);
        let before = Span::new(self.plan.start, behind.saturating_sub(self.plan.start));
        self.target.advise(before, Advice::DropCache);
        *behind = done;
    }

    /// The end of a copy, good or bad; all threads are gone.
    fn end(self) -> Result<Copied> {
        let done = self.work().low_watermark();
        let mut last = *self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner);
        let flushed = if self.options.flush || self.options.checkpoint_every > 0 {
            self.make_checkpoint(&mut last, done)
        } else {
            Ok(())
        };
        if self.options.drop_cache {
            self.source.advise(self.whole(), Advice::DropCache);
            self.target.advise(self.whole(), Advice::DropCache);
        }
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
