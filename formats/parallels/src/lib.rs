// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Parallels images and bundles: read-only.
//!
//! A disk of Parallels is a folder: `DiskDescriptor.xml` ([`Descriptor`]) names the files
//! of each part of the disk and the tree of its snapshots. The files are plain or growing
//! (`.hds`, [`Image`]); a growing one can stand alone, too. [`Bundle`] puts them together.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod bundle;
mod check;
mod descriptor;
mod header;
mod image;
mod table;

pub use bundle::{Bundle, BundleOptions};
pub use check::check;
pub use descriptor::{Descriptor, ImageFile, ImageType, Shot, StorageFiles};
pub use header::Header;
pub use image::{Image, OpenOptions};

/// Bytes of a sector.
const SECTOR: u64 = 512;
