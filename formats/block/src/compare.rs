// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Comparing two disks, reading only what at least one of them stores.

use crate::copy::default_threads;
use crate::{AlignedBuffer, BlockDevice, CopyObserver, Error, ErrorKind, ExtentKind, Result, Span};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes that are read from each side before they are compared: both fit into the core's
/// own cache.
const STEP: usize = 256 << 10;

/// Bytes of a task; also the bytes without data after which progress is told.
const TASK: u64 = 1 << 20;

/// How to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompareOptions {
    /// Sizes, and what is stored where, have to be the same as well.
    pub strict: bool,
    /// How many places are compared at the same time; at least 1.
    pub threads: usize,
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self { strict: false, threads: default_threads() }
    }
}

/// What a comparison found; where several things differ, the one with the lowest offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Both hold the same bytes; a disk that is longer than the other has zeroes there.
    Identical,
    /// The first byte that differs.
    DiffersAt(u64),
    /// Strict: the first byte that one stores, or knows as zero, otherwise than the other.
    AllocationDiffersAt(u64),
    /// Strict: they have different sizes. Nothing else was compared.
    SizesDiffer,
}

/// Why a comparison came to no end.
#[derive(Debug)]
pub enum CompareError {
    /// What is stored where could not be found out.
    Extents(Error),
    /// Bytes could not be read.
    Read(Error),
    /// The observer said so.
    Cancelled,
}

impl From<CompareError> for Error {
    fn from(error: CompareError) -> Self {
        match error {
            CompareError::Extents(error) | CompareError::Read(error) => error,
            CompareError::Cancelled => Self::new(ErrorKind::Cancelled, "comparing was cancelled"),
        }
    }
}

/// Compares disk `a` with disk `b`. Ranges that both know as zero are not read; where one
/// does, the other is searched for anything else.
///
/// # Errors
///
/// What asking for extents and reading report, if it lies below the first difference.
pub fn compare(
    a: &dyn BlockDevice,
    b: &dyn BlockDevice,
    options: &CompareOptions,
    observer: &dyn CopyObserver,
) -> std::result::Result<Comparison, CompareError> {
    if options.strict && a.size() != b.size() {
        return Ok(Comparison::SizesDiffer);
    }
    let job = Job {
        a,
        b,
        strict: options.strict,
        observer,
        end: a.size().max(b.size()),
        state: Mutex::new(State {
            a: Side::new(a, "first"),
            b: Side::new(b, "second"),
            next: 0,
            done: 0,
            outcome: None,
        }),
    };
    std::thread::scope(|scope| {
        for _ in 1..options.threads.max(1) {
            scope.spawn(|| job.run());
        }
        job.run();
    });
    let state = job.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    state.outcome.map_or(Ok(Comparison::Identical), |(_, outcome)| outcome)
}

type Outcome = std::result::Result<Comparison, CompareError>;

/// Which sides of a range have to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sides {
    A,
    B,
    Both,
}

/// One of the disks, and the extent that was asked for last.
#[derive(Debug)]
struct Side<'a> {
    device: &'a dyn BlockDevice,
    name: &'static str,
    extent: (Span, ExtentKind),
}

impl<'a> Side<'a> {
    fn new(device: &'a dyn BlockDevice, name: &'static str) -> Self {
        Self { device, name, extent: (Span::new(0, 0), ExtentKind::Hole) }
    }

    /// What is at `offset`, and up to where.
    fn at(&mut self, offset: u64) -> Result<(ExtentKind, u64)> {
        let size = self.device.size();
        if offset >= size {
            return Ok((ExtentKind::Hole, u64::MAX));
        }
        if self.extent.0.end() <= offset {
            let extent = self
                .device
                .extent_at(offset)
                .and_then(|extent| {
                    if extent.len == 0 {
                        return Err(Error::corrupt("device reported an empty extent"));
                    }
                    Ok(extent)
                })
                .map_err(|error| {
                    let text = format!("finding the extents of the {} disk failed", self.name);
                    Error::new(error.kind(), text).at(offset).because(error)
                })?;
            let len = extent.len.min(size.saturating_sub(offset));
            self.extent = (Span::new(offset, len), extent.kind);
        }
        Ok((self.extent.1, self.extent.0.end()))
    }
}

struct State<'a> {
    a: Side<'a>,
    b: Side<'a>,
    next: u64,
    done: u64,
    /// The lowest place at which there is something to say.
    outcome: Option<(u64, Outcome)>,
}

impl State<'_> {
    fn note(&mut self, offset: u64, outcome: Outcome) {
        if self.outcome.as_ref().is_none_or(|(at, _)| offset < *at) {
            self.outcome = Some((offset, outcome));
        }
    }
}

struct Job<'a> {
    a: &'a dyn BlockDevice,
    b: &'a dyn BlockDevice,
    strict: bool,
    observer: &'a dyn CopyObserver,
    end: u64,
    state: Mutex<State<'a>>,
}

impl<'a> Job<'a> {
    fn state(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let (mut left, mut right) = (AlignedBuffer::new(STEP), AlignedBuffer::new(STEP));
        loop {
            let mut state = self.state();
            if state.outcome.is_some() {
                return;
            }
            let begin = state.next;
            if self.observer.is_cancelled() {
                state.note(begin, Err(CompareError::Cancelled));
                return;
            }
            let parts = self.cut(&mut state);
            let covered = state.next.saturating_sub(begin);
            drop(state);
            if covered == 0 {
                return;
            }
            let found = parts
                .iter()
                .find_map(|(span, sides)| self.compare_part(*span, *sides, &mut left, &mut right));
            let mut state = self.state();
            if let Some((offset, outcome)) = found {
                state.note(offset, outcome);
            }
            state.done = state.done.saturating_add(covered);
            self.observer.progress(state.done, self.end);
        }
    }

    /// Moves on by about a task's bytes, and returns what of them has to be read. What
    /// the extents alone tell is noted at once.
    fn cut(&self, state: &mut State<'_>) -> Vec<(Span, Sides)> {
        let mut parts: Vec<(Span, Sides)> = Vec::new();
        let mut left = TASK;
        while state.next < self.end && left > 0 {
            let at = state.next;
            let found = state.a.at(at).and_then(|a| state.b.at(at).map(|b| (a, b)));
            let ((a, a_end), (b, b_end)) = match found {
                Ok(found) => found,
                Err(error) => {
                    state.note(at, Err(CompareError::Extents(error)));
                    break;
                }
            };
            if self.strict && a != b {
                state.note(at, Ok(Comparison::AllocationDiffersAt(at)));
                break;
            }
            let known = a_end.min(b_end).min(self.end).saturating_sub(at);
            let sides = match (a.reads_zero(), b.reads_zero()) {
                (true, true) => {
                    state.next = at.saturating_add(known);
                    left = left.saturating_sub(known);
                    continue;
                }
                (false, true) => Sides::A,
                (true, false) => Sides::B,
                (false, false) => Sides::Both,
            };
            let len = known.min(left);
            state.next = at.saturating_add(len);
            left = left.saturating_sub(len);
            match parts.last_mut() {
                Some((span, last)) if *last == sides && span.end() == at => {
                    span.len = span.len.saturating_add(len);
                }
                _ => parts.push((Span::new(at, len), sides)),
            }
        }
        parts
    }

    fn compare_part(
        &self,
        span: Span,
        sides: Sides,
        left: &mut [u8],
        right: &mut [u8],
    ) -> Option<(u64, Outcome)> {
        let mut at = span.start;
        while at < span.end() {
            let len = usize::try_from(span.end().saturating_sub(at)).unwrap_or(STEP).min(STEP);
            let left = left.get_mut(..len).unwrap_or_default();
            let right = right.get_mut(..len).unwrap_or_default();
            let read = match sides {
                Sides::A => read(self.a, "first", left, at),
                Sides::B => read(self.b, "second", left, at),
                Sides::Both => {
                    read(self.a, "first", left, at).and_then(|()| read(self.b, "second", right, at))
                }
            };
            if let Err(error) = read {
                return Some((at, Err(CompareError::Read(error))));
            }
            let position = match sides {
                Sides::Both if left == right => None,
                Sides::Both => left.iter().zip(right.iter()).position(|(a, b)| a != b),
                _ if crate::is_zero(left) => None,
                _ => left.iter().position(|byte| *byte != 0),
            };
            if let Some(position) = position {
                let offset = at.saturating_add(u64::try_from(position).unwrap_or(u64::MAX));
                return Some((offset, Ok(Comparison::DiffersAt(offset))));
            }
            at = at.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        }
        None
    }
}

fn read(device: &dyn BlockDevice, name: &str, buf: &mut [u8], offset: u64) -> Result<()> {
    device.read_at(buf, offset).map_err(|error| {
        Error::new(error.kind(), format!("reading the {name} disk failed"))
            .at(offset)
            .because(error)
    })
}

#[cfg(test)]
mod tests;
