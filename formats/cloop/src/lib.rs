// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compressed loop images (cloop, version 2): read-only.
//!
//! A shell script of 128 bytes, block size and number of blocks (u32, big endian), the
//! offsets of all blocks and of the end (u64), and each block as a zlib stream.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod header;
mod image;

pub use header::Header;
pub use image::Cloop;
