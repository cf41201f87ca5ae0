// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ioctls that no library wraps.

use rustix::fd::{AsFd, AsRawFd};
use rustix::io::Errno;
use tranship_protocol::MOST_ENTROPY;

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

/// `_IOW('R', 0x03, int [2])` of linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)` of linux/random.h.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// `struct rand_pool_info` of linux/random.h with its bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MOST_ENTROPY],
}

/// Stirs `entropy` into the kernel's pool, which counts it as random, and has what it generates
/// depend on it from now on.
pub(crate) fn add_entropy(random: impl AsFd, entropy: &[u8]) -> Result<(), Errno> {
    let size = entropy.len().min(MOST_ENTROPY);
    let count = libc::c_int::try_from(size).unwrap_or(0);
    let mut pool =
        RandPoolInfo { entropy_count: count * 8, buf_size: count, buf: [0; MOST_ENTROPY] };
    pool.buf[..size].copy_from_slice(&entropy[..size]);
    let random = random.as_fd().as_raw_fd();
    // SAFETY: RNDADDENTROPY reads a rand_pool_info whose buf_size says how many bytes of buf
    // follow; both are inside the structure. RNDRESEEDCRNG takes no argument.
    let done = unsafe {
        libc::ioctl(random, RNDADDENTROPY, &raw const pool) == 0
            && libc::ioctl(random, RNDRESEEDCRNG) == 0
    };
    if done {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}
