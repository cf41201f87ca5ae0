// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening test disks from a folder: a gate that allows plain names in it.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Extents, Gate, Request, Result, Span};
use tranship_raw::{Access, RawFile};
use tranship_vmdk::{OpenOptions, Vmdk};

#[derive(Debug)]
pub(crate) struct Folder(pub(crate) PathBuf);

impl Gate for Folder {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        if request.name.contains('/') {
            return Err(Error::new(
                ErrorKind::Denied,
                format!("{:?} is not a plain name", request.name),
            ));
        }
        Ok(Arc::new(RawFile::open(&self.0.join(request.name), Access::ReadOnly)?))
    }
}

/// Opens the disk at `path`, with its extents beside it.
pub(crate) fn open(path: &Path) -> Result<Vmdk> {
    open_with(path, OpenOptions::default())
}

pub(crate) fn open_with(path: &Path, options: OpenOptions) -> Result<Vmdk> {
    let device = Arc::new(RawFile::open(path, Access::ReadOnly)?);
    Vmdk::open(
        device,
        &Folder(path.parent().expect("a test disk is in a folder").to_owned()),
        options,
    )
}

/// Everything a small disk holds, checking that what extents call zero is zero.
pub(crate) fn contents(disk: &dyn BlockDevice) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(disk.size()).expect("test disks fit into memory")];
    disk.read_at(&mut bytes, 0)?;
    for extent in Extents::new(disk, Span::new(0, u64::MAX)) {
        let (span, kind) = extent?;
        let range = usize::try_from(span.start).expect("test disks fit into memory")
            ..usize::try_from(span.end()).expect("test disks fit into memory");
        assert!(!kind.reads_zero() || bytes[range].iter().all(|byte| *byte == 0), "{span:?}");
    }
    Ok(bytes)
}
