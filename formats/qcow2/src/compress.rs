// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Deflating clusters: each thread has its own compressor, which is used again and again.

use crate::geometry::{COMPRESSED, Geometry};
use crate::header::Compression;
use libdeflater::{CompressionLvl, Compressor};
use std::cell::RefCell;
use tranship_block::{Encoding, Error, ErrorKind, Result};
use zstd::zstd_safe::{CCtx, get_error_name};

/// Deflate level: smaller results than zlib's default level in two thirds of its time.
const DEFLATE_LEVEL: i32 = 6;
/// What zstd does when it is not told.
const ZSTD_LEVEL: i32 = zstd::DEFAULT_COMPRESSION_LEVEL;

thread_local! {
    static DEFLATER: RefCell<Option<Compressor>> = const { RefCell::new(None) };
    static ZSTD: RefCell<Option<CCtx<'static>>> = const { RefCell::new(None) };
}

/// Appends `cluster`, whose length is that of a cluster, to `arena`: compressed if that
/// makes it shorter.
pub(crate) fn pack(
    compression: Compression,
    cluster: &[u8],
    arena: &mut Vec<u8>,
) -> Result<Encoding> {
    let start = arena.len();
    // A stream of the full length gains nothing.
    let most = cluster.len().saturating_sub(1);
    arena.resize(start.saturating_add(most), 0);
    let out = arena.get_mut(start..).unwrap_or_default();
    let len = match compression {
        Compression::Deflate => deflate(cluster, out)?,
        Compression::Zstd => pack_zstd(cluster, out)?,
    };
    arena.truncate(start.saturating_add(len.unwrap_or(0)));
    if len.is_some() {
        return Ok(Encoding::Compressed);
    }
    arena.extend_from_slice(cluster);
    Ok(Encoding::Plain)
}

/// The length of the stream, `None` if `out` is too short for it.
fn deflate(cluster: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
    DEFLATER.with_borrow_mut(|deflater| {
        if deflater.is_none() {
            let level = CompressionLvl::new(DEFLATE_LEVEL)
                .map_err(|_| Error::unsupported("deflate level is not known"))?;
            *deflater = Some(Compressor::new(level));
        }
        let deflater = deflater.as_mut();
        Ok(deflater.and_then(|deflater| deflater.deflate_compress(cluster, out).ok()))
    })
}

fn pack_zstd(cluster: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
    // ZSTD_error_dstSize_tooSmall, as the name of which it is told apart from real errors.
    const TOO_SMALL: &str = "Destination buffer is too small";
    ZSTD.with_borrow_mut(|context| {
        let context = context.get_or_insert_with(CCtx::create);
        match context.compress(out, cluster, ZSTD_LEVEL) {
            Ok(len) => Ok(Some(len)),
            Err(code) if get_error_name(code) == TOO_SMALL => Ok(None),
            Err(code) => Err(Error::new(
                ErrorKind::Io,
                format!("cannot compress a cluster: {}", get_error_name(code)),
            )),
        }
    })
}

/// The L2 entry of a stream of `len` bytes at `start`; `None` if that is too far away.
pub(crate) fn entry(geometry: Geometry, start: u64, len: u64) -> Option<u64> {
    let shift = 62_u32.wrapping_sub(geometry.cluster_bits.wrapping_sub(8));
    let last = start.saturating_add(len).saturating_sub(1);
    let sectors = (last / 512).saturating_sub(start / 512);
    (start < 1_u64.wrapping_shl(shift)).then(|| COMPRESSED | sectors.wrapping_shl(shift) | start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Mapping;

    #[test]
    fn what_does_not_shrink_stays_as_it_is() {
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            u8::try_from(state >> 56).unwrap()
        })
        .take(4096)
        .collect();
        for compression in [Compression::Deflate, Compression::Zstd] {
            let mut arena = vec![7; 3];
            assert_eq!(pack(compression, &noise, &mut arena).unwrap(), Encoding::Plain);
            assert_eq!(arena.len(), 4099);
            assert!(arena[3..] == noise);
            assert_eq!(pack(compression, &[1; 4096], &mut arena).unwrap(), Encoding::Compressed);
            assert!(arena.len() < 4199, "{}", arena.len());
        }
    }

    #[test]
    fn an_entry_says_where_a_stream_is_and_which_sectors_it_touches() {
        for bits in [9, 16, 21] {
            let geometry = Geometry {
                cluster_bits: bits,
                refcount_order: 4,
                version: 3,
                extended: false,
                external: false,
            };
            for (start, len) in [(0x1000, 1), (0x11ff, 1), (0x11ff, 2), (0x1234, 500)] {
                let entry = entry(geometry, start, len).unwrap();
                let Mapping::Compressed { start: found, len: most } =
                    geometry.mapping(entry, 0).unwrap()
                else {
                    panic!("{entry:#x} is not compressed");
                };
                assert_eq!(found, start);
                assert!(most >= len && most < len + 512, "{len} in {most}");
            }
            assert_eq!(entry(geometry, 1 << 62, 1), None);
        }
    }
}
