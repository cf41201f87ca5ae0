// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening: only what can be a disk, and without waiting for anybody.

use crate::direct::Direct;
use crate::holes::Holes;
use crate::lock::ImageLock;
use rustix::fs::{Advice, FileType, Mode, OFlags, SeekFrom};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use tranship_block::{Error, Result};

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading alone; writes are refused before they reach the operating system.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

/// A regular file or block device as a disk, byte for byte.
#[derive(Debug)]
pub struct RawFile {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    pub(crate) access: Access,
    pub(crate) is_block_device: bool,
    pub(crate) size: AtomicU64,
    pub(crate) sector_size: u32,
    pub(crate) holes: Holes,
    pub(crate) direct: Option<Direct>,
    /// Whether the file system can punch holes, once somebody wanted to know.
    pub(crate) punches: OnceLock<bool>,
    /// The image locks that are held.
    pub(crate) lock: Mutex<Option<ImageLock>>,
    /// Held while bytes go to the page cache.
    pub(crate) writer: Mutex<()>,
}

impl RawFile {
    /// Opens the regular file or block device at `path`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Unsupported`] for anything that is neither: a
    /// directory, FIFO, socket or character device. [`tranship_block::ErrorKind::NotFound`]
    /// if there is nothing, and what the operating system reports.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        // Without O_NONBLOCK, opening a FIFO waits for its other end.
        let mode = match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        let flags = mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| Error::io("cannot open", errno.into()).in_file(path))?;
        Self::from_file(File::from(file), path, access)
    }

    /// As [`Self::open`], with I/O past the page cache. Any range can still be read and
    /// written; whole blocks are fastest.
    ///
    /// # Errors
    ///
    /// As [`Self::open`], and [`tranship_block::ErrorKind::Unsupported`] where the file
    /// system cannot do it.
    pub fn open_direct(path: &Path, access: Access) -> Result<Self> {
        Self::open(path, access)?.into_direct()
    }

    /// The same file, with I/O past the page cache from now on.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Unsupported`] where the file system cannot do it; what
    /// the operating system reports.
    pub fn into_direct(mut self) -> Result<Self> {
        let flags = match self.access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        self.direct = Some(Direct::new(&self.file, &self.path, flags | OFlags::CLOEXEC)?);
        Ok(self)
    }

    /// Uses a file that is open already; `path` is what errors call it.
    ///
    /// # Errors
    ///
    /// As [`Self::open`]. A `file` that was not opened for `access` fails at its first use.
    pub fn from_file(file: File, path: impl AsRef<Path>, access: Access) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let stat = rustix::fs::fstat(&file).map_err(|errno| {
            Error::io("cannot get the file's type", errno.into()).in_file(&path)
        })?;
        let (is_block_device, size) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => (false, u64::try_from(stat.st_size).unwrap_or(0)),
            FileType::BlockDevice => {
                let end = length_of(&file, true).map_err(|errno| {
                    Error::io("cannot get the size of the block device", errno.into())
                        .in_file(&path)
                })?;
                (true, end)
            }
            other => {
                return Err(Error::unsupported(format!(
                    "is {}, expected a regular file or a block device",
                    name_of(other)
                ))
                .in_file(&path));
            }
        };
        let sector_size =
            if is_block_device { rustix::fs::ioctl_blksszget(&file).unwrap_or(512) } else { 512 };
        Ok(Self {
            file,
            path,
            access,
            is_block_device,
            size: AtomicU64::new(size),
            sector_size,
            holes: Holes::default(),
            direct: None,
            punches: OnceLock::new(),
            lock: Mutex::new(None),
            writer: Mutex::new(()),
        })
    }

    /// The name that errors use for the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for locks and for copies inside the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether it is a block device, whose size cannot change.
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// Bytes in which space can be given back by a discard; `None` if it cannot.
    pub fn discard_granularity(&self) -> Option<u64> {
        let stat = rustix::fs::fstat(&self.file).ok()?;
        if !self.is_block_device {
            return u64::try_from(stat.st_blksize).ok().filter(|bytes| *bytes > 0);
        }
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        // A partition has no queue of its own: its disk's is one folder above.
        [".", ".."].iter().find_map(|up| {
            let name = format!("/sys/dev/block/{major}:{minor}/{up}/queue/discard_granularity");
            let text = std::fs::read_to_string(name).ok()?;
            text.trim().parse().ok().filter(|bytes| *bytes > 0)
        })
    }

    /// Tells the kernel that the file will be read from front to back.
    pub fn advise_sequential(&self) {
        // Advice that is refused changes nothing that a caller could act on.
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::Sequential);
    }

    pub(crate) fn len(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }
}

/// Bytes of a file, as they are now.
pub(crate) fn length_of(file: &File, is_block_device: bool) -> rustix::io::Result<u64> {
    if is_block_device {
        // Its st_size is 0; its end is where seeking to the end leads.
        rustix::fs::seek(file, SeekFrom::End(0))
    } else {
        Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0))
    }
}

fn name_of(file_type: FileType) -> &'static str {
    match file_type {
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::Symlink => "a symbolic link",
        _ => "of an unknown type",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::{BlockDevice, ErrorKind};

    #[test]
    fn only_files_and_block_devices_are_opened_and_a_fifo_does_not_hang() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        for (path, what) in [
            (fifo.as_path(), "a FIFO"),
            (folder.path(), "a directory"),
            (Path::new("/dev/null"), "a character device"),
        ] {
            let error = RawFile::open(path, Access::ReadOnly).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{path:?}");
            assert!(error.message().starts_with(&format!("is {what}, expected")), "{error}");
            assert_eq!(error.path(), Some(path));
        }
    }

    #[test]
    fn a_missing_file_is_not_found() {
        let folder = tempfile::tempdir().unwrap();
        let error = RawFile::open(&folder.path().join("no"), Access::ReadOnly).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn create_never_overwrites() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let disk = RawFile::create(&path, 12_345).unwrap();
        assert_eq!(disk.size(), 12_345);
        assert!(RawFile::create(&path, 1).is_err());
        assert_eq!(RawFile::open(&path, Access::ReadOnly).unwrap().size(), 12_345);
    }
}
