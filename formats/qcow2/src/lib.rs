// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QCOW2 images: read, write, create, overlays, and everything that an image keeps beside
//! its disk.
//!
//! [`Header::read`] tells what an image is and which backing file it asks for, without
//! opening anything else. [`Qcow2`] is the disk inside it, for reading and writing;
//! [`create`] makes a new one, [`check`] compares its reference counts with its references
//! and repairs them. Who converts a disk uses [`create_for_writing`] or, for compressed
//! clusters, [`create_packed`]: the image is none before it is finished, and costs less to
//! write.
//!
//! What changes an image as a whole works on its file while nobody else has it open:
//! [`create_snapshot`] and its kind, [`add_bitmap`] and its kind, [`resize`], [`amend`].
//!
//! Images are hostile until proven otherwise: every count and offset is checked against
//! the format's limits and the size of the file before it is used. Writing keeps the
//! order that makes a crash at any moment leak clusters at worst; the module `writeback`
//! has the details.
//!
//! Field names and rules follow `docs/interop/qcow2` of QEMU.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod amend;
mod bitmaps;
mod bulk;
mod cache;
mod check;
mod compress;
mod compressed;
mod create;
mod editor;
mod encode;
mod extensions;
mod first_cluster;
mod geometry;
mod header;
mod image;
mod layout;
mod measure;
mod metadata;
mod packed;
mod payload;
mod read;
mod refcounts;
mod repair;
mod resize;
mod shape;
mod snapshots;
mod space;
mod write;
mod writeback;
mod zero;

pub use amend::{Amendments, amend, change_backing};
pub use bitmaps::{
    Bitmap, BitmapContent, add_bitmap, bitmaps, clear_bitmap, disable_bitmap, enable_bitmap,
    merge_bitmap, remove_bitmap,
};
pub use check::{check, check_read_only};
pub use create::{CreateOptions, DataFile, Preallocation, create, create_for_writing, create_over};
pub use header::{Backing, Compression, Encryption, Header, MAGIC};
pub use image::{OpenOptions, Qcow2};
pub use measure::{MeasureOptions, Measured, measure, measure_bitmaps};
pub use packed::{PackedQcow2, create_packed};
pub use repair::{rebuild_refcounts, repair_leaks};
pub use resize::{ResizeOptions, resize};
pub use snapshots::{
    Snapshot, apply_snapshot, create_snapshot, delete_snapshot, snapshot_view, snapshots,
};
pub use space::{empty, give_back};
