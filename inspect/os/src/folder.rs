// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A folder on this machine as a guest, for tests and for unpacked trees.

use crate::{
    DirEntry, Error, ErrorKind, FileKind, Finished, GuestEdit, GuestTree, Ownership, Result, Space,
    Stat,
};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tranship_protocol::GuestPath;

/// Symbolic links that one path may pass through, as many as Linux allows.
const MAX_LINKS: u32 = 40;

/// A folder on this machine as a guest, for tests and for unpacked trees.
///
/// Links are resolved by hand below the folder, so that neither an absolute link nor
/// `..` leaves it. Programs of such a guest are never run. Ownership is set only as far
/// as this process may.
#[derive(Debug)]
pub struct FolderTree {
    root: PathBuf,
    space: Option<Space>,
}

impl FolderTree {
    /// The guest whose root directory is the folder `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), space: None }
    }

    /// Reports `space` for every path, instead of what this machine has.
    #[must_use]
    pub fn with_space(mut self, space: Space) -> Self {
        self.space = Some(space);
        self
    }

    /// Where `path` lies on this machine; a final link is followed only if `follow`.
    ///
    /// Names that do not exist resolve as they are written.
    fn resolve(&self, path: &GuestPath, follow: bool) -> Result<PathBuf> {
        let mut pending: Vec<Vec<u8>> = names(path.as_bytes());
        pending.reverse();
        let mut below: Vec<Vec<u8>> = Vec::new();
        let mut links = 0_u32;
        while let Some(name) = pending.pop() {
            if name == b".." {
                below.pop();
                continue;
            }
            below.push(name);
            if pending.is_empty() && !follow {
                break;
            }
            let Ok(target) = fs::read_link(self.host(&below)) else { continue };
            links = links.saturating_add(1);
            if links > MAX_LINKS {
                return Err(Error::new(ErrorKind::Io, "too many symbolic links").on(path));
            }
            let target = target.into_os_string().into_vec();
            below.pop();
            if target.first() == Some(&b'/') {
                below.clear();
            }
            pending.extend(names(&target).into_iter().rev());
        }
        Ok(self.host(&below))
    }

    fn host(&self, below: &[Vec<u8>]) -> PathBuf {
        let mut host = self.root.clone();
        host.extend(below.iter().map(|name| OsStr::from_bytes(name)));
        host
    }

    /// Writes `content` to a new file beside `host` and renames it into place.
    fn replace(&self, path: &GuestPath, host: &Path, content: &[u8], new: Ownership) -> Result<()> {
        let parent = host.parent().unwrap_or(&self.root);
        let in_file = |source: io::Error| failed("cannot be written", source).on(path);
        fs::create_dir_all(parent).map_err(in_file)?;
        let (mode, owner) = match fs::metadata(host) {
            Ok(old) => (old.mode() & 0o7777, (old.uid(), old.gid())),
            Err(_) => (new.mode, (new.uid, new.gid)),
        };
        let mut name = OsStr::from_bytes(b".tranship-").to_owned();
        name.push(host.file_name().unwrap_or_default());
        let beside = parent.join(name);
        let mut file = fs::File::create(&beside).map_err(in_file)?;
        file.write_all(content).map_err(in_file)?;
        // Only root may give files away; everybody else keeps them.
        let _ = std::os::unix::fs::chown(&beside, Some(owner.0), Some(owner.1));
        file.set_permissions(fs::Permissions::from_mode(mode)).map_err(in_file)?;
        drop(file);
        fs::rename(&beside, host).map_err(in_file)
    }
}

impl GuestTree for FolderTree {
    fn lstat(&self, path: &GuestPath) -> Result<Option<Stat>> {
        stat_of(path, fs::symlink_metadata(self.resolve(path, false)?))
    }

    fn stat(&self, path: &GuestPath) -> Result<Option<Stat>> {
        stat_of(path, fs::symlink_metadata(self.resolve(path, true)?))
    }

    fn read(&self, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        let host = self.resolve(path, true)?;
        let cannot = |source: io::Error| failed("cannot be read", source).on(path);
        let meta = fs::symlink_metadata(&host).map_err(cannot)?;
        if !meta.is_file() {
            return Err(Error::new(ErrorKind::Io, "not a regular file").on(path));
        }
        let too_large = |size: u64| {
            let message = format!("holds {size} bytes, more than the limit of {limit}");
            Err(Error::new(ErrorKind::Unsupported, message).on(path))
        };
        if meta.len() > limit {
            return too_large(meta.len());
        }
        let mut content = Vec::new();
        let file = fs::File::open(&host).map_err(cannot)?;
        let size = file.take(limit.saturating_add(1)).read_to_end(&mut content).map_err(cannot)?;
        match u64::try_from(size) {
            Ok(size) if size > limit => too_large(size),
            _ => Ok(content),
        }
    }

    fn read_link(&self, path: &GuestPath) -> Result<Vec<u8>> {
        fs::read_link(self.resolve(path, false)?)
            .map(|target| target.into_os_string().into_vec())
            .map_err(|source| failed("is not a link that can be read", source).on(path))
    }

    fn read_dir(&self, path: &GuestPath) -> Result<Vec<DirEntry>> {
        let cannot = |source: io::Error| failed("cannot be listed", source).on(path);
        let mut entries = fs::read_dir(self.resolve(path, true)?)
            .map_err(cannot)?
            .map(|entry| {
                let entry = entry.map_err(cannot)?;
                let kind = kind_of(entry.file_type().map_err(cannot)?);
                Ok(DirEntry { name: entry.file_name().into_vec(), kind })
            })
            .collect::<Result<Vec<_>>>()?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn space(&self, path: &GuestPath) -> Result<Space> {
        if let Some(space) = self.space {
            return Ok(space);
        }
        let host = self.resolve(path, true)?;
        let found = rustix::fs::statvfs(&host)
            .map_err(|errno| failed("has no free-space figures", errno.into()).on(path))?;
        Ok(Space {
            free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
            free_inodes: (found.f_files > 0).then_some(found.f_favail),
            read_only: found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY),
        })
    }
}

impl GuestEdit for FolderTree {
    fn write(&self, path: &GuestPath, content: &[u8], new: Ownership) -> Result<()> {
        self.replace(path, &self.resolve(path, true)?, content, new)
    }

    fn append(
        &self,
        path: &GuestPath,
        data: &[u8],
        align: u64,
        backup: Option<&GuestPath>,
    ) -> Result<u64> {
        let host = self.resolve(path, true)?;
        let mut content = fs::read(&host).map_err(|e| failed("cannot be read", e).on(path))?;
        let align = usize::try_from(align.max(1)).unwrap_or(1);
        let start = content.len().next_multiple_of(align);
        content.resize(start, 0);
        content.extend_from_slice(data);
        if let Some(backup) = backup {
            let to = self.resolve(backup, false)?;
            fs::copy(&host, &to).map_err(|e| failed("cannot be written", e).on(backup))?;
        }
        self.replace(path, &host, &content, Ownership { mode: 0o600, uid: 0, gid: 0 })?;
        Ok(u64::try_from(start).unwrap_or(u64::MAX))
    }

    fn symlink(&self, path: &GuestPath, target: &[u8]) -> Result<()> {
        let host = self.resolve(path, false)?;
        let cannot = |source: io::Error| failed("cannot be made a link", source).on(path);
        if let Some(parent) = host.parent() {
            fs::create_dir_all(parent).map_err(cannot)?;
        }
        self.remove(path)?;
        std::os::unix::fs::symlink(OsStr::from_bytes(target), &host).map_err(cannot)
    }

    fn copy(&self, from: &GuestPath, to: &GuestPath) -> Result<()> {
        let source = self.resolve(from, true)?;
        let target = self.resolve(to, true)?;
        let cannot = |source: io::Error| failed("cannot be copied", source).on(from);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(cannot)?;
        }
        fs::copy(source, target).map(|_| ()).map_err(cannot)
    }

    fn remove(&self, path: &GuestPath) -> Result<()> {
        match fs::remove_file(self.resolve(path, false)?) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(failed("cannot be removed", source).on(path))
            }
            _ => Ok(()),
        }
    }

    fn run(&self, program: &str, _arguments: &[&str]) -> Result<Finished> {
        let message = format!("{program} is not run: this guest is only a folder");
        Err(Error::new(ErrorKind::Unsupported, message))
    }
}

fn names(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .map(<[u8]>::to_vec)
        .collect()
}

fn kind_of(kind: fs::FileType) -> FileKind {
    if kind.is_file() {
        FileKind::File
    } else if kind.is_dir() {
        FileKind::Directory
    } else if kind.is_symlink() {
        FileKind::Link
    } else {
        FileKind::Other
    }
}

fn stat_of(path: &GuestPath, meta: io::Result<fs::Metadata>) -> Result<Option<Stat>> {
    match meta {
        Ok(meta) => Ok(Some(Stat {
            kind: kind_of(meta.file_type()),
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            size: meta.len(),
            device: meta.dev(),
            inode: meta.ino(),
            modified: meta.mtime(),
        })),
        // A file in place of a directory on the way means that the name is not there.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(e) => Err(failed("has no attributes", e).on(path)),
    }
}

fn failed(what: &str, source: io::Error) -> Error {
    let kind = match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::NoSpace,
        _ => ErrorKind::Io,
    };
    Error::new(kind, what).because(source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const NEW: Ownership = Ownership { mode: 0o640, uid: 0, gid: 0 };

    fn guest() -> (tempfile::TempDir, FolderTree) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/inside"), "inside").unwrap();
        fs::write(dir.path().join("outside"), "outside").unwrap();
        (dir, FolderTree::new(root))
    }

    #[test]
    fn links_and_dots_stay_below_the_folder() {
        let (dir, tree) = guest();
        symlink("/etc/inside", dir.path().join("root/absolute")).unwrap();
        symlink("../../../outside", dir.path().join("root/upwards")).unwrap();
        symlink("round", dir.path().join("root/round")).unwrap();
        assert_eq!(tree.read(&"/absolute".into(), 10).unwrap(), b"inside");
        assert_eq!(tree.read(&"/../../etc/../etc/inside".into(), 10).unwrap(), b"inside");
        assert_eq!(tree.stat(&"/upwards".into()).unwrap(), None);
        assert!(tree.lstat(&"/upwards".into()).unwrap().is_some());
        let error = tree.stat(&"/round".into()).unwrap_err();
        assert_eq!(error.to_string(), "guest file /round: too many symbolic links");
    }

    #[test]
    fn a_file_over_the_limit_is_not_read() {
        let (_dir, tree) = guest();
        let error = tree.read(&"/etc/inside".into(), 5).unwrap_err();
        assert_eq!(
            error.to_string(),
            "guest file /etc/inside: holds 6 bytes, more than the limit of 5"
        );
    }

    #[test]
    fn writing_keeps_the_mode_and_the_link_of_an_existing_file() {
        let (dir, tree) = guest();
        let root = dir.path().join("root");
        symlink("inside", root.join("etc/link")).unwrap();
        fs::set_permissions(root.join("etc/inside"), fs::Permissions::from_mode(0o600)).unwrap();
        tree.write(&"/etc/link".into(), b"changed", NEW).unwrap();
        assert_eq!(fs::read(root.join("etc/inside")).unwrap(), b"changed");
        assert_eq!(fs::metadata(root.join("etc/inside")).unwrap().mode() & 0o777, 0o600);
        assert!(fs::symlink_metadata(root.join("etc/link")).unwrap().is_symlink());
        tree.write(&"/new/dir/file".into(), b"new", NEW).unwrap();
        assert_eq!(fs::metadata(root.join("new/dir/file")).unwrap().mode() & 0o777, 0o640);
    }

    #[test]
    fn appending_pads_and_keeps_the_original_as_a_backup() {
        let (dir, tree) = guest();
        let at = tree.append(&"/etc/inside".into(), b"more", 8, Some(&"/etc/old".into())).unwrap();
        assert_eq!(at, 8);
        let root = dir.path().join("root");
        assert_eq!(fs::read(root.join("etc/inside")).unwrap(), b"inside\0\0more");
        assert_eq!(fs::read(root.join("etc/old")).unwrap(), b"inside");
    }

    #[test]
    fn programs_are_refused() {
        let (_dir, tree) = guest();
        assert_eq!(tree.run("/bin/true", &[]).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
