// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one ioctl that no library wraps: FITRIM.

use rustix::fd::{AsFd, AsRawFd};
use rustix::io::Errno;

/// `_IOWR('X', 121, struct fstrim_range)` of linux/fs.h.
const FITRIM: libc::c_ulong = 0xc018_5879;

/// `struct fstrim_range` of linux/fs.h.
#[repr(C)]
struct FstrimRange {
    start: u64,
    len: u64,
    minlen: u64,
}

/// Discards what the filesystem of `directory` does not use; returns the bytes discarded.
pub(crate) fn trim(directory: impl AsFd) -> Result<u64, Errno> {
    let mut range = FstrimRange { start: 0, len: u64::MAX, minlen: 0 };
    // SAFETY: FITRIM reads and writes one fstrim_range through the pointer, which is valid
    // and unaliased for the duration of the call; the descriptor is borrowed and open.
    let result = unsafe { libc::ioctl(directory.as_fd().as_raw_fd(), FITRIM, &raw mut range) };
    if result == 0 {
        Ok(range.len)
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}
