// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one door to all disk formats: probe and open by name.
//!
//! [`open`] turns a path, and [`open_spec`] whatever QEMU's tools take as a name, into a
//! disk with its whole backing chain. What images ask for by name goes through a
//! [`FolderGate`], and a backing file is opened in the format that the image names for it:
//! a format that was guessed could have been chosen by a guest.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod chain;
mod check;
mod compressing;
mod create;
mod files;
mod format;
mod gate;
mod handover;
mod layer;
mod null;
mod probe;
mod replacing;
mod secrets;
mod spec;
mod staged;
mod unflushed;

pub use chain::{Locking, OpenOptions, Trust, open, open_device, open_spec};
pub use check::check_read_only;
pub use compressing::Compressing;
pub use create::{Create, FillOptions, Filling, create, fill};
pub use files::resize_vmdk;
pub use format::Format;
pub use gate::FolderGate;
pub use handover::{Files, Given, GivenServer, Noted, NotedFile, NotedServer};
pub use layer::{Disk, Layer, Opened};
pub use probe::probe;
pub use replacing::{Replacing, WhenEmpty};
pub use secrets::Secrets;
pub use spec::{Below, Member, NbdAddress, Place, SliceOf, Spec, VpcSize};
pub use staged::Staged;
pub use tranship_raw::Preallocation as RawPreallocation;
pub use tranship_tar::is_tar;
