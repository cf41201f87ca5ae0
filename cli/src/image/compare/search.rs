// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the first sector in which two disks differ, with all processors.
//!
//! Places that both disks know to be zero are not read, and of places that one disk knows
//! to be zero only the other one's data is.

use crate::failure::Failure;
use crate::image::console::Progress;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use tranship_block::{BlockDevice, ExtentKind, is_zero};

/// Bytes that are compared at once.
const PIECE: usize = 1 << 20;
/// What differences are reported in.
const SECTOR: usize = 512;
/// Threads that read at the same time: more only compete for the memory's bandwidth.
const MOST_THREADS: usize = 8;
/// Exit code if an image cannot tell what is allocated.
const CANNOT_TELL: u8 = 3;
/// Exit code if an image cannot be read.
const CANNOT_READ: u8 = 4;

/// A disk and what its user calls it.
#[derive(Clone, Copy)]
pub(super) struct Side<'a> {
    pub(super) device: &'a dyn BlockDevice,
    pub(super) name: &'a str,
}

/// What one disk says about a place.
struct Known {
    kind: ExtentKind,
    len: u64,
}

impl Known {
    fn is_zero(&self) -> bool {
        self.kind.reads_zero()
    }
}

impl Side<'_> {
    /// Bytes, in whole sectors.
    pub(super) fn size(&self) -> u64 {
        self.device.size().next_multiple_of(SECTOR as u64)
    }

    /// A disk is zero behind its end.
    fn known_at(&self, at: u64) -> Result<Known, Failure> {
        if at >= self.device.size() {
            return Ok(Known { kind: ExtentKind::Hole, len: u64::MAX });
        }
        let extent = self.device.extent_at(at).map_err(|error| {
            Failure::from(error)
                .within(format!("Sector allocation test failed for '{}'", self.name))
                .exiting_with(CANNOT_TELL)
        })?;
        Ok(Known { kind: extent.kind, len: extent.len.max(1) })
    }

    fn read(&self, buf: &mut [u8], at: u64) -> Result<(), Failure> {
        let left = usize::try_from(self.device.size().saturating_sub(at)).unwrap_or(usize::MAX);
        let (there, behind) = buf.split_at_mut(left.min(buf.len()));
        behind.fill(0);
        self.device.read_at(there, at).map_err(|error| {
            Failure::from(error)
                .within(format!("Error while reading offset {at} of {}", self.name))
                .exiting_with(CANNOT_READ)
        })
    }
}

/// A piece of the disks that has to be compared.
#[derive(Clone, Copy)]
struct Piece {
    start: u64,
    len: usize,
    /// Which sides have to be read.
    is_read: [bool; 2],
}

/// What has been found: the difference or failure with the lowest offset.
#[derive(Default)]
struct Found {
    at: Option<u64>,
    failure: Option<Failure>,
}

struct Search<'a> {
    sides: [Side<'a>; 2],
    /// Bytes of the larger disk.
    size: u64,
    /// Where the search ends.
    end: u64,
    next: Mutex<u64>,
    found: Mutex<Found>,
    /// The offset of what has been found: nothing behind it matters any more.
    limit: AtomicU64,
    progress: &'a Progress,
}

/// The first byte below `end` of which the disks know different things: data, zeroes, or
/// nothing at all.
pub(super) fn first_status_difference(
    sides: [Side<'_>; 2],
    end: u64,
) -> Result<Option<u64>, Failure> {
    let mut at = 0;
    while at < end {
        let [first, second] = sides.map(|side| side.known_at(at));
        let [first, second] = [first?, second?];
        if first.kind != second.kind {
            return Ok(Some(at));
        }
        at = at.saturating_add(first.len.min(second.len));
    }
    Ok(None)
}

/// The first sector in `range` that differs; the shorter disk counts as followed by zeroes.
pub(super) fn first_difference(
    sides: [Side<'_>; 2],
    range: Range<u64>,
    progress: &Progress,
) -> Result<Option<u64>, Failure> {
    let search = Search {
        sides,
        size: sides[0].size().max(sides[1].size()),
        end: range.end,
        next: Mutex::new(range.start),
        found: Mutex::default(),
        limit: AtomicU64::new(range.end),
        progress,
    };
    let threads = thread::available_parallelism().map_or(2, usize::from).clamp(1, MOST_THREADS);
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|| search.work());
        }
        search.work();
    });
    let found = search.found.into_inner().unwrap_or_else(PoisonError::into_inner);
    match found {
        Found { failure: Some(failure), .. } => Err(failure),
        Found { at, .. } => Ok(at),
    }
}

impl Search<'_> {
    fn work(&self) {
        let mut buffers = [vec![0; PIECE], vec![0; PIECE]];
        loop {
            let piece = match self.next_piece() {
                Ok(Some(piece)) => piece,
                Ok(None) => return,
                Err((at, failure)) => return self.report(at, Some(failure)),
            };
            match self.compare(piece, &mut buffers) {
                Ok(None) => {}
                Ok(Some(at)) => self.report(at, None),
                Err(failure) => self.report(piece.start, Some(failure)),
            }
        }
    }

    /// The next piece that is not known to be zero on both sides.
    fn next_piece(&self) -> Result<Option<Piece>, (u64, Failure)> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let start = *next;
            if start >= self.limit.load(Ordering::Relaxed) {
                return Ok(None);
            }
            self.progress.set(start, self.size);
            let known = self.sides.map(|side| side.known_at(start));
            let [first, second] = known;
            let fail = |failure| (start, failure);
            let known = [first.map_err(fail)?, second.map_err(fail)?];
            let left = self.end - start;
            let len = known[0].len.min(known[1].len).min(left);
            if known[0].is_zero() && known[1].is_zero() {
                *next = start + len;
                continue;
            }
            let len = usize::try_from(len).unwrap_or(PIECE).min(PIECE);
            *next = start + len as u64;
            return Ok(Some(Piece { start, len, is_read: known.map(|known| !known.is_zero()) }));
        }
    }

    /// The first sector of the piece that differs.
    fn compare(&self, piece: Piece, buffers: &mut [Vec<u8>; 2]) -> Result<Option<u64>, Failure> {
        let [first, second] = buffers;
        let (first, second) = (&mut first[..piece.len], &mut second[..piece.len]);
        let at = match piece.is_read {
            [true, true] => {
                self.sides[0].read(first, piece.start)?;
                self.sides[1].read(second, piece.start)?;
                if first == second { None } else { differing(first, second) }
            }
            [is_first, _] => {
                let side = usize::from(!is_first);
                self.sides[side].read(first, piece.start)?;
                if is_zero(first) { None } else { nonzero(first) }
            }
        };
        // Offsets are of sectors of the disk, wherever the piece starts.
        Ok(at.map(|at| (piece.start + at as u64) / SECTOR as u64 * SECTOR as u64))
    }

    fn report(&self, at: u64, failure: Option<Failure>) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.at.is_none_or(|known| at < known) {
            *found = Found { at: Some(at), failure };
            self.limit.fetch_min(at, Ordering::Relaxed);
        }
    }
}

fn differing(first: &[u8], second: &[u8]) -> Option<usize> {
    first.iter().zip(second).position(|(one, other)| one != other)
}

fn nonzero(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|byte| *byte != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    fn difference(first: &[u8], second: &[u8]) -> Option<u64> {
        let devices = [first, second].map(|bytes| MemoryDevice::read_only(bytes.to_vec()));
        let sides = [
            Side { device: &devices[0], name: "first" },
            Side { device: &devices[1], name: "second" },
        ];
        let size = sides[0].size().max(sides[1].size());
        first_difference(sides, 0..size, &Progress::start(false)).unwrap()
    }

    #[test]
    fn the_lowest_differing_sector_is_found() {
        let size = 5 * PIECE + 1024;
        let zeroes = vec![0; size];
        assert_eq!(difference(&zeroes, &zeroes), None);
        assert_eq!(difference(&zeroes, &zeroes[..1000]), None);
        let mut data = zeroes.clone();
        for at in [size - 1, 4 * PIECE, 3 * PIECE + 700, 513] {
            data[at] = 1;
            let sector = Some((at / SECTOR * SECTOR) as u64);
            assert_eq!(difference(&data, &zeroes), sector);
            assert_eq!(difference(&zeroes, &data), sector);
            assert_eq!(difference(&data, &data), None);
            assert_eq!(difference(&data, &zeroes[..512]), sector);
        }
        let mut other = data.clone();
        other[600] = 9;
        assert_eq!(difference(&data, &other), Some(512));
    }

    #[test]
    fn an_odd_tail_is_followed_by_zeroes() {
        assert_eq!(difference(&[1; 1000], &[1; 1000]), None);
        let mut longer = vec![1; 1024];
        longer[1000..].fill(0);
        assert_eq!(difference(&[1; 1000], &longer), None);
        longer[1023] = 1;
        assert_eq!(difference(&[1; 1000], &longer), Some(512));
    }
}
