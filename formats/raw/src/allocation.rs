// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making files, and giving them space before it is needed.

use crate::file::{Access, RawFile};
use crate::lock::ImageLock;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::path::Path;
use tranship_block::{BlockDevice, Error, Result, Span, Storage};

/// How much space a new part of a file gets at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// None: it is a hole.
    #[default]
    Off,
    /// Space is reserved, nothing is written.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl RawFile {
    /// Creates the file `path` with `size` bytes that read as zero and take no space.
    ///
    /// # Errors
    ///
    /// What the operating system reports, also if `path` exists already: an existing
    /// file is never overwritten.
    pub fn create(path: &Path, size: u64) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|error| Error::io("cannot create", error).in_file(path))?;
        let file = Self::from_file(file, path, Access::ReadWrite)?;
        file.set_len(size)?;
        Ok(file)
    }

    /// Makes `path` a file of `size` zero bytes, whatever it held before, and takes the
    /// locks of a writer. A block device keeps its size and what it holds.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Busy`] if another process uses the file: nothing is
    /// changed then. [`tranship_block::ErrorKind::NoSpace`] for a block device that is too
    /// small, and where space cannot be reserved; what the operating system reports.
    pub fn create_or_replace(path: &Path, size: u64, space: Preallocation) -> Result<Self> {
        // Nothing is cut before the locks are ours.
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o666))
            .map_err(|errno| Error::io("cannot create", errno.into()).in_file(path))?;
        let file = Self::from_file(File::from(file), path, Access::ReadWrite)?;
        file.lock(ImageLock::Write)?;
        if !file.is_block_device() {
            file.set_len(0)?;
        }
        file.grow(size, space)?;
        Ok(file)
    }

    /// Gives the file a length of at least `len` bytes; the new part reads as zero.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::NoSpace`] where there is none,
    /// [`tranship_block::ErrorKind::Unsupported`] if space cannot be reserved here, and
    /// what the operating system reports. The length is then as it was before.
    pub fn grow(&self, len: u64, space: Preallocation) -> Result<()> {
        let before = self.size();
        if len <= before {
            return Ok(());
        }
        self.set_len(len)?;
        let new = Span::new(before, len.saturating_sub(before));
        let result = match space {
            Preallocation::Off => Ok(()),
            Preallocation::Falloc => self.reserve(new),
            Preallocation::Full => self.write_zero_bytes(new).and_then(|()| self.flush()),
        };
        if let Err(error) = result {
            // What failed is worth more than that it could not be undone.
            let _ = self.set_len(before);
            return Err(error);
        }
        Ok(())
    }

    fn reserve(&self, span: Span) -> Result<()> {
        loop {
            let none = FallocateFlags::empty();
            return match rustix::fs::fallocate(&self.file, none, span.start, span.len) {
                Ok(()) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    Err(Error::unsupported("file system cannot reserve space").in_file(&self.path))
                }
                Err(errno) => Err(self.failed("reserve space", errno, span.start)),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use tranship_block::{ErrorKind, is_zero};

    #[test]
    fn space_is_given_as_asked() {
        let folder = tempfile::tempdir().unwrap();
        for (name, space, least) in [
            ("off", Preallocation::Off, 0),
            ("falloc", Preallocation::Falloc, 1 << 20),
            ("full", Preallocation::Full, 1 << 20),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, [7; 5000]).unwrap();
            let file = RawFile::create_or_replace(&path, 1 << 20, space).unwrap();
            file.grow(2 << 20, space).unwrap();
            file.grow(100, space).unwrap();
            let meta = std::fs::metadata(&path).unwrap();
            assert_eq!(meta.len(), 2 << 20);
            let stored = meta.blocks() * 512;
            assert!(
                if least > 0 { stored >= 2 << 20 } else { stored < 1 << 20 },
                "{name} {stored}"
            );
            let mut bytes = vec![1; 2 << 20];
            file.read_at(&mut bytes, 0).unwrap();
            assert!(is_zero(&bytes));
        }
    }

    #[test]
    fn what_somebody_uses_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, "precious").unwrap();
        let reader = RawFile::open(&path, Access::ReadOnly).unwrap();
        reader.lock(ImageLock::Read).unwrap();
        let error = RawFile::create_or_replace(&path, 9, Preallocation::Off).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
