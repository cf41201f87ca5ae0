// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A minimal virtual machine monitor for the appliance.
//!
//! It boots the uncompressed kernel of a distribution by Linux' 64-bit boot protocol and
//! gives it what those kernels have drivers for and nothing else: hardware-reduced ACPI, PCI
//! with MSI-X and pins, virtio disks, a virtio console with named ports, entropy, and a serial line
//! for last words. Disks are any [`tranship_block::BlockDevice`], served by threads of their
//! own in this process.
#![cfg(target_arch = "x86_64")]

mod acpi;
mod board;
pub mod channel;
pub mod child;
pub mod confine;
pub mod core_file;
mod cpu;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod kernel;
mod layout;
mod machine;
mod memory;
mod pci;
mod processors;
mod serial;
mod snapshot;
pub mod trace;
mod virtio;

pub use board::Ending;
pub use error::{Error, Result};
pub use machine::{Disk, MOST_DISKS, MOST_PROCESSORS, Machine, Parts};
pub use memory::{Backing, Memory, Ram};
pub use snapshot::Snapshot;
