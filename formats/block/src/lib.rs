// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a disk is to the rest of tranship: random access to a fixed number of bytes.
//!
//! Every image format, every network source and every test double implements
//! [`BlockDevice`]; everything that moves or shows disk contents (copy engine, NBD
//! server, appliance, shell) is written against it and so gets every format at once.
//! Files that an image wants to open by name go through a [`Gate`].
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod buffer;
mod check;
mod cipher;
mod compare;
mod concat;
mod copy;
mod device;
mod error;
mod extent;
mod fields;
mod gate;
mod lower;
mod manifest;
mod measure;
mod memory;
mod meter;
mod packed;
mod queue;
mod slice;
#[cfg(test)]
mod testing;
mod throttle;
mod zero;

pub use buffer::AlignedBuffer;
pub use check::{CheckReport, Repair};
pub use cipher::SectorCipher;
pub use compare::{CompareError, CompareOptions, Comparison, compare};
pub use concat::Concat;
pub use copy::{Copied, CopyObserver, CopyOptions, copy, copy_packed};
pub use device::{Advice, BlockDevice, FileRange, Storage, Zeroing};
pub use error::{Error, ErrorKind, Result};
pub use extent::{Extent, ExtentKind, Extents, Span};
pub use fields::{BigEndian, LittleEndian};
pub use gate::{DenyAll, Gate, Request};
pub use lower::Lower;
pub use manifest::{
    Digest, HashedChunk, MANIFEST_CHUNK, ManifestHeader, ManifestReader, ManifestSummary,
    ManifestWriter, Verified, VerifyOptions, verify,
};
pub use measure::{
    Counts, LatencyClass, Measured, OperationCounter, OperationStatistics, Statistics,
};
pub use memory::MemoryDevice;
pub use meter::{DiskMeter, DiskStatistics, FileMeter, FileStatistics, Meter};
pub use packed::{Encoding, PackedTarget, PackedUnit};
pub use queue::ReadQueue;
pub use slice::Slice;
pub use throttle::{Rate, Throttle, Throttled};
pub use zero::is_zero;
