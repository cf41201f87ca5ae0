// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is in this guest: operating system, kernels, mounts, bootloader.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod error;
pub mod folder;
mod tree;

pub use error::{Error, ErrorKind, Result};
pub use tree::{DirEntry, FileKind, Finished, GuestEdit, GuestTree, Ownership, Space, Stat};
