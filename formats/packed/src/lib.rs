// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Raw disks inside gzip, xz, zstd and bzip2 files: read-only, with random access.
//!
//! A packed file is a row of pieces that can be decompressed each on its own: the blocks
//! of xz (by the index at its end), the frames of zstd (by the seek table or by walking
//! the block headers), the streams of bzip2, and for gzip the stretches between access
//! points, which a first pass over the file makes. Pieces of up to 32 MiB are decompressed
//! whole, by all readers at the same time, and the last ones are kept.
//!
//! A larger piece (`xz` and `zstd` make one single piece of a file unless told otherwise)
//! can only be read forward: there is one cursor, which keeps the last bytes that it has
//! passed. Reading in ascending order, by any number of threads, runs at the speed of
//! decompression; a step back behind what is kept starts the piece anew.
//!
//! The size is known from the index or the headers; where they lack it (gzip, bzip2, zstd
//! from a pipe), opening decompresses the file once.
//!
//! References: RFC 1951, 1952 (gzip), RFC 8878 and "Zstandard Seekable Format" 0.1.0,
//! "The .xz File Format" 1.2.1.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod bzip2;
mod cache;
mod device;
mod gzip;
mod open;
mod piece;
mod source;
mod xz;
mod zstd;

pub use device::Packed;
pub use open::{Compression, OpenOptions};
