// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens disks from descriptors: the process may open nothing itself.

use crate::channel::{NewDisk, Source};
use crate::machine::Disk;
use crate::{Error, Result};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, Storage};
use tranship_formats::{Files, NotedFile, OpenOptions};
use tranship_nbd::{ClientOptions, Remote};
use tranship_qcow2::{CreateOptions, Qcow2};
use tranship_raw::{Access, RawFile};

type Opened = std::result::Result<Arc<dyn BlockDevice>, tranship_block::Error>;

/// Opens a disk whose descriptors have come with its description.
pub(super) fn open(disk: NewDisk, descriptors: Vec<OwnedFd>) -> Result<Disk> {
    let refused = |message: String| Error::Disk { serial: disk.serial.clone(), message };
    let mut descriptors = descriptors.into_iter();
    let mut next = || {
        descriptors
            .next()
            .map(File::from)
            .ok_or_else(|| refused("it came without one of its descriptors".into()))
    };
    let device = match &disk.source {
        Source::Raw => raw(next()?, Path::new(&disk.serial), disk.read_only),
        Source::Nbd { export } => {
            let stream = UnixStream::from(OwnedFd::from(next()?));
            nbd(stream, export, disk.read_only)
        }
        Source::Image { path, format, files, discard } => {
            let mut given = Vec::with_capacity(files.len());
            for (path, writable) in files {
                let (path, writable) = (path.clone(), *writable);
                given.push(NotedFile { path, writable, file: next()? });
            }
            let overlay = if *discard { Some(next()?) } else { None };
            let read_only = disk.read_only || *discard;
            let image = image(path, format.as_deref(), given, read_only);
            match overlay {
                Some(file) => image.and_then(|image| over(image, file)),
                None => image,
            }
        }
    };
    let device = device.map_err(|error| refused(error.to_string()))?;
    Ok(Disk {
        device,
        serial: disk.serial,
        read_only: disk.read_only,
        durable: disk.durable,
        sector_size: disk.sector_size,
    })
}

fn raw(file: File, name: &Path, read_only: bool) -> Opened {
    let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
    Ok(Arc::new(RawFile::from_file(file, name, access)?))
}

fn nbd(stream: UnixStream, export: &str, read_only: bool) -> Opened {
    let options =
        ClientOptions { export: export.to_owned(), read_only, ..ClientOptions::default() };
    Ok(Arc::new(Remote::from_stream(stream, &options)?))
}

fn image(path: &Path, format: Option<&str>, files: Vec<NotedFile>, read_only: bool) -> Opened {
    let options = OpenOptions {
        format: format.map(str::parse).transpose()?,
        read_only,
        files: Files::Given(Arc::new(files)),
        ..OpenOptions::default()
    };
    Ok(tranship_formats::open(path, &options)?.device)
}

/// What is written to `image` goes into the empty `file`.
fn over(image: Arc<dyn BlockDevice>, file: File) -> Opened {
    let name = PathBuf::from("overlay of a read-only disk");
    let storage: Arc<dyn Storage> = Arc::new(RawFile::from_file(file, name, Access::ReadWrite)?);
    tranship_qcow2::create(&*storage, &CreateOptions::new(image.size()))?;
    let options = tranship_qcow2::OpenOptions { backing: Some(image), ..Default::default() };
    Ok(Arc::new(Qcow2::open(storage, options)?))
}
