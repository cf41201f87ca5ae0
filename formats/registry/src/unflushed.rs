// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Storage that leaves it to the kernel when bytes reach the disk.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use tranship_block::{Advice, BlockDevice, Extent, FileRange, Result, Span, Storage, Zeroing};

/// The same storage, on which a flush does nothing (QEMU's cache mode `unsafe`): for new
/// images, which a crash of the machine makes worthless anyway.
#[derive(Debug)]
pub(crate) struct Unflushed(pub(crate) Arc<dyn Storage>);

impl BlockDevice for Unflushed {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        self.0.is_read_only()
    }
    fn preferred_block(&self) -> u32 {
        self.0.preferred_block()
    }
    fn sector_size(&self) -> u32 {
        self.0.sector_size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.0.read_vectored_at(bufs, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.0.write_vectored_at(bufs, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.0.write_zeroes(span, mode)
    }
    fn zeroes_quickly(&self, span: Span, mode: Zeroing) -> bool {
        self.0.zeroes_quickly(span, mode)
    }
    fn discard(&self, span: Span) -> Result<()> {
        self.0.discard(span)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.0.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
        self.0.file_range(offset)
    }
    fn write_from_file(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
        self.0.write_from_file(offset, range)
    }
    fn advise(&self, span: Span, advice: Advice) {
        self.0.advise(span, advice);
    }
}

impl Storage for Unflushed {
    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }
}
