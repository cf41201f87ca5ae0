// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files of a guest, whoever holds them: the appliance, or a folder in a test.

use crate::Result;
use tranship_protocol::GuestPath;

/// What kind of thing a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, FIFO or socket.
    Other,
}

/// Attributes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, including set-user-id, set-group-id and sticky.
    pub mode: u32,
    /// Owner's user number.
    pub uid: u32,
    /// Owner's group number.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Number of the device (filesystem) it lies on.
    pub device: u64,
    /// Number of its inode on that device.
    pub inode: u64,
    /// When its contents last changed, in seconds since 1970.
    pub modified: i64,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without its directory.
    pub name: Vec<u8>,
    /// What it stands for, not following links.
    pub kind: FileKind,
}

/// Free space of a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that root can still write.
    pub free_bytes: u64,
    /// Files that can still be made; `None` where the filesystem does not count them.
    pub free_inodes: Option<u64>,
    /// Whether the filesystem is mounted read-only.
    pub read_only: bool,
}

/// Reads the files of a guest.
///
/// Paths are absolute with the guest's root as `/`; links resolve inside the guest.
/// Everything that comes back is hostile input.
pub trait GuestTree {
    /// Attributes of the name itself, not following a final link; `None` if it is not there.
    fn lstat(&self, path: &GuestPath) -> Result<Option<Stat>>;

    /// Attributes of what the name leads to; `None` if that is not there.
    fn stat(&self, path: &GuestPath) -> Result<Option<Stat>>;

    /// The whole contents of a file of at most `limit` bytes, following links.
    ///
    /// # Errors
    ///
    /// Not there, not a regular file, or larger than `limit`.
    fn read(&self, path: &GuestPath, limit: u64) -> Result<Vec<u8>>;

    /// What a symbolic link says, unresolved.
    fn read_link(&self, path: &GuestPath) -> Result<Vec<u8>>;

    /// The names in a directory, sorted, without `.` and `..`.
    fn read_dir(&self, path: &GuestPath) -> Result<Vec<DirEntry>>;

    /// Free space where `path` lies.
    fn space(&self, path: &GuestPath) -> Result<Space>;
}

/// Who may use a file that is made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// Permission bits.
    pub mode: u32,
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
}

/// What a program in the guest left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Exit status; 128 + N if signal N killed it.
    pub status: i32,
    /// Standard output and standard error, as they came; bounded.
    pub output: Vec<u8>,
}

/// Changes the files of a guest.
pub trait GuestEdit: GuestTree {
    /// Gives the file `path` these contents, atomically.
    ///
    /// An existing file keeps owner, mode, extended attributes and, if it is reached
    /// through a link, its place; a new one gets `new`. Missing parent directories are
    /// made with mode 0755.
    fn write(&self, path: &GuestPath, content: &[u8], new: Ownership) -> Result<()>;

    /// Appends `data` to the file `path`, after zero bytes up to a multiple of `align`.
    ///
    /// Done on a copy that then replaces the file; the untouched original stays as
    /// `backup` if that is given. Returns the offset at which `data` begins.
    fn append(
        &self,
        path: &GuestPath,
        data: &[u8],
        align: u64,
        backup: Option<&GuestPath>,
    ) -> Result<u64>;

    /// Makes `path` a symbolic link to `target`, replacing a file or link of that name.
    fn symlink(&self, path: &GuestPath, target: &[u8]) -> Result<()>;

    /// Copies a regular file with its attributes, replacing what is at `to`.
    fn copy(&self, from: &GuestPath, to: &GuestPath) -> Result<()>;

    /// Removes a file or link; does nothing if it is not there.
    fn remove(&self, path: &GuestPath) -> Result<()>;

    /// Runs a program of the guest with the guest as its root.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<Finished>;
}
