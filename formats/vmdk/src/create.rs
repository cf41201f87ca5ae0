// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making new, empty disks.

use crate::compose::compose;
use crate::extents::ExtentFiles;
use crate::header::{
    FLAG_NEWLINE_TEST, FLAG_REDUNDANT_DIRECTORY, FLAG_ZEROED_GRAIN, MAGIC, MAX_DIRECTORY_ENTRIES,
    NEWLINES,
};
use crate::identity::random_cid;
use crate::line::{Access, ExtentLine, ExtentType};
use crate::stream::Stream;
use crate::{MAX_EXTENTS, SECTOR};
use std::str::FromStr;
use tranship_block::{BlockDevice, Error, Result, Span, Storage, Zeroing};

/// Bytes of a grain in new disks.
pub(crate) const GRAIN: u64 = 64 << 10;
/// Grains per table.
pub(crate) const TABLE_ENTRIES: u64 = 512;
const TABLE_LEN: u64 = TABLE_ENTRIES * 4;
/// Sectors that new disks reserve for an embedded descriptor.
pub(crate) const DESCRIPTOR_SECTORS: u64 = 20;
/// What VMware puts into one extent of a split disk: with its tables it stays below 2 GiB.
pub(crate) const SPLIT: u64 = 2047 << 20;
/// Bytes of a directory that are written at a time.
const PIECE: usize = 1 << 20;

/// The kinds of disks that can be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subformat {
    /// One growing file with the descriptor in it.
    MonolithicSparse,
    /// A descriptor and one file of plain bytes.
    MonolithicFlat,
    /// A descriptor and growing files of at most 2 GiB.
    TwoGbMaxExtentSparse,
    /// A descriptor and files of plain bytes of at most 2 GiB.
    TwoGbMaxExtentFlat,
    /// One file of compressed grains, written once.
    StreamOptimized,
    /// A descriptor and one file of plain bytes, for a VMFS datastore.
    Vmfs,
}

impl Subformat {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentSparse,
        Self::TwoGbMaxExtentFlat,
        Self::StreamOptimized,
        Self::Vmfs,
    ];

    /// The word that descriptors use as `createType`.
    pub fn word(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
            Self::Vmfs => "vmfs",
        }
    }

    fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat | Self::Vmfs)
    }

    fn is_split(self) -> bool {
        matches!(self, Self::TwoGbMaxExtentFlat | Self::TwoGbMaxExtentSparse)
    }
}

impl FromStr for Subformat {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        if ["vmfsSparse", "seSparse"].iter().any(|delta| word.eq_ignore_ascii_case(delta)) {
            return Err(Error::unsupported(format!(
                "disks of subformat {word} are made by ESX alone; they can be read, not created"
            )));
        }
        Self::ALL.into_iter().find(|kind| word.eq_ignore_ascii_case(kind.word())).ok_or_else(|| {
            Error::usage(format!(
                "subformat {word:?} is not known, expected one of {}",
                Self::ALL.map(Self::word).join(", ")
            ))
        })
    }
}

/// The disk controller that a disk is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Adapter {
    /// IDE.
    #[default]
    Ide,
    /// BusLogic SCSI.
    BusLogic,
    /// LSI Logic SCSI.
    LsiLogic,
    /// SCSI of ESX 2.
    LegacyEsx,
    /// Paravirtual SCSI.
    PvScsi,
}

impl Adapter {
    /// The word that descriptors use.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ide => "ide",
            Self::BusLogic => "buslogic",
            Self::LsiLogic => "lsilogic",
            Self::LegacyEsx => "legacyESX",
            Self::PvScsi => "pvscsi",
        }
    }
}

impl FromStr for Adapter {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let all = [Self::Ide, Self::BusLogic, Self::LsiLogic, Self::LegacyEsx, Self::PvScsi];
        all.into_iter().find(|adapter| word.eq_ignore_ascii_case(adapter.word())).ok_or_else(|| {
            Error::usage(format!(
                "adapter type {word:?} is not known, expected one of {}",
                all.map(Self::word).join(", ")
            ))
        })
    }
}

/// What a new snapshot is based on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentLink {
    /// The parent's file as the descriptor shall name it.
    pub name: String,
    /// The parent's content id.
    pub cid: u32,
}

/// What a new disk is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes, rounded up to a multiple of 512.
    pub size: u64,
    /// How the disk is stored.
    pub subformat: Subformat,
    /// Name of the disk's own file, without folders: `disk.vmdk`. The names of the extents
    /// follow from it.
    pub name: String,
    /// The controller that the geometry is made for.
    pub adapter: Adapter,
    /// `virtualHWVersion`; QEMU's `compat6` is 6.
    pub hardware_version: u32,
    /// `toolsVersion`.
    pub tools_version: u32,
    /// Whether table entries may say that a grain is zero. Needs version 2 of the format.
    pub zeroed_grain: bool,
    /// The disk below, if the new one is a snapshot.
    pub parent: Option<ParentLink>,
    /// The content id; a random one if none is given.
    pub cid: Option<u32>,
    /// Effort of compression for [`Subformat::StreamOptimized`], from 1 to 12.
    pub compression_level: i32,
}

impl CreateOptions {
    /// A disk with what QEMU takes for everything else.
    pub fn new(size: u64, subformat: Subformat, name: impl Into<String>) -> Self {
        Self {
            size,
            subformat,
            name: name.into(),
            adapter: Adapter::Ide,
            hardware_version: 4,
            tools_version: i32::MAX.unsigned_abs(),
            zeroed_grain: false,
            parent: None,
            cid: None,
            compression_level: 6,
        }
    }

    /// Checks what descriptors and tables cannot express.
    pub(crate) fn check(&self) -> Result<()> {
        let names = [Some(&self.name), self.parent.as_ref().map(|parent| &parent.name)];
        for name in names.into_iter().flatten() {
            if name.is_empty() || name.contains(['"', '\n', '\r', '\0']) {
                return Err(Error::usage(format!("{name:?} cannot be a name in a descriptor")));
            }
        }
        if self.parent.is_some() && self.subformat.is_flat() {
            return Err(Error::usage(format!(
                "a disk of subformat {} cannot have a parent: only sparse ones can",
                self.subformat.word()
            )));
        }
        if self.size == 0 || i64::try_from(self.size).is_err() {
            return Err(Error::usage(format!(
                "size is {} bytes, expected 1 to 2^63 - 512",
                self.size
            )));
        }
        Ok(())
    }

    /// Bytes of the disk, whole sectors.
    pub(crate) fn capacity(&self) -> u64 {
        self.size.div_ceil(SECTOR).saturating_mul(SECTOR)
    }

    /// The extents of the disk.
    pub(crate) fn extents(&self) -> Result<Vec<ExtentLine>> {
        let capacity = self.capacity();
        let piece = if self.subformat.is_split() { SPLIT } else { capacity };
        let count = capacity.div_ceil(piece.max(1));
        if count > u64::try_from(MAX_EXTENTS).unwrap_or(0) {
            return Err(Error::unsupported(format!(
                "{capacity} bytes need {count} extents of 2 GiB, expected at most {MAX_EXTENTS}"
            )));
        }
        let line = |number: u64| {
            let start = number.saturating_mul(piece);
            ExtentLine {
                access: match self.subformat {
                    Subformat::StreamOptimized => Access::ReadOnly,
                    _ => Access::ReadWrite,
                },
                len: capacity.saturating_sub(start).min(piece),
                kind: match self.subformat {
                    Subformat::Vmfs => ExtentType::Vmfs,
                    kind if kind.is_flat() => ExtentType::Flat,
                    _ => ExtentType::Sparse,
                },
                name: extent_name(&self.name, self.subformat, number),
                offset: 0,
            }
        };
        Ok((0..count).map(line).collect())
    }
}

/// The file of extent `number` of the disk `name`.
pub(crate) fn extent_name(name: &str, subformat: Subformat, number: u64) -> String {
    let stem = match name.len().checked_sub(5).and_then(|at| name.split_at_checked(at)) {
        Some((stem, ending)) if ending.eq_ignore_ascii_case(".vmdk") && !stem.is_empty() => stem,
        _ => name,
    };
    let number = number.saturating_add(1);
    match subformat {
        Subformat::MonolithicSparse | Subformat::StreamOptimized => name.to_owned(),
        Subformat::MonolithicFlat | Subformat::Vmfs => format!("{stem}-flat.vmdk"),
        Subformat::TwoGbMaxExtentSparse => format!("{stem}-s{number:03}.vmdk"),
        Subformat::TwoGbMaxExtentFlat => format!("{stem}-f{number:03}.vmdk"),
    }
}

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
    match options.subformat {
        Subformat::MonolithicSparse => {
            create_sparse(storage, options.capacity(), options.zeroed_grain, Some(&text))
        }
        Subformat::StreamOptimized => Stream::new(storage, options, &text)?.finish(storage),
        _ => {
            invalidate(storage)?;
            for line in &extents {
                create_extent(files, line, options.zeroed_grain)
                    .map_err(|error| error.in_file(&line.name))?;
            }
            storage.set_len(u64::try_from(text.len()).unwrap_or(u64::MAX))?;
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
) -> Result<()> {
    if line.kind == ExtentType::Sparse {
        let file = files.create(&line.name, 0)?;
        return create_sparse(&*file, line.len, zeroed_grain, None);
    }
    files.create(&line.name, line.len)?.flush()
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
            check_descriptor(text)?;
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
