// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Persistent bitmaps: which parts of the disk have changed since somebody asked.
//!
//! A bitmap whose last writer died is inconsistent: it is kept, and can only be removed.

mod content;
pub(crate) mod directory;
mod operations;
pub(crate) mod tracking;

pub use content::BitmapContent;
pub use operations::{
    add_bitmap, clear_bitmap, disable_bitmap, enable_bitmap, merge_bitmap, remove_bitmap,
};
pub(crate) use operations::{forget, resize};

use crate::first_cluster::FirstCluster;
use crate::header::Header;
use directory::{AUTO, Directory, Entry, IN_USE};
use tranship_block::{BlockDevice, Error, ErrorKind, Result};

/// A bitmap, as the image's directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bitmap {
    /// Unique name.
    pub name: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// Its last writer died, or is at work: the bits say nothing.
    pub is_in_use: bool,
    /// Writes to the disk set bits.
    pub is_enabled: bool,
}

impl From<&Entry> for Bitmap {
    fn from(entry: &Entry) -> Self {
        Self {
            name: entry.name.clone(),
            granularity: 1_u64.wrapping_shl(u32::from(entry.granularity_bits)),
            is_in_use: entry.flags & IN_USE != 0,
            is_enabled: entry.flags & AUTO != 0,
        }
    }
}

/// The bitmaps of the image in `file`.
///
/// # Errors
///
/// As [`Header::read`]; [`ErrorKind::Corrupt`] for a directory that contradicts the format.
pub fn bitmaps(file: &dyn BlockDevice) -> Result<Vec<Bitmap>> {
    let header = Header::read(file)?;
    let first = FirstCluster::read(file, &header)?;
    let directory = Directory::read(file, &first, header.geometry())?.unwrap_or_default();
    Ok(directory.entries.iter().map(Bitmap::from).collect())
}

impl BitmapContent {
    /// Reads the bits of bitmap `name` of the image in `file`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] without such a bitmap, [`ErrorKind::Corrupt`] if it is
    /// inconsistent or contradicts the format.
    pub fn read(file: &dyn BlockDevice, name: &str) -> Result<Self> {
        let header = Header::read(file)?;
        let first = FirstCluster::read(file, &header)?;
        let directory = Directory::read(file, &first, header.geometry())?.unwrap_or_default();
        let entry = directory
            .entries
            .iter()
            .find(|entry| entry.name == name)
            .ok_or_else(|| no_bitmap(name))?;
        refuse_in_use(entry)?;
        Self::load(file, &header, entry).map(|(content, _)| content)
    }
}

fn no_bitmap(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("image has no bitmap {name:?}"))
}

fn refuse_in_use(entry: &Entry) -> Result<()> {
    if entry.flags & IN_USE == 0 {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "bitmap {:?} is inconsistent: its last writer did not store it; it can only be removed",
        entry.name
    )))
}
