// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The locks by which QEMU and its tools keep out of one another's images.
//!
//! Each permission has two bytes of the file, and a process puts shared locks on them:
//! on byte 100 + n if it uses permission n, on byte 200 + n if it does not let others use
//! it. Nobody ever locks exclusively: whoever comes tests whether an exclusive lock would
//! be refused. All are open-file-description locks, so they go with the last descriptor.

use crate::file::RawFile;
use std::fmt;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use tranship_block::{Error, ErrorKind, Result};

const HELD: i64 = 100;
const NOT_SHARED: i64 = 200;

/// A use of an image, as QEMU counts them. The number is the bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Reading what stays consistent.
    ConsistentRead = 0,
    /// Changing what the guest sees.
    Write = 1,
    /// Writing without changing what the guest sees.
    WriteUnchanged = 2,
    /// Changing the length.
    Resize = 3,
}

const ALL: [Permission; 4] =
    [Permission::ConsistentRead, Permission::Write, Permission::WriteUnchanged, Permission::Resize];

impl Permission {
    fn byte(self, base: i64) -> i64 {
        let bit = match self {
            Self::ConsistentRead => 0,
            Self::Write => 1,
            Self::WriteUnchanged => 2,
            Self::Resize => 3,
        };
        base.saturating_add(bit)
    }

    fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        }
    }
}

/// What somebody does with an image, and what others may do meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageLock {
    /// Reads; nobody may write.
    Read,
    /// Reads, whatever others do (`--force-share`).
    ReadShared,
    /// Reads, writes and changes the length; nobody else may write.
    Write,
}

impl ImageLock {
    fn held(self) -> &'static [Permission] {
        match self {
            Self::Read | Self::ReadShared => &[Permission::ConsistentRead],
            Self::Write => &[Permission::ConsistentRead, Permission::Write, Permission::Resize],
        }
    }

    fn not_shared(self) -> &'static [Permission] {
        match self {
            Self::ReadShared => &[],
            Self::Read | Self::Write => &[Permission::Write, Permission::Resize],
        }
    }
}

/// Somebody else uses the image in a way that does not go together with ours. It is the
/// cause of the [`ErrorKind::Busy`] error, and its text is QEMU's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockConflict {
    /// What the conflict is about.
    pub permission: Permission,
    /// Whether the other side uses it and we would not share it; otherwise we would use it
    /// and the other side does not share it.
    pub shared: bool,
    /// The image.
    pub path: PathBuf,
}

impl LockConflict {
    /// What QEMU says in the next line.
    pub fn hint(&self) -> String {
        format!("Is another process using the image [{}]?", self.path.display())
    }
}

impl fmt::Display for LockConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = if self.shared { "shared " } else { "" };
        write!(f, "Failed to get {shared}\"{}\" lock", self.permission.name())
    }
}

impl std::error::Error for LockConflict {}

impl RawFile {
    /// Takes the locks of an image that is used in this way, in place of those held
    /// before. `false` says that the file system has no such locks.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`], with a [`LockConflict`] as its cause, if another process uses
    /// the image in a way that does not go together with this; the locks are then as they
    /// were before.
    pub fn lock(&self, lock: ImageLock) -> Result<bool> {
        let before = self.lock.lock().map_or(None, |lock| *lock);
        if !self.hold(lock)? {
            return Ok(false);
        }
        if let Some(conflict) = self.conflict(lock)? {
            self.release_but(before)?;
            return Err(Error::new(ErrorKind::Busy, "is in use by another process")
                .in_file(&self.path)
                .because(conflict));
        }
        self.release_but(Some(lock))?;
        if let Ok(mut held) = self.lock.lock() {
            *held = Some(lock);
        }
        Ok(true)
    }

    /// Gives the locks back.
    ///
    /// # Errors
    ///
    /// What the operating system reports.
    pub fn unlock(&self) -> Result<()> {
        self.release_but(None)?;
        if let Ok(mut held) = self.lock.lock() {
            *held = None;
        }
        Ok(())
    }

    /// Adds the locks, before anything is tested: of two that come at the same time, at
    /// least one sees the other.
    fn hold(&self, lock: ImageLock) -> Result<bool> {
        for byte in bytes(lock) {
            match sys::lock(&self.file, byte, true) {
                Ok(()) => {}
                Err(error) if is_unsupported(&error) => return Ok(false),
                Err(error) => return Err(self.lock_failed(error)),
            }
        }
        Ok(true)
    }

    fn conflict(&self, lock: ImageLock) -> Result<Option<LockConflict>> {
        let uses = lock.held().iter().map(|permission| (*permission, false, NOT_SHARED));
        let keeps = lock.not_shared().iter().map(|permission| (*permission, true, HELD));
        for (permission, shared, base) in uses.chain(keeps) {
            let taken = sys::is_locked(&self.file, permission.byte(base))
                .map_err(|error| self.lock_failed(error))?;
            if taken {
                return Ok(Some(LockConflict { permission, shared, path: self.path.clone() }));
            }
        }
        Ok(None)
    }

    fn release_but(&self, keep: Option<ImageLock>) -> Result<()> {
        let keep: Vec<i64> = keep.into_iter().flat_map(bytes).collect();
        let all = ALL.iter().flat_map(|permission| [HELD, NOT_SHARED].map(|b| permission.byte(b)));
        for byte in all.filter(|byte| !keep.contains(byte)) {
            match sys::lock(&self.file, byte, false) {
                Err(error) if !is_unsupported(&error) => return Err(self.lock_failed(error)),
                _ => {}
            }
        }
        Ok(())
    }

    fn lock_failed(&self, error: std::io::Error) -> Error {
        Error::io("cannot lock the image", error).in_file(Path::new(&self.path))
    }
}

fn bytes(lock: ImageLock) -> impl Iterator<Item = i64> {
    let held = lock.held().iter().map(|permission| permission.byte(HELD));
    held.chain(lock.not_shared().iter().map(|permission| permission.byte(NOT_SHARED)))
}

fn is_unsupported(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let known = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOLCK];
    known.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// The two system calls, for which rustix has no safe form.
#[allow(unsafe_code, reason = "fcntl takes a pointer")]
mod sys {
    use super::AsRawFd;
    use std::fs::File;
    use std::io::{Error, Result};

    fn range(byte: i64, kind: libc::c_int) -> Result<libc::flock> {
        let number = |value: libc::c_int| {
            libc::c_short::try_from(value)
                .map_err(|_| Error::from(std::io::ErrorKind::InvalidInput))
        };
        // l_pid has to be 0.
        Ok(libc::flock {
            l_type: number(kind)?,
            l_whence: number(libc::SEEK_SET)?,
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        })
    }

    /// Puts a shared lock on a byte, or takes it away.
    pub(super) fn lock(file: &File, byte: i64, hold: bool) -> Result<()> {
        let mut range = range(byte, if hold { libc::F_RDLCK } else { libc::F_UNLCK })?;
        call(file, libc::F_OFD_SETLK, &mut range)
    }

    /// Whether anybody else has a lock on a byte.
    pub(super) fn is_locked(file: &File, byte: i64) -> Result<bool> {
        let mut range = range(byte, libc::F_WRLCK)?;
        call(file, libc::F_OFD_GETLK, &mut range)?;
        Ok(libc::c_int::from(range.l_type) != libc::F_UNLCK)
    }

    fn call(file: &File, command: libc::c_int, range: &mut libc::flock) -> Result<()> {
        let range: *mut libc::flock = range;
        // SAFETY: `file` is open, and `range` is a flock that lives during the call, which
        // is all that these commands read or write.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, range) } == -1 {
            return Err(Error::last_os_error());
        }
        Ok(())
    }
}
