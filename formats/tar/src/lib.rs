// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tar archives (POSIX.1-2001 pax, ustar, GNU), whose members are read in place: OVA
//! packages, mostly.
//!
//! Only the headers are read. A parser of its own, because every length is hostile: long
//! names are bounded, and a member that is cut off is told by name.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod archive;
mod header;

pub use archive::{Archive, is_tar};
