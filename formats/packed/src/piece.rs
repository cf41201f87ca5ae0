// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The parts of a packed file that can be decompressed on their own.

use crate::gzip::{self, Point};
use crate::source::{Source, failure};
use crate::{Compression, bzip2, xz, zstd};
use std::io::Read;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Span};

/// Largest piece that is decompressed whole: it is memory, once for every reader.
pub(crate) const MAX_WHOLE: u64 = 32 << 20;
/// Bytes that a decompressor is asked for at a time.
const CALL: usize = 64 << 10;
/// Most pieces of a file: each takes memory as long as the file is open.
pub(crate) const MAX_PIECES: usize = 4 << 20;

/// One of the parts.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// The bytes of the disk.
    pub(crate) span: Span,
    /// Where they lie compressed; for gzip, everything from the access point onward.
    pub(crate) packed: Span,
    /// Whether all bytes are known to be zero.
    pub(crate) zero: bool,
    /// How to begin.
    pub(crate) start: Start,
}

/// What a decompressor has to know to begin with a piece.
#[derive(Clone, Debug)]
pub(crate) enum Start {
    /// Nothing: headers are part of the piece.
    Plain,
    /// Flags of the xz stream that the block belongs to, and bytes without padding.
    XzBlock { flags: [u8; 2], unpadded: u64 },
    /// The state of the inflater.
    Gzip(Arc<Point>),
}

impl Piece {
    /// A decompressor at the start of the piece.
    pub(crate) fn decoder(
        &self,
        file: &Arc<dyn BlockDevice>,
        compression: Compression,
        salvage: bool,
    ) -> Result<Decoder> {
        let source = Source::new(file, self.packed);
        let stream: Box<dyn Read + Send> = match (&self.start, compression) {
            (Start::XzBlock { flags, unpadded }, _) => {
                Box::new(xz::block_decoder(source, *flags, *unpadded, self.span.len)?)
            }
            (Start::Gzip(point), _) => Box::new(gzip::Decoder::resume(source, point)?),
            (Start::Plain, Compression::Zstd) => Box::new(zstd::frame_decoder(source)?),
            (Start::Plain, Compression::Bzip2) => Box::new(bzip2::stream_decoder(source)),
            (Start::Plain, Compression::Gzip | Compression::Xz) => {
                return Err(Error::usage("piece without the state to begin with"));
            }
        };
        Ok(Decoder {
            stream,
            span: self.span,
            packed: self.packed.start,
            position: 0,
            compression,
            salvage,
        })
    }
}

/// A decompressor that is somewhere in a piece.
pub(crate) struct Decoder {
    stream: Box<dyn Read + Send>,
    span: Span,
    packed: u64,
    /// Bytes of the piece that are behind it.
    pub(crate) position: u64,
    compression: Compression,
    /// Damage makes the rest of the piece zero.
    salvage: bool,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("span", &self.span).finish_non_exhaustive()
    }
}

impl Decoder {
    /// Fills `out` with what comes next; behind damage that is salvaged, with zeroes.
    pub(crate) fn read(&mut self, out: &mut [u8]) -> Result<()> {
        let start = self.position;
        match self.read_whole(out) {
            Err(error) if self.salvage && error.kind() == ErrorKind::Corrupt => {
                let done = self.position.saturating_sub(start);
                let done = usize::try_from(done).unwrap_or(usize::MAX);
                out.get_mut(done..).unwrap_or_default().fill(0);
                self.position = start.saturating_add(u64::try_from(out.len()).unwrap_or(0));
                self.stream = Box::new(std::io::repeat(0).take(self.rest()));
                Ok(())
            }
            result => result,
        }
    }

    fn rest(&self) -> u64 {
        self.span.len.saturating_sub(self.position)
    }

    /// Fills `out` with what comes next. At the end of the piece, it makes sure that the
    /// stream ends there, too, which also verifies its checksum.
    fn read_whole(&mut self, mut out: &mut [u8]) -> Result<()> {
        while !out.is_empty() {
            // What a decompressor has made in a call that fails is lost: not too much.
            let most = out.len().min(CALL);
            let part = out.get_mut(..most).unwrap_or_default();
            let len = self.stream.read(part).map_err(|error| self.damaged(error))?;
            if len == 0 {
                return Err(Error::corrupt(format!(
                    "{} data gives {} bytes, expected {}",
                    self.compression, self.position, self.span.len
                ))
                .at(self.packed));
            }
            self.position = self.position.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
            out = out.get_mut(len..).unwrap_or_default();
        }
        // A stretch of gzip goes on in the next one; its checksum is known to be right.
        let ends = !matches!(self.compression, Compression::Gzip);
        if ends && self.position == self.span.len {
            let mut more = [0];
            if self.stream.read(&mut more).map_err(|error| self.damaged(error))? != 0 {
                return Err(Error::corrupt(format!(
                    "{} data gives more than the expected {} bytes",
                    self.compression, self.span.len
                ))
                .at(self.packed));
            }
        }
        Ok(())
    }

    fn damaged(&self, error: std::io::Error) -> Error {
        failure(error, &format!("the {} piece", self.compression)).at(self.packed)
    }
}
