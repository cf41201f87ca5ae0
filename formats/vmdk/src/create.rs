// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making new, empty disks.

use crate::compose::compose;
use crate::extents::ExtentFiles;
use crate::header::{
    FLAG_NEWLINE_TEST, FLAG_REDUNDANT_DIRECTORY, FLAG_ZEROED_GRAIN, MAGIC, MAX_DIRECTORY_ENTRIES,
    NEWLINES,
};
use crate::identity::random_cid;
use crate::line::{ExtentLine, ExtentType};
use crate::options::{CreateOptions, Subformat};
use crate::stream::Stream;
use crate::{SECTOR, cowd};
use tranship_block::{BlockDevice, Error, Result, Span, Storage, Zeroing};

/// Bytes of a grain in new disks.
pub(crate) const GRAIN: u64 = 64 << 10;
/// Grains per table.
pub(crate) const TABLE_ENTRIES: u64 = 512;
const TABLE_LEN: u64 = TABLE_ENTRIES * 4;
/// Sectors that new disks reserve for an embedded descriptor.
pub(crate) const DESCRIPTOR_SECTORS: u64 = 20;
/// Bytes of a directory that are written at a time.
const PIECE: usize = 1 << 20;

/// Makes `storage`, the disk's first or only file, a new disk; further files are created
/// by `files`.
///
/// What makes it a disk is written last: after a failure it is none.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Usage`] for options that contradict each other,
/// [`tranship_block::ErrorKind::Unsupported`] for a size that the subformat cannot have,
/// and what storage and files report.
pub fn create(
    storage: &dyn Storage,
    files: &dyn ExtentFiles,
    options: &CreateOptions,
) -> Result<()> {
    options.check()?;
    let extents = options.extents()?;
    let cid = options.cid.unwrap_or_else(random_cid);
    let text = compose(options, cid, &extents);
    // Everything is looked at before anything is overwritten.
    if matches!(options.subformat, Subformat::MonolithicSparse | Subformat::StreamOptimized) {
        check_descriptor(&text)?;
    }
    for line in &extents {
        match line.kind {
            ExtentType::VmfsSparse => cowd::tables(line.len).map(drop)?,
            ExtentType::Sparse if options.subformat != Subformat::StreamOptimized => {
                Plan::new(line.len, 1 + DESCRIPTOR_SECTORS).map(drop)?;
            }
            _ => {}
        }
    }
    match options.subformat {
        Subformat::MonolithicSparse => {
            create_sparse(storage, options.capacity(), options.zeroed_grain, Some(&text))
        }
        Subformat::StreamOptimized => Stream::new(storage, options, &text)?.finish(storage),
        _ => {
            // An old descriptor must not find new extents.
            let len = u64::try_from(text.len()).unwrap_or(u64::MAX);
            storage.set_len(len)?;
            storage.write_zeroes(Span::new(0, len), Zeroing::MayUnmap)?;
            storage.flush()?;
            for line in &extents {
                create_extent(files, line, options.zeroed_grain, options.preallocate)
                    .map_err(|error| error.in_file(&line.name))?;
            }
            storage.write_at(text.as_bytes(), 0)?;
            storage.flush()
        }
    }
}

/// Creates the file of one extent.
pub(crate) fn create_extent(
    files: &dyn ExtentFiles,
    line: &ExtentLine,
    zeroed_grain: bool,
    preallocate: bool,
) -> Result<()> {
    if line.kind == ExtentType::VmfsSparse {
        return cowd::create(&*files.create(&line.name, 0)?, line.len);
    }
    if line.kind == ExtentType::Sparse {
        let file = files.create(&line.name, 0)?;
        return create_sparse(&*file, line.len, zeroed_grain, None);
    }
    let file = files.create(&line.name, line.len)?;
    if preallocate {
        file.write_zeroes(Span::new(0, line.len), Zeroing::KeepAllocated)?;
    }
    file.flush()
}

/// Where the parts of a new sparse extent are, in sectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) tables: u64,
    pub(crate) redundant: u64,
    pub(crate) directory: u64,
    pub(crate) overhead: u64,
}

impl Plan {
    /// Two copies of directory and tables for `capacity` bytes, from sector `start` on.
    pub(crate) fn new(capacity: u64, start: u64) -> Result<Self> {
        let tables = capacity.div_ceil(GRAIN * TABLE_ENTRIES);
        let directory_len = tables.saturating_mul(4).div_ceil(SECTOR);
        let tables_len = tables.saturating_mul(TABLE_LEN / SECTOR);
        let directory = start.saturating_add(directory_len).saturating_add(tables_len);
        let end = directory.saturating_add(directory_len).saturating_add(tables_len);
        let per_grain = GRAIN / SECTOR;
        let overhead = end.div_ceil(per_grain).saturating_mul(per_grain);
        if tables > MAX_DIRECTORY_ENTRIES || u32::try_from(overhead).is_err() {
            return Err(Error::unsupported(format!(
                "{capacity} bytes are too many for a sparse extent: its {tables} grain tables do \
                 not fit"
            )));
        }
        Ok(Self { tables, redundant: start, directory, overhead })
    }

    /// Bytes from a directory to the first of its tables.
    fn directory_len(&self) -> u64 {
        self.tables.saturating_mul(4).div_ceil(SECTOR).saturating_mul(SECTOR)
    }

    /// Writes both directories.
    pub(crate) fn write_directories(&self, storage: &dyn Storage) -> Result<()> {
        for start in [self.redundant, self.directory] {
            let at = start.saturating_mul(SECTOR);
            let first = at.saturating_add(self.directory_len()) / SECTOR;
            let table = |number: u64| {
                let sector = first.saturating_add(number.saturating_mul(TABLE_LEN / SECTOR));
                u32::try_from(sector).unwrap_or(0)
            };
            Self::write_entries(storage, at, (0..self.tables).map(table))?;
        }
        Ok(())
    }

    /// Writes the entries of a directory that starts at byte `at`.
    pub(crate) fn write_entries(
        storage: &dyn Storage,
        mut at: u64,
        entries: impl IntoIterator<Item = u32>,
    ) -> Result<()> {
        let mut piece = Vec::new();
        for entry in entries {
            piece.extend(entry.to_le_bytes());
            if piece.len() >= PIECE {
                storage.write_at(&piece, at)?;
                at = at.saturating_add(u64::try_from(piece.len()).unwrap_or(0));
                piece.clear();
            }
        }
        storage.write_at(&piece, at)
    }
}

fn create_sparse(
    storage: &dyn Storage,
    capacity: u64,
    zeroed_grain: bool,
    descriptor: Option<&str>,
) -> Result<()> {
    let plan = Plan::new(capacity, 1 + DESCRIPTOR_SECTORS)?;
    let end = plan.overhead.saturating_mul(SECTOR);
    invalidate(storage)?;
    // What was there before must not shine through in tables.
    storage.set_len(end)?;
    storage.write_zeroes(Span::new(0, end), Zeroing::MayUnmap)?;
    plan.write_directories(storage)?;
    let descriptor_len = match descriptor {
        None => 0,
        Some(text) => {
            storage.write_at(text.as_bytes(), SECTOR)?;
            DESCRIPTOR_SECTORS
        }
    };
    storage.flush()?;
    let header = HeaderFields {
        version: if zeroed_grain { 2 } else { 1 },
        flags: FLAG_NEWLINE_TEST
            | FLAG_REDUNDANT_DIRECTORY
            | if zeroed_grain { FLAG_ZEROED_GRAIN } else { 0 },
        capacity: capacity / SECTOR,
        descriptor: descriptor_len,
        redundant: plan.redundant,
        directory: plan.directory,
        overhead: plan.overhead,
        compression: 0,
    };
    storage.write_at(&header.bytes(), 0)?;
    storage.flush()
}

/// Makes whatever disk is in `storage` none, before it is overwritten piece by piece.
pub(crate) fn invalidate(storage: &dyn Storage) -> Result<()> {
    let front = storage.size().min(SECTOR);
    if front == 0 {
        return Ok(());
    }
    storage.write_zeroes(Span::new(0, front), Zeroing::MayUnmap)?;
    storage.flush()
}

/// Refuses a descriptor that does not fit in front of the tables.
pub(crate) fn check_descriptor(text: &str) -> Result<()> {
    let most = usize::try_from(DESCRIPTOR_SECTORS * SECTOR).unwrap_or(0);
    if text.len() >= most {
        return Err(Error::usage(format!(
            "the descriptor has {} bytes, expected less than {most}: names are too long",
            text.len()
        )));
    }
    Ok(())
}

/// The fields of a hosted header that differ between disks; places and lengths in sectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeaderFields {
    pub(crate) version: u32,
    pub(crate) flags: u32,
    pub(crate) capacity: u64,
    pub(crate) descriptor: u64,
    pub(crate) redundant: u64,
    pub(crate) directory: u64,
    pub(crate) overhead: u64,
    pub(crate) compression: u16,
}

impl HeaderFields {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.capacity.to_le_bytes());
        bytes.extend((GRAIN / SECTOR).to_le_bytes());
        bytes.extend(u64::from(self.descriptor != 0).to_le_bytes());
        bytes.extend(self.descriptor.to_le_bytes());
        bytes.extend(u32::try_from(TABLE_ENTRIES).unwrap_or(0).to_le_bytes());
        bytes.extend(self.redundant.to_le_bytes());
        bytes.extend(self.directory.to_le_bytes());
        bytes.extend(self.overhead.to_le_bytes());
        // uncleanShutdown
        bytes.push(0);
        bytes.extend(NEWLINES);
        bytes.extend(self.compression.to_le_bytes());
        bytes.resize(usize::try_from(SECTOR).unwrap_or(0), 0);
        bytes
    }
}
