// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The compressions that the kernel understands for an initramfs.

use liblzma::stream::{Check, Stream};
use serde::Serialize;
use std::fmt;
use std::io::{self, BufRead, Read, Write};
use tranship_inspect::{Error, ErrorKind, Result};

/// Largest block of the legacy LZ4 format, unpacked.
const LZ4_BLOCK: usize = 8 << 20;
/// Memory that unpacking xz or lzma may take.
const XZ_MEMORY: u64 = 512 << 20;

/// How one part of an initramfs is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
    /// LZ4 in its legacy format.
    Lz4,
    /// bzip2.
    Bzip2,
    /// lzma, the format before xz.
    Lzma,
    /// LZO, which is recognised but not unpacked.
    Lzo,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Lzo => "lzo",
        })
    }
}

impl Compression {
    /// Which one it is, by the first bytes, as the kernel decides.
    pub(crate) fn of(head: &[u8]) -> Option<Self> {
        const MAGIC: &[(&[u8], Compression)] = &[
            (b"070701", Compression::None),
            (b"070702", Compression::None),
            (b"\x1f\x8b", Compression::Gzip),
            (b"\x1f\x9e", Compression::Gzip),
            (b"BZh", Compression::Bzip2),
            (b"\x5d\x00\x00", Compression::Lzma),
            (b"\xfd7zXZ\x00", Compression::Xz),
            (b"\x89LZO", Compression::Lzo),
            (b"\x02\x21\x4c\x18", Compression::Lz4),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ];
        MAGIC.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, kind)| *kind)
    }

    /// The compression for a part that is appended to one of this compression.
    ///
    /// What the kernel unpacks already it can unpack again; formats that are rare or slow
    /// are replaced by none at all, which every kernel understands.
    pub(crate) fn for_addition(self) -> Self {
        match self {
            Self::Gzip | Self::Xz | Self::Zstd => self,
            _ => Self::None,
        }
    }

    /// Lets `read` see the unpacked stream at the start of `source`, which is then
    /// advanced to the end of what was packed.
    pub(crate) fn unpack<T>(
        self,
        source: &mut &[u8],
        read: &mut dyn FnMut(&mut dyn Read) -> Result<T>,
    ) -> Result<T> {
        match self {
            Self::None => read(source),
            Self::Gzip => drained(&mut flate2::bufread::GzDecoder::new(source), read),
            Self::Bzip2 => drained(&mut bzip2::bufread::BzDecoder::new(source), read),
            Self::Xz => {
                let stream = Stream::new_stream_decoder(XZ_MEMORY, 0).map_err(no_decoder)?;
                drained(&mut liblzma::bufread::XzDecoder::new_stream(source, stream), read)
            }
            Self::Lzma => {
                let stream = Stream::new_lzma_decoder(XZ_MEMORY).map_err(no_decoder)?;
                drained(&mut liblzma::bufread::XzDecoder::new_stream(source, stream), read)
            }
            Self::Zstd => {
                let decoder =
                    zstd::stream::read::Decoder::with_buffer(source).map_err(no_decoder)?;
                drained(&mut decoder.single_frame(), read)
            }
            Self::Lz4 => drained(&mut Lz4Legacy::new(source), read),
            Self::Lzo => Err(Error::new(
                ErrorKind::Unsupported,
                "is compressed with lzo, which is not supported",
            )),
        }
    }

    /// Packs a whole part.
    pub(crate) fn pack(self, content: Vec<u8>) -> Result<Vec<u8>> {
        let failed = |source: io::Error| {
            Error::new(ErrorKind::Io, format!("{self} compression failed")).because(source)
        };
        match self {
            Self::Gzip => {
                let mut encoder =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
                encoder.write_all(&content).map_err(failed)?;
                encoder.finish().map_err(failed)
            }
            Self::Xz => {
                // The kernel's decoder knows no other checksum than CRC32.
                let stream = Stream::new_easy_encoder(6, Check::Crc32).map_err(no_decoder)?;
                let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
                encoder.write_all(&content).map_err(failed)?;
                encoder.finish().map_err(failed)
            }
            Self::Zstd => zstd::stream::encode_all(content.as_slice(), 3).map_err(failed),
            Self::None => Ok(content),
            Self::Lz4 | Self::Bzip2 | Self::Lzma | Self::Lzo => {
                Err(Error::new(ErrorKind::Unsupported, format!("{self} is not written")))
            }
        }
    }
}

/// Reads to the end of the stream even where `read` stopped at the end of an archive,
/// so that the decoder takes all of its input.
fn drained<T>(
    decoder: &mut dyn Read,
    read: &mut dyn FnMut(&mut dyn Read) -> Result<T>,
) -> Result<T> {
    let result = read(decoder)?;
    io::copy(decoder, &mut io::sink())
        .map_err(|e| Error::new(ErrorKind::Corrupt, "compressed data is damaged").because(e))?;
    Ok(result)
}

fn no_decoder(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Io, "no memory for a decoder").because(source)
}

/// Unpacks the legacy LZ4 format: blocks, each after its length in four bytes.
struct Lz4Legacy<'a, 'b> {
    source: &'a mut &'b [u8],
    block: Vec<u8>,
    at: usize,
}

impl<'a, 'b> Lz4Legacy<'a, 'b> {
    fn new(source: &'a mut &'b [u8]) -> Self {
        source.consume(4.min(source.len()));
        Self { source, block: Vec::new(), at: 0 }
    }

    /// Unpacks the next block; false at the end: no more input, padding, or another part.
    fn next_block(&mut self) -> io::Result<bool> {
        let Some((head, tail)) = self.source.split_first_chunk::<4>() else {
            return Ok(false);
        };
        let len = usize::try_from(u32::from_le_bytes(*head)).unwrap_or(usize::MAX);
        if len == 0 || Compression::of(self.source).is_some() {
            return Ok(false);
        }
        let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let packed = tail.get(..len).ok_or_else(|| damaged("lz4 block ends after the file"))?;
        self.block.resize(LZ4_BLOCK, 0);
        let size = lz4_flex::block::decompress_into(packed, &mut self.block)
            .map_err(|_| damaged("lz4 block is damaged"))?;
        self.block.truncate(size);
        self.at = 0;
        *self.source = tail.get(len..).unwrap_or_default();
        Ok(true)
    }
}

impl Read for Lz4Legacy<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let mut rest = self.block.get(self.at..).unwrap_or_default();
        let read = rest.read(buf)?;
        self.at = self.at.saturating_add(read);
        Ok(read)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Packs in the formats that only tests write.
    pub(crate) fn pack_any(kind: Compression, content: &[u8]) -> Vec<u8> {
        match kind {
            Compression::Lz4 => {
                let mut bytes = b"\x02\x21\x4c\x18".to_vec();
                for chunk in content.chunks(LZ4_BLOCK) {
                    let packed = lz4_flex::block::compress(chunk);
                    bytes.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
                    bytes.extend(packed);
                }
                bytes
            }
            Compression::Bzip2 => {
                let mut encoder =
                    bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
                encoder.write_all(content).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Lzma => {
                let options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
                let stream = Stream::new_lzma_encoder(&options).unwrap();
                let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
                encoder.write_all(content).unwrap();
                encoder.finish().unwrap()
            }
            _ => kind.pack(content.to_vec()).unwrap(),
        }
    }

    #[test]
    fn every_format_unpacks_and_stops_where_it_ends() {
        let content = b"some text, some text, some text".repeat(100);
        for kind in [
            Compression::Gzip,
            Compression::Xz,
            Compression::Zstd,
            Compression::Lz4,
            Compression::Bzip2,
            Compression::Lzma,
        ] {
            let mut bytes = pack_any(kind, &content);
            assert_eq!(Compression::of(&bytes), Some(kind));
            bytes.extend_from_slice(b"\0\0\0\x00070701");
            let mut source = bytes.as_slice();
            let unpacked = kind
                .unpack(&mut source, &mut |stream| {
                    let mut bytes = Vec::new();
                    stream.read_to_end(&mut bytes).unwrap();
                    Ok(bytes)
                })
                .unwrap();
            assert_eq!(unpacked, content, "{kind}");
            assert_eq!(source, b"\0\0\0\x00070701", "{kind}");
        }
    }
}
