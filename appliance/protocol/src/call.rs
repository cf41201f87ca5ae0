// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The calls that the agent understands, and what it answers.

use crate::{Body, FrameKind, GuestPath};
use serde::{Deserialize, Serialize};

/// The agent's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The agent's [`crate::VERSION`].
    pub version: u32,
    /// Release of the running kernel, as `uname -r` has it.
    pub kernel: String,
    /// When each stage of start-up ended, in microseconds since the kernel began.
    pub stages: Vec<(String, u64)>,
    /// Where in the machine's memory the kernel's notes for debuggers begin, and their size in
    /// bytes: what `/sys/kernel/vmcoreinfo` says.
    pub vmcoreinfo: Option<(u64, u64)>,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A block device.
    Block,
    /// A character device.
    Character,
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
}

/// Attributes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub mode: u32,
    /// Owner's user number.
    pub uid: u32,
    /// Owner's group number.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Number of links to it.
    pub links: u64,
    /// Number of the device it lies on.
    pub device: u64,
    /// Number of its inode.
    pub inode: u64,
    /// Time of the last change of its contents, in seconds since 1970 UTC.
    pub modified: i64,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    /// The name without its directory.
    pub name: Vec<u8>,
    /// What it stands for, links not followed.
    pub kind: FileKind,
}

/// Free space of a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Size in bytes.
    pub size: u64,
    /// Bytes that root can still write.
    pub free: u64,
    /// Files that it can hold; 0 if it does not count them.
    pub inodes: u64,
    /// Files that can still be made.
    pub free_inodes: u64,
    /// Whether it is mounted read-only.
    pub read_only: bool,
}

/// What kind of block device a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum VolumeKind {
    /// A whole disk.
    Disk,
    /// A partition.
    Partition,
    /// An LVM logical volume.
    LogicalVolume,
    /// An MD RAID array.
    Raid,
    /// An opened encrypted volume.
    Encrypted,
}

/// A block device that may hold a filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name in the API: `/dev/sda1`, `/dev/VG/LV`, `/dev/md0`.
    pub device: String,
    /// What it is.
    pub kind: VolumeKind,
    /// Size in bytes.
    pub size: u64,
    /// Where it begins on its disk, in bytes; partitions only.
    pub start: Option<u64>,
    /// Number of the partition.
    pub number: Option<u32>,
    /// Everything that a look at its contents and its partition entry found, with
    /// libblkid's names: `TYPE`, `UUID`, `LABEL`, `PART_ENTRY_UUID`, `PTTYPE`, …
    pub tags: Vec<(String, String)>,
}

impl Volume {
    /// The tag called `name`.
    pub fn tag(&self, name: &str) -> Option<&str> {
        self.tags.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Outcome of a filesystem check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesystemCheck {
    /// Whether nothing is wrong.
    pub clean: bool,
    /// Whether a checker for this type exists at all.
    pub checked: bool,
    /// What the checker said, bounded.
    pub text: String,
}

/// What a program left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramOutput {
    /// Exit status; 128 + N if signal N ended it.
    pub status: i32,
}

/// Attributes for a file that is made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewFile {
    /// Permission bits.
    pub mode: u32,
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
}

/// Random bytes, which are nobody's business.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entropy(pub Vec<u8>);

impl std::fmt::Debug for Entropy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Entropy({} bytes)", self.0.len())
    }
}

/// Something that the host asks the agent to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// Nothing; answers [`Reply::Done`].
    Ping,
    /// Unmounts everything, writes everything out and switches off after the reply.
    Shutdown,
    /// Gets ready what most guests need, before the machine is saved.
    Prepare,
    /// The first call after the machine was restored: what stood still comes to the present.
    Wake {
        /// The time in seconds since 1970 UTC,
        seconds: i64,
        /// and nanoseconds.
        nanoseconds: u32,
        /// Fresh random bytes, at most [`crate::MOST_ENTROPY`].
        entropy: Entropy,
    },
    /// Disks were plugged in: waits until those with these serial numbers are there.
    Plugged {
        /// Their serial numbers.
        serials: Vec<String>,
    },
    /// Lets go of the disk with this serial number, which is to be unplugged; fails while it is
    /// in use.
    Unplug {
        /// Its serial number.
        serial: String,
    },
    /// The guest's disks in order: [`Reply::Volumes`] of [`VolumeKind::Disk`].
    Disks,
    /// Every block device that may hold a filesystem, volume groups and arrays
    /// activated: [`Reply::Volumes`].
    Volumes,
    /// Opens an encrypted volume as `/dev/mapper/NAME`; the key is uploaded.
    OpenEncrypted {
        /// The encrypted device.
        device: String,
        /// Name for the opened volume.
        name: String,
    },
    /// Mounts `device` at `mountpoint` of the guest's tree.
    Mount {
        /// The device, by its API name.
        device: String,
        /// Where; `/` first.
        mountpoint: GuestPath,
        /// Comma-separated options as for mount(8); empty for the defaults.
        options: String,
        /// Filesystem type; found by looking if absent.
        fstype: Option<String>,
    },
    /// Unmounts one mountpoint.
    Unmount {
        /// Where something is mounted.
        mountpoint: GuestPath,
    },
    /// Unmounts everything, innermost first.
    UnmountAll,
    /// What is mounted: [`Reply::Mounts`].
    Mounts,
    /// Writes everything out to the disks.
    Sync,
    /// Checks an unmounted filesystem without changing it: [`Reply::Checked`].
    Check {
        /// The device, by its API name.
        device: String,
        /// Its filesystem type.
        fstype: String,
    },
    /// Tells the disks which blocks a mounted filesystem does not use:
    /// [`Reply::Bytes`], the number of bytes discarded.
    Trim {
        /// Where it is mounted.
        mountpoint: GuestPath,
    },
    /// Attributes of the name itself: [`Reply::Attributes`].
    Lstat {
        /// The name.
        path: GuestPath,
    },
    /// Attributes of what the name leads to: [`Reply::Attributes`].
    Stat {
        /// The name.
        path: GuestPath,
    },
    /// What a link says: [`Reply::Target`].
    ReadLink {
        /// The link.
        path: GuestPath,
    },
    /// The names in a directory; downloads them as [`Name`]s, answers [`Reply::Done`].
    ReadDir {
        /// The directory.
        path: GuestPath,
    },
    /// Free space where `path` lies: [`Reply::Space`].
    Space {
        /// Anything on the filesystem.
        path: GuestPath,
    },
    /// Downloads a file; answers [`Reply::Bytes`], how many there were.
    Download {
        /// The file; links are followed.
        path: GuestPath,
    },
    /// Uploads a file's contents.
    Upload {
        /// The file; links are followed.
        path: GuestPath,
        /// Attributes if it is new; an existing file keeps its own.
        new: NewFile,
        /// Whether missing directories are made.
        parents: bool,
    },
    /// Appends what is uploaded, on a copy that then replaces the file; answers
    /// [`Reply::Bytes`], the offset where it begins.
    Append {
        /// The file.
        path: GuestPath,
        /// The offset is a multiple of this many bytes; zeroes fill the gap.
        align: u64,
        /// Name under which the original stays.
        backup: Option<GuestPath>,
    },
    /// Makes a directory and its parents.
    MakeDir {
        /// The directory.
        path: GuestPath,
        /// Permission bits of what is made.
        mode: u32,
    },
    /// Makes a symbolic link, replacing a file or link of that name.
    Symlink {
        /// The link.
        path: GuestPath,
        /// What it says.
        target: Vec<u8>,
    },
    /// Copies a regular file with owner, mode and extended attributes.
    Copy {
        /// The file.
        from: GuestPath,
        /// The copy; replaced if it exists.
        to: GuestPath,
    },
    /// Removes a file or link; nothing happens if it is not there.
    Remove {
        /// The name.
        path: GuestPath,
    },
    /// Runs a program; its output is downloaded, answers [`Reply::Finished`].
    Run {
        /// Program and arguments.
        arguments: Vec<String>,
        /// Whether the guest's tree is its root; else the appliance's own programs run.
        in_guest: bool,
        /// Whether what is uploaded is its standard input.
        input: bool,
        /// Seconds after which it is killed; 0 for no limit.
        timeout: u32,
    },
}

/// What the agent answers when a call is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Nothing to tell.
    Done,
    /// Block devices.
    Volumes(Vec<Volume>),
    /// Device and mountpoint of everything mounted, in the order of mounting.
    Mounts(Vec<(String, GuestPath)>),
    /// A file's attributes; `None` if it is not there.
    Attributes(Option<Attributes>),
    /// What a link says.
    Target(Vec<u8>),
    /// Free space.
    Space(Space),
    /// A number of bytes.
    Bytes(u64),
    /// A filesystem check is done.
    Checked(FilesystemCheck),
    /// A program ended.
    Finished(ProgramOutput),
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The system's error number, 0 if none applies.
    pub errno: i32,
    /// What went wrong, with the path or device.
    pub message: String,
}

/// The receiver of file contents took this many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit(pub u64);

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Units that are done.
    pub done: u64,
    /// Units in all; 0 if not known.
    pub total: u64,
}

/// The host no longer wants the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancelled;

macro_rules! bodies {
    ($($body:ty => $kind:ident),*) => {$(
        impl Body for $body {
            const KIND: FrameKind = FrameKind::$kind;
        }
    )*};
}
bodies!(Hello => Hello, Call => Call, Reply => Reply, Failure => Failure, Credit => Credit,
        Progress => Progress, Cancelled => Cancel, Vec<Name> => Data);
