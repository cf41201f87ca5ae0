// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that are written once, compressed: the half of the work that every core can do
//! at the same time is kept apart from the half that has to happen in order.

use crate::Result;
use std::fmt::Debug;
use std::sync::Arc;

/// How a unit is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Compressed, in a stream of its own.
    Compressed,
    /// As it is, because compressing it gains nothing.
    Plain,
}

/// A unit that is ready to be stored: its bytes follow those of the unit before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedUnit {
    /// Where the unit lies in the guest's disk, in bytes; a multiple of the unit.
    pub offset: u64,
    /// Bytes that it takes in the arena.
    pub len: usize,
    /// What these bytes are.
    pub encoding: Encoding,
}

/// A new image of compressed units: clusters or grains.
///
/// Units that are never stored read as zero, or from what the image is based on.
pub trait PackedTarget: Debug + Send + Sync {
    /// Virtual size in bytes.
    fn size(&self) -> u64;

    /// Bytes of a unit, a power of two.
    fn unit(&self) -> u32;

    /// Appends unit `bytes` in the form in which it is stored to `arena`; any number of
    /// threads do so at the same time. The last unit of a disk may be short.
    ///
    /// # Errors
    ///
    /// What the compressor reports.
    fn pack(&self, bytes: &[u8], arena: &mut Vec<u8>) -> Result<Encoding>;

    /// Stores units; called by one thread at a time, with ascending offsets.
    ///
    /// # Errors
    ///
    /// I/O errors, and [`crate::ErrorKind::Usage`] for offsets out of order.
    fn store(&self, arena: &[u8], units: &[PackedUnit]) -> Result<()>;

    /// Writes the tables, and last what makes the file an image; flushes.
    ///
    /// # Errors
    ///
    /// I/O errors.
    fn finish(&self) -> Result<()>;
}

impl<T: PackedTarget + ?Sized> PackedTarget for Arc<T> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn unit(&self) -> u32 {
        (**self).unit()
    }

    fn pack(&self, bytes: &[u8], arena: &mut Vec<u8>) -> Result<Encoding> {
        (**self).pack(bytes, arena)
    }

    fn store(&self, arena: &[u8], units: &[PackedUnit]) -> Result<()> {
        (**self).store(arena, units)
    }

    fn finish(&self) -> Result<()> {
        (**self).finish()
    }
}
