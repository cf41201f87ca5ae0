// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changing what the header says about an image.

mod downgrade;

use crate::bitmaps::tracking::DATA_FILE_RAW;
use crate::check;
use crate::editor::Editor;
use crate::extensions::BACKING_FORMAT;
use crate::first_cluster::{FirstCluster, field};
use crate::header::{Backing, DATA_FILE, Header};
use crate::repair::recount;
use crate::snapshots;
use tranship_block::{Error, Result, Storage};

/// Type of the header extension with the name of the data file.
const DATA_FILE_NAME: u32 = 0x4441_5441;
/// Compatible bit 0: reference counts may be written late.
const LAZY_REFCOUNTS: u64 = 1;
/// The longest name of a backing format.
const LONGEST_FORMAT: usize = 15;

/// What is to be changed; `None` stays as it is.
#[derive(Clone, Debug, Default)]
pub struct Amendments {
    /// 2 or 3.
    pub version: Option<u32>,
    /// Reference counts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// Width of reference counts in bits: 1, 2, 4, 8, 16, 32 or 64.
    pub refcount_bits: Option<u32>,
    /// The backing file that the header names, or none. Contents are not looked at.
    pub backing: Option<Option<Backing>>,
    /// Name of the external data file of an image that has one.
    pub data_file: Option<String>,
    /// Whether the data file alone is a raw disk of the same contents; can only be given up.
    pub data_file_raw: Option<bool>,
}

/// Changes the header of the image in `storage`, and what follows from it. Nobody else may
/// have it open. Each change is in force as a whole or not at all.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Usage`] for what contradicts the format or the image,
/// [`tranship_block::ErrorKind::Unsupported`] for counts that do not fit into the width and
/// features that version 2 does not have, [`tranship_block::ErrorKind::Corrupt`] for an image
/// that needs a repair.
pub fn amend(storage: &dyn Storage, amendments: &Amendments) -> Result<()> {
    let header = Header::read(storage)?;
    let version = amendments.version.unwrap_or(header.version);
    let order = match amendments.refcount_bits {
        None => header.refcount_order,
        Some(bits) if bits.is_power_of_two() && bits <= 64 => bits.trailing_zeros(),
        Some(bits) => {
            return Err(Error::usage(format!(
                "refcount_bits is {bits}, expected a power of two up to 64"
            )));
        }
    };
    validate(&header, amendments, (version, order))?;
    if version > header.version {
        upgrade(storage)?;
    }
    if order != header.refcount_order {
        change_width(storage, order)?;
    }
    if version < header.version {
        downgrade::downgrade(storage)?;
    }
    change_header(storage, amendments)
}

/// Makes `backing` what the header names, without looking at any contents.
///
/// # Errors
///
/// As [`amend`].
pub fn change_backing(storage: &dyn Storage, backing: Option<Backing>) -> Result<()> {
    amend(storage, &Amendments { backing: Some(backing), ..Amendments::default() })
}

fn validate(header: &Header, amendments: &Amendments, (version, order): (u32, u32)) -> Result<()> {
    let has_data_file = header.incompatible_features & DATA_FILE != 0;
    let fault = if !(2..=3).contains(&version) {
        format!("version is {version}, expected 2 or 3")
    } else if version < 3 && order != 4 {
        format!("version 2 has reference counts of 16 bits, not of {}", 1_u32.wrapping_shl(order))
    } else if version < 3 && amendments.lazy_refcounts == Some(true) {
        "version 2 has no lazy reference counts".to_owned()
    } else if amendments.data_file.is_some() && !has_data_file {
        "the image has no external data file whose name could be changed".to_owned()
    } else if amendments.data_file_raw == Some(true)
        && header.autoclear_features & DATA_FILE_RAW == 0
    {
        "data_file_raw cannot be set for an image that exists".to_owned()
    } else if let Some(Some(backing)) = &amendments.backing {
        let raw = header.autoclear_features & DATA_FILE_RAW != 0;
        match &backing.format {
            _ if raw && amendments.data_file_raw != Some(false) => {
                "an image whose data file is raw cannot have a backing file".to_owned()
            }
            None => {
                format!("backing file {:?} needs a format: guessing it is unsafe", backing.name)
            }
            Some(format) if format.len() > LONGEST_FORMAT => format!(
                "name of the backing format has {} bytes, expected at most {LONGEST_FORMAT}",
                format.len()
            ),
            Some(_) if backing.name.is_empty() || backing.name.contains('\0') => {
                "name of the backing file is empty or has a NUL byte in it".to_owned()
            }
            Some(_) => return Ok(()),
        }
    } else {
        return Ok(());
    };
    Err(Error::usage(fault))
}

/// Version 3 of the same image. Snapshots get the extra data that it demands.
fn upgrade(storage: &dyn Storage) -> Result<()> {
    let mut editor = Editor::open(storage)?;
    let (list, old_size) = snapshots::list(storage, &editor.header)?;
    if list.iter().any(|snapshot| snapshot.disk_size.is_none()) {
        let size = editor.header.size;
        let table: Vec<u8> = list.iter().flat_map(|snapshot| snapshot.encode(size)).collect();
        let offset = editor.store(&table)?;
        editor.free(editor.header.snapshots_offset, old_size);
        editor.first.set_u64(field::SNAPSHOTS_OFFSET, offset);
    }
    editor.first.set_version(3, 4);
    editor.commit()
}

/// Writes all reference counts anew in another width.
fn change_width(storage: &dyn Storage, order: u32) -> Result<()> {
    let mut editor = Editor::open(storage)?;
    let references = check::contents(storage, &editor.header)?;
    let wide = crate::geometry::Geometry { refcount_order: order, ..editor.geometry() };
    let most = references.most();
    if most > wide.refcount_max() {
        return Err(Error::unsupported(format!(
            "a cluster has {most} references, more than {} bits can count",
            1_u32.wrapping_shl(order)
        )));
    }
    recount(storage, &editor.header, references, order)?;
    editor.header = Header::read(storage)?;
    editor.trim()?;
    storage.flush()
}

fn change_header(storage: &dyn Storage, amendments: &Amendments) -> Result<()> {
    let header = Header::read(storage)?;
    let mut first = FirstCluster::read(storage, &header)?;
    if let Some(lazy) = amendments.lazy_refcounts
        && header.version >= 3
    {
        if header.is_dirty() {
            crate::repair::rebuild_refcounts(storage)?;
            first = FirstCluster::read(storage, &Header::read(storage)?)?;
        }
        let features = first.u64(field::COMPATIBLE) & !LAZY_REFCOUNTS;
        first.set_u64(field::COMPATIBLE, features | u64::from(lazy));
    }
    if let Some(backing) = &amendments.backing {
        let format = backing.as_ref().and_then(|backing| backing.format.clone());
        first.set_extension(BACKING_FORMAT, format.map(String::into_bytes));
        first.set_backing(backing.as_ref().map_or("", |backing| &backing.name));
    }
    if let Some(name) = &amendments.data_file {
        let name = (!name.is_empty()).then(|| name.clone().into_bytes());
        first.set_extension(DATA_FILE_NAME, name);
    }
    if amendments.data_file_raw == Some(false) {
        let features = first.u64(field::AUTOCLEAR) & !DATA_FILE_RAW;
        first.set_u64(field::AUTOCLEAR, features);
    }
    first.write(storage)
}
