// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The work directory of a conversion: its lock, its journal and everything unfinished.
//!
//! `FOLDER/.NAME.work/` belongs to one conversion. Nothing under a final name exists before
//! it is complete; a killed run leaves only this directory, and the next run goes on from
//! what the journal says. After success the journal alone stays, so that a repeated run
//! sees that there is nothing to do.

use crate::{Error, ErrorKind, Result};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

/// Layout of the journal; another number is not understood and means starting over.
const VERSION: u32 = 1;

/// Largest journal that is read, in bytes.
const MOST_JOURNAL: u64 = 16 << 20;

/// How far a conversion has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// The overlays may be half changed.
    #[default]
    Converting,
    /// The overlays hold the converted guest; the copy is under way.
    Copying,
    /// All results are in place.
    Done,
}

/// One target disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TargetDisk {
    /// Its final name, without the folder.
    pub(crate) name: String,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    /// Everything below this byte is durable in the unfinished target.
    pub(crate) copied: u64,
    /// Whether the target is complete.
    pub(crate) complete: bool,
}

/// What has to survive a kill.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Journal {
    version: u32,
    /// What was asked for and the state of the input files; see [`crate::pipeline`].
    pub(crate) fingerprint: String,
    pub(crate) phase: Phase,
    /// The target's definition, known once the guest is converted.
    pub(crate) xml: String,
    pub(crate) disks: Vec<TargetDisk>,
}

impl Journal {
    pub(crate) fn new(fingerprint: String) -> Self {
        Self { version: VERSION, fingerprint, ..Self::default() }
    }
}

/// A locked work directory.
#[derive(Debug)]
pub(crate) struct Work {
    path: PathBuf,
    // Held until the conversion ends, in whatever way.
    _lock: File,
}

fn io(what: impl Into<String>, error: std::io::Error) -> Error {
    let kind = match error.kind() {
        std::io::ErrorKind::NotFound
        | std::io::ErrorKind::PermissionDenied
        | std::io::ErrorKind::ReadOnlyFilesystem
        | std::io::ErrorKind::NotADirectory
        | std::io::ErrorKind::InvalidInput => ErrorKind::Usage,
        _ => ErrorKind::Transient,
    };
    Error::new(kind, what).because(error)
}

impl Work {
    /// Makes and locks the work directory of the guest `name` in `folder`.
    pub(crate) fn open(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(format!(".{name}.work"));
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                let what = format!("{}: cannot be made", path.display());
                return Err(io(what, error)
                    .with_remedy("give a folder that exists and can be written to with -os"));
            }
        }
        let lock_path = path.join("lock");
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(|error| io(format!("{}: cannot be opened", lock_path.display()), error))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let _ = Read::by_ref(&mut lock).take(64).read_to_string(&mut holder);
                return Err(Error::new(
                    ErrorKind::Transient,
                    format!(
                        "{}: process {} converts this guest right now",
                        path.display(),
                        holder.trim()
                    ),
                )
                .with_remedy("wait for it, or give the guest another name with -on"));
            }
            Err(error) => {
                return Err(io(format!("{}: cannot be locked", lock_path.display()), error.into()));
            }
        }
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(|error| io(format!("{}: cannot be written", lock_path.display()), error))?;
        Ok(Self { path, _lock: lock })
    }

    /// A file of the work directory.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The journal of an earlier run, if there is one that is understood.
    pub(crate) fn journal(&self) -> Option<Journal> {
        let file = File::open(self.file("journal.json")).ok()?;
        let mut text = String::new();
        file.take(MOST_JOURNAL).read_to_string(&mut text).ok()?;
        let journal: Journal = serde_json::from_str(&text).ok()?;
        (journal.version == VERSION).then_some(journal)
    }

    /// Replaces the journal, durably and as a whole.
    pub(crate) fn store(&self, journal: &Journal) -> Result<()> {
        let text = serde_json::to_vec_pretty(journal).map_err(|error| {
            Error::new(ErrorKind::Transient, "writing the journal").because(error)
        })?;
        write_atomically(&self.file("journal.json"), &text)
    }

    /// Removes everything but lock and journal.
    pub(crate) fn clear(&self) -> Result<()> {
        let failed = |error| io(format!("{}: cannot be cleared", self.path.display()), error);
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if name != "lock" && name != "journal.json" {
                fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// Gives `path` these contents: all of them or none, also after a power cut.
pub(crate) fn write_atomically(path: &Path, contents: &[u8]) -> Result<()> {
    let failed = |error| io(format!("{}: cannot be written", path.display()), error);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let mut file = File::create(&temporary).map_err(failed)?;
    file.write_all(contents).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)?;
    sync_folder(path)
}

/// Makes a rename in the folder of `path` durable.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| io(format!("{}: cannot be synchronised", folder.display()), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_survives_and_the_rest_is_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let work = Work::open(folder.path(), "guest").unwrap();
        assert!(work.journal().is_none());
        let mut journal = Journal::new("print".into());
        journal.phase = Phase::Copying;
        work.store(&journal).unwrap();
        fs::write(work.file("overlay-0.qcow2"), "x").unwrap();
        work.clear().unwrap();
        assert_eq!(work.journal(), Some(journal));
        assert!(!work.file("overlay-0.qcow2").exists());
    }

    #[test]
    fn two_conversions_of_one_guest_do_not_run_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let first = Work::open(folder.path(), "guest").unwrap();
        let error = Work::open(folder.path(), "guest").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient);
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(first);
        Work::open(folder.path(), "guest").unwrap();
    }

    #[test]
    fn a_missing_folder_is_a_mistake_of_the_caller() {
        let error = Work::open(Path::new("/nonexistent/folder"), "guest").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }

    #[test]
    fn a_journal_of_another_version_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let work = Work::open(folder.path(), "guest").unwrap();
        work.store(&Journal::new("print".into())).unwrap();
        let text = fs::read_to_string(work.file("journal.json")).unwrap();
        fs::write(work.file("journal.json"), text.replace("\"version\": 1", "\"version\": 9"))
            .unwrap();
        assert!(work.journal().is_none());
        fs::write(work.file("journal.json"), "{ cut").unwrap();
        assert!(work.journal().is_none());
    }
}
