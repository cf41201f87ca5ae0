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
mod control;
mod core_file;
mod drive;
mod dumps;
mod error;
mod guest;
mod launch;
mod own;
mod postmortem;
mod process;
mod qemu;
mod session;
mod snapshots;

pub use backend::{
    Backend, Choice, Machine, MachineSpec, Preference, SnapshotFiles, SpecDisk, choose,
};
pub use control::{Appliance, Status, dump, running};
pub use drive::{Drive, Image, Server};
pub use error::{Error, ErrorKind, Result};
pub use guest::{Boot, Guest, Settings};
pub use launch::{LaunchTimes, Start};
pub use own::MACHINE_NAME;
pub use process::Process;
pub use session::{CancelToken, Observer, Patience, Session, Silent};
pub use tranship_protocol as protocol;

/// Runs a machine in this process, which was started for nothing else: how it ended, in
/// words.
///
/// `number` is the only word on the command line.
///
/// # Errors
///
/// [`ErrorKind::Launch`] if the machine could not be built or could not go on.
pub fn run_machine(number: Option<&std::ffi::OsStr>) -> Result<String> {
    let number = number.and_then(|number| number.to_str()).and_then(|number| number.parse().ok());
    let number = number.ok_or_else(|| {
        Error::new(ErrorKind::Usage, "the number of a descriptor is expected, as only we give it")
    })?;
    match tranship_vmm::child::run(number) {
        Ok(tranship_vmm::Ending::Failed(why)) => Err(Error::new(ErrorKind::Launch, why)),
        Ok(ending) => Ok(ending.to_string()),
        Err(error) => Err(Error::new(ErrorKind::Launch, "the machine").because(error)),
    }
}

/// The QEMU that [`choose`] would start, if one is installed.
pub fn qemu_program() -> Option<std::path::PathBuf> {
    qemu::Qemu::find()
}
