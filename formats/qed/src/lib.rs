// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QED images: read-only.
//!
//! [`Header::read`] tells what an image is and which backing file it asks for, without
//! opening anything else: the name is a request that a [`tranship_block::Gate`] decides
//! about. An image with a backing file is never read without it.
//!
//! Field names and rules follow `docs/interop/qed_spec` of QEMU.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod check;
mod disk;
mod header;
mod table;

pub use check::check;
pub use disk::{OpenOptions, Qed};
pub use header::{Backing, Header, MAGIC};
