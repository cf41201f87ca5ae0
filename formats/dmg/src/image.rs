// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An image that is open for reading.

use crate::chunk::{self, Chunk, Content};
use crate::codec::Codec;
use crate::property_list;
use crate::trailer::Trailer;
use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Result, Span, Zeroing};

/// Largest property list that is read.
const MAX_PROPERTY_LIST: u64 = 16 << 20;
/// Decompressed bytes that are kept for readers of small pieces.
const CACHE: usize = 32 << 20;
/// Chunks that one question for an extent joins.
const MAX_JOINED: usize = 4096;

/// An Apple disk image.
#[derive(Debug)]
pub struct Dmg {
    file: Arc<dyn BlockDevice>,
    trailer: Trailer,
    /// In the order of the disk, without gaps.
    chunks: Vec<Chunk>,
    cache: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
}

impl Dmg {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// Those of [`Trailer::read`]; [`tranship_block::ErrorKind::Corrupt`] for tables that
    /// contradict each other or the file.
    pub fn open_read_only(file: Arc<dyn BlockDevice>) -> Result<Self> {
        let trailer = Trailer::read(&file)?;
        let list = trailer.property_list;
        if list.len > MAX_PROPERTY_LIST {
            return Err(Error::corrupt(format!(
                "property list has {} bytes, expected at most {MAX_PROPERTY_LIST}",
                list.len
            ))
            .at(list.start));
        }
        let mut text = vec![0; usize::try_from(list.len).unwrap_or(usize::MAX)];
        file.read_at(&mut text, list.start)?;
        let mut chunks = Vec::new();
        for table in property_list::tables(&text).map_err(|error| error.at(list.start))? {
            chunk::parse(&table, &trailer, &mut chunks)?;
        }
        let chunks = chunk::arrange(chunks, trailer.size)?;
        Ok(Self { file, trailer, chunks, cache: Mutex::default() })
    }

    /// Where the parts of the image lie.
    pub fn trailer(&self) -> &Trailer {
        &self.trailer
    }

    /// The kinds of compression in use.
    pub fn codecs(&self) -> Vec<Codec> {
        let codecs = self.chunks.iter().filter_map(|chunk| match chunk.content {
            Content::Packed(codec, _) => Some(codec),
            Content::Zero | Content::Ignored | Content::Raw(_) => None,
        });
        codecs.collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn index_at(&self, offset: u64) -> Result<usize> {
        let behind = self.chunks.partition_point(|chunk| chunk.span.start <= offset);
        behind
            .checked_sub(1)
            .filter(|_| offset < self.trailer.size)
            .ok_or_else(|| Error::usage("offset past the end of the disk").at(offset))
    }

    fn chunk_at(&self, offset: u64) -> Result<&Chunk> {
        let index = self.index_at(offset)?;
        self.chunks.get(index).ok_or_else(|| Error::usage("no such chunk").at(offset))
    }

    /// The bytes of a compressed chunk.
    fn unpacked(&self, chunk: &Chunk, codec: Codec, stored: Span) -> Result<Arc<Vec<u8>>> {
        let key = chunk.span.start;
        let found = self.cache().iter().find(|(at, _)| *at == key).map(|(_, bytes)| bytes.clone());
        if let Some(bytes) = found {
            return Ok(bytes);
        }
        let mut packed = vec![0; usize::try_from(stored.len).unwrap_or(usize::MAX)];
        self.file.read_at(&mut packed, stored.start)?;
        let mut bytes = vec![0; usize::try_from(chunk.span.len).unwrap_or(usize::MAX)];
        codec.decompress(&packed, &mut bytes).map_err(|error| error.at(stored.start))?;
        let bytes = Arc::new(bytes);
        let mut cache = self.cache();
        cache.push_front((key, Arc::clone(&bytes)));
        let mut kept = 0_usize;
        cache.retain(|(_, bytes)| {
            let fits = kept == 0 || kept.saturating_add(bytes.len()) <= CACHE;
            kept = kept.saturating_add(bytes.len());
            fits
        });
        drop(cache);
        Ok(bytes)
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, VecDeque<(u64, Arc<Vec<u8>>)>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_chunk(&self, chunk: &Chunk, buf: &mut [u8], within: u64) -> Result<()> {
        match chunk.content {
            Content::Zero | Content::Ignored => buf.fill(0),
            Content::Raw(start) => self.file.read_at(buf, start.saturating_add(within))?,
            Content::Packed(codec, stored) => {
                let bytes = self.unpacked(chunk, codec, stored)?;
                let within = usize::try_from(within).unwrap_or(usize::MAX);
                let part = bytes.get(within..).and_then(|tail| tail.get(..buf.len()));
                let part = part.ok_or_else(|| Error::usage("read past the end of a chunk"))?;
                buf.copy_from_slice(part);
            }
        }
        Ok(())
    }
}

/// What an extent is, without its length.
fn extent_of(chunk: &Chunk, within: u64, len: u64) -> Extent {
    match chunk.content {
        Content::Zero => Extent::new(ExtentKind::Zero, len),
        Content::Ignored => Extent::new(ExtentKind::Hole, len),
        Content::Raw(start) => {
            Extent::new(ExtentKind::Data, len).mapped_to(start.saturating_add(within))
        }
        Content::Packed(..) => Extent { compressed: true, ..Extent::new(ExtentKind::Data, len) },
    }
}

impl BlockDevice for Dmg {
    fn size(&self) -> u64 {
        self.trailer.size
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let wanted = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        Span::new(offset, wanted).check_within(self.size())?;
        while !buf.is_empty() {
            let chunk = self.chunk_at(offset)?;
            let left = usize::try_from(chunk.span.end().saturating_sub(offset));
            let (part, rest) = buf.split_at_mut(left.unwrap_or(usize::MAX).min(buf.len()));
            self.read_chunk(chunk, part, offset.saturating_sub(chunk.span.start))?;
            offset = offset.saturating_add(u64::try_from(part.len()).unwrap_or(u64::MAX));
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
        let index = self.index_at(offset)?;
        let first = self.chunk_at(offset)?;
        let within = offset.saturating_sub(first.span.start);
        let mut extent = extent_of(first, within, first.span.len.saturating_sub(within));
        for next in self.chunks.iter().skip(index.saturating_add(1)).take(MAX_JOINED) {
            let follows = extent_of(next, 0, next.span.len);
            let mapped = extent.offset.map(|at| at.saturating_add(extent.len));
            if (follows.kind, follows.compressed, follows.offset)
                != (extent.kind, extent.compressed, mapped)
            {
                break;
            }
            extent.len = extent.len.saturating_add(follows.len);
        }
        Ok(extent)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
