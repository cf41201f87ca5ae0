// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a Linux guest has to change to run on KVM.
//!
//! [`plan`] works out every change from the facts that inspection found, [`Plan`] is what
//! a dry run prints, and [`apply`] carries it out. No program of the guest is run unless
//! [`InitramfsMethod::Guest`] asks for it.
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)]

mod apply;
mod compression;
mod convert;
mod cpio;
mod devices;
mod draft;
mod drivers;
mod firmware;
mod firstboot;
mod grub;
mod initramfs;
mod machine;
mod network;
mod plan;
mod space;
mod tables;
mod tools;

pub use apply::apply;
pub use compression::Compression;
pub use convert::plan;
pub use machine::{
    AgentPackage, Disk, Firmware, InitramfsMethod, MachineFacts, Nic, Options, Volume,
};
pub use plan::{AppendInitramfs, Blocker, DeviceChange, Plan, Step, Warning};
