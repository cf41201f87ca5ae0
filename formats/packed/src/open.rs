// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finding out what a packed file is, and where its pieces lie.

use crate::piece::{MAX_PIECES, Piece};
use crate::{bzip2, gzip, xz, zstd};
use std::fmt;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Span};

/// How to open a packed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Largest disk to accept, in bytes. A few bytes can stand for any number of zeroes,
    /// and with gzip all of them are inflated to learn the size.
    pub max_size: u64,
    /// Gives what can be had of a damaged or truncated file: zeroes for the rest of a
    /// piece behind the damage, and the end of the disk where its size is not known
    /// without the lost bytes. An xz file without its index cannot be salvaged.
    pub salvage: bool,
}

impl Default for OpenOptions {
    /// 64 TiB, and nothing but whole files.
    fn default() -> Self {
        Self { max_size: 64 << 40, salvage: false }
    }
}

/// The kind of compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952, any number of members.
    Gzip,
    /// The .xz format, any number of streams.
    Xz,
    /// RFC 8878, any number of frames, with or without a seek table.
    Zstd,
    /// bzip2, any number of streams.
    Bzip2,
}

impl Compression {
    /// Bytes that [`Self::probe`] needs.
    pub const PROBE: usize = 8;

    /// The kind that a file is, by its first bytes.
    pub fn probe(head: &[u8]) -> Option<Self> {
        let magic = head.first_chunk().map(|head| u32::from_le_bytes(*head));
        if head.starts_with(&[0x1f, 0x8b, 8]) {
            Some(Self::Gzip)
        } else if head.starts_with(&xz::MAGIC) {
            Some(Self::Xz)
        } else if magic == Some(zstd::MAGIC)
            || magic.is_some_and(|magic| magic & !0xf == 0x184d_2a50)
        {
            // A skippable frame in front is what parallel compressors write.
            Some(Self::Zstd)
        } else if let [b'B', b'Z', b'h', b'1'..=b'9', ..] = head {
            Some(Self::Bzip2)
        } else {
            None
        }
    }

    /// The pieces of `file`, and what was odd about it.
    pub(crate) fn pieces(
        self,
        file: &Arc<dyn BlockDevice>,
        options: OpenOptions,
    ) -> Result<Builder> {
        let mut builder = Builder {
            max_size: options.max_size,
            salvage: options.salvage,
            pieces: Vec::new(),
            size: 0,
            warnings: Vec::new(),
        };
        match self {
            Self::Gzip => gzip::pieces(file, &mut builder)?,
            Self::Xz => xz::pieces(file, &mut builder)?,
            Self::Zstd => zstd::pieces(file, &mut builder)?,
            Self::Bzip2 => bzip2::pieces(file, &mut builder)?,
        }
        Ok(builder)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
        })
    }
}

/// Collects pieces in the order of the disk.
#[derive(Debug)]
pub(crate) struct Builder {
    max_size: u64,
    salvage: bool,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) size: u64,
    pub(crate) warnings: Vec<String>,
}

impl Builder {
    /// Refuses a disk that grows too large by `more` bytes behind the pieces so far.
    pub(crate) fn check_size(&self, more: u64) -> Result<()> {
        if more > self.max_size.saturating_sub(self.size) {
            return Err(Error::unsupported(format!(
                "packed disk is larger than the limit of {} bytes",
                self.max_size
            )));
        }
        Ok(())
    }

    /// Takes a failure as the end of the disk, if it is damage and what is left is to be
    /// salvaged.
    pub(crate) fn forgive(&mut self, error: Error) -> Result<()> {
        if !self.salvage || error.kind() != ErrorKind::Corrupt {
            return Err(error);
        }
        self.warnings.push(format!("{error}; what lies behind the damage is lost"));
        Ok(())
    }

    /// Adds a piece of `len` bytes, which `piece` makes for its place on the disk.
    pub(crate) fn push(&mut self, len: u64, piece: impl FnOnce(Span) -> Piece) -> Result<()> {
        self.check_size(len)?;
        if len == 0 {
            return Ok(());
        }
        if self.pieces.len() >= MAX_PIECES {
            return Err(Error::unsupported(format!(
                "packed file has more than {MAX_PIECES} pieces"
            )));
        }
        self.pieces.push(piece(Span::new(self.size, len)));
        self.size = self.size.saturating_add(len);
        Ok(())
    }
}
