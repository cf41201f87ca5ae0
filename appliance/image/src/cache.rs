// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The private directory with finished appliances, and how processes share it.
//!
//! Everything in it is made in a temporary directory under the lock and renamed when it is whole:
//! what has its final name is complete. A killed build leaves a temporary directory and a lock
//! that died with it; whoever gets the lock next removes what is left.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::{Event, Progress};

const TEMPORARY: &str = "tmp-";
/// An unused artifact of this age goes. Younger ones may be about to be opened by a process that
/// was just told of them.
const UNUSED: Duration = Duration::from_hours(1);
/// An option set that nobody built with for so long is forgotten.
const FORGOTTEN: Duration = Duration::from_hours(90 * 24);

/// The kinds of artifacts, each a directory of directories named by key.
pub(crate) const KINDS: [&str; 3] = ["kernels", "tools", "initramfs"];

/// What `stat` says about a file, to notice that it was replaced. `None` if it does not exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub(crate) path: PathBuf,
    state: Option<(u64, i64, i64, u64, u64)>,
}

impl Stamp {
    /// Size, modification time and inode of `path`, following links.
    pub(crate) fn of(path: &Path) -> Self {
        let state = fs::metadata(path)
            .ok()
            .map(|m| (m.size(), m.mtime(), m.mtime_nsec(), m.ino(), m.dev()));
        Self { path: path.to_owned(), state }
    }

    /// Whether the file is still the same.
    pub(crate) fn holds(&self) -> bool {
        *self == Self::of(&self.path)
    }

    /// One line for a key.
    pub(crate) fn line(&self) -> String {
        format!("{} {:?}", self.path.display(), self.state)
    }
}

/// An open cache directory.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

/// Held while something is made in the cache.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Cache {
    /// Opens `root` and creates it if need be.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] if it belongs to another user or others can write to it: they could
    /// put a kernel of theirs under our guests' disks.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(root).context("creating", root)?;
        let meta = fs::metadata(root).context("looking at", root)?;
        let uid = rustix::process::geteuid().as_raw();
        if meta.uid() != uid {
            return Err(Error::new(
                ErrorKind::Denied,
                format!("appliance cache belongs to user {}, we are user {uid}", meta.uid()),
            )
            .in_file(root)
            .remedy("name a cache directory of your own"));
        }
        if meta.mode() & 0o022 != 0 {
            return Err(Error::new(
                ErrorKind::Denied,
                format!(
                    "appliance cache has mode {:04o}, others can write to it",
                    meta.mode() & 0o7777
                ),
            )
            .in_file(root)
            .remedy(format!(
                "remove it, or check what is in it and run `chmod 0700 {}`",
                root.display()
            )));
        }
        // An absolute path, because packages are downloaded from another working directory.
        Ok(Self { root: fs::canonicalize(root).context("resolving", root)? })
    }

    /// Waits for the lock and removes what killed builds left behind.
    pub(crate) fn lock(&self, progress: &Progress<'_>) -> Result<Lock> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .context("opening", &path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                progress(Event::Waiting);
                loop {
                    match flock(&file, FlockOperation::LockExclusive) {
                        Err(rustix::io::Errno::INTR) => {}
                        other => break other,
                    }
                }
            }
            other => other,
        }
        .context("locking", &path)?;
        // Temporary names are made under the lock only: all that exist now are orphans.
        for entry in fs::read_dir(&self.root).context("listing", &self.root)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                let orphan = entry.path();
                let removed = if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    fs::remove_dir_all(&orphan)
                } else {
                    fs::remove_file(&orphan)
                };
                removed.context("removing", &orphan)?;
            }
        }
        Ok(Lock { _file: file })
    }

    /// A directory for work in progress; goes away with the value.
    pub(crate) fn temporary(&self, _lock: &Lock) -> Result<tempfile::TempDir> {
        tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempdir_in(&self.root)
            .context("creating a directory", &self.root)
    }

    /// Where the artifact of `kind` with `key` is or will be.
    pub(crate) fn artifact(&self, kind: &str, key: &str) -> PathBuf {
        self.root.join(kind).join(key)
    }

    /// Gives a finished directory its final name.
    pub(crate) fn install(
        &self,
        _lock: &Lock,
        made: &Path,
        kind: &str,
        key: &str,
    ) -> Result<PathBuf> {
        let to = self.artifact(kind, key);
        let parent = self.root.join(kind);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&parent)
            .context("creating", &parent)?;
        if to.exists() {
            fs::remove_dir_all(&to).context("removing", &to)?;
        }
        sync_dir(made)?;
        fs::rename(made, &to).context("renaming", made)?;
        sync_dir(&parent)?;
        Ok(to)
    }

    /// A file directly in the cache directory.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Reads a JSON file; one that does not exist or is of another version is as good as none.
    pub(crate) fn read_json<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.file(name)).ok()?).ok()
    }

    /// Removes a file directly in the cache directory, if it is there.
    pub(crate) fn remove(&self, _lock: &Lock, name: &str) -> Result<()> {
        let path = self.file(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context("removing", &path)
            }
            _ => Ok(()),
        }
    }

    /// Replaces a JSON file as a whole.
    pub(crate) fn write_json<T: Serialize>(
        &self,
        _lock: &Lock,
        name: &str,
        value: &T,
    ) -> Result<()> {
        let path = self.file(name);
        let mut file = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempfile_in(&self.root)
            .context("creating a file", &self.root)?;
        write_json(file.as_file_mut(), value).map_err(|e| e.in_file(&path))?;
        file.persist(&path).map_err(|e| e.error).context("renaming", &path)?;
        Ok(())
    }

    /// Removes artifacts that no remembered option set and no pointer uses any more.
    pub(crate) fn collect_garbage(&self, _lock: &Lock, used: &BTreeSet<String>) {
        // Failing to clean up is no reason to fail a build; it is tried again the next time.
        for kind in KINDS {
            for entry in fs::read_dir(self.root.join(kind)).into_iter().flatten().flatten() {
                if !used.contains(&*entry.file_name().to_string_lossy())
                    && is_older(&entry.path(), UNUSED)
                {
                    let _ = fs::remove_dir_all(entry.path());
                }
            }
        }
    }

    /// Names of the remembered option sets; drops those that are forgotten.
    pub(crate) fn option_sets(&self, _lock: &Lock) -> Vec<String> {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("current-"))
            .filter(|entry| {
                let old = is_older(&entry.path(), FORGOTTEN);
                if old {
                    let _ = fs::remove_file(entry.path());
                }
                !old
            })
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }
}

fn is_older(path: &Path, age: Duration) -> bool {
    fs::metadata(path)
        .and_then(|meta| meta.modified())
        .ok()
        .and_then(|then| SystemTime::now().duration_since(then).ok())
        .is_some_and(|elapsed| elapsed > age)
}

/// Writes `value` as readable JSON and waits until it is on the disk.
pub(crate) fn write_json<T: Serialize>(file: &mut File, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::new(ErrorKind::Io, "manifest cannot be written as JSON").because(e))?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(|e| Error::io("writing failed", e))
}

/// Creates a file with `bytes` that are on the disk on return.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create_new(path).context("creating", path)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).context("writing", path)
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).context("syncing", path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_new_cache_is_private_and_a_shared_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        Cache::open(&root).unwrap();
        assert_eq!(fs::metadata(&root).unwrap().mode() & 0o777, 0o700);
        for mode in [0o720, 0o702, 0o1777] {
            fs::set_permissions(&root, fs::Permissions::from_mode(mode)).unwrap();
            let error = Cache::open(&root).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied);
            assert!(error.what_helps().unwrap().contains("chmod 0700"));
        }
    }

    #[test]
    fn a_cache_of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: giving a directory away needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(12345), None).unwrap();
        let error = Cache::open(dir.path()).unwrap_err();
        assert_eq!(error.message(), "appliance cache belongs to user 12345, we are user 0");
    }

    #[test]
    fn the_lock_excludes_and_its_next_holder_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let orphan = dir.path().join("tmp-dead");
        let lock = cache.lock(&|_| ()).unwrap();
        fs::create_dir(&orphan).unwrap();
        fs::write(dir.path().join("tmp-file"), "x").unwrap();
        let (to, waiting) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let cache = Cache::open(dir.path()).unwrap();
                let lock = cache.lock(&|event| to.send(event).unwrap()).unwrap();
                assert!(!orphan.exists() && !dir.path().join("tmp-file").exists());
                drop(lock);
            });
            assert!(matches!(waiting.recv().unwrap(), Event::Waiting));
            assert!(orphan.exists());
            drop(lock);
            other.join().unwrap();
        });
    }

    #[test]
    fn a_stamp_notices_replacement_and_appearance() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let absent = Stamp::of(&path);
        assert!(absent.holds());
        fs::write(&path, "a").unwrap();
        assert!(!absent.holds());
        let present = Stamp::of(&path);
        fs::write(dir.path().join("g"), "b").unwrap();
        fs::rename(dir.path().join("g"), &path).unwrap();
        assert!(!present.holds());
    }
}
