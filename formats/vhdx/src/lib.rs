// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VHDX images: read, write, create, check, TRIM, compact.
//!
//! The format is that of the specification MS-VHDX, whose sections the modules cite.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod bat;
mod bitmap;
mod bytes;
mod check;
mod compact;
mod create;
mod guid;
mod header;
mod image;
mod journal;
mod locator;
mod log;
mod metadata;
mod open;
mod overlay;
mod read;
mod region;
mod replay;
mod resize;
mod space;
mod structure;
mod write;
mod zero;

pub use check::check;
pub use compact::{Compacted, compact};
pub use create::{CreateOptions, LARGEST_DISK, create};
pub use guid::Guid;
pub use image::{LogState, OpenOptions, Parent, Subformat, Vhdx};
pub use locator::{NameKind, ParentLocator, ParentName};
pub use resize::Shrink;
pub use structure::{read_data_write_guid, read_parent};
