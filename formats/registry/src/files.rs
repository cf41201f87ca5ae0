// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The other files of a disk that is written.

use crate::chain::cached;
use crate::{FolderGate, Layer};
use std::path::PathBuf;
use std::sync::Arc;
use tranship_block::{BlockDevice, DiskMeter, Error, Request, Result, Storage};
use tranship_raw::RawFile;
use tranship_vmdk::{ExtentFiles, ResizeOptions};

/// Files beside the first one of a disk that is written.
#[derive(Debug)]
pub(crate) struct Beside {
    /// Where they are.
    pub(crate) gate: FolderGate,
    /// A new file takes the place of one that is there.
    pub(crate) replace: bool,
    /// What counts them.
    pub(crate) meter: DiskMeter,
    /// Past the page cache.
    pub(crate) direct: bool,
}

impl Beside {
    fn counted(&self, file: RawFile) -> Result<Arc<dyn Storage>> {
        let meter = self.meter.file(file.path());
        Ok(meter.storage(Arc::new(cached(file, self.direct)?)))
    }
}

/// Gives the VMDK disk whose first file is `layer` a size of `size` bytes. Its other files
/// are beside it or, if it names them so, in the folders of `allowed`; new ones are made
/// beside it. The layer's disk must not be used any more.
///
/// # Errors
///
/// As [`tranship_vmdk::resize`]; [`tranship_block::ErrorKind::Usage`] if the layer was
/// opened for reading, and what the operating system reports if a new file's name is
/// taken.
pub fn resize_vmdk(
    layer: &Layer,
    allowed: &[PathBuf],
    size: u64,
    options: ResizeOptions,
) -> Result<()> {
    let storage = layer
        .storage
        .as_ref()
        .filter(|storage| !storage.is_read_only())
        .ok_or_else(|| Error::usage("the disk is open for reading"))?;
    let gate = FolderGate::beside(&layer.path, allowed);
    let files = Beside { gate, replace: false, meter: DiskMeter::default(), direct: false };
    tranship_vmdk::resize(&**storage, &files, size, options)
        .map_err(|error| error.in_file(&layer.path))
}

impl ExtentFiles for Beside {
    fn open(&self, name: &str, writable: bool) -> Result<Arc<dyn Storage>> {
        let request = Request { name, role: "VMDK extent", writable };
        self.counted(self.gate.open_file(request)?)
    }

    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Storage>> {
        // The names are made from the disk's own: there is no folder in them.
        if name.is_empty() || name.contains('/') {
            return Err(Error::usage(format!("{name:?} is no name for a part of a disk")));
        }
        let folder = self.gate.folder.as_ref().ok_or_else(|| {
            Error::usage(format!("the disk is in no folder, where {name:?} could be made"))
        })?;
        let path = folder.join(name);
        if self.replace {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("cannot replace", error).in_file(path));
                }
                _ => {}
            }
        }
        self.counted(RawFile::create(&path, size)?)
    }
}
