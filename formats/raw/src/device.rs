// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Positioned I/O on the file: reads, writes, holes.

use crate::direct::{Direct, Parts};
use crate::file::{Access, RawFile};
use rustix::fs::{Advice as FileAdvice, FallocateFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use tranship_block::{
    BlockDevice, Error, Extent, ExtentKind, FileRange, Result, Span, Storage, Zeroing,
};

/// Zeroes for file systems that can neither punch holes nor zero ranges.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// Bytes that one system call gets for the page cache. With twice as many, Linux 6.18
/// looks for memory of 2 MiB in one piece, which costs five times what writing does once
/// memory is fragmented.
const MOST_BUFFERED: usize = 1 << 20;

/// Bytes of a write that is long enough to keep other writers from spinning.
const WORTH_WAITING: usize = 64 << 10;

/// Most buffers that one system call takes (`IOV_MAX`).
const MOST_BUFFERS: usize = 1024;

impl RawFile {
    pub(crate) fn failed(&self, what: &str, errno: Errno, offset: u64) -> Error {
        Error::io(format!("cannot {what}"), errno.into()).at(offset).in_file(&self.path)
    }

    /// Somebody else shortened the file: what is missing must not turn into zeroes.
    fn ended(&self, offset: u64) -> Error {
        Error::new(
            tranship_block::ErrorKind::Io,
            format!("file ends before its size of {} bytes: it was cut while in use", self.len()),
        )
        .at(offset)
        .in_file(&self.path)
    }

    fn check(&self, span: Span) -> Result<()> {
        span.check_within(self.len()).map_err(|error| error.in_file(&self.path))
    }

    fn check_write(&self, span: Span) -> Result<()> {
        if self.access == Access::ReadOnly {
            return Err(Error::usage("device is read-only").at(span.start).in_file(&self.path));
        }
        self.check(span)
    }

    /// Reads from `file`, which is this one with or without the page cache.
    fn read_all(&self, file: &File, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            match rustix::io::pread(file, &mut *buf, offset) {
                Ok(0) => return Err(self.ended(offset)),
                Ok(count) => {
                    buf = buf.get_mut(count..).unwrap_or_default();
                    offset = offset.saturating_add(length(count));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("read", errno, offset)),
            }
        }
        Ok(())
    }

    /// Writes through the page cache.
    ///
    /// File systems let one writer at a time into a file, and the kernel has the others
    /// spin: who waits here leaves the processor to those who read.
    fn write_buffered(&self, buf: &[u8], mut offset: u64) -> Result<()> {
        for part in buf.chunks(MOST_BUFFERED) {
            let _alone = (part.len() >= WORTH_WAITING)
                .then(|| self.writer.lock().unwrap_or_else(PoisonError::into_inner));
            self.write_all(&self.file, part, offset)?;
            offset = offset.saturating_add(length(part.len()));
        }
        Ok(())
    }

    /// Writes to `file`, which is this one with or without the page cache.
    fn write_all(&self, file: &File, mut buf: &[u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            match rustix::io::pwrite(file, buf, offset) {
                // No file system that we know does it; an endless loop would be worse.
                Ok(0) => return Err(self.failed("write", Errno::IO, offset)),
                Ok(count) => {
                    buf = buf.get(count..).unwrap_or_default();
                    offset = offset.saturating_add(length(count));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("write", errno, offset)),
            }
        }
        Ok(())
    }

    /// Writes at most as many buffers as one system call takes; returns where they end.
    fn write_group(&self, group: &[IoSlice<'_>], mut offset: u64) -> Result<u64> {
        let mut own = group.to_vec();
        let mut left: &mut [IoSlice<'_>] = &mut own;
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            match rustix::io::pwritev(&self.file, left, offset) {
                Ok(0) => return Err(self.failed("write", Errno::IO, offset)),
                Ok(count) => {
                    IoSlice::advance_slices(&mut left, count);
                    offset = offset.saturating_add(length(count));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("write", errno, offset)),
            }
        }
        Ok(offset)
    }

    fn read_direct(&self, direct: &Direct, buf: &mut [u8], offset: u64) -> Result<()> {
        let Parts { head, middle } = direct.parts(offset, buf.len());
        let (front, rest) = buf.split_at_mut_checked(head).unwrap_or_default();
        let (aligned, tail) = rest.split_at_mut_checked(middle).unwrap_or_default();
        let start = offset.saturating_add(length(head));
        self.read_all(&self.file, front, offset)?;
        if !aligned.is_empty() {
            direct.read(aligned, start, |file, buf, at| self.read_all(file, buf, at))?;
        }
        self.read_all(&self.file, tail, start.saturating_add(length(middle)))
    }

    fn write_direct(&self, direct: &Direct, buf: &[u8], offset: u64) -> Result<()> {
        let Parts { head, middle } = direct.parts(offset, buf.len());
        let (front, rest) = buf.split_at_checked(head).unwrap_or_default();
        let (aligned, tail) = rest.split_at_checked(middle).unwrap_or_default();
        let start = offset.saturating_add(length(head));
        self.write_all(&self.file, front, offset)?;
        if !aligned.is_empty() {
            direct.write(aligned, start, |file, buf, at| self.write_all(file, buf, at))?;
        }
        self.write_all(&self.file, tail, start.saturating_add(length(middle)))
    }

    /// Runs a change of the file's contents, of which the map of holes has to know.
    fn change<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.holes.forget();
        let result = work();
        self.holes.forget();
        result
    }

    /// Calls `fallocate`; `false` if this file or range cannot do it and zeroes must be
    /// made in another way.
    fn allocate(&self, mode: FallocateFlags, span: Span) -> Result<bool> {
        loop {
            return match rustix::fs::fallocate(&self.file, mode, span.start, span.len) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                // EINVAL is a block device asked for a range that is not whole sectors.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
                Err(errno) => Err(self.failed("zero", errno, span.start)),
            };
        }
    }

    /// Whether the file system can punch holes, found out far past the end of the file.
    /// Those that can also reserve space without writing to it.
    fn can_punch(&self) -> bool {
        const BEYOND: u64 = 1 << 30;
        const BLOCK: u64 = 4096;
        let start = self.len().saturating_add(BEYOND) & !BLOCK.wrapping_sub(1);
        !self.is_block_device
            && self.access == Access::ReadWrite
            && rustix::fs::fallocate(&self.file, punch(), start, BLOCK).is_ok()
    }

    pub(crate) fn write_zero_bytes(&self, span: Span) -> Result<()> {
        let mut offset = span.start;
        while offset < span.end() {
            let left = usize::try_from(span.end().saturating_sub(offset)).unwrap_or(usize::MAX);
            let zeroes = ZEROES.get(..left).unwrap_or(&ZEROES);
            self.write_all(&self.file, zeroes, offset)?;
            offset = offset.saturating_add(length(zeroes.len()));
        }
        Ok(())
    }
}

fn length(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

fn punch() -> FallocateFlags {
    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
}

impl BlockDevice for RawFile {
    fn size(&self) -> u64 {
        self.len()
    }

    fn refresh_size(&self) {
        // Who cannot tell keeps what it knew.
        let Ok(found) = crate::file::length_of(&self.file, self.is_block_device) else { return };
        if self.size.swap(found, Ordering::AcqRel) != found {
            self.holes.forget();
        }
    }

    fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn sector_size(&self) -> u32 {
        self.sector_size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(Span::new(offset, length(buf.len())))?;
        match &self.direct {
            Some(direct) => self.read_direct(direct, buf, offset),
            None => self.read_all(&self.file, buf, offset),
        }
    }

    fn read_vectored_at(&self, mut bufs: &mut [IoSliceMut<'_>], mut offset: u64) -> Result<()> {
        let total = bufs.iter().fold(0_u64, |sum, buf| sum.saturating_add(length(buf.len())));
        self.check(Span::new(offset, total))?;
        if let Some(direct) = &self.direct {
            for buf in bufs {
                self.read_direct(direct, buf, offset)?;
                offset = offset.saturating_add(length(buf.len()));
            }
            return Ok(());
        }
        IoSliceMut::advance_slices(&mut bufs, 0);
        while !bufs.is_empty() {
            let most = bufs.len().min(MOST_BUFFERS);
            let now = bufs.get_mut(..most).unwrap_or_default();
            match rustix::io::preadv(&self.file, now, offset) {
                Ok(0) => return Err(self.ended(offset)),
                Ok(count) => {
                    IoSliceMut::advance_slices(&mut bufs, count);
                    offset = offset.saturating_add(length(count));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed("read", errno, offset)),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_write(Span::new(offset, length(buf.len())))?;
        self.change(|| match &self.direct {
            Some(direct) => self.write_direct(direct, buf, offset),
            None => self.write_buffered(buf, offset),
        })
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], mut offset: u64) -> Result<()> {
        let total = bufs.iter().fold(0_u64, |sum, buf| sum.saturating_add(length(buf.len())));
        self.check_write(Span::new(offset, total))?;
        self.change(|| {
            if self.direct.is_some() || total > length(MOST_BUFFERED) {
                for buf in bufs {
                    match &self.direct {
                        Some(direct) => self.write_direct(direct, buf, offset)?,
                        None => self.write_buffered(buf, offset)?,
                    }
                    offset = offset.saturating_add(length(buf.len()));
                }
                return Ok(());
            }
            for group in bufs.chunks(MOST_BUFFERS) {
                offset = self.write_group(group, offset)?;
            }
            Ok(())
        })
    }

    /// On a block device both modes are one request to the kernel to zero sectors.
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.check_write(span)?;
        if span.is_empty() {
            return Ok(());
        }
        let reserve = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        self.change(|| {
            let done = match mode {
                Zeroing::MayUnmap => {
                    self.allocate(punch(), span)? || self.allocate(reserve, span)?
                }
                // tmpfs has no ZERO_RANGE: there the space is given back and taken again.
                Zeroing::KeepAllocated => {
                    self.allocate(reserve, span)?
                        || self.allocate(punch(), span)?
                            && self.allocate(FallocateFlags::KEEP_SIZE, span)?
                }
            };
            if done { Ok(()) } else { self.write_zero_bytes(span) }
        })
    }

    fn zeroes_quickly(&self, _span: Span, _mode: Zeroing) -> bool {
        *self.punches.get_or_init(|| self.can_punch())
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.check_write(span)?;
        if !span.is_empty() {
            self.change(|| self.allocate(punch(), span))?;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.check(Span::new(offset, 1))?;
        let (kind, end) = self
            .holes
            .at(&self.file, offset, self.len())
            .map_err(|errno| self.failed("look for data", errno, offset))?;
        let extent = Extent::new(kind, end.saturating_sub(offset));
        Ok(if kind == ExtentKind::Data { extent.mapped_to(offset) } else { extent })
    }

    fn flush(&self) -> Result<()> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        loop {
            match rustix::fs::fdatasync(&self.file) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(Error::io("cannot flush", errno.into()).in_file(&self.path));
                }
            }
        }
    }

    fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
        let len = self.len().checked_sub(offset).filter(|len| *len > 0)?;
        // A block device is no party to copies inside the kernel.
        (!self.is_block_device).then(|| FileRange { file: self.file.as_fd(), offset, len })
    }

    fn write_from_file(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
        if self.is_block_device {
            return Ok(false);
        }
        self.change(|| self.copy_from(offset, range))
    }

    fn advise(&self, span: Span, advice: tranship_block::Advice) {
        use tranship_block::Advice;
        let Some(len) = std::num::NonZeroU64::new(span.len) else { return };
        // Advice that is refused changes nothing that a caller could act on.
        let _ = match advice {
            Advice::WillRead => {
                rustix::fs::fadvise(&self.file, span.start, Some(len), FileAdvice::Sequential)
            }
            // Linux drops what is clean and starts to write what is not, for both.
            Advice::DropCache | Advice::StartWriteback => {
                rustix::fs::fadvise(&self.file, span.start, Some(len), FileAdvice::DontNeed)
            }
        };
    }
}

/// What one call of `copy_file_range` may copy at most: a whole page less than it takes.
const MOST_COPIED: usize = 0x7fff_f000;

impl RawFile {
    /// As [`BlockDevice::write_from_file`]. Where both files share blocks (XFS, Btrfs) and
    /// the range is whole blocks, the kernel makes a reflink of it.
    fn copy_from(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
        self.check_write(Span::new(offset, range.len))?;
        let (mut from, mut to) = (range.offset, offset);
        let end = offset.saturating_add(range.len);
        while to < end {
            let left = usize::try_from(end.saturating_sub(to)).unwrap_or(MOST_COPIED);
            let count = rustix::fs::copy_file_range(
                range.file,
                Some(&mut from),
                &self.file,
                Some(&mut to),
                left.min(MOST_COPIED),
            );
            match count {
                Ok(count) if count > 0 => {}
                Err(Errno::INTR) => {}
                // Nothing: the other file ends here, and reading it tells what that means.
                Ok(_)
                | Err(
                    Errno::XDEV
                    | Errno::INVAL
                    | Errno::OPNOTSUPP
                    | Errno::NOSYS
                    | Errno::BADF
                    | Errno::PERM
                    | Errno::TXTBSY
                    | Errno::OVERFLOW
                    | Errno::ISDIR,
                ) => return Ok(false),
                Err(errno) => return Err(self.failed("copy", errno, to)),
            }
        }
        Ok(true)
    }
}

impl Storage for RawFile {
    fn set_len(&self, len: u64) -> Result<()> {
        self.check_write(Span::new(0, 0))?;
        if self.is_block_device {
            let size = self.len();
            return if len <= size {
                Ok(())
            } else {
                Err(Error::new(
                    tranship_block::ErrorKind::NoSpace,
                    format!("block device has {size} bytes, {len} are needed"),
                )
                .in_file(&self.path))
            };
        }
        if len == self.len() {
            // Cutting even nothing off makes ext4 write all of the file out when it is
            // closed, since it takes that for an old file that is replaced.
            return Ok(());
        }
        self.change(|| {
            rustix::fs::ftruncate(&self.file, len).map_err(|errno| {
                Error::io(format!("cannot set the length to {len} bytes"), errno.into())
                    .in_file(&self.path)
            })?;
            self.size.store(len, Ordering::Release);
            Ok(())
        })
    }
}
