// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making new images.

use crate::{Format, Place, Spec};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use tranship_block::{Error, Result, Span, Storage, Zeroing};
use tranship_raw::{Access, RawFile};

/// A new image, with what its format lets one choose.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Create {
    /// Bytes that read as zero.
    Raw {
        /// Bytes.
        size: u64,
        /// Reserve space for all of them.
        reserve: bool,
    },
    /// A QCOW2 image.
    Qcow2(tranship_qcow2::CreateOptions),
}

impl Create {
    /// The format of the image.
    pub fn format(&self) -> Format {
        match self {
            Self::Raw { .. } => Format::Raw,
            Self::Qcow2(_) => Format::Qcow2,
        }
    }
}

/// Makes an image in the file that `spec` names; what was in the file is lost.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Usage`] for what no image can be, and what writing
/// reports. An image whose creation failed cannot be opened.
pub fn create(spec: &Spec, what: &Create) -> Result<()> {
    let Place::File(path) = &spec.place else {
        return Err(Error::unsupported(format!("{} is no file to make an image in", spec.name)));
    };
    let storage = emptied(path)?;
    create_in(&*storage, what).map_err(|error| error.in_file(path))
}

/// Makes an image in `storage`; what was in it is lost.
///
/// # Errors
///
/// As [`create`].
pub fn create_in(storage: &dyn Storage, what: &Create) -> Result<()> {
    match what {
        Create::Raw { size, reserve } => {
            storage.set_len(*size)?;
            if *reserve {
                storage.write_zeroes(Span::new(0, *size), Zeroing::KeepAllocated)?;
            }
            storage.flush()
        }
        Create::Qcow2(options) => tranship_qcow2::create(storage, options),
    }
}

/// The file at `path` without its contents; it is made if it is not there.
fn emptied(path: &Path) -> Result<Arc<dyn Storage>> {
    let failed = |error| Error::io("cannot create", error).in_file(path);
    let is_there = path.exists();
    if is_there {
        // Looks at what it is before anything of it is lost.
        let file = RawFile::open(path, Access::ReadWrite)?;
        file.set_len(0)?;
        return Ok(Arc::new(file));
    }
    let file =
        File::options().read(true).write(true).create_new(true).open(path).map_err(failed)?;
    Ok(Arc::new(RawFile::from_file(file, path, Access::ReadWrite)?))
}
