// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The work list of a copy: planned as it is taken, so its size does not depend on the
//! disk's, and the books about what is finished.

use super::Copied;
use crate::{BlockDevice, Error, Extent, Result, Span};
use std::collections::BTreeSet;

/// Neighbouring extents are joined up to this many bytes; also the longest piece of zeroes.
const LONGEST_RUN: u64 = 256 << 20;

/// What has to be done with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Read it and write it.
    Data,
    /// Make it zero.
    Zero,
}

#[derive(Debug)]
pub(super) struct Work {
    /// Not looked at yet.
    unplanned: Span,
    /// The first extent of `unplanned`, if it was looked at already.
    peeked: Option<Extent>,
    /// The run that pieces are being cut from.
    run: Span,
    kind: Kind,
    /// Starts of pieces that were taken and are not finished. A failed piece stays.
    in_flight: BTreeSet<u64>,
    bytes_done: u64,
    copied: Copied,
    failure: Option<(u64, Error)>,
    stopped: bool,
}

impl Work {
    pub(super) fn new(whole: Span) -> Self {
        Self {
            unplanned: whole,
            peeked: None,
            run: Span::new(whole.start, 0),
            kind: Kind::Zero,
            in_flight: BTreeSet::new(),
            bytes_done: 0,
            copied: Copied::default(),
            failure: None,
            stopped: false,
        }
    }

    /// The next piece; pieces ascend. `None` if there is none or the copy has stopped.
    pub(super) fn next(&mut self, source: &dyn BlockDevice, chunk: u64) -> Option<(Span, Kind)> {
        if self.stopped {
            return None;
        }
        if self.run.is_empty()
            && let Err(error) = self.plan(source)
        {
            let text = "finding the source's extents failed";
            let at = self.unplanned.start;
            let error = Error::new(error.kind(), text).at(at).because(error);
            self.fail(Span::new(at, 0), error);
            return None;
        }
        if self.run.is_empty() {
            return None;
        }
        let grid = if self.kind == Kind::Data { chunk } else { LONGEST_RUN };
        let start = self.run.start;
        // Pieces end at multiples of the grid, wherever the copy began.
        let to_grid = grid.saturating_sub(start.checked_rem(grid).unwrap_or(0));
        let piece = Span::new(start, self.run.len.min(to_grid));
        self.run = Span::new(piece.end(), self.run.len.saturating_sub(piece.len));
        self.in_flight.insert(piece.start);
        Some((piece, self.kind))
    }

    /// Moves the next run from `unplanned` to `run`.
    fn plan(&mut self, source: &dyn BlockDevice) -> Result<()> {
        let end = self.unplanned.end();
        let start = self.unplanned.start;
        let mut at = start;
        let mut kind = None;
        while at < end && at.saturating_sub(start) < LONGEST_RUN {
            let (next, len) = if at >= source.size() {
                (Kind::Zero, end.saturating_sub(at))
            } else {
                let extent = match self.peeked.take() {
                    Some(extent) => extent,
                    None => source.extent_at(at)?,
                };
                if extent.len == 0 {
                    return Err(Error::corrupt("device reported an empty extent").at(at));
                }
                let next = if extent.kind.reads_zero() { Kind::Zero } else { Kind::Data };
                if kind.is_some_and(|kind| kind != next) {
                    self.peeked = Some(extent);
                    break;
                }
                (next, extent.len.min(source.size().saturating_sub(at)))
            };
            if *kind.get_or_insert(next) != next {
                break;
            }
            at = at.saturating_add(len).min(end);
        }
        self.kind = kind.unwrap_or(Kind::Zero);
        self.run = Span::new(start, at.saturating_sub(start));
        self.unplanned = Span::new(at, end.saturating_sub(at));
        Ok(())
    }

    pub(super) fn finish(&mut self, piece: Span, copied: Copied) {
        self.in_flight.remove(&piece.start);
        self.bytes_done = self.bytes_done.saturating_add(piece.len);
        self.copied.add(copied);
    }

    /// Stops the copy. Pieces below that are still in flight go on, so that the failure
    /// with the lowest offset is the one that remains.
    pub(super) fn fail(&mut self, piece: Span, error: Error) {
        self.stopped = true;
        if self.failure.as_ref().is_none_or(|(start, _)| piece.start < *start) {
            self.failure = Some((piece.start, error));
        }
    }

    pub(super) fn cancel(&mut self) {
        self.stopped = true;
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped
    }

    pub(super) fn take_failure(&mut self) -> Option<Error> {
        self.failure.take().map(|(_, error)| error)
    }

    pub(super) fn bytes_done(&self) -> u64 {
        self.bytes_done
    }

    pub(super) fn copied(&self) -> Copied {
        self.copied
    }

    /// Everything below this offset is finished.
    pub(super) fn low_watermark(&self) -> u64 {
        let planned = if self.run.is_empty() { self.unplanned.start } else { self.run.start };
        self.in_flight.first().copied().unwrap_or(planned)
    }
}
