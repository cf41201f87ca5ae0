// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Starts the appliance and offers the guest API.
//!
//! A [`Guest`] is created, gets its disks, is launched once, answers calls and is shut
//! down: the life of a libguestfs handle. Below it a [`Backend`] runs the machine and a
//! [`Session`] carries calls to the agent. Disks reach the machine through our own NBD
//! server, so that the machine never sees an image file.

mod backend;
mod clock;
mod console;
mod error;
mod guest;
mod process;
mod qemu;
mod session;

pub use backend::{Backend, Choice, Machine, MachineSpec, Preference, SpecDisk, choose};
pub use error::{Error, ErrorKind, Result};
pub use guest::{Boot, Drive, Guest, LaunchTimes, Settings};
pub use process::Process;
pub use session::{CancelToken, Observer, Session, Silent};
pub use tranship_protocol as protocol;

/// The QEMU that [`choose`] would start, if one is installed.
pub fn qemu_program() -> Option<std::path::PathBuf> {
    qemu::Qemu::find()
}
