// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where guests come from: OVA and OVF, VMX, plain disks.
//!
//! Whatever the source is, the outcome is a [`Source`]: what the virtual machine looks
//! like, and disks that can be opened for reading. Archives are read in place. All names
//! inside of a source are requests that may lead to its own files only.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod archive;
mod disks;
mod error;
mod files;
mod genid;
mod hardware;
mod image;
mod manifest;
mod model;
mod ova;
mod ovf;
mod vmx;
mod vmx_text;

pub use disks::open_disks;
pub use error::{Error, ErrorKind, Result};
pub use model::{
    Controller, CpuTopology, Firmware, Location, NetworkKind, Removable, RemovableKind, Source,
    SourceDisk, SourceKind, SourceNic,
};
pub use ova::open_ova;
pub use vmx::open_vmx;
