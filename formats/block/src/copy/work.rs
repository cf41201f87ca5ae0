// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The work list of a copy: planned as it is taken, so its size does not depend on the
//! disk's, and the books about what is finished.

use super::Copied;
use crate::{BlockDevice, Error, ErrorKind, HashedChunk, Result, Span};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The longest piece of zeroes.
const LONGEST_RUN: u64 = 256 << 20;

/// What has to be done with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Read it and write it.
    Data,
    /// Make it zero.
    Zero,
    /// Leave it alone.
    Skip,
}

/// Neighbouring bytes of the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) span: Span,
    pub(super) kind: Kind,
}

impl Run {
    pub(super) fn new(start: u64, end: u64, kind: Kind) -> Self {
        Self { span: Span::new(start, end.saturating_sub(start)), kind }
    }
}

/// What one thread does at a time: runs that follow one another without a gap. All but
/// single runs of zeroes or skipped bytes fit into a chunk.
#[derive(Clone, Debug, Default)]
pub(super) struct Piece {
    pub(super) runs: Vec<Run>,
}

impl Piece {
    pub(super) fn span(&self) -> Span {
        match (self.runs.first(), self.runs.last()) {
            (Some(first), Some(last)) => {
                let start = first.span.start;
                Span::new(start, last.span.end().saturating_sub(start))
            }
            _ => Span::new(0, 0),
        }
    }
}

/// How the disk is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Pieces end at multiples of this, wherever the copy began.
    pub(super) grid: u64,
    pub(super) deepest: Option<u32>,
    /// Zeroes are read and written like any other bytes.
    pub(super) zeroes_are_data: bool,
    pub(super) salvage: bool,
    /// The source is asked for its extents.
    pub(super) extents: bool,
}

#[derive(Debug)]
pub(super) struct Work {
    plan: Plan,
    /// Everything below was taken.
    next: u64,
    /// What is known about the bytes from `next` to `known_end`, without a gap.
    known: VecDeque<Run>,
    known_end: u64,
    /// Starts of pieces that were taken and are not finished. A failed piece stays.
    in_flight: BTreeSet<u64>,
    /// Hashes of finished pieces above one that is not.
    hashes: BTreeMap<u64, Vec<HashedChunk>>,
    bytes_done: u64,
    copied: Copied,
    failure: Option<(u64, Error)>,
    stopped: bool,
}

impl Work {
    pub(super) fn new(plan: Plan) -> Self {
        Self {
            plan,
            next: plan.start,
            known: VecDeque::new(),
            known_end: plan.start,
            in_flight: BTreeSet::new(),
            hashes: BTreeMap::new(),
            bytes_done: 0,
            copied: Copied::default(),
            failure: None,
            stopped: false,
        }
    }

    /// The next piece; pieces ascend. `None` if there is none or the copy has stopped.
    pub(super) fn next(&mut self, source: &dyn BlockDevice) -> Option<Piece> {
        if self.stopped || self.next >= self.plan.end {
            return None;
        }
        match self.cut(source) {
            Ok(piece) => {
                self.in_flight.insert(self.next);
                self.next = piece.span().end();
                Some(piece)
            }
            Err(error) => {
                let text = "finding the source's extents failed";
                let at = self.known_end;
                let error = Error::new(error.kind(), text).at(at).because(error);
                self.fail(Span::new(at, 0), error);
                None
            }
        }
    }

    fn cut(&mut self, source: &dyn BlockDevice) -> Result<Piece> {
        let Plan { end, grid, .. } = self.plan;
        let start = self.next;
        self.know(source, start.saturating_add(1))?;
        let single = self.known.front().filter(|run| run.kind != Kind::Data).copied();
        if single.is_some() {
            let far = start.saturating_add(LONGEST_RUN).min(end);
            while self.known.len() == 1 && self.known_end < far {
                self.know(source, self.known_end.saturating_add(1))?;
            }
            let run_end = self.known.front().map_or(start, |run| run.span.end()).min(far);
            let cut = if run_end == end { end } else { floor(run_end, grid) };
            if cut > start {
                return Ok(self.take(cut));
            }
        }
        let cut = floor(start, grid).saturating_add(grid).min(end);
        self.know(source, cut)?;
        Ok(self.take(cut))
    }

    /// Asks for extents until everything below `to` is known.
    fn know(&mut self, source: &dyn BlockDevice, to: u64) -> Result<()> {
        let to = to.min(self.plan.end);
        while self.known_end < to {
            let at = self.known_end;
            let (kind, len) = self.ask(source, at)?;
            let end = at.saturating_add(len).min(self.plan.end);
            match self.known.back_mut() {
                Some(last) if last.kind == kind => {
                    last.span.len = end.saturating_sub(last.span.start);
                }
                _ => self.known.push_back(Run::new(at, end, kind)),
            }
            self.known_end = end;
        }
        Ok(())
    }

    fn ask(&self, source: &dyn BlockDevice, at: u64) -> Result<(Kind, u64)> {
        let size = source.size();
        let zero = if self.plan.zeroes_are_data { Kind::Data } else { Kind::Zero };
        if at >= size {
            return Ok((zero, u64::MAX));
        }
        if !self.plan.extents {
            return Ok((Kind::Data, size.saturating_sub(at)));
        }
        let extent = match source.extent_at(at) {
            Ok(extent) if extent.len == 0 => {
                Err(Error::corrupt("device reported an empty extent").at(at))
            }
            other => other,
        };
        match extent {
            Ok(extent) => {
                let kind = if self.plan.deepest.is_some_and(|deepest| extent.depth > deepest) {
                    Kind::Skip
                } else if extent.kind.reads_zero() {
                    zero
                } else {
                    Kind::Data
                };
                Ok((kind, extent.len.min(size.saturating_sub(at))))
            }
            // Reading will tell which bytes can be had nevertheless.
            Err(error) if self.plan.salvage && is_damage(&error) => {
                let to_grid = floor(at, self.plan.grid).saturating_add(self.plan.grid);
                Ok((Kind::Data, to_grid.min(size).saturating_sub(at).max(1)))
            }
            Err(error) => Err(error),
        }
    }

    /// Takes what is known below `cut`.
    fn take(&mut self, cut: u64) -> Piece {
        let mut piece = Piece::default();
        while let Some(run) = self.known.pop_front() {
            if run.span.end() > cut {
                self.known.push_front(Run::new(cut, run.span.end(), run.kind));
                if run.span.start < cut {
                    piece.runs.push(Run::new(run.span.start, cut, run.kind));
                }
                break;
            }
            piece.runs.push(run);
        }
        piece
    }

    /// Notes that a piece is done; `tell` gets the hashes whose turn it is.
    pub(super) fn finish(
        &mut self,
        piece: Span,
        copied: Copied,
        hashes: Vec<HashedChunk>,
        mut tell: impl FnMut(HashedChunk),
    ) {
        self.in_flight.remove(&piece.start);
        self.bytes_done = self.bytes_done.saturating_add(piece.len);
        self.copied.add(copied);
        if !hashes.is_empty() {
            self.hashes.insert(piece.start, hashes);
        }
        let done = self.low_watermark();
        while let Some(entry) = self.hashes.first_entry().filter(|entry| *entry.key() < done) {
            entry.remove().into_iter().for_each(&mut tell);
        }
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

    /// Whether there are no more pieces.
    pub(super) fn is_over(&self) -> bool {
        self.stopped || self.next >= self.plan.end
    }

    /// Whether the copy goes on, or has failed only above this piece.
    pub(super) fn has_use_for(&self, piece: Span) -> bool {
        !self.stopped || self.failure.as_ref().is_some_and(|(start, _)| piece.start < *start)
    }

    /// How many pieces have hashes that wait for one below them.
    pub(super) fn waiting(&self) -> usize {
        self.hashes.len()
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
        self.in_flight.first().copied().unwrap_or(self.next)
    }
}

/// `value` rounded down to a multiple of `unit`.
pub(super) fn floor(value: u64, unit: u64) -> u64 {
    value.saturating_sub(value.checked_rem(unit).unwrap_or(0))
}

/// Whether the disk itself is the reason, so that other ranges may still be readable.
pub(super) fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt)
}
