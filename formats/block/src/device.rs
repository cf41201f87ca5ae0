// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one interface every image format, network source and test double offers.

use crate::{Error, Extent, ReadQueue, Result, Span};
use std::fmt::Debug;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// How a range is to be made zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Storage may be given back; the range must read as zero.
    MayUnmap,
    /// Storage must stay reserved; the range must read as zero.
    KeepAllocated,
}

/// Guest bytes that lie in a file as they are, for copies inside the kernel.
#[derive(Clone, Copy, Debug)]
pub struct FileRange<'a> {
    /// The open file; its own position is of no interest.
    pub file: BorrowedFd<'a>,
    /// Where the first byte lies in the file.
    pub offset: u64,
    /// How many bytes follow one another in the file; never 0.
    pub len: u64,
}

/// What somebody is about to do with a range; a hint about caches, never about contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// It will be read soon, from front to back.
    WillRead,
    /// What was written there should be on its way to the disk from now on.
    StartWriteback,
    /// Nobody will look at it again.
    DropCache,
}

/// Random-access storage of fixed size, shared freely between threads.
///
/// All I/O is positioned, so there is no cursor and no `&mut self`. Offsets and lengths
/// are bytes; any value is accepted, whatever the sector size. A write is durable only
/// after [`Self::flush`] returns. Concurrent operations on disjoint ranges are safe;
/// overlapping concurrent writes leave one of the two contents, byte by byte.
pub trait BlockDevice: Debug + Send + Sync {
    /// Virtual size in bytes; changes only through [`Storage::set_len`] and
    /// [`Self::refresh_size`].
    fn size(&self) -> u64;

    /// Looks again how long the device is, if somebody else may have changed that. Those
    /// that have a size of their own do nothing.
    fn refresh_size(&self) {}

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Size in bytes of the pieces in which I/O is cheapest: a cluster, a grain, a page.
    fn preferred_block(&self) -> u32 {
        4096
    }

    /// Logical sector size in bytes that the guest sees: 512 or 4096.
    fn sector_size(&self) -> u32 {
        512
    }

    /// Fills `buf` with the bytes from `offset` onward.
    ///
    /// # Errors
    ///
    /// Reading past the end is an error, never a short read. Metadata or payload that
    /// cannot be read, decompressed or trusted.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Ways to read that need no thread for each request: one for each connection to a
    /// server. A device without any is read with [`Self::read_at`].
    fn read_queues(&self) -> Vec<Box<dyn ReadQueue + '_>> {
        Vec::new()
    }

    /// Fills `bufs` in order with the bytes from `offset` onward.
    ///
    /// # Errors
    ///
    /// As [`Self::read_at`].
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], mut offset: u64) -> Result<()> {
        for buf in bufs {
            self.read_at(buf, offset)?;
            offset = offset.saturating_add(length(buf));
        }
        Ok(())
    }

    /// Stores `buf` from `offset` onward.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Usage`] on a read-only device or past its end,
    /// [`crate::ErrorKind::NoSpace`] where nothing can be allocated any more.
    fn write_at(&self, _buf: &[u8], offset: u64) -> Result<()> {
        Err(Error::usage("device is read-only").at(offset))
    }

    /// Stores `bufs` in order from `offset` onward.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], mut offset: u64) -> Result<()> {
        for buf in bufs {
            self.write_at(buf, offset)?;
            offset = offset.saturating_add(length(buf));
        }
        Ok(())
    }

    /// Makes `span` read as zero, without transferring zeroes where possible.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()>;

    /// Whether [`Self::write_zeroes`] would be much quicker than to write zeroes: by a change
    /// of metadata. `false` is always right.
    fn zeroes_quickly(&self, _span: Span, _mode: Zeroing) -> bool {
        false
    }

    /// Forgets the contents of `span`: a hint, what it reads as afterwards is undefined.
    ///
    /// Devices that cannot discard do nothing.
    ///
    /// # Errors
    ///
    /// Only I/O errors, and [`crate::ErrorKind::Usage`] on a read-only device.
    fn discard(&self, _span: Span) -> Result<()> {
        Ok(())
    }

    /// Classifies the bytes from `offset` and how far that answer holds.
    ///
    /// The answer may be shorter than the true run but is never empty, so that callers
    /// can walk a device in one loop ([`crate::Extents`]). It does not read payload.
    /// `offset` must be less than [`Self::size`].
    ///
    /// # Errors
    ///
    /// Metadata that cannot be read or contradicts itself.
    fn extent_at(&self, offset: u64) -> Result<Extent>;

    /// As [`Self::extent_at`] for the first byte of `span`, when nobody needs to know what
    /// comes after it: a short answer to a short question.
    ///
    /// # Errors
    ///
    /// As [`Self::extent_at`].
    fn extent_within(&self, span: Span) -> Result<Extent> {
        Ok(self.extent_at(span.start)?.limited_to(span.len.max(1)))
    }

    /// Returns once every completed write has reached stable storage.
    ///
    /// # Errors
    ///
    /// I/O errors. After a failed flush, data written before may be lost.
    fn flush(&self) -> Result<()>;

    /// Where the bytes from `offset` onward lie in a file as they are, if they do.
    ///
    /// The answer holds until something is written to the range. `None` is always right.
    fn file_range(&self, _offset: u64) -> Option<FileRange<'_>> {
        None
    }

    /// Stores the bytes of `range` from `offset` onward without moving them through this
    /// process. `false` says that it cannot be done: any part of the bytes may have been
    /// stored, and the caller writes all of them in the usual way.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    fn write_from_file(&self, _offset: u64, _range: &FileRange<'_>) -> Result<bool> {
        Ok(false)
    }

    /// Tells what is going to happen to `span`. Devices that can do nothing with it, or
    /// fail to, do nothing.
    fn advise(&self, _span: Span, _advice: Advice) {}
}

/// A device whose length can change: what an image format keeps its clusters in.
pub trait Storage: BlockDevice {
    /// Gives the storage this length in bytes; new bytes read as zero.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Usage`] on read-only storage, [`crate::ErrorKind::NoSpace`]
    /// where it cannot grow (a block device has the size that it has).
    fn set_len(&self, len: u64) -> Result<()>;
}

pub(crate) fn length(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

macro_rules! forward {
    ($($pointer:ty),*) => {$(
        impl<D: BlockDevice + ?Sized> BlockDevice for $pointer {
            fn size(&self) -> u64 { (**self).size() }
            fn refresh_size(&self) { (**self).refresh_size() }
            fn is_read_only(&self) -> bool { (**self).is_read_only() }
            fn preferred_block(&self) -> u32 { (**self).preferred_block() }
            fn sector_size(&self) -> u32 { (**self).sector_size() }
            fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
                (**self).read_at(buf, offset)
            }
            fn read_queues(&self) -> Vec<Box<dyn ReadQueue + '_>> { (**self).read_queues() }
            fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
                (**self).read_vectored_at(bufs, offset)
            }
            fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
                (**self).write_at(buf, offset)
            }
            fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
                (**self).write_vectored_at(bufs, offset)
            }
            fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
                (**self).write_zeroes(span, mode)
            }
            fn zeroes_quickly(&self, span: Span, mode: Zeroing) -> bool {
                (**self).zeroes_quickly(span, mode)
            }
            fn discard(&self, span: Span) -> Result<()> { (**self).discard(span) }
            fn extent_at(&self, offset: u64) -> Result<Extent> { (**self).extent_at(offset) }
            fn extent_within(&self, span: Span) -> Result<Extent> {
                (**self).extent_within(span)
            }
            fn flush(&self) -> Result<()> { (**self).flush() }
            fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
                (**self).file_range(offset)
            }
            fn write_from_file(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
                (**self).write_from_file(offset, range)
            }
            fn advise(&self, span: Span, advice: Advice) { (**self).advise(span, advice) }
        }
    )*};
}
forward!(Arc<D>, &D, Box<D>);

impl<D: Storage + ?Sized> Storage for Arc<D> {
    fn set_len(&self, len: u64) -> Result<()> {
        (**self).set_len(len)
    }
}
