// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the header of a sparse extent says, whichever of the three kinds it is: hosted
//! (`KDMV`), COWD or seSparse. All have a directory of tables of grains.

use crate::SECTOR;
use crate::line::ExtentType;
use std::num::NonZeroU64;
use tranship_block::{Error, Result, Span};

/// Where a grain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// This extent says nothing about it.
    Absent,
    /// It is declared to be zero.
    Zero,
    /// It is at this byte of the file: data, or a marker in front of a compressed grain.
    Stored(u64),
}

/// What directory and table entries look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entries {
    /// 32 bits, a number of sectors from the start of the file.
    Sectors {
        /// Whether table entries of 1 stand for grains of zeroes.
        zeroed: bool,
    },
    /// 64 bits with a state in the uppermost four.
    SeSparse {
        /// Where the grain tables are, in bytes.
        tables: Span,
        /// Where the grains start, in bytes.
        grains: u64,
    },
}

/// The entry of a table that could not be read, in salvaged disks alone. Tables are parsed
/// so that no entry on disk has this value.
pub(crate) const LOST: u64 = u64::MAX;

/// A header whose numbers have been checked against the limits of the format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Which of the three kinds it is.
    pub(crate) kind: ExtentType,
    /// Guest-visible size in bytes.
    pub(crate) capacity: u64,
    /// Bytes per grain, a power of two.
    pub(crate) grain: NonZeroU64,
    /// Grains per grain table.
    pub(crate) table_entries: NonZeroU64,
    /// Tables that cover the capacity.
    pub(crate) directory_entries: u64,
    /// What the entries are.
    pub(crate) entries: Entries,
    /// Where the embedded descriptor is.
    pub(crate) descriptor: Option<Span>,
    /// Byte offset of the grain directory; none if only a footer knows it.
    pub(crate) directory: Option<u64>,
    /// Whether the directory is named by a footer alone, which has to stay at the end.
    pub(crate) has_footer: bool,
    /// Byte offset of the second copy of the grain directory.
    pub(crate) redundant: Option<u64>,
    /// Byte behind the metadata at the front, as far as the header knows it.
    pub(crate) overhead: u64,
    /// Whether grains are zlib streams behind a marker.
    pub(crate) compressed: bool,
    /// Whether the last writer did not finish.
    pub(crate) unclean: bool,
}

impl Layout {
    /// Bytes of one entry of directory or table.
    pub(crate) fn entry_len(&self) -> u64 {
        match self.entries {
            Entries::Sectors { .. } => 4,
            Entries::SeSparse { .. } => 8,
        }
    }

    /// Bytes that one grain table occupies, without padding.
    pub(crate) fn table_len(&self) -> u64 {
        self.table_entries.get().saturating_mul(self.entry_len())
    }

    /// Bytes from one table to the next where they lie back to back.
    pub(crate) fn table_stride(&self) -> u64 {
        self.table_len().div_ceil(SECTOR).saturating_mul(SECTOR)
    }

    /// Grains that cover the capacity; the last may be short.
    pub(crate) fn grains(&self) -> u64 {
        self.capacity.div_ceil(self.grain.get())
    }

    /// Bytes of the guest that one table covers.
    pub(crate) fn table_span(&self) -> u64 {
        self.grain.get().saturating_mul(self.table_entries.get())
    }

    /// Bytes of grain `index` that lie within the capacity.
    pub(crate) fn needed_len(&self, index: u64) -> u64 {
        let start = index.saturating_mul(self.grain.get());
        self.capacity.saturating_sub(start).min(self.grain.get())
    }

    /// The byte of the file at which the table of a directory entry starts: sectors, or
    /// for seSparse the table's number plus one.
    pub(crate) fn table_at(&self, entry: u32) -> u64 {
        match self.entries {
            Entries::Sectors { .. } => u64::from(entry).saturating_mul(SECTOR),
            Entries::SeSparse { tables, .. } => tables.start.saturating_add(
                u64::from(entry).saturating_sub(1).saturating_mul(self.table_len()),
            ),
        }
    }

    /// Whether table entries can say that a grain is zero.
    pub(crate) fn can_zero(&self) -> bool {
        matches!(self.entries, Entries::Sectors { zeroed: true } | Entries::SeSparse { .. })
    }

    /// Where the grain of a table's `entry` is; whether that is in the file is not checked.
    pub(crate) fn place(&self, entry: u64) -> Result<Place> {
        match (self.entries, entry) {
            (_, 0) => Ok(Place::Absent),
            (_, LOST) | (Entries::Sectors { zeroed: true }, 1) => Ok(Place::Zero),
            // Descriptors and directories are there, never grains.
            (Entries::Sectors { zeroed: false }, 1) => Err(Error::corrupt(
                "grain table entry is 1, but the header does not say that this means zeroes",
            )),
            (Entries::Sectors { .. }, sector) => Ok(Place::Stored(sector.saturating_mul(SECTOR))),
            (Entries::SeSparse { grains, .. }, entry) => match entry >> 60 {
                0 => Ok(Place::Absent),
                1 | 2 => Ok(Place::Zero),
                3 => {
                    let high = entry >> 48 & 0x0fff;
                    let low = entry & 0x0000_ffff_ffff_ffff;
                    let index = high | low << 12;
                    index
                        .checked_mul(self.grain.get())
                        .and_then(|at| at.checked_add(grains))
                        .filter(|at| i64::try_from(*at).is_ok())
                        .map(Place::Stored)
                        .ok_or_else(|| {
                            Error::corrupt(format!("grain table entry {entry:#x} is out of range"))
                        })
                }
                state => Err(Error::corrupt(format!(
                    "grain table entry {entry:#x} has state {state}, expected 0 to 3"
                ))),
            },
        }
    }
}
