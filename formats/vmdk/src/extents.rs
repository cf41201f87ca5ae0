// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files of a disk, for those who write: unlike what a gate opens they can grow.

use std::fmt::Debug;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Gate, Request, Result, Storage};

/// What error messages and gates call the files of a disk.
const ROLE: &str = "VMDK extent";

/// Opens and creates the files that a disk consists of besides its first one.
///
/// Names come out of descriptors, so that the rules of a [`Gate`] hold: an implementation
/// allows nothing that its owner did not allow, and follows no link out of the allowed
/// place. Names given to [`Self::create`] are those of [`crate::CreateOptions`].
pub trait ExtentFiles: Debug + Send + Sync {
    /// Opens the existing file `name`; for reading alone unless `writable`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] if the name is not allowed, [`ErrorKind::NotFound`] if it is
    /// allowed but not there.
    fn open(&self, name: &str, writable: bool) -> Result<Arc<dyn Storage>>;

    /// Creates the file `name` with `size` bytes that read as zero and take no space; an
    /// existing file is not overwritten unless its owner wants that.
    ///
    /// # Errors
    ///
    /// As [`Self::open`], and what the operating system reports.
    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Storage>>;
}

/// The files of disks that consist of a single one: none.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFiles;

impl ExtentFiles for NoFiles {
    fn open(&self, name: &str, _writable: bool) -> Result<Arc<dyn Storage>> {
        Err(denied(name))
    }

    fn create(&self, name: &str, _size: u64) -> Result<Arc<dyn Storage>> {
        Err(denied(name))
    }
}

fn denied(name: &str) -> Error {
    Error::new(
        ErrorKind::Denied,
        format!("the disk asks for {ROLE} {name:?}, and no other file is allowed for it"),
    )
}

/// Where the files of a disk come from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// For reading.
    Gate(&'a dyn Gate),
    /// For writing.
    Files(&'a dyn ExtentFiles),
}

/// A file of a disk.
#[derive(Clone, Debug)]
pub(crate) struct OpenFile {
    pub(crate) device: Arc<dyn BlockDevice>,
    /// The same file, if it may be written.
    pub(crate) storage: Option<Arc<dyn Storage>>,
}

impl OpenFile {
    pub(crate) fn read_only(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, storage: None }
    }

    pub(crate) fn writable(storage: Arc<dyn Storage>) -> Self {
        let device: Arc<dyn BlockDevice> = storage.clone();
        Self { device, storage: Some(storage) }
    }
}

impl Source<'_> {
    /// Opens `name`, to be written if `writable` and if this source opens for writing.
    pub(crate) fn open(self, name: &str, writable: bool) -> Result<OpenFile> {
        let opened = match self {
            Self::Gate(gate) => {
                gate.open(Request { name, role: ROLE, writable: false }).map(OpenFile::read_only)
            }
            Self::Files(files) if writable => files.open(name, true).map(OpenFile::writable),
            Self::Files(files) => {
                files.open(name, false).map(|file| OpenFile { device: file, storage: None })
            }
        };
        opened.map_err(|error| {
            if error.kind() != ErrorKind::NotFound {
                return error;
            }
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "the descriptor asks for the extent {name:?}, which is missing: it has to be \
                     copied together with the descriptor, and if it was renamed the descriptor \
                     has to say its new name"
                ),
            )
            .because(error)
        })
    }
}
