// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMDK disks: sparse, stream-optimized, flat, split, and the deltas of ESX.
//!
//! The format is described in VMware's "Virtual Disk Format 1.1" and "5.0". A disk is a
//! list of extents, given by a descriptor text that is a file of its own or embedded in a
//! sparse extent. Every other file is opened through a [`tranship_block::Gate`], or by
//! [`ExtentFiles`] where it is to be written; data that the image promises but does not
//! hold is an error, never zeroes, unless a disk is salvaged.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod busy;
mod cache;
mod check;
mod check_extent;
mod compose;
mod compressed;
mod cowd;
mod create;
mod descriptor;
mod directory;
mod disk;
mod extents;
mod files;
mod footer;
mod header;
mod identity;
mod layout;
mod line;
mod losses;
mod open;
mod options;
mod resize;
mod sesparse;
mod sparse;
mod stream;
mod table;
mod write;
mod writer;

pub use check::check;
pub use create::create;
pub use descriptor::{Descriptor, NO_PARENT};
pub use disk::{ExtentInfo, Vmdk};
pub use extents::{ExtentFiles, NoFiles};
pub use line::{Access, ExtentLine, ExtentType};
pub use open::{OpenOptions, Parent, probe, read_descriptor};
pub use options::{Adapter, CreateOptions, ParentLink, Subformat};
pub use resize::{ResizeOptions, resize};
pub use stream::StreamTarget;

/// Bytes per sector, the unit of nearly every number in the format.
pub(crate) const SECTOR: u64 = 512;
/// More extents than any product writes (8 TiB in 2 GiB pieces); each costs an open file.
pub(crate) const MAX_EXTENTS: usize = 4096;
