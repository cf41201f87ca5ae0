// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Space that belongs to nothing, and giving it back.

use super::Checker;
use crate::SECTOR;
use crate::layout::Entries;
use tranship_block::{BlockDevice, Extents, Repair, Result, Span, Storage, is_zero};

/// Bytes of a block of a file system, at most.
const LARGEST_BLOCK: u64 = 64 << 10;

impl Checker<'_> {
    /// Finds space behind the first tables that belongs to nothing.
    pub(super) fn check_leaks(&mut self) -> Result<()> {
        if !matches!(self.layout.entries, Entries::Sectors { .. }) {
            return Ok(());
        }
        let grain = self.layout.grain.get();
        let grains = self
            .places
            .iter()
            .map(|sector| Span::new(u64::from(*sector).saturating_mul(SECTOR), grain));
        let mut areas: Vec<Span> = grains.chain(self.metadata.iter().copied()).collect();
        areas.sort_unstable_by_key(|area| area.start);
        let size = self.storage.size();
        let mut end = self.layout.overhead.max(SECTOR);
        let mut gaps = Vec::new();
        for area in areas {
            let start = area.start.min(size);
            if start.saturating_sub(end) >= grain {
                gaps.push(Span::new(end, start.saturating_sub(end)));
            }
            end = end.max(area.end());
        }
        for gap in gaps {
            if takes_space(self.storage, gap)? {
                self.leak(gap, |storage| storage.discard(gap))?;
            }
        }
        if size.saturating_sub(end) >= grain {
            let tail = Span::new(end, size.saturating_sub(end));
            self.leak(tail, |storage| storage.set_len(end))?;
        }
        Ok(())
    }

    fn leak(&mut self, span: Span, give_back: impl Fn(&dyn Storage) -> Result<()>) -> Result<()> {
        let count = span.len / self.layout.grain;
        let text = format!("{count} grains at {:#x} belong to nothing", span.start);
        if self.repair == Repair::Nothing {
            self.report.leak(count, || text);
            return Ok(());
        }
        give_back(self.storage)?;
        self.storage.flush()?;
        self.report.leaks_fixed = self.report.leaks_fixed.saturating_add(count);
        self.report.note(|| text);
        Ok(())
    }
}

/// Whether something is stored in `gap`. A hole takes no space: that is where discarded
/// grains were. At its edges are blocks of the file system that it has to itself in part
/// only; after a discard these hold zeroes.
fn takes_space(file: &dyn BlockDevice, gap: Span) -> Result<bool> {
    let mut bytes = Vec::new();
    for (span, kind) in Extents::new(file, gap).filter_map(Result::ok) {
        if kind.reads_zero() {
            continue;
        }
        if span.len > LARGEST_BLOCK {
            return Ok(true);
        }
        bytes.resize(usize::try_from(span.len).unwrap_or(0), 0);
        file.read_at(&mut bytes, span.start)?;
        if !is_zero(&bytes) {
            return Ok(true);
        }
    }
    Ok(false)
}
