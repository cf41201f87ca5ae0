// SPDX-License-Identifier: Apache-2.0 OR MIT
//! I/O past the page cache, for big disks on fast storage.
//!
//! The kernel takes only aligned ranges of aligned memory. What of a range is not aligned,
//! the odd tail of a file above all, goes through the page cache, which Linux keeps
//! coherent with direct I/O on the same file; memory that is not aligned is bounced.

use rustix::fs::{AtFlags, OFlags, StatxFlags};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use tranship_block::{AlignedBuffer, Error, Result};

/// Bytes that are bounced at a time.
const BOUNCE: usize = 1 << 20;

/// A second descriptor of a file, opened for direct I/O.
#[derive(Debug)]
pub(crate) struct Direct {
    pub(crate) file: File,
    memory: usize,
    offset: u64,
}

/// How a range is done: bytes through the page cache, then aligned ones, then the rest
/// through the page cache again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) head: usize,
    pub(crate) middle: usize,
}

impl Direct {
    /// Opens `file`, which is at `path`, once more.
    pub(crate) fn new(file: &File, path: &Path, flags: OFlags) -> Result<Self> {
        let unsupported = || Error::unsupported("file system has no direct I/O").in_file(path);
        // Through the descriptor, since the path may name another file by now.
        let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
        let opened = rustix::fs::open(again, flags | OFlags::DIRECT, rustix::fs::Mode::empty());
        let direct = match opened {
            Ok(direct) => File::from(direct),
            Err(rustix::io::Errno::INVAL) => return Err(unsupported()),
            Err(errno) => {
                return Err(Error::io("cannot open for direct I/O", errno.into()).in_file(path));
            }
        };
        let (memory, offset) = alignment(&direct).unwrap_or((4096, 4096));
        let memory = usize::try_from(memory).unwrap_or(usize::MAX);
        let usable = memory.is_power_of_two() && memory <= AlignedBuffer::ALIGNMENT;
        if !usable || !offset.is_power_of_two() {
            return Err(unsupported());
        }
        Ok(Self { file: direct, memory, offset: u64::from(offset) })
    }

    /// How the `len` bytes at `offset` are done.
    pub(crate) fn parts(&self, offset: u64, len: usize) -> Parts {
        let end = offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        let start = offset.checked_next_multiple_of(self.offset).unwrap_or(end).min(end);
        let stop = end.saturating_sub(end.checked_rem(self.offset).unwrap_or(0)).max(start);
        let count = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Parts {
            head: count(start.saturating_sub(offset)),
            middle: count(stop.saturating_sub(start)),
        }
    }

    fn fits(&self, bytes: &[u8]) -> bool {
        bytes.as_ptr().align_offset(self.memory) == 0
    }

    /// Fills `buf`, whose length and offset are aligned, by calls of `read`.
    pub(crate) fn read(
        &self,
        buf: &mut [u8],
        mut offset: u64,
        read: impl Fn(&File, &mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        if self.fits(buf) {
            return read(&self.file, buf, offset);
        }
        let mut bounce = AlignedBuffer::new(buf.len().min(BOUNCE));
        for part in buf.chunks_mut(BOUNCE) {
            let bounce = bounce.get_mut(..part.len()).unwrap_or_default();
            read(&self.file, bounce, offset)?;
            part.copy_from_slice(bounce);
            offset = offset.saturating_add(u64::try_from(part.len()).unwrap_or(u64::MAX));
        }
        Ok(())
    }

    /// Stores `buf`, whose length and offset are aligned, by calls of `write`.
    pub(crate) fn write(
        &self,
        buf: &[u8],
        mut offset: u64,
        write: impl Fn(&File, &[u8], u64) -> Result<()>,
    ) -> Result<()> {
        if self.fits(buf) {
            return write(&self.file, buf, offset);
        }
        let mut bounce = AlignedBuffer::new(buf.len().min(BOUNCE));
        for part in buf.chunks(BOUNCE) {
            let bounce = bounce.get_mut(..part.len()).unwrap_or_default();
            bounce.copy_from_slice(part);
            write(&self.file, bounce, offset)?;
            offset = offset.saturating_add(u64::try_from(part.len()).unwrap_or(u64::MAX));
        }
        Ok(())
    }
}

/// The alignment of memory and of offsets that the kernel asks for, if it says so.
fn alignment(file: &File) -> Option<(u32, u32)> {
    let found = rustix::fs::statx(file.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let told = found.ok().filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    match told {
        // Zero is a file system that takes O_DIRECT and does nothing with it.
        Some(stat) => Some((stat.stx_dio_mem_align, stat.stx_dio_offset_align)),
        None => rustix::fs::ioctl_blksszget(file).ok().map(|sector| (sector, sector)),
    }
}
