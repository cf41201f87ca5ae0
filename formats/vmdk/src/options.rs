// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a new disk is to be.

use crate::line::{Access, ExtentLine, ExtentType};
use crate::{MAX_EXTENTS, SECTOR};
use std::str::FromStr;
use tranship_block::{Error, Result};

/// What VMware puts into one extent of a split disk: with its tables it stays below 2 GiB.
pub(crate) const SPLIT: u64 = 2047 << 20;

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
    /// A descriptor and a growing file (COWD) of less than 2 TiB, as ESX up to 6.0 uses it
    /// for snapshots.
    VmfsSparse,
}

impl Subformat {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentSparse,
        Self::TwoGbMaxExtentFlat,
        Self::StreamOptimized,
        Self::Vmfs,
        Self::VmfsSparse,
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
            Self::VmfsSparse => "vmfsSparse",
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
        if word.eq_ignore_ascii_case("seSparse") {
            return Err(Error::unsupported(format!(
                "disks of subformat {word} are made by ESXi alone; they can be read, not created"
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
    /// Whether flat extents get all of their space at once.
    pub preallocate: bool,
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
            preallocate: false,
            cid: None,
            compression_level: 6,
        }
    }

    /// The name of extent `number`, counted from 0.
    pub fn extent_name(&self, number: u64) -> String {
        extent_name(&self.name, self.subformat, number)
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
        if self.preallocate && !self.subformat.is_flat() {
            return Err(Error::usage(format!(
                "space cannot be reserved for a disk of subformat {}: only for flat ones",
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
                    Subformat::VmfsSparse => ExtentType::VmfsSparse,
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
        Subformat::VmfsSparse => format!("{stem}-delta.vmdk"),
        Subformat::TwoGbMaxExtentSparse => format!("{stem}-s{number:03}.vmdk"),
        Subformat::TwoGbMaxExtentFlat => format!("{stem}-f{number:03}.vmdk"),
    }
}
