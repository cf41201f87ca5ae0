// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header, and the table of offsets behind it.

use std::num::NonZeroU64;
use tranship_block::{BigEndian, BlockDevice, Error, Result, Span};

const LEN: usize = 136;
const TABLE: u64 = 136;
const MAX_BLOCK: u32 = 64 << 20;
/// Bytes of the table of offsets: what QEMU accepts.
const MAX_TABLE: u64 = 512 << 20;

/// A header whose numbers have been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of a block.
    pub block: NonZeroU64,
    /// Blocks of the disk.
    pub blocks: u32,
}

impl Header {
    /// Reads and checks the header of `file`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if it is none, or if the file is truncated;
    /// [`tranship_block::ErrorKind::Unsupported`] for other versions.
    pub fn read(file: &dyn BlockDevice) -> Result<Self> {
        let len = usize::try_from(file.size()).unwrap_or(usize::MAX).min(LEN);
        let mut bytes = vec![0; len];
        file.read_at(&mut bytes, 0)?;
        let header = Self::parse(&bytes)?;
        let table_end = TABLE.saturating_add(header.table_len());
        if table_end > file.size() {
            return Err(Error::corrupt(format!(
                "table of {} blocks ends past the file's size of {} bytes",
                header.blocks,
                file.size()
            ))
            .at(132));
        }
        // The offset behind the last block tells whether the file is whole.
        let mut last = [0; 8];
        file.read_at(&mut last, table_end.saturating_sub(8))?;
        let end = u64::from_be_bytes(last);
        if end > file.size() {
            return Err(Error::corrupt(format!(
                "blocks end at byte {end}, but the file has {} bytes: it is truncated",
                file.size()
            ))
            .at(table_end.saturating_sub(8)));
        }
        Ok(header)
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let fields = BigEndian(bytes, "cloop header");
        let script = String::from_utf8_lossy(fields.bytes("script", 0, 128)?);
        let version = script.split("#V").nth(1).and_then(|rest| rest.split(" Format").next());
        match version.filter(|_| script.starts_with("#!")) {
            Some("2.0") => {}
            Some(other) => {
                return Err(Error::unsupported(format!(
                    "version of the cloop image is {other:?}, expected 2.0"
                )));
            }
            None => return Err(Error::corrupt("no cloop header").at(0)),
        }
        let block = fields.u32("block size", 128)?;
        let aligned = block.is_multiple_of(512) && block <= MAX_BLOCK;
        let block = NonZeroU64::new(u64::from(block)).filter(|_| aligned).ok_or_else(|| {
            Error::corrupt(format!(
                "block size is {block}, expected a multiple of 512 up to {MAX_BLOCK}"
            ))
            .at(128)
        })?;
        let header = Self { block, blocks: fields.u32("number of blocks", 132)? };
        if header.table_len() > MAX_TABLE {
            return Err(Error::corrupt(format!(
                "image has {} blocks, expected a table of at most {MAX_TABLE} bytes",
                header.blocks
            ))
            .at(132));
        }
        Ok(header)
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.block.get().saturating_mul(u64::from(self.blocks))
    }

    fn table_len(&self) -> u64 {
        u64::from(self.blocks).saturating_add(1).saturating_mul(8)
    }

    /// Where the `count` blocks from `first` onward lie compressed.
    pub(crate) fn stored(
        &self,
        file: &dyn BlockDevice,
        first: u64,
        count: u64,
    ) -> Result<Vec<Span>> {
        let len = count.saturating_add(1).saturating_mul(8);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        let at = TABLE.saturating_add(first.saturating_mul(8));
        file.read_at(&mut bytes, at)?;
        let offsets: Vec<_> =
            bytes.as_chunks().0.iter().map(|bytes| u64::from_be_bytes(*bytes)).collect();
        let data = TABLE.saturating_add(self.table_len());
        // Incompressible blocks grow a little; more than twice the size is an attack.
        let most = self.block.get().saturating_mul(2);
        let pairs = offsets.iter().zip(offsets.iter().skip(1));
        pairs
            .zip(first..)
            .map(|((start, end), block)| match end.checked_sub(*start) {
                Some(len) if len <= most && *start >= data && *end <= file.size() => {
                    Ok(Span::new(*start, len))
                }
                _ => Err(Error::corrupt(format!(
                    "block {block} lies from byte {start} to {end}, expected at most {most} bytes \
                     between {data} and {}",
                    file.size()
                ))
                .at(at)),
            })
            .collect()
    }
}
