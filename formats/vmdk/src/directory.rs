// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The grain directory: where the grain tables are.

use crate::layout::{Entries, Layout};
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Span};

/// Bytes of a directory that are read at a time.
const PIECE: u64 = 1 << 20;
/// The upper half of a directory entry of seSparse that names a table.
const SESPARSE_TABLE: u64 = 0x1000_0000;
/// An entry that leads out of every file: a table that is lost.
const NOWHERE: u32 = u32::MAX;

/// Both copies of a directory.
#[derive(Debug)]
pub(crate) struct Directory {
    /// What [`Layout::table_at`] takes, 0 where there is no table.
    pub(crate) primary: Vec<u32>,
    /// The same for the second copy of the tables; empty if there is none.
    pub(crate) redundant: Vec<u32>,
    /// What was wrong and could be worked around.
    pub(crate) warning: Option<String>,
}

/// Reads the directory and its redundant copy; entries that only the copy has, or whose
/// table would lie outside of the file, are taken from the copy.
pub(crate) fn read(file: &dyn BlockDevice, layout: &Layout, salvage: bool) -> Result<Directory> {
    let primary = layout
        .directory
        .filter(|at| *at != 0)
        .ok_or_else(|| Error::corrupt("gdOffset is 0, expected the grain directory"))
        .and_then(|at| read_at(file, layout, at, "grain directory", salvage));
    let Some(redundant_at) = layout.redundant else {
        return Ok(Directory { primary: primary?, redundant: Vec::new(), warning: None });
    };
    let redundant = read_at(file, layout, redundant_at, "redundant grain directory", salvage);
    match (primary, redundant) {
        (Ok(primary), Ok(redundant)) => Ok(merge(file, layout, primary, redundant)),
        (Ok(primary), Err(error)) => Ok(Directory {
            primary,
            redundant: Vec::new(),
            warning: Some(format!("the second copy of the grain directory is lost: {error}")),
        }),
        // A header that leads nowhere may be wrong about the copy as well, and an empty copy
        // does not prove that the disk is empty.
        (Err(error), Ok(redundant))
            if (salvage || error.kind() != ErrorKind::Corrupt)
                && redundant.iter().any(|entry| *entry != 0) =>
        {
            Ok(Directory {
                primary: redundant.clone(),
                redundant,
                warning: Some(format!("{error}; the redundant copy is used")),
            })
        }
        (Err(error), _) => Err(error),
    }
}

fn merge(
    file: &dyn BlockDevice,
    layout: &Layout,
    mut primary: Vec<u32>,
    redundant: Vec<u32>,
) -> Directory {
    let size = file.size();
    let usable = |entry: u32| is_usable(layout, entry, size);
    let mut replaced = 0_u64;
    for (own, copy) in primary.iter_mut().zip(&redundant) {
        if !usable(*own) && usable(*copy) {
            *own = *copy;
            replaced = replaced.saturating_add(1);
        }
    }
    let warning = (replaced > 0).then(|| {
        format!(
            "{replaced} of {} entries of the grain directory are lost; its redundant copy is used",
            primary.len()
        )
    });
    Directory { primary, redundant, warning }
}

/// Whether a directory entry names a table that lies within a file of `size` bytes.
pub(crate) fn is_usable(layout: &Layout, entry: u32, size: u64) -> bool {
    // Millions of entries name no table at all.
    if entry == 0 {
        return false;
    }
    let table = Span::new(layout.table_at(entry), layout.table_len());
    table.start != 0 && table.check_within(size).is_ok()
}

/// Reads one copy of the directory.
pub(crate) fn read_at(
    file: &dyn BlockDevice,
    layout: &Layout,
    at: u64,
    name: &str,
    salvage: bool,
) -> Result<Vec<u32>> {
    let count = layout.directory_entries;
    let span = Span::new(at, count.saturating_mul(layout.entry_len()));
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
        match layout.entries {
            Entries::Sectors { .. } => {
                entries.extend(bytes.as_chunks().0.iter().map(|entry| u32::from_le_bytes(*entry)));
            }
            Entries::SeSparse { tables, .. } => {
                let count = tables.len.checked_div(layout.table_len()).unwrap_or(0);
                for entry in bytes.as_chunks().0 {
                    match table_number(u64::from_le_bytes(*entry), count) {
                        Ok(number) => entries.push(number),
                        Err(_) if salvage => entries.push(NOWHERE),
                        Err(error) => return Err(error.at(next)),
                    }
                }
            }
        }
        next = next.saturating_add(len);
    }
    Ok(entries)
}

/// The number of a seSparse table plus one, or 0 for none.
fn table_number(entry: u64, count: u64) -> Result<u32> {
    if entry == 0 {
        return Ok(0);
    }
    let number = entry & u64::from(u32::MAX);
    u32::try_from(number.saturating_add(1))
        .ok()
        .filter(|_| entry >> 32 == SESPARSE_TABLE && number < count)
        .ok_or_else(|| {
            Error::corrupt(format!(
                "grain directory entry is {entry:#x}, expected 0 or {SESPARSE_TABLE:#x} above a \
                 table number below {count}"
            ))
        })
}
