// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking for contradictions in the block map.

use crate::disk::{ABSENT, ZERO, read_map};
use crate::header::{Header, Kind};
use std::collections::HashMap;
use tranship_block::{BlockDevice, CheckReport, Result, Span};

/// Checks the image in `file` without changing it: blocks outside of the file, blocks that
/// belong to two places of the disk, and a wrong count of them. The parent of a
/// differencing image is not needed.
///
/// # Errors
///
/// Those of [`Header::read`], and I/O errors.
pub fn check(file: &dyn BlockDevice) -> Result<CheckReport> {
    let header = Header::read(file)?;
    let map = read_map(file, &header)?;
    let mut report = CheckReport { total_clusters: header.entries(), ..CheckReport::default() };
    let mut owners: HashMap<u32, u64> = HashMap::new();
    let (mut left, mut expected) = (header.size, None);
    for (index, entry) in (0_u64..).zip(map) {
        let used = left.min(header.block_size.into());
        left = left.saturating_sub(used);
        if entry == ABSENT || entry == ZERO {
            continue;
        }
        report.allocated_clusters = report.allocated_clusters.saturating_add(1);
        if expected.replace(entry.saturating_add(1)).is_some_and(|next| next != entry) {
            report.fragmented_clusters = report.fragmented_clusters.saturating_add(1);
        }
        if entry >= header.blocks {
            report.corruption(|| format!("ERROR: block index {index} too large, is {entry}"));
            continue;
        }
        let place = Span::new(header.data_at(entry), used);
        if place.check_within(file.size()).is_err() {
            report.corruption(|| {
                format!(
                    "ERROR: block {index} ends at byte {} of a file of {}",
                    place.end(),
                    file.size()
                )
            });
        }
        if let Some(other) = owners.insert(entry, index) {
            report.corruption(|| format!("ERROR: blocks {other} and {index} are both at {entry}"));
        }
    }
    let (counted, stated) = (report.allocated_clusters, u64::from(header.allocated));
    // A fixed image is counted as full from the start.
    if counted != stated && header.kind != Kind::Fixed {
        report.corruption(|| {
            format!("ERROR: allocated blocks mismatch, is {counted}, should be {stated}")
        });
    }
    Ok(report)
}
