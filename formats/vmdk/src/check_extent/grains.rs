// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where grains are: within the file, apart from the metadata and from each other.

use super::Checker;
use crate::SECTOR;
use crate::compressed::max_stored;
use crate::footer::MARKER;
use crate::layout::{Layout, Place};
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span};

/// Grains whose places are compared with each other: 1 GiB of memory.
const MOST_PLACES: usize = 256 << 20;

impl Checker<'_> {
    /// What is wrong with the place of a grain.
    pub(super) fn fault(&self, grain: u64, entry: u64) -> Option<String> {
        let at = match self.layout.place(entry) {
            Ok(Place::Absent | Place::Zero) => return None,
            Ok(Place::Stored(at)) => at,
            Err(error) => return Some(error.to_string()),
        };
        let len = if self.layout.compressed { MARKER } else { self.layout.needed_len(grain) };
        let span = Span::new(at, len);
        if span.check_within(self.storage.size()).is_err() {
            return Some(format!("grain {grain} at {at:#x} ends past the end of the file"));
        }
        let index = self.metadata.partition_point(|area| area.end() <= at);
        match self.metadata.get(index) {
            Some(area) if area.start < span.end() => {
                Some(format!("grain {grain} at {at:#x} lies in the metadata"))
            }
            _ => None,
        }
    }

    /// Counts a grain and finds what is wrong with its place.
    pub(super) fn check_grain(&mut self, grain: u64, entry: u64) {
        if let Some(fault) = self.fault(grain, entry) {
            self.corruption(|| fault);
            return;
        }
        let Ok(Place::Stored(at)) = self.layout.place(entry) else { return };
        let report = &mut *self.report;
        report.allocated_clusters = report.allocated_clusters.saturating_add(1);
        let len = if self.layout.compressed {
            report.compressed_clusters = report.compressed_clusters.saturating_add(1);
            match marker(self.storage, &self.layout, grain, at) {
                Ok(len) => len,
                Err(error) => {
                    self.corruption(|| error.to_string());
                    return;
                }
            }
        } else {
            if self.expected.is_some_and(|expected| expected != at) {
                report.fragmented_clusters = report.fragmented_clusters.saturating_add(1);
            }
            self.expected = Some(at.saturating_add(self.layout.grain.get()));
            self.layout.grain.get()
        };
        report.image_end_offset = report.image_end_offset.max(at.saturating_add(len));
        if self.places.len() < MOST_PLACES
            && let Ok(sector) = u32::try_from(at / SECTOR)
        {
            self.places.push(sector);
        }
    }

    /// Finds grains that share bytes.
    pub(super) fn check_places(&mut self) {
        self.places.sort_unstable();
        let len = if self.layout.compressed { 1 } else { self.layout.grain.get() / SECTOR };
        let shared = self
            .places
            .windows(2)
            .filter(|pair| matches!(pair, [a, b] if u64::from(b.saturating_sub(*a)) < len))
            .count();
        if shared > 0 {
            self.corruption(|| format!("{shared} grains share their place with another one"));
        }
    }
}

/// Checks the marker of compressed grain `grain` at byte `at`; returns its length with
/// padding.
fn marker(file: &dyn BlockDevice, layout: &Layout, grain: u64, at: u64) -> Result<u64> {
    let mut bytes = [0; 12];
    file.read_at(&mut bytes, at)?;
    let fields = LittleEndian(&bytes, "grain marker");
    let (lba, size) = (fields.u64("lba", 0)?, u64::from(fields.u32("size", 8)?));
    let expected = grain.saturating_mul(layout.grain.get() / SECTOR);
    let end = at.saturating_add(MARKER).saturating_add(size);
    if lba != expected || size == 0 || size > max_stored(layout) || end > file.size() {
        return Err(Error::corrupt(format!(
            "marker of grain {grain} says {size} bytes for guest sector {lba}, expected sector \
             {expected} and bytes within the file"
        ))
        .at(at));
    }
    Ok(end.saturating_sub(at).div_ceil(SECTOR).saturating_mul(SECTOR))
}
