// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which parts of the file are in use.

use crate::bytes::mib_up;
use std::collections::BTreeMap;
use tranship_block::{Error, Result, Span};

/// Free runs of whole MiB between structures, and everything behind the last one.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Start and end.
    free: BTreeMap<u64, u64>,
    /// The byte after the last structure.
    end: u64,
}

impl Space {
    /// What `used` leaves free.
    ///
    /// # Errors
    ///
    /// Two of `used` share bytes: writing would destroy one of them.
    pub(crate) fn around(mut used: Vec<Span>) -> Result<Self> {
        used.sort_unstable_by_key(|span| span.start);
        let mut space = Self::default();
        for span in used {
            if span.start < space.end {
                return Err(Error::corrupt(format!(
                    "{} bytes at {:#x} belong to two structures of the image",
                    space.end.saturating_sub(span.start).min(span.len),
                    span.start
                ))
                .at(span.start));
            }
            space.cover(span);
        }
        Ok(space)
    }

    /// Appends `span`, which lies behind everything else.
    fn cover(&mut self, span: Span) {
        if span.start > self.end {
            self.free.insert(self.end, span.start);
        }
        self.end = mib_up(span.end());
    }

    /// The byte after the last structure; a multiple of 1 MiB.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Takes `len` bytes, whole MiB: the first run that is large enough, else the end.
    pub(crate) fn allocate(&mut self, len: u64) -> u64 {
        let start = self.lowest(len).unwrap_or(self.end);
        self.claim(Span::new(start, len));
        start
    }

    /// The first free run of `len` bytes between structures.
    pub(crate) fn lowest(&self, len: u64) -> Option<u64> {
        self.free.iter().find(|(start, end)| end.saturating_sub(**start) >= len).map(|(at, _)| *at)
    }

    /// Takes `span` if nobody has any of it.
    pub(crate) fn claim(&mut self, span: Span) -> bool {
        if span.start >= self.end {
            self.cover(span);
            return true;
        }
        let run = self.free.range(..=span.start).next_back().map(|(start, end)| (*start, *end));
        let Some((start, end)) = run.filter(|(_, end)| *end >= span.end()) else {
            return false;
        };
        self.free.remove(&start);
        if start < span.start {
            self.free.insert(start, span.start);
        }
        if span.end() < end {
            self.free.insert(span.end(), end);
        }
        true
    }

    /// Gives back what was taken.
    pub(crate) fn release(&mut self, span: Span) {
        let (mut start, mut end) = (span.start, mib_up(span.end()));
        if let Some((&before, &to)) = self.free.range(..start).next_back()
            && to == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(to) = self.free.remove(&end) {
            end = to;
        }
        if end >= self.end {
            self.end = start;
        } else {
            self.free.insert(start, end);
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn span(start: u64, len: u64) -> Span {
        Span::new(start * MIB, len * MIB)
    }

    #[test]
    fn free_runs_are_used_first_and_grow_together() {
        let mut space = Space::around(vec![span(8, 2), span(0, 1), span(3, 1)]).unwrap();
        assert_eq!(space.end(), 10 * MIB);
        assert_eq!(space.allocate(2 * MIB), MIB);
        assert_eq!(space.allocate(3 * MIB), 4 * MIB);
        assert_eq!(space.allocate(2 * MIB), 10 * MIB);
        assert_eq!(space.allocate(MIB), 7 * MIB);
        space.release(span(4, 3));
        space.release(span(8, 2));
        space.release(span(7, 1));
        assert_eq!(space.lowest(6 * MIB), Some(4 * MIB));
        space.release(span(10, 2));
        assert_eq!(space.end(), 4 * MIB);
        assert_eq!(space.allocate(MIB), 4 * MIB);
    }

    #[test]
    fn claims_take_only_what_is_free() {
        let mut space = Space::around(vec![span(0, 1), span(6, 1)]).unwrap();
        assert!(space.claim(span(3, 2)));
        assert!(!space.claim(span(4, 2)));
        assert!(space.claim(span(9, 2)));
        assert!(!space.claim(span(6, 1)));
        assert_eq!(space.lowest(2 * MIB), Some(MIB));
        assert_eq!((space.end(), space.lowest(3 * MIB)), (11 * MIB, None));
        let error = Space::around(vec![span(0, 2), span(1, 4)]).unwrap_err();
        assert!(error.message().starts_with("1048576 bytes at 0x100000 belong to two"));
    }
}
