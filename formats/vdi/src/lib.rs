// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VDI images of VirtualBox: read-only; dynamic, fixed and differencing.
//!
//! [`Header::read`] tells what an image is and which parent it needs, without opening
//! anything else. The format has no name for the parent, only its UUID: the caller finds
//! the file. A differencing image is never read without it.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod check;
mod disk;
mod header;

pub use check::check;
pub use disk::{OpenOptions, Parent, Vdi};
pub use header::{Header, Kind, SIGNATURE, format_uuid};
