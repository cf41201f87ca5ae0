// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The grain directory: where the grain tables are.

use crate::header::Header;
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Span};

/// Bytes of a directory that are read at a time.
const PIECE: u64 = 1 << 20;

/// The sector of each grain table, 0 where none is, and a warning if it is the second copy.
pub(crate) fn read(file: &dyn BlockDevice, header: &Header) -> Result<(Vec<u32>, Option<String>)> {
    let count = header.directory_entries;
    let primary = header
        .directory
        .filter(|at| *at != 0)
        .ok_or_else(|| Error::corrupt("gdOffset is 0, expected the grain directory"))
        .and_then(|at| read_at(file, at, count, "grain directory"));
    let Some(redundant_at) = header.redundant else { return Ok((primary?, None)) };
    let reason = match primary {
        Ok(primary) if primary.iter().any(|sector| *sector != 0) => return Ok((primary, None)),
        Ok(_) => "is all zero",
        Err(error) if error.kind() == ErrorKind::Io => "cannot be read",
        Err(error) => return Err(error),
    };
    let redundant = read_at(file, redundant_at, count, "redundant grain directory")?;
    let empty = redundant.iter().all(|sector| *sector == 0);
    let warning = format!("the grain directory {reason}; its redundant copy is used");
    // Two empty directories agree: an empty disk, nothing to warn about.
    Ok((redundant, Some(warning).filter(|_| !empty || reason != "is all zero")))
}

fn read_at(file: &dyn BlockDevice, at: u64, count: u64, name: &str) -> Result<Vec<u32>> {
    let span = Span::new(at, count.saturating_mul(4));
    if span.check_within(file.size()).is_err() {
        return Err(Error::corrupt(format!(
            "{name} of {count} entries ends past the file's size of {} bytes",
            file.size()
        ))
        .at(at));
    }
    let mut entries = Vec::new();
    let mut next = span.start;
    while next < span.end() {
        let len = span.end().saturating_sub(next).min(PIECE);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(&mut bytes, next)?;
        entries.extend(bytes.as_chunks().0.iter().map(|entry| u32::from_le_bytes(*entry)));
        next = next.saturating_add(len);
    }
    Ok(entries)
}
