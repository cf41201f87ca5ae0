// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QCOW2 images: read, write, create, overlays.
//!
//! [`Header::read`] tells what an image is and which backing file it asks for, without
//! opening anything else. [`Qcow2`] is the disk inside it, for reading and writing;
//! [`create`] makes a new one, [`check`] compares its reference counts with its references.
//!
//! Images are hostile until proven otherwise: every count and offset is checked against
//! the format's limits and the size of the file before it is used. Writing keeps the
//! order that makes a crash at any moment leak clusters at worst; the module `writeback`
//! has the details.
//!
//! Field names and rules follow `docs/interop/qcow2` of QEMU.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod cache;
mod check;
mod compressed;
mod create;
mod extensions;
mod geometry;
mod header;
mod image;
mod metadata;
mod read;
mod refcounts;
mod repair;
mod snapshots;
mod write;
mod writeback;

pub use check::{Report, check};
pub use create::{CreateOptions, create};
pub use header::{Backing, Compression, Header, MAGIC};
pub use image::{OpenOptions, Qcow2};
pub use repair::repair_leaks;
