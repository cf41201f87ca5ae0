// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bounded decompression by magic number, for kernels, modules and package members.

use std::io::Read;

use liblzma::stream::Stream;

use crate::error::{Error, Result};

/// Memory that an xz or lzma decoder may use. Kernels use a dictionary of at most 128 MiB.
const LZMA_MEMORY: u64 = 512 << 20;
/// A legacy LZ4 block unpacks to at most this (lz4 command's `-l`, block size 8 MiB).
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

/// A compression that the builder can undo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Xz,
    Zstd,
    Bzip2,
    /// The headerless `.lzma` container of xz-utils' predecessor.
    Lzma,
    /// Frames without end mark, as the kernel's build makes them.
    Lz4Legacy,
}

impl Compression {
    /// Recognises the compression by the first bytes of `data`.
    pub(crate) fn detect(data: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 6] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
            (b"BZh", Compression::Bzip2),
            (b"\x02\x21\x4c\x18", Compression::Lz4Legacy),
            // Properties byte 0x5d (lc 3, lp 0, pb 2) and a dictionary of at least 64 KiB:
            // weak, therefore last.
            (b"\x5d\0\0", Compression::Lzma),
        ];
        MAGICS.iter().find(|(magic, _)| data.starts_with(magic)).map(|&(_, kind)| kind)
    }

    /// A reader of the first stream or frame in `data`; bytes behind it are left alone.
    ///
    /// LZ4 has no such reader here: see [`unpack`].
    pub(crate) fn reader<'a, R: Read + 'a>(self, data: R) -> Result<Box<dyn Read + 'a>> {
        let lzma = |stream: std::result::Result<Stream, liblzma::stream::Error>| {
            stream.map_err(|e| Error::unsupported("the lzma decoder cannot be set up").because(e))
        };
        Ok(match self {
            Self::Gzip => Box::new(flate2::read::GzDecoder::new(data)),
            Self::Bzip2 => Box::new(bzip2::read::BzDecoder::new(data)),
            Self::Zstd => Box::new(
                zstd::stream::read::Decoder::new(data)
                    .map_err(|e| Error::io("the zstd decoder cannot be set up", e))?
                    .single_frame(),
            ),
            Self::Xz => Box::new(liblzma::read::XzDecoder::new_stream(
                data,
                lzma(Stream::new_stream_decoder(LZMA_MEMORY, 0))?,
            )),
            Self::Lzma => Box::new(liblzma::read::XzDecoder::new_stream(
                data,
                lzma(Stream::new_lzma_decoder(LZMA_MEMORY))?,
            )),
            Self::Lz4Legacy => {
                return Err(Error::unsupported("lz4 is expected only in a kernel image"));
            }
        })
    }
}

/// Unpacks the first stream in `data`, which may not grow beyond `limit` bytes.
pub(crate) fn unpack(compression: Compression, data: &[u8], limit: usize) -> Result<Vec<u8>> {
    if compression == Compression::Lz4Legacy {
        return unpack_lz4_legacy(data, limit);
    }
    let mut out = Vec::new();
    let bound = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    compression.reader(data)?.take(bound).read_to_end(&mut out).map_err(|e| {
        Error::corrupt(format!("{compression:?} data cannot be unpacked")).because(e)
    })?;
    if out.len() > limit {
        return Err(Error::corrupt(format!("unpacks to more than {limit} bytes")));
    }
    Ok(out)
}

/// Magic, then blocks of a length and that many bytes, until the data ends. What is left over and
/// cannot be a block (the size that the kernel's build appends) ends it as well.
fn unpack_lz4_legacy(data: &[u8], limit: usize) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut block = vec![0; LZ4_LEGACY_BLOCK];
    let mut rest = data.get(4..).unwrap_or_default();
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        if tail.is_empty() {
            break;
        }
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (packed, next) = tail.split_at_checked(length).ok_or_else(|| {
            Error::corrupt(format!(
                "lz4 block of {length} bytes, but only {} bytes are left",
                tail.len()
            ))
        })?;
        let unpacked = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|e| Error::corrupt("lz4 block cannot be unpacked").because(e))?;
        if out.len().saturating_add(unpacked) > limit {
            return Err(Error::corrupt(format!("unpacks to more than {limit} bytes")));
        }
        out.extend_from_slice(block.get(..unpacked).unwrap_or_default());
        rest = next;
    }
    Ok(out)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    /// `data` packed as the kernel's build does, without the appended size.
    pub(crate) fn pack(compression: Compression, data: &[u8]) -> Vec<u8> {
        match compression {
            Compression::Gzip => {
                let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                to.write_all(data).unwrap();
                to.finish().unwrap()
            }
            Compression::Xz => {
                // The kernel packs itself with the x86 branch filter in front.
                let mut filters = liblzma::stream::Filters::new();
                let options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
                filters.x86().lzma2(&options);
                let stream =
                    Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32).unwrap();
                let mut to = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
                to.write_all(data).unwrap();
                to.finish().unwrap()
            }
            Compression::Lzma => {
                let options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
                let stream = Stream::new_lzma_encoder(&options).unwrap();
                let mut to = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
                to.write_all(data).unwrap();
                to.finish().unwrap()
            }
            Compression::Zstd => zstd::encode_all(data, 1).unwrap(),
            Compression::Bzip2 => {
                let mut to = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
                to.write_all(data).unwrap();
                to.finish().unwrap()
            }
            Compression::Lz4Legacy => {
                let mut out = b"\x02\x21\x4c\x18".to_vec();
                for block in data.chunks(LZ4_LEGACY_BLOCK) {
                    let packed = lz4_flex::block::compress(block);
                    out.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
                    out.extend(packed);
                }
                out
            }
        }
    }

    pub(crate) const ALL: [Compression; 6] = [
        Compression::Gzip,
        Compression::Xz,
        Compression::Zstd,
        Compression::Bzip2,
        Compression::Lzma,
        Compression::Lz4Legacy,
    ];

    #[test]
    fn every_compression_is_recognised_and_undone() {
        let data: Vec<u8> = (0..300_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for kind in ALL {
            let packed = pack(kind, &data);
            assert_eq!(Compression::detect(&packed), Some(kind));
            assert!(unpack(kind, &packed, data.len()).unwrap() == data, "{kind:?}");
            let error = unpack(kind, &packed, data.len() - 1).unwrap_err();
            assert_eq!(error.message(), format!("unpacks to more than {} bytes", data.len() - 1));
        }
    }

    #[test]
    fn cut_data_is_an_error_not_short_output() {
        let data: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        for kind in ALL {
            let packed = pack(kind, &data);
            assert!(unpack(kind, &packed[..packed.len() / 2], 1 << 20).is_err(), "{kind:?}");
        }
    }
}
