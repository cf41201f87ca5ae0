// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file that is to become an image, and keeps what it holds until that is certain.

use std::fmt;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use tranship_block::{
    Advice, BlockDevice, ErrorKind, Extent, FileRange, Result, Span, Storage, Zeroing,
};
use tranship_raw::{Access, ImageLock, Preallocation, RawFile};

/// What is done with the file once it is empty: some file systems take what they are to
/// know about a file only then.
pub type WhenEmpty = Box<dyn FnOnce(&File) + Send>;

#[derive(Default)]
struct Once(Option<WhenEmpty>);

impl fmt::Debug for Once {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "to be done" } else { "done" })
    }
}

/// A file whose contents go with the first change, and read as nothing before: every
/// format looks at all of its options before it writes, so that those that no image can
/// have cost nobody their old one.
#[derive(Debug)]
pub struct Replacing {
    file: RawFile,
    when_empty: Mutex<Once>,
    /// The file was not there before.
    is_new: bool,
    /// It still holds what it held.
    is_pending: AtomicBool,
}

impl Replacing {
    /// Opens or makes the file `path` and takes the locks of a writer. A regular file is
    /// shown to `when_empty` before the first change.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if another process uses the file, and what the operating system
    /// reports.
    pub fn begin(path: &Path, when_empty: Option<WhenEmpty>) -> Result<Self> {
        let (file, is_new) = match RawFile::open(path, Access::ReadWrite) {
            Ok(file) => {
                file.lock(ImageLock::Write)?;
                (file, false)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                (RawFile::create_or_replace(path, 0, Preallocation::Off)?, true)
            }
            Err(error) => return Err(error),
        };
        let is_pending = AtomicBool::new(!file.is_block_device());
        let when_empty = Mutex::new(Once(when_empty));
        Ok(Self { file, when_empty, is_new, is_pending })
    }

    /// Makes the file one of `size` zero bytes; a block device keeps what it has.
    pub(crate) fn grow(&self, size: u64, space: Preallocation) -> Result<()> {
        self.change()?;
        self.file.grow(size, space)
    }

    /// Removes the file if it was made for the image that it did not become.
    pub(crate) fn give_up(&self) {
        if self.is_new
            && let Ok(path) = self.file.path().canonicalize()
        {
            let _ = std::fs::remove_file(path);
        }
    }

    fn is_pending(&self) -> bool {
        self.is_pending.load(Ordering::Acquire)
    }

    /// Empties the file when it is called first.
    fn change(&self) -> Result<()> {
        if !self.is_pending() {
            return Ok(());
        }
        // Held until it is done: nobody may write before.
        let mut when_empty = self.when_empty.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_pending() {
            if self.file.size() > 0 {
                self.file.set_len(0)?;
            }
            if let Some(act) = when_empty.0.take() {
                act(self.file.file());
            }
            self.is_pending.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl BlockDevice for Replacing {
    fn size(&self) -> u64 {
        if self.is_pending() { 0 } else { self.file.size() }
    }
    fn is_read_only(&self) -> bool {
        self.file.is_read_only()
    }
    fn preferred_block(&self) -> u32 {
        self.file.preferred_block()
    }
    fn sector_size(&self) -> u32 {
        self.file.sector_size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.change()?;
        self.file.read_at(buf, offset)
    }
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.change()?;
        self.file.read_vectored_at(bufs, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change()?;
        self.file.write_at(buf, offset)
    }
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.change()?;
        self.file.write_vectored_at(bufs, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.change()?;
        self.file.write_zeroes(span, mode)
    }
    fn discard(&self, span: Span) -> Result<()> {
        self.change()?;
        self.file.discard(span)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.change()?;
        self.file.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        self.file.flush()
    }
    fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
        if self.is_pending() { None } else { self.file.file_range(offset) }
    }
    fn write_from_file(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
        self.change()?;
        self.file.write_from_file(offset, range)
    }
    fn advise(&self, span: Span, advice: Advice) {
        self.file.advise(span, advice);
    }
}

impl Storage for Replacing {
    fn set_len(&self, len: u64) -> Result<()> {
        // Formats begin by this, some of them before the last look at their options.
        if len == 0 && self.is_pending() {
            return Ok(());
        }
        self.change()?;
        self.file.set_len(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::sync::Arc;

    #[test]
    fn contents_go_with_the_first_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("old");
        fs::write(&path, "contents").unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let lengths = Arc::clone(&seen);
        let act: WhenEmpty =
            Box::new(move |file| lengths.lock().unwrap().push(file.metadata().unwrap().len()));
        let file = Replacing::begin(&path, Some(act)).unwrap();
        file.set_len(0).unwrap();
        file.flush().unwrap();
        assert!(seen.lock().unwrap().is_empty());
        assert_eq!(file.size(), 0);
        assert!(file.file_range(0).is_none());
        file.give_up();
        assert_eq!(fs::read(&path).unwrap(), b"contents");
        file.set_len(3).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0; 3]);
        assert_eq!(*seen.lock().unwrap(), [0], "once, and when it was empty");
        file.write_at(b"ab", 1).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"\0ab");
        file.set_len(0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn a_file_that_was_not_there_is_not_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let file = Replacing::begin(&path, None).unwrap();
        let error = Replacing::begin(&path, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        file.give_up();
        assert!(!path.exists());
    }
}
