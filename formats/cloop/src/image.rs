// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An image that is open for reading.

use crate::header::Header;
use libdeflater::Decompressor;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Result, Span, Zeroing};

/// Inflated bytes that are kept for readers of less than a block.
const CACHE: u64 = 4 << 20;
/// Bytes of the disk whose blocks are read from the file at once.
const BATCH: u64 = 4 << 20;

thread_local! {
    static INFLATER: RefCell<Decompressor> = RefCell::new(Decompressor::new());
}

/// A compressed loop image.
#[derive(Debug)]
pub struct Cloop {
    file: Arc<dyn BlockDevice>,
    header: Header,
    cache: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
}

impl Cloop {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// Those of [`Header::read`].
    pub fn open_read_only(file: Arc<dyn BlockDevice>) -> Result<Self> {
        let header = Header::read(&file)?;
        Ok(Self { file, header, cache: Mutex::default() })
    }

    /// The facts of the image.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// A part of block `block`, from byte `within` of it onward.
    fn read_part(&self, buf: &mut [u8], block: u64, within: u64) -> Result<()> {
        let found =
            self.cache().iter().find(|(at, _)| *at == block).map(|(_, bytes)| bytes.clone());
        let bytes = match found {
            Some(bytes) => bytes,
            None => self.load(block)?,
        };
        let within = usize::try_from(within).unwrap_or(usize::MAX);
        let part = bytes.get(within..).and_then(|tail| tail.get(..buf.len()));
        buf.copy_from_slice(part.ok_or_else(|| Error::usage("read past the end of a block"))?);
        Ok(())
    }

    fn load(&self, block: u64) -> Result<Arc<Vec<u8>>> {
        let size = self.header.block.get();
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
        self.read_blocks(&mut bytes, block)?;
        let bytes = Arc::new(bytes);
        let most = CACHE.checked_div(size).unwrap_or(0).max(1);
        let mut cache = self.cache();
        cache.push_front((block, Arc::clone(&bytes)));
        cache.truncate(usize::try_from(most).unwrap_or(1));
        drop(cache);
        Ok(bytes)
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, VecDeque<(u64, Arc<Vec<u8>>)>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Inflates whole blocks from `first` onward into `buf`.
    fn read_blocks(&self, buf: &mut [u8], first: u64) -> Result<()> {
        let size = usize::try_from(self.header.block.get()).unwrap_or(usize::MAX);
        let count = u64::try_from(buf.len().checked_div(size).unwrap_or(0)).unwrap_or(0);
        let stored = self.header.stored(&self.file, first, count)?;
        let (Some(start), Some(end)) = (stored.first(), stored.last()) else { return Ok(()) };
        // The offsets ascend, so the blocks lie side by side.
        let start = start.start;
        let len = end.end().saturating_sub(start);
        let mut packed = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.file.read_at(&mut packed, start)?;
        for ((span, part), block) in stored.iter().zip(buf.chunks_mut(size)).zip(first..) {
            let from = usize::try_from(span.start.saturating_sub(start)).unwrap_or(usize::MAX);
            let len = usize::try_from(span.len).unwrap_or(usize::MAX);
            let data = packed.get(from..).and_then(|tail| tail.get(..len)).unwrap_or_default();
            let whole = INFLATER
                .with_borrow_mut(|inflater| inflater.zlib_decompress(data, part))
                .is_ok_and(|len| len == part.len());
            if !whole {
                return Err(Error::corrupt(format!(
                    "compressed data of block {block} is damaged, or does not give {size} bytes"
                ))
                .at(span.start));
            }
        }
        Ok(())
    }
}

impl BlockDevice for Cloop {
    fn size(&self) -> u64 {
        self.header.size()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn preferred_block(&self) -> u32 {
        u32::try_from(self.header.block.get()).unwrap_or(4096)
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let wanted = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        Span::new(offset, wanted).check_within(self.size())?;
        let size = self.header.block;
        while !buf.is_empty() {
            let left = u64::try_from(buf.len()).unwrap_or(u64::MAX);
            let (block, within) = (offset / size, offset % size);
            let whole = left.min(BATCH.max(size.get())) / size;
            let len = if within == 0 && whole > 0 {
                whole.saturating_mul(size.get())
            } else {
                size.get().saturating_sub(within).min(left)
            };
            let (part, rest) = buf.split_at_mut(usize::try_from(len).unwrap_or(0));
            if within == 0 && whole > 0 {
                self.read_blocks(part, block)?;
            } else {
                self.read_part(part, block, within)?;
            }
            offset = offset.saturating_add(len);
            buf = rest;
        }
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn discard(&self, span: Span) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Span::new(offset, 1).check_within(self.size())?;
        let data = Extent::new(ExtentKind::Data, self.size().saturating_sub(offset));
        Ok(Extent { compressed: true, ..data })
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
