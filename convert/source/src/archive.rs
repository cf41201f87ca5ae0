// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Packages in tar archives, read in place.

use crate::{Error, Location, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::BlockDevice;
use tranship_raw::{Access, RawFile};

/// An archive and where its members are.
#[derive(Debug)]
pub(crate) struct Archive {
    path: PathBuf,
    archive: tranship_tar::Archive,
}

impl Archive {
    /// Reads all headers of the archive at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = RawFile::open(path, Access::ReadOnly)
            .map_err(|error| Error::disk("cannot open the archive", error))?;
        let archive = tranship_tar::Archive::open(Arc::new(file))
            .map_err(|error| Error::disk("cannot read the archive", error))?;
        Ok(Self { path: path.to_owned(), archive })
    }

    /// The names of all regular files.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.archive.names()
    }

    /// The data of the member called `name`.
    pub(crate) fn open_member(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        self.archive.member(name).map_err(|error| no_member(name, error))
    }

    /// Where the member called `name` is.
    pub(crate) fn locate(&self, name: &str) -> Result<Location> {
        let span = self.archive.span(name).map_err(|error| no_member(name, error))?;
        Ok(Location::Member { archive: self.path.clone(), offset: span.start, len: span.len })
    }
}

fn no_member(name: &str, error: tranship_block::Error) -> Error {
    Error::disk(format!("cannot open member {name:?}"), error)
}
