// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The folder with saved machines.
//!
//! A machine that was saved before the first disk was plugged in is the same for every guest, so
//! it is booted once and restored ever after. What is found here runs below the users' disks:
//! nobody else may have written it.

use crate::backend::{MachineSpec, SnapshotFiles};
use crate::{Error, ErrorKind, Result};
use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::{self, DirBuilder, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tranship_protocol::Hello;

/// Number of the layout of the folder and of what is in its files.
const LAYOUT: u32 = 1;
/// Saved machines that are kept: the least recently used goes first.
const KEPT: usize = 4;
/// A folder that is being filled has this in front of its name; one of this age never will be.
const TEMPORARY: &str = "tmp-";
const ABANDONED: Duration = Duration::from_hours(1);
/// The largest description of a snapshot in bytes.
const MOST_ABOUT: u64 = 64 << 10;

/// The name of the one snapshot that fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key(String);

/// A saved machine that fits.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) files: SnapshotFiles,
    /// How the agent in it has introduced itself.
    pub(crate) hello: Hello,
}

#[derive(Serialize, Deserialize)]
struct About {
    layout: u32,
    hello: Hello,
}

/// The folder.
#[derive(Debug)]
pub(crate) struct Snapshots {
    folder: PathBuf,
}

impl Key {
    /// Covers everything that a saved machine depends on: `backend` is what the backend says
    /// about itself.
    pub(crate) fn of(spec: &MachineSpec, backend: &str) -> Option<Self> {
        let mut text = format!(
            "layout {LAYOUT}\nprotocol {}\n{backend}\nmemory {}\nprocessors {}\n",
            tranship_protocol::VERSION,
            spec.memory_mib,
            spec.processors,
        );
        for file in [&spec.kernel, &spec.initramfs, &spec.tools] {
            text.push_str(&stamp(file)?);
        }
        let host = rustix::system::uname();
        let _ = writeln!(text, "host {:?} {:?}", host.release(), host.version());
        // A crash of the host may leave half of what was written, and nothing here waits for
        // the disk: what is older than the host's last start is not used.
        text.push_str(&fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?);
        text.push_str(&processor());
        let mut name = String::new();
        for byte in Sha256::digest(text.as_bytes()).iter().take(20) {
            let _ = write!(name, "{byte:02x}");
        }
        Some(Self(name))
    }
}

/// One line that changes whenever the file does; `None` if it is not there.
pub(crate) fn stamp(file: &Path) -> Option<String> {
    let facts = fs::metadata(file).ok()?;
    Some(format!(
        "file {} {} {} {}.{} {}\n",
        file.display(),
        facts.dev(),
        facts.ino(),
        facts.mtime(),
        facts.mtime_nsec(),
        facts.size()
    ))
}

/// What the host's kernel says about its first processor, without what changes by the minute.
fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.lines().take_while(|line| !line.is_empty());
    let lasting = |line: &&str| {
        ["vendor_id", "cpu family", "model", "stepping", "microcode", "flags"]
            .iter()
            .any(|word| line.starts_with(word))
    };
    first.filter(lasting).fold(String::new(), |text, line| text + line + "\n")
}

fn failed(what: &str, path: &Path, error: impl Into<std::io::Error>) -> Error {
    Error::new(ErrorKind::Io, format!("{what} {}", path.display())).because(error.into())
}

fn refused(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Io, format!("{}: {why}", path.display()))
}

/// Refuses what others own or could have read or changed.
fn check(path: &Path, file: &impl rustix::fd::AsFd) -> Result<()> {
    let facts = rustix::fs::fstat(file).map_err(|error| failed("looking at", path, error))?;
    if facts.st_uid != rustix::process::geteuid().as_raw() {
        return Err(refused(path, &format!("it belongs to user {}", facts.st_uid)));
    }
    if facts.st_mode & 0o077 != 0 {
        return Err(refused(
            path,
            &format!("others have access, mode {:o}", facts.st_mode & 0o777),
        ));
    }
    Ok(())
}

/// A folder that is ours alone, which is made if need be.
///
/// # Errors
///
/// A folder that others have access to, and the operating system's.
pub(crate) fn private_folder(path: &Path) -> Result<OwnedFd> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| failed("making", path, error))?;
    let folder = open_folder(path).map_err(|error| failed("opening", path, error))?;
    check(path, &folder)?;
    Ok(folder)
}

/// Opens a name in a folder, itself and nothing that it might lead to.
pub(crate) fn open_in(folder: &OwnedFd, path: &Path, name: &str, flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let shown = path.join(name);
    let file = rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(0o600))
        .map_err(|error| failed("opening", &shown, error))?;
    check(&shown, &file)?;
    Ok(file)
}

fn open_folder(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

impl Snapshots {
    /// The folder, which is made if need be.
    ///
    /// # Errors
    ///
    /// A folder that others have access to, and the operating system's.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        private_folder(folder)?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// The saved machine under `key`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// One that is damaged or not ours alone.
    pub(crate) fn find(&self, key: &Key) -> Result<Option<Saved>> {
        let path = self.folder.join(&key.0);
        let folder = match open_folder(&path) {
            Ok(folder) => folder,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(failed("opening", &path, error)),
        };
        check(&path, &folder)?;
        let open = |name| open_in(&folder, &path, name, OFlags::RDONLY).map(File::from);
        let mut text = Vec::new();
        let about = open("about")?;
        about
            .take(MOST_ABOUT)
            .read_to_end(&mut text)
            .map_err(|error| failed("reading", &path, error))?;
        let about: About = serde_json::from_slice(&text)
            .map_err(|error| refused(&path, &format!("its description: {error}")))?;
        if about.layout != LAYOUT {
            return Err(refused(&path, &format!("layout {}, expected {LAYOUT}", about.layout)));
        }
        let files = SnapshotFiles { state: open("state")?, memory: open("memory")? };
        // When it was used last.
        let now = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
            last_modification: rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
        };
        let _ = rustix::fs::futimens(&folder, &now);
        Ok(Some(Saved { files, hello: about.hello }))
    }

    /// Keeps what `write` puts into the files, under `key`.
    ///
    /// # Errors
    ///
    /// What `write` returns, and the operating system's; nothing is kept then.
    pub(crate) fn keep(
        &self,
        key: &Key,
        hello: &Hello,
        write: impl FnOnce(&SnapshotFiles) -> Result<()>,
    ) -> Result<()> {
        let temporary = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .tempdir_in(&self.folder)
            .map_err(|error| failed("making a folder in", &self.folder, error))?;
        let path = temporary.path();
        let folder = open_folder(path).map_err(|error| failed("opening", path, error))?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let create = |name| open_in(&folder, path, name, flags).map(File::from);
        let files = SnapshotFiles { state: create("state")?, memory: create("memory")? };
        write(&files)?;
        let about = About { layout: LAYOUT, hello: hello.clone() };
        let text = serde_json::to_vec(&about)
            .map_err(|error| failed("describing", path, std::io::Error::from(error)))?;
        create("about")?.write_all(&text).map_err(|error| failed("writing", path, error))?;
        let target = self.folder.join(&key.0);
        match rustix::fs::renameat_with(CWD, path, CWD, &target, RenameFlags::NOREPLACE) {
            // Somebody else was quicker.
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(failed("naming", &target, error)),
            Ok(()) => drop(temporary.keep()),
        }
        self.tidy(key);
        Ok(())
    }

    /// Removes the snapshot under `key`: it does not work.
    pub(crate) fn forget(&self, key: &Key) {
        let _ = fs::remove_dir_all(self.folder.join(&key.0));
    }

    /// Removes what nobody used for the longest time, and what was never finished.
    fn tidy(&self, used: &Key) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let mut finished = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(modified) = entry.metadata().ok().and_then(|facts| facts.modified().ok())
            else {
                continue;
            };
            let age = SystemTime::now().duration_since(modified).unwrap_or_default();
            if name.starts_with(TEMPORARY) {
                if age > ABANDONED {
                    let _ = fs::remove_dir_all(entry.path());
                }
            } else if name != used.0 {
                finished.push((modified, entry.path()));
            }
        }
        finished.sort();
        let excess = finished.len().saturating_sub(KEPT - 1);
        for (_, path) in finished.into_iter().take(excess) {
            let _ = fs::remove_dir_all(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn hello() -> Hello {
        Hello { version: 2, kernel: "6.1".into(), stages: Vec::new(), vmcoreinfo: None }
    }

    fn key(name: &str) -> Key {
        Key(name.to_owned())
    }

    fn with_one() -> (tempfile::TempDir, Snapshots) {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(&folder.path().join("warm")).unwrap();
        let write = |files: &SnapshotFiles| {
            (&files.state).write_all(b"state").map_err(|error| failed("", Path::new(""), error))
        };
        snapshots.keep(&key("one"), &hello(), write).unwrap();
        (folder, snapshots)
    }

    #[test]
    fn what_was_kept_is_found_under_its_key_only() {
        let (_folder, snapshots) = with_one();
        let mut saved = snapshots.find(&key("one")).unwrap().unwrap();
        let mut text = String::new();
        saved.files.state.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), saved.hello), ("state", hello()));
        assert!(snapshots.find(&key("two")).unwrap().is_none());
        snapshots.forget(&key("one"));
        assert!(snapshots.find(&key("one")).unwrap().is_none());
    }

    #[test]
    fn a_failed_save_leaves_nothing() {
        let (_folder, snapshots) = with_one();
        let fail = |_: &SnapshotFiles| Err(refused(Path::new("x"), "full"));
        snapshots.keep(&key("two"), &hello(), fail).unwrap_err();
        let names: Vec<_> = fs::read_dir(&snapshots.folder).unwrap().flatten().collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[test]
    fn what_others_can_touch_is_refused() {
        for name in ["one", "one/state", "one/memory", "one/about"] {
            let (_folder, snapshots) = with_one();
            let path = snapshots.folder.join(name);
            let mode = if path.is_dir() { 0o750 } else { 0o640 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = snapshots.find(&key("one")).unwrap_err().to_string();
            assert!(error.contains("others have access"), "{error}");
        }
        let (_folder, snapshots) = with_one();
        fs::set_permissions(&snapshots.folder, fs::Permissions::from_mode(0o711)).unwrap();
        Snapshots::open(&snapshots.folder).unwrap_err();
    }

    #[test]
    fn links_are_not_followed_and_damage_is_an_error() {
        let (_folder, snapshots) = with_one();
        let state = snapshots.folder.join("one/state");
        fs::rename(&state, snapshots.folder.join("one/other")).unwrap();
        std::os::unix::fs::symlink("other", &state).unwrap();
        snapshots.find(&key("one")).unwrap_err();
        let (_folder, snapshots) = with_one();
        fs::write(snapshots.folder.join("one/about"), "{}").unwrap();
        snapshots.find(&key("one")).unwrap_err();
        let (_folder, snapshots) = with_one();
        fs::remove_file(snapshots.folder.join("one/memory")).unwrap();
        snapshots.find(&key("one")).unwrap_err();
    }

    #[test]
    fn the_least_recently_used_go() {
        let (_folder, snapshots) = with_one();
        for name in ["a", "b", "c", "d", "e"] {
            snapshots.keep(&key(name), &hello(), |_| Ok(())).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            // In use all the time.
            snapshots.find(&key("one")).unwrap().unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(&snapshots.folder)
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["c", "d", "e", "one"]);
    }
}
