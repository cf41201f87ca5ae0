// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The last answer about extents, so that a walk does not ask for each one again.

use tranship_block::{Extent, ExtentKind};

/// Neighbouring extents from some offset on.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Where each ends, ascending, and what it is.
    runs: Vec<(u64, ExtentKind)>,
    start: u64,
    /// Counts how often all of it was forgotten.
    generation: u64,
}

impl Known {
    pub(super) fn new(start: u64) -> Self {
        Self { start, ..Self::default() }
    }

    pub(super) fn push(&mut self, len: u64, kind: ExtentKind) {
        let end = self.runs.last().map_or(self.start, |(end, _)| *end).saturating_add(len);
        match self.runs.last_mut() {
            Some((last, same)) if *same == kind => *last = end,
            _ => self.runs.push((end, kind)),
        }
    }

    pub(super) fn at(&self, offset: u64) -> Option<Extent> {
        if offset < self.start {
            return None;
        }
        let number = self.runs.partition_point(|(end, _)| *end <= offset);
        let (end, kind) = self.runs.get(number)?;
        Some(Extent::new(*kind, end.saturating_sub(offset)))
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn clear(&mut self) {
        self.runs.clear();
        self.generation = self.generation.wrapping_add(1);
    }

    /// Takes an answer over, unless something was written since it was asked for.
    pub(super) fn replace(&mut self, new: Self, asked: u64) {
        if self.generation == asked {
            *self = Self { generation: asked, ..new };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_from_before_a_write_is_not_kept() {
        let mut known = Known::default();
        let asked = known.generation();
        let mut answer = Known::new(100);
        for (len, kind) in [(50, ExtentKind::Data), (50, ExtentKind::Data), (10, ExtentKind::Hole)]
        {
            answer.push(len, kind);
        }
        assert_eq!(answer.at(99), None);
        assert_eq!(answer.at(120), Some(Extent::new(ExtentKind::Data, 80)));
        assert_eq!(answer.at(205), Some(Extent::new(ExtentKind::Hole, 5)));
        assert_eq!(answer.at(210), None);
        known.clear();
        known.replace(answer, asked);
        assert_eq!(known.at(120), None);
    }
}
