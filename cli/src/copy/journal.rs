// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How far a copy has come, so that it can go on after whatever ended it.

use super::watch::part_of;
use crate::failure::Failure;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What a copy is of: it goes on only as the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asked {
    /// Name of the source.
    pub(super) source: String,
    /// Path, size and time of change of every file that the source consists of.
    pub(super) files: Vec<(PathBuf, u64, i64, i64)>,
    /// Bytes of the source.
    pub(super) size: Option<u64>,
    /// Name of the destination.
    pub(super) target: String,
    /// Bytes of a destination that is there already.
    pub(super) target_size: Option<u64>,
    /// Format of the destination.
    pub(super) format: Option<String>,
    /// Hashes are written.
    pub(super) hashed: bool,
}

/// The file with what was asked for and how far it is.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    asked: Asked,
    done: u64,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    asked: Asked,
    done: u64,
}

/// What tells whether files are still the same.
pub(super) fn identities(files: &[PathBuf]) -> Result<Vec<(PathBuf, u64, i64, i64)>, Failure> {
    let identity = |file: &PathBuf| {
        let metadata =
            file.metadata().map_err(|error| Failure::io("looking at the source", &error))?;
        Ok((file.clone(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
    };
    files.iter().map(identity).collect()
}

/// The journal of a copy whose hashes go to `hash`.
pub(super) fn beside(hash: &Path) -> PathBuf {
    let mut name = hash.file_name().unwrap_or_default().to_owned();
    name.push(".journal");
    hash.with_file_name(name)
}

impl Journal {
    /// The journal at `path`: that of an earlier try if it was the same copy and what it
    /// has left is still there, else of a new one.
    pub(super) fn open(path: PathBuf, asked: Asked, hash: Option<&Path>, is_there: bool) -> Self {
        let stored = std::fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Stored>(&bytes).ok());
        let has_hashes = hash.is_none_or(|hash| part_of(hash).exists());
        let done = match stored {
            Some(stored) if stored.asked == asked && is_there && has_hashes => stored.done,
            _ => 0,
        };
        Self { path, asked, done }
    }

    /// The first byte that has to be copied.
    pub(super) fn start(&self) -> u64 {
        self.done
    }

    /// Everything below `done` is on the disk.
    pub(super) fn reached(&mut self, done: u64) -> std::io::Result<()> {
        self.done = done;
        let stored = Stored { asked: self.asked.clone(), done };
        let next = self.path.with_extension("next");
        let mut file = File::create(&next)?;
        file.write_all(&serde_json::to_vec(&stored)?)?;
        file.sync_data()?;
        std::fs::rename(&next, &self.path)
    }

    /// The copy is complete: nobody will go on with it.
    pub(super) fn close(self) {
        // One that was never written, or whose folder has gone, is gone as well.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_goes_on_only_as_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        let hash = folder.path().join("disk.hash");
        std::fs::write(&disk, "bytes").unwrap();
        let asked = Asked {
            source: "disk".to_owned(),
            files: identities(std::slice::from_ref(&disk)).unwrap(),
            size: Some(5),
            target: "nbd://h".to_owned(),
            target_size: Some(9),
            format: None,
            hashed: true,
        };
        let open = |asked: &Asked, is_there| {
            Journal::open(beside(&hash), asked.clone(), Some(&hash), is_there)
        };
        let mut journal = open(&asked, true);
        assert_eq!(journal.start(), 0);
        journal.reached(3).unwrap();
        // Without the hashes of what is done there would be none of it in the manifest.
        assert_eq!(open(&asked, true).start(), 0);
        std::fs::write(part_of(&hash), "").unwrap();
        assert_eq!(open(&asked, true).start(), 3);
        assert_eq!(open(&asked, false).start(), 0);
        assert_eq!(open(&Asked { target_size: Some(8), ..asked.clone() }, true).start(), 0);
        std::fs::write(&disk, "other bytes").unwrap();
        let changed = Asked { files: identities(&[disk]).unwrap(), ..asked.clone() };
        assert_eq!(open(&changed, true).start(), 0);
        open(&asked, true).close();
        assert!(!beside(&hash).exists());
    }
}
