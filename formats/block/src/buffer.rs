// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that the kernel can move to and from a disk without a copy of its own.

use std::ops::{Deref, DerefMut};

/// Bytes whose address is a multiple of the largest alignment that direct I/O asks for.
#[derive(Debug)]
pub struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// Alignment of the address in bytes.
    pub const ALIGNMENT: usize = 4096;

    /// A buffer of `len` zeroes.
    pub fn new(len: usize) -> Self {
        // Fresh zeroed memory costs nothing until it is touched.
        let bytes = vec![0; len.saturating_add(Self::ALIGNMENT)];
        let start = bytes.as_ptr().align_offset(Self::ALIGNMENT).min(Self::ALIGNMENT);
        Self { bytes, start, len }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(self.start..).and_then(|tail| tail.get(..self.len)).unwrap_or_default()
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let tail = self.bytes.get_mut(self.start..);
        tail.and_then(|tail| tail.get_mut(..self.len)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_aligned_and_the_length_as_asked() {
        for len in [0, 1, 4096, 100_000] {
            let mut buffer = AlignedBuffer::new(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr().align_offset(AlignedBuffer::ALIGNMENT), 0);
            buffer.fill(1);
        }
    }
}
