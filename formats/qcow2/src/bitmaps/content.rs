// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bits of a bitmap in memory.

use super::directory::{ENTRY_OFFSET, Entry};
use crate::geometry::{to_u64, to_usize};
use crate::header::Header;
use crate::shape::read_sparse;
use tranship_block::{BlockDevice, Error, Result, Span};

/// Bits that one bitmap may have: 512 MiB of memory.
const MOST_BITS: u64 = 1 << 32;

/// A cluster of bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    Clear,
    Set,
    Bits(Vec<u8>),
}

/// Which parts of a disk a bitmap has marked.
#[derive(Clone, Debug)]
pub struct BitmapContent {
    /// Bytes of the disk.
    size: u64,
    granularity_bits: u32,
    /// Bytes of a chunk: a cluster.
    chunk_len: usize,
    pub(super) chunks: Vec<Chunk>,
}

impl BitmapContent {
    /// A bitmap without marks.
    pub(super) fn new(header: &Header, size: u64, granularity_bits: u32) -> Result<Self> {
        let bits = size.div_ceil(1_u64.wrapping_shl(granularity_bits));
        if bits > MOST_BITS {
            return Err(Error::usage(format!(
                "a bitmap of {bits} bits is too large, expected at most {MOST_BITS}: choose a \
                 larger granularity"
            )));
        }
        let chunks = to_usize(header.geometry().clusters_for(bits.div_ceil(8)))?;
        Ok(Self {
            size,
            granularity_bits,
            chunk_len: header.geometry().cluster_len(),
            chunks: vec![Chunk::Clear; chunks],
        })
    }

    /// Reads the bits of `entry`, and its table.
    pub(super) fn load(
        file: &dyn BlockDevice,
        header: &Header,
        entry: &Entry,
    ) -> Result<(Self, Vec<u64>)> {
        let mut content = Self::new(header, header.size, u32::from(entry.granularity_bits))?;
        if to_u64(content.chunks.len()) != u64::from(entry.table_size) {
            return Err(Error::corrupt(format!(
                "table of bitmap {:?} has {} entries, expected {}",
                entry.name,
                entry.table_size,
                content.chunks.len()
            ))
            .at(entry.table_offset));
        }
        let table = read_sparse(file, entry.table_offset, u64::from(entry.table_size))?;
        for (chunk, word) in content.chunks.iter_mut().zip(&table) {
            let offset = word & ENTRY_OFFSET;
            let is_flag = offset == 0 && *word <= 1;
            if !is_flag && (*word != offset || header.geometry().within(offset) != 0) {
                return Err(Error::corrupt(format!(
                    "table entry {word:#x} of bitmap {:?} has reserved bits",
                    entry.name
                ))
                .at(entry.table_offset));
            }
            *chunk = match word {
                0 => Chunk::Clear,
                1 => Chunk::Set,
                _ => {
                    let mut bits = vec![0; content.chunk_len];
                    file.read_at(&mut bits, offset).map_err(|error| {
                        Error::corrupt(format!("bits of bitmap {:?} cannot be read", entry.name))
                            .at(offset)
                            .because(error)
                    })?;
                    Chunk::Bits(bits)
                }
            };
        }
        Ok((content, table))
    }

    /// Bytes of the disk that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1_u64.wrapping_shl(self.granularity_bits)
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether byte `offset` is marked, and for how many bytes, at least, that holds; no
    /// bytes from the disk's end on.
    pub fn dirty_at(&self, offset: u64) -> (bool, u64) {
        if offset >= self.size {
            return (false, 0);
        }
        let first = offset.wrapping_shr(self.granularity_bits);
        let is_set = self.get(first);
        let mut bit = first;
        let bits = self.size.div_ceil(self.granularity());
        let per_chunk = to_u64(self.chunk_len).saturating_mul(8);
        while bit < bits {
            let (chunk, byte) = self.place(bit);
            match self.chunks.get(chunk) {
                Some(Chunk::Bits(bytes)) => {
                    let whole = if is_set { u8::MAX } else { 0 };
                    if bit.is_multiple_of(8) && bytes.get(byte) == Some(&whole) {
                        bit = bit.saturating_add(8);
                    } else if self.get(bit) == is_set {
                        bit = bit.saturating_add(1);
                    } else {
                        break;
                    }
                }
                Some(same) if (*same == Chunk::Set) == is_set => {
                    let start = to_u64(chunk).saturating_mul(per_chunk);
                    bit = start.saturating_add(per_chunk);
                }
                _ => break,
            }
        }
        let end = bit.saturating_mul(self.granularity()).min(self.size);
        (is_set, end.saturating_sub(offset))
    }

    /// Number of marked bytes.
    pub fn dirty_bytes(&self) -> u64 {
        let (mut sum, mut at) = (0_u64, 0_u64);
        loop {
            match self.dirty_at(at) {
                (_, 0) => return sum,
                (is_set, len) => {
                    sum = sum.saturating_add(if is_set { len } else { 0 });
                    at = at.saturating_add(len);
                }
            }
        }
    }

    /// Chunk and byte in it that hold a bit; the lowest bit of a byte comes first.
    fn place(&self, bit: u64) -> (usize, usize) {
        let byte = usize::try_from(bit / 8).unwrap_or(usize::MAX);
        let chunk = byte.checked_div(self.chunk_len).unwrap_or(0);
        (chunk, byte.checked_rem(self.chunk_len).unwrap_or(0))
    }

    fn get(&self, bit: u64) -> bool {
        let (chunk, byte) = self.place(bit);
        match self.chunks.get(chunk) {
            None | Some(Chunk::Clear) => false,
            Some(Chunk::Set) => true,
            Some(Chunk::Bits(bytes)) => {
                bytes.get(byte).is_some_and(|byte| byte.wrapping_shr(low(bit)) & 1 != 0)
            }
        }
    }

    /// Marks `span`, as far as the disk goes; parts of a granule mark all of it.
    pub(super) fn mark(&mut self, span: Span) {
        let end = span.end().min(self.size);
        if span.start >= end {
            return;
        }
        let mut bit = span.start.wrapping_shr(self.granularity_bits);
        let stop = end.div_ceil(self.granularity());
        let per_chunk = to_u64(self.chunk_len).saturating_mul(8);
        while bit < stop {
            let (number, byte) = self.place(bit);
            let start = to_u64(number).saturating_mul(per_chunk);
            let chunk_end = start.saturating_add(per_chunk).min(stop);
            let chunk_len = self.chunk_len;
            let Some(chunk) = self.chunks.get_mut(number) else { return };
            if *chunk == Chunk::Clear {
                *chunk = Chunk::Bits(vec![0; chunk_len]);
            }
            let Chunk::Bits(bytes) = chunk else {
                bit = chunk_end;
                continue;
            };
            if bit.is_multiple_of(8) && bit.saturating_add(8) <= chunk_end {
                if let Some(byte) = bytes.get_mut(byte) {
                    *byte = u8::MAX;
                }
                bit = bit.saturating_add(8);
            } else {
                if let Some(byte) = bytes.get_mut(byte) {
                    *byte |= 1_u8.wrapping_shl(low(bit));
                }
                bit = bit.saturating_add(1);
            }
        }
    }

    pub(super) fn fill(&mut self, chunk: &Chunk) {
        self.chunks.fill(chunk.clone());
    }

    /// Marks everything that `other` has marked.
    pub(super) fn merge(&mut self, other: &Self) -> Result<()> {
        if self.size != other.size {
            return Err(Error::usage(format!(
                "bitmaps of disks of {} and {} bytes cannot be merged",
                self.size, other.size
            )));
        }
        let mut at = 0_u64;
        loop {
            let (is_set, len) = other.dirty_at(at);
            if len == 0 {
                return Ok(());
            }
            if is_set {
                self.mark(Span::new(at, len));
            }
            at = at.saturating_add(len);
        }
    }

    /// The same marks for a disk of another size; new parts are unmarked.
    pub(super) fn resized(&self, header: &Header, size: u64) -> Result<Self> {
        let mut other = Self::new(header, size, self.granularity_bits)?;
        let old = Self { size: self.size.min(size), ..self.clone() };
        let mut at = 0_u64;
        loop {
            let (is_set, len) = old.dirty_at(at);
            if len == 0 {
                return Ok(other);
            }
            if is_set {
                other.mark(Span::new(at, len));
            }
            at = at.saturating_add(len);
        }
    }
}

fn low(bit: u64) -> u32 {
    u32::try_from(bit & 7).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty(size: u64, bits: u32) -> BitmapContent {
        let chunks = usize::try_from(size.div_ceil(1 << bits).div_ceil(8).div_ceil(16)).unwrap();
        let chunks = vec![Chunk::Clear; chunks];
        BitmapContent { size, granularity_bits: bits, chunk_len: 16, chunks }
    }

    #[test]
    fn marks_are_found_where_they_were_made() {
        let size = 300_000;
        let mut content = empty(size, 9);
        let mut model = vec![false; 300_000_usize.div_ceil(512)];
        let mut state = 1_u64;
        for _ in 0..60 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (start, len) = ((state >> 33) % size, (state >> 20) % 9000);
            content.mark(Span::new(start, len));
            let end = (start + len).min(size).div_ceil(512);
            for bit in start / 512..if len == 0 { 0 } else { end } {
                model[usize::try_from(bit).unwrap()] = true;
            }
        }
        let mut at = 0;
        while at < size {
            let (is_set, len) = content.dirty_at(at);
            assert!(len > 0);
            for bit in at / 512..(at + len).div_ceil(512) {
                assert_eq!(model[usize::try_from(bit).unwrap()], is_set, "bit {bit}");
            }
            at += len;
        }
        assert_eq!(at, size);
    }

    #[test]
    fn merging_rounds_to_the_coarser_granularity() {
        let mut fine = empty(100_000, 9);
        fine.mark(Span::new(70_000, 1));
        let mut coarse = empty(100_000, 16);
        coarse.merge(&fine).unwrap();
        assert_eq!(coarse.dirty_at(0), (false, 65_536));
        assert_eq!(coarse.dirty_at(65_536), (true, 34_464));
        assert_eq!(coarse.dirty_bytes(), 34_464);
        fine.merge(&coarse).unwrap();
        assert_eq!(fine.dirty_bytes(), 34_464);
        assert!(fine.merge(&empty(5, 9)).is_err());
    }
}
