// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening test disks from a folder or from memory.

#![allow(dead_code, reason = "not every test uses all of it")]
#![allow(clippy::unwrap_used, reason = "for tests alone")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tranship_block::{
    BlockDevice, Error, ErrorKind, Extents, Gate, MemoryDevice, Request, Result, Span, Storage,
};
use tranship_raw::{Access, RawFile};
use tranship_vmdk::{CreateOptions, ExtentFiles, OpenOptions, Vmdk};

/// Plain names in a folder.
#[derive(Debug)]
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    fn file(&self, name: &str, access: Access) -> Result<RawFile> {
        if name.contains('/') {
            return Err(Error::new(ErrorKind::Denied, format!("{name:?} is not a plain name")));
        }
        RawFile::open(&self.0.join(name), access)
    }
}

impl Gate for Folder {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        Ok(Arc::new(self.file(request.name, Access::ReadOnly)?))
    }
}

impl ExtentFiles for Folder {
    fn open(&self, name: &str, writable: bool) -> Result<Arc<dyn Storage>> {
        let access = if writable { Access::ReadWrite } else { Access::ReadOnly };
        Ok(Arc::new(self.file(name, access)?))
    }

    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Storage>> {
        Ok(Arc::new(RawFile::create(&self.0.join(name), size)?))
    }
}

/// Names in memory.
#[derive(Debug, Default)]
pub(crate) struct Memory(pub(crate) Mutex<HashMap<String, Arc<dyn Storage>>>);

impl Memory {
    pub(crate) fn put(&self, name: &str, storage: Arc<dyn Storage>) {
        self.0.lock().unwrap().insert(name.to_owned(), storage);
    }

    fn find(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let files = self.0.lock().unwrap();
        files.get(name).cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no {name:?} in memory"))
        })
    }
}

impl Gate for Memory {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        let file: Arc<dyn BlockDevice> = self.find(request.name)?;
        Ok(file)
    }
}

impl ExtentFiles for Memory {
    fn open(&self, name: &str, _writable: bool) -> Result<Arc<dyn Storage>> {
        self.find(name)
    }

    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Storage>> {
        let file = MemoryDevice::new(vec![0; usize::try_from(size).unwrap()]);
        self.put(name, Arc::new(file));
        self.find(name)
    }
}

/// Opens the disk at `path` for reading, with its extents beside it.
pub(crate) fn open(path: &Path) -> Result<Vmdk> {
    open_with(path, OpenOptions::default())
}

pub(crate) fn open_with(path: &Path, options: OpenOptions) -> Result<Vmdk> {
    let device = Arc::new(RawFile::open(path, Access::ReadOnly)?);
    Vmdk::open(device, &beside(path), options)
}

/// Opens the disk at `path` for reading and writing.
pub(crate) fn open_writable(path: &Path) -> Result<Vmdk> {
    let storage = Arc::new(RawFile::open(path, Access::ReadWrite)?);
    Vmdk::open_writable(storage, &beside(path), OpenOptions::default())
}

/// Creates the disk `options.name` in `folder` and returns its path.
pub(crate) fn create(folder: &Path, options: &CreateOptions) -> Result<PathBuf> {
    let path = folder.join(&options.name);
    let storage = RawFile::create(&path, 0)?;
    tranship_vmdk::create(&storage, &Folder(folder.to_owned()), options)?;
    Ok(path)
}

pub(crate) fn beside(path: &Path) -> Folder {
    Folder(path.parent().expect("a test disk is in a folder").to_owned())
}

/// Everything a small disk holds, checking that what extents call zero is zero.
pub(crate) fn contents(disk: &dyn BlockDevice) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(disk.size()).expect("test disks fit into memory")];
    disk.read_at(&mut bytes, 0)?;
    for extent in Extents::new(disk, Span::new(0, u64::MAX)) {
        let (span, kind) = extent?;
        let range = usize::try_from(span.start).expect("test disks fit into memory")
            ..usize::try_from(span.end()).expect("test disks fit into memory");
        let part = &bytes[range];
        // Comparing slices is fast without optimisation, too.
        assert!(!kind.reads_zero() || part == vec![0; part.len()], "{span:?}");
    }
    Ok(bytes)
}
