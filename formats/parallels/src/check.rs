// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking for contradictions in the block allocation table of an image.

use crate::header::{HEADER_LEN, Header};
use std::collections::HashMap;
use tranship_block::{BlockDevice, CheckReport, Result};

/// Bytes of the table that are read at a time.
const PIECE: u64 = 1 << 20;

/// Checks the image in `file` without changing it: clusters outside of the file, in its
/// table or used twice, space behind the last of them, and whether it was closed. The
/// parent is not needed.
///
/// # Errors
///
/// Those of [`Header::read`], and I/O errors.
pub fn check(file: &dyn BlockDevice) -> Result<CheckReport> {
    let header = Header::read(file)?;
    let cluster = header.cluster.get();
    let entries = u64::from(header.entries);
    let table_end = HEADER_LEN.saturating_add(entries.saturating_mul(4));
    let mut report = CheckReport { total_clusters: entries, ..CheckReport::default() };
    if header.dirty {
        report.corruption(|| "ERROR image was not closed correctly".to_owned());
    }
    let mut owners: HashMap<u32, u64> = HashMap::new();
    let (mut end, mut expected) = (0, None);
    let mut at = HEADER_LEN;
    while at < table_end {
        let len = table_end.saturating_sub(at).min(PIECE);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(&mut bytes, at)?;
        let first = at.saturating_sub(HEADER_LEN) / 4;
        at = at.saturating_add(len);
        for (index, entry) in (first..).zip(bytes.as_chunks().0) {
            let entry = u32::from_le_bytes(*entry);
            if entry == 0 {
                expected = None;
                continue;
            }
            let offset = header.offset(entry);
            let next = offset.saturating_add(cluster);
            report.allocated_clusters = report.allocated_clusters.saturating_add(1);
            if expected.replace(next).is_some_and(|expected| expected != offset) {
                report.fragmented_clusters = report.fragmented_clusters.saturating_add(1);
            }
            if offset < table_end {
                report.corruption(|| format!("ERROR cluster {index} is inside the BAT"));
            } else if offset >= file.size() {
                report.corruption(|| format!("ERROR cluster {index} is outside image"));
                continue;
            }
            // What is missing in the last one was never written.
            end = next.min(file.size()).max(end);
            if let Some(other) = owners.insert(entry, index) {
                report.corruption(|| format!("ERROR clusters {other} and {index} are the same"));
            }
        }
    }
    report.image_end_offset = if end == 0 { header.data_start() } else { end };
    let tail = file.size().saturating_sub(report.image_end_offset);
    if tail > 0 {
        report.leak(tail.div_ceil(cluster.max(1)), || {
            format!("ERROR space leaked at the end of the image {tail}")
        });
    }
    Ok(report)
}
