// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The other files of a disk that is written.

use crate::FolderGate;
use std::sync::Arc;
use tranship_block::{Error, Request, Result, Storage};
use tranship_raw::RawFile;
use tranship_vmdk::ExtentFiles;

/// Files beside a disk's first one.
#[derive(Debug)]
pub(crate) struct Beside(pub(crate) FolderGate);

impl ExtentFiles for Beside {
    fn open(&self, name: &str, writable: bool) -> Result<Arc<dyn Storage>> {
        let request = Request { name, role: "VMDK extent", writable };
        Ok(Arc::new(self.0.open_file(request)?))
    }

    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Storage>> {
        // The names are made from the disk's own: there is no folder in them.
        if name.is_empty() || name.contains('/') {
            return Err(Error::usage(format!("{name:?} is no name for a part of a disk")));
        }
        let path = self.0.folder.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("cannot replace", error).in_file(path));
            }
            _ => {}
        }
        Ok(Arc::new(RawFile::create(&path, size)?))
    }
}
