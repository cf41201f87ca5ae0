// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kinds of compression.

use crate::adc;
use libdeflater::Decompressor;
use liblzma::stream::Stream;
use lzfse_rust::LzfseRingDecoder;
use std::cell::RefCell;
use std::fmt;
use std::io::Read;
use tranship_block::{Error, Result};

/// Memory for one LZMA decompressor: twice what the largest preset needs.
const LZMA_MEMORY: u64 = 128 << 20;

thread_local! {
    static INFLATER: RefCell<Decompressor> = RefCell::new(Decompressor::new());
}

/// How a chunk is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Codec {
    /// Apple Data Compression (UDCO).
    Adc,
    /// zlib (UDZO).
    Zlib,
    /// bzip2 (UDBZ).
    Bzip2,
    /// LZFSE (ULFO).
    Lzfse,
    /// LZMA in xz streams (ULMO).
    Lzma,
}

impl Codec {
    /// The kind that a run's type means.
    pub(crate) fn of(kind: u32) -> Result<Self> {
        Ok(match kind {
            0x8000_0004 => Self::Adc,
            0x8000_0005 => Self::Zlib,
            0x8000_0006 => Self::Bzip2,
            0x8000_0007 => Self::Lzfse,
            0x8000_0008 => Self::Lzma,
            _ => {
                return Err(Error::unsupported(format!(
                    "type of a chunk is {kind:#x}, expected 0 to 2 or 0x80000004 to 0x80000008"
                )));
            }
        })
    }

    /// Decompresses `packed` into `out`, which it has to fill exactly.
    pub(crate) fn decompress(self, packed: &[u8], out: &mut [u8]) -> Result<()> {
        let whole = match self {
            Self::Adc => adc::decompress(packed, out).is_some(),
            Self::Zlib => INFLATER
                .with_borrow_mut(|inflater| inflater.zlib_decompress(packed, out))
                .is_ok_and(|len| len == out.len()),
            Self::Bzip2 => fills(bzip2::read::BzDecoder::new(packed), out),
            Self::Lzfse => fills(LzfseRingDecoder::default().reader_bytes(packed), out),
            Self::Lzma => {
                let stream = Stream::new_stream_decoder(LZMA_MEMORY, 0).map_err(|error| {
                    Error::unsupported("lzma decompressor cannot be set up").because(error)
                })?;
                fills(liblzma::read::XzDecoder::new_stream(packed, stream), out)
            }
        };
        if whole {
            Ok(())
        } else {
            Err(Error::corrupt(format!(
                "{self} data of a chunk is damaged, or does not give {} bytes",
                out.len()
            )))
        }
    }
}

/// Whether `stream` has as many bytes as `out`, which get them.
fn fills(mut stream: impl Read, out: &mut [u8]) -> bool {
    stream.read_exact(out).is_ok() && matches!(stream.read(&mut [0]), Ok(0))
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Adc => "ADC",
            Self::Zlib => "zlib",
            Self::Bzip2 => "bzip2",
            Self::Lzfse => "LZFSE",
            Self::Lzma => "LZMA",
        })
    }
}
