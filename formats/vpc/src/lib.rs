// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VPC (VHD) images: fixed, dynamic and differencing; read, write, create, resize, check.
//!
//! [`ParentRequest::read`] tells which parent a differencing image asks for, without
//! opening anything else; the caller finds it and hands it to [`Vpc::open`]. A
//! differencing image is never read without its parent, and a damaged footer never
//! without saying so: [`Vpc::warnings`].
//!
//! What a write changes in tables and bitmaps reaches the file with the next
//! [`tranship_block::BlockDevice::flush`], after the data that it refers to: the module
//! `commit` has the details. A power cut at any moment leaves a valid image that holds
//! what was flushed.
//!
//! Field names and rules follow Microsoft's "Virtual Hard Disk Image Format
//! Specification" 1.0.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod bitmaps;
mod check;
mod commit;
mod create;
mod disk;
mod footer;
mod geometry;
mod header;
mod open;
mod parent;
mod resize;
mod space;
mod sparse;
mod table;
mod write;

pub use check::check;
pub use create::{CreateOptions, NewParent, Sizing, create, timestamp};
pub use disk::Vpc;
pub use footer::{Footer, Kind, MAGIC, MAX_SIZE, SizeSource};
pub use geometry::Geometry;
pub use open::OpenOptions;
pub use parent::{NameKind, Parent, ParentName, ParentRequest, format_id};
