// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one door to all disk formats: probe and open by name.
//!
//! [`open`] turns a path into a disk with its whole backing chain. What images ask for by
//! name goes through a [`FolderGate`], and a backing file is opened in the format that
//! the image names for it: a format that was guessed could have been chosen by a guest.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod chain;
mod format;
mod gate;
mod probe;

pub use chain::{OpenOptions, Opened, open, open_device};
pub use format::Format;
pub use gate::FolderGate;
pub use probe::probe;
