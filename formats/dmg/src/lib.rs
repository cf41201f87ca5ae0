// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Apple disk images (UDIF, `.dmg`): read-only.
//!
//! A trailer at the end of the file (`koly`) leads to a property list, whose tables
//! (`mish`) divide the disk into chunks: zeroes, plain bytes, or bytes compressed by ADC,
//! zlib, bzip2, LZFSE or LZMA. There is no published specification.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod adc;
mod chunk;
mod codec;
mod image;
mod property_list;
mod trailer;

pub use codec::Codec;
pub use image::Dmg;
pub use trailer::Trailer;

/// Bytes of a sector.
const SECTOR: u64 = 512;
