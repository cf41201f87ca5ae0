// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking one sparse extent: both copies of directory and tables, the places of grains,
//! and what is left over.

mod grains;
mod leaks;
mod tables;

use crate::layout::Layout;
use crate::writer::metadata;
use tranship_block::{CheckReport, Repair, Result, Span, Storage};

/// The check of one extent.
pub(crate) struct Checker<'a> {
    storage: &'a dyn Storage,
    layout: Layout,
    repair: Repair,
    report: &'a mut CheckReport,
    primary: Vec<u32>,
    redundant: Vec<u32>,
    /// Header, descriptor, directories and tables.
    metadata: Vec<Span>,
    /// Sectors at which grains are stored.
    places: Vec<u32>,
    /// Where the next grain would be if it followed the one before.
    expected: Option<u64>,
    /// Contradictions of this extent that are left.
    corruptions: u64,
}

impl<'a> Checker<'a> {
    pub(crate) fn new(
        storage: &'a dyn Storage,
        layout: Layout,
        repair: Repair,
        report: &'a mut CheckReport,
    ) -> Self {
        // Nothing can be put behind a footer, or taken away in front of it.
        let repair = if layout.has_footer { Repair::Nothing } else { repair };
        Self {
            storage,
            layout,
            repair,
            report,
            primary: Vec::new(),
            redundant: Vec::new(),
            metadata: Vec::new(),
            places: Vec::new(),
            expected: None,
            corruptions: 0,
        }
    }

    pub(crate) fn run(mut self) -> Result<()> {
        self.report.total_clusters =
            self.report.total_clusters.saturating_add(self.layout.grains());
        if !self.read_directories() {
            return Ok(());
        }
        if self.layout.descriptor.is_some_and(|at| at.check_within(self.storage.size()).is_err()) {
            self.corruption(|| "the embedded descriptor ends past the end of the file".to_owned());
        }
        self.check_entangled();
        self.mend_directories()?;
        self.metadata = metadata(&self.layout, &self.primary, &self.redundant);
        for index in 0..self.primary.len() {
            self.check_table(index)?;
        }
        self.check_places();
        let end = self.metadata.last().map_or(0, Span::end);
        self.report.image_end_offset = self.report.image_end_offset.max(end);
        if self.corruptions == 0 && !self.layout.compressed && !self.layout.has_footer {
            self.check_leaks()?;
        }
        Ok(())
    }

    fn corruption(&mut self, detail: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(1);
        self.report.corruption(detail);
    }

    /// A contradiction that was mended, if this is wanted, or stays.
    fn mended(&mut self, detail: impl FnOnce() -> String) {
        if self.repair == Repair::All {
            self.report.corruptions_fixed = self.report.corruptions_fixed.saturating_add(1);
            self.report.note(detail);
        } else {
            self.corruption(detail);
        }
    }
}
