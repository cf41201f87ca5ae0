// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest in the appliance as inspection and conversion see it.

use tranship_appliance::Guest;
use tranship_inspect::{
    DirEntry, Error, ErrorKind, FileKind, Finished, GuestEdit, GuestTree, Ownership, Result, Space,
    Stat,
};
use tranship_protocol::{self as protocol, GuestPath, NewFile};

/// Names in one directory, at most.
const MOST_NAMES: usize = 200_000;

/// Bytes of a program's output that are kept.
const MOST_OUTPUT: usize = 4 << 20;

/// ENOENT, ENOTDIR, EROFS, ENOSPC, EDQUOT as Linux numbers them.
const NOT_FOUND: [i32; 2] = [2, 20];
const NO_SPACE: [i32; 3] = [30, 28, 122];

/// The mounted files of a launched [`Guest`].
#[derive(Clone, Copy, Debug)]
pub struct GuestFiles<'a>(pub &'a Guest);

fn failed(path: &GuestPath, error: tranship_appliance::Error) -> Error {
    use tranship_appliance::ErrorKind as From;
    let kind = match error.kind() {
        From::Call if NOT_FOUND.contains(&error.errno()) => ErrorKind::NotFound,
        From::Call if NO_SPACE.contains(&error.errno()) => ErrorKind::NoSpace,
        From::Call | From::Usage => ErrorKind::Io,
        _ => ErrorKind::Appliance,
    };
    Error::new(kind, "could not be accessed in the appliance").on(path).because(error)
}

fn kind_of(kind: protocol::FileKind) -> FileKind {
    match kind {
        protocol::FileKind::File => FileKind::File,
        protocol::FileKind::Directory => FileKind::Directory,
        protocol::FileKind::Link => FileKind::Link,
        _ => FileKind::Other,
    }
}

impl GuestFiles<'_> {
    fn attributes(self, path: &GuestPath, follow: bool) -> Result<Option<Stat>> {
        let found = self.0.attributes(path, follow).map_err(|error| failed(path, error))?;
        Ok(found.map(|found| Stat {
            kind: kind_of(found.kind),
            mode: found.mode,
            uid: found.uid,
            gid: found.gid,
            size: found.size,
            device: found.device,
            inode: found.inode,
            modified: found.modified,
        }))
    }
}

impl GuestTree for GuestFiles<'_> {
    fn lstat(&self, path: &GuestPath) -> Result<Option<Stat>> {
        self.attributes(path, false)
    }

    fn stat(&self, path: &GuestPath) -> Result<Option<Stat>> {
        self.attributes(path, true)
    }

    fn read(&self, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        self.0.read_file(path, limit).map_err(|error| failed(path, error))
    }

    fn read_link(&self, path: &GuestPath) -> Result<Vec<u8>> {
        self.0.read_link(path).map_err(|error| failed(path, error))
    }

    fn read_dir(&self, path: &GuestPath) -> Result<Vec<DirEntry>> {
        let names = self.0.read_dir(path, MOST_NAMES).map_err(|error| failed(path, error))?;
        Ok(names
            .into_iter()
            .map(|entry| DirEntry { name: entry.name, kind: kind_of(entry.kind) })
            .collect())
    }

    fn space(&self, path: &GuestPath) -> Result<Space> {
        let found = self.0.space(path).map_err(|error| failed(path, error))?;
        Ok(Space {
            free_bytes: found.free,
            free_inodes: (found.inodes > 0).then_some(found.free_inodes),
            read_only: found.read_only,
        })
    }
}

impl GuestEdit for GuestFiles<'_> {
    fn write(&self, path: &GuestPath, content: &[u8], new: Ownership) -> Result<()> {
        let new = NewFile { mode: new.mode, uid: new.uid, gid: new.gid };
        let mut content = content;
        self.0
            .upload(path, &mut content, new, true, &tranship_appliance::Silent)
            .map_err(|error| failed(path, error))
    }

    fn append(
        &self,
        path: &GuestPath,
        data: &[u8],
        align: u64,
        backup: Option<&GuestPath>,
    ) -> Result<u64> {
        self.0.append(path, data, align, backup).map_err(|error| failed(path, error))
    }

    fn symlink(&self, path: &GuestPath, target: &[u8]) -> Result<()> {
        self.0
            .make_dir(&path.parent(), 0o755)
            .and_then(|()| self.0.symlink(path, target))
            .map_err(|error| failed(path, error))
    }

    fn copy(&self, from: &GuestPath, to: &GuestPath) -> Result<()> {
        self.0
            .make_dir(&to.parent(), 0o755)
            .and_then(|()| self.0.copy(from, to))
            .map_err(|error| failed(to, error))
    }

    fn remove(&self, path: &GuestPath) -> Result<()> {
        self.0.remove(path).map_err(|error| failed(path, error))
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<Finished> {
        let mut words = vec![program];
        words.extend(arguments);
        let mut output = Vec::new();
        let mut take = |bytes: &[u8]| {
            let room = MOST_OUTPUT.saturating_sub(output.len());
            output.extend(bytes.iter().take(room));
            Ok(())
        };
        let finished = self
            .0
            .run(&words, true, None, None, &mut take)
            .map_err(|error| failed(&GuestPath::of(program), error))?;
        Ok(Finished { status: finished.status, output })
    }
}
