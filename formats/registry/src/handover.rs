// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening a disk in a process that can open nothing.
//!
//! A process that may open files opens the disk once and has noted which files that took; it
//! sends them, with the names under which they were asked for, to one that may not. There the
//! same disk is opened again, and each file that is asked for is found among those that were
//! sent. An image that changed in between can ask for other names, but gets no other files.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tranship_block::{Error, ErrorKind, Result};
use tranship_raw::{Access, RawFile};

/// A file under the name by which it was asked for.
#[derive(Debug)]
pub struct NotedFile {
    /// The name.
    pub path: PathBuf,
    /// Whether it was opened for writing.
    pub writable: bool,
    /// The file.
    pub file: File,
}

/// Where the files come from that a disk consists of.
#[derive(Clone, Debug, Default)]
pub enum Files {
    /// From the filesystem, by their names.
    #[default]
    System,
    /// From the filesystem; each is noted.
    Noting(Arc<Mutex<Vec<NotedFile>>>),
    /// From what was noted elsewhere; there are no others.
    Given(Arc<Vec<NotedFile>>),
}

fn locked(noted: &Mutex<Vec<NotedFile>>) -> MutexGuard<'_, Vec<NotedFile>> {
    noted.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Files {
    /// Everything that was noted since the last call.
    pub fn noted(&self) -> Vec<NotedFile> {
        match self {
            Self::Noting(noted) => std::mem::take(&mut *locked(noted)),
            Self::System | Self::Given(_) => Vec::new(),
        }
    }

    /// Whether there is a regular file at `path`.
    pub(crate) fn has(&self, path: &Path) -> bool {
        match self {
            Self::Given(given) => given.iter().any(|noted| noted.path == path),
            Self::System | Self::Noting(_) => path.is_file(),
        }
    }

    /// The file at `path`: from what was given, or from `open`.
    pub(crate) fn open(
        &self,
        path: &Path,
        access: Access,
        open: impl FnOnce() -> Result<RawFile>,
    ) -> Result<RawFile> {
        let writable = access == Access::ReadWrite;
        let shared = |file: &File| {
            file.try_clone()
                .map_err(|error| Error::io("cannot share the file", error).in_file(path))
        };
        match self {
            Self::System => open(),
            Self::Noting(noted) => {
                let opened = open()?;
                let file = shared(opened.file())?;
                locked(noted).push(NotedFile { path: path.to_owned(), writable, file });
                Ok(opened)
            }
            Self::Given(given) => {
                let found = given
                    .iter()
                    .find(|noted| noted.path == path && (noted.writable || !writable))
                    .ok_or_else(|| {
                        Error::new(ErrorKind::Denied, "the file is not among those that were given")
                            .in_file(path)
                    })?;
                RawFile::from_file(shared(&found.file)?, path, access)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Format, OpenOptions, open};
    use tranship_block::BlockDevice;

    /// Opens the disk at `path` noting its files, moves these away, and opens it from the notes.
    fn handed_over(path: &Path, format: Format) -> Arc<dyn BlockDevice> {
        let files = Files::Noting(Arc::default());
        let options = OpenOptions { format: Some(format), files, ..OpenOptions::default() };
        let first = open(path, &options).unwrap();
        drop(first);
        let noted = options.files.noted();
        assert!(!noted.is_empty());
        for file in &noted {
            std::fs::remove_file(&file.path).unwrap();
        }
        let options = OpenOptions { files: Files::Given(Arc::new(noted)), ..options };
        open(path, &options).unwrap().device
    }

    #[test]
    fn a_chain_is_opened_from_what_was_given() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base.raw");
        std::fs::write(&base, vec![7; 1 << 20]).unwrap();
        let top = folder.path().join("top.qcow2");
        let backing =
            tranship_qcow2::Backing { name: "base.raw".into(), format: Some("raw".into()) };
        let created = tranship_qcow2::CreateOptions {
            backing: Some(backing),
            ..tranship_qcow2::CreateOptions::new(1 << 20)
        };
        let file = RawFile::create(&top, 0).unwrap();
        tranship_qcow2::create(&file, &created).unwrap();
        drop(file);
        let device = handed_over(&top, Format::Qcow2);
        let mut found = [0; 512];
        device.read_at(&mut found, 4096).unwrap();
        assert_eq!(found, [7; 512]);
        device.write_at(&[9; 512], 4096).unwrap();
        device.read_at(&mut found, 4096).unwrap();
        assert_eq!(found, [9; 512]);
    }

    #[test]
    fn nothing_else_can_be_had() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, vec![7; 4096]).unwrap();
        let files = Files::Given(Arc::default());
        let options = OpenOptions { format: Some(Format::Raw), files, ..OpenOptions::default() };
        let error = open(&path, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.to_string().contains("disk.raw"), "{error}");
        // What was opened for reading is not written.
        let file = File::open(&path).unwrap();
        let noted = NotedFile { path: path.clone(), writable: false, file };
        let options = OpenOptions { files: Files::Given(Arc::new(vec![noted])), ..options };
        assert!(open(&path, &options).is_err());
        assert!(open(&path, &OpenOptions { read_only: true, ..options }).is_ok());
    }
}
