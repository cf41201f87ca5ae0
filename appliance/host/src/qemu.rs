// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backend that runs the machine in QEMU, with KVM or with emulation.

mod arguments;
mod confine;
mod machine;
mod qmp;
#[cfg(test)]
mod tests;

use crate::backend::{Backend, Machine, MachineSpec, SnapshotFiles};
use crate::process::Process;
use crate::snapshots::stamp;
use crate::{Error, ErrorKind, Result, clock};
use arguments::{Chipset, Descriptors, SLOTS};
use machine::QemuMachine;
use qmp::Qmp;
use rustix::fd::{AsRawFd, OwnedFd};
use std::fmt::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where distributions put the program, in the order of preference.
const PLACES: &[&str] = &[
    "/usr/bin/qemu-system-x86_64",
    "/usr/local/bin/qemu-system-x86_64",
    "/usr/bin/qemu-kvm",
    "/usr/libexec/qemu-kvm",
];

/// The name of RHEL's QEMU, which has one chipset.
const RHEL_NAME: &str = "qemu-kvm";

/// QEMU, with or without KVM.
#[derive(Clone, Debug)]
pub(crate) struct Qemu {
    program: PathBuf,
    kvm: bool,
}

impl Qemu {
    pub(crate) fn new(program: PathBuf, kvm: bool) -> Self {
        Self { program, kvm }
    }

    /// The installed QEMU, if there is one.
    pub(crate) fn find() -> Option<PathBuf> {
        PLACES.iter().map(PathBuf::from).find(|place| place.is_file())
    }

    fn chipset(&self) -> Chipset {
        if self.program.file_name().is_some_and(|name| name == RHEL_NAME) {
            Chipset::Q35
        } else {
            Chipset::Pc
        }
    }

    fn machine<'a>(&self, spec: &'a MachineSpec, tsc_khz: Option<u64>) -> arguments::Machine<'a> {
        arguments::Machine { kvm: self.kvm, chipset: self.chipset(), tsc_khz, spec }
    }

    /// Has `command` open no more than the machine needs.
    fn confine(&self, command: &mut Command, spec: &MachineSpec) -> Result<()> {
        let files = [&*spec.kernel, &*spec.initramfs, &*spec.tools];
        let devices: &[&Path] = if self.kvm { &[Path::new("/dev/kvm")] } else { &[] };
        if let Some(rules) = confine::rules(&self.program, &files, devices)? {
            confine::restrict(command, rules);
        }
        Ok(())
    }
}

impl Backend for Qemu {
    fn name(&self) -> &'static str {
        if self.kvm { "qemu-kvm" } else { "qemu-tcg" }
    }

    fn most_plugged(&self) -> usize {
        match self.chipset() {
            Chipset::Pc => SLOTS,
            Chipset::Q35 => 0,
        }
    }

    fn identity(&self, spec: &MachineSpec) -> Option<String> {
        if self.chipset() == Chipset::Q35 {
            return None;
        }
        // The frequency is measured: it is never quite the same, and the host's is.
        let arguments = self.machine(spec, None).arguments(Descriptors::default()).ok()?;
        let mut text = format!("QEMU {arguments:?}\n{}", stamp(&self.program)?);
        match arguments::quick_firmware() {
            Some(firmware) => text.push_str(&stamp(firmware)?),
            None => {
                let _ = writeln!(text, "its own firmware");
            }
        }
        Some(text)
    }

    fn start(&self, spec: MachineSpec, from: Option<SnapshotFiles>) -> Result<Box<dyn Machine>> {
        let (near, far) = UnixStream::pair()
            .map_err(|error| Error::new(ErrorKind::Io, "a socket pair for QEMU").because(error))?;
        let descriptors = Descriptors {
            control: spec.control.as_raw_fd(),
            bulk: spec.bulk.as_raw_fd(),
            qmp: far.as_raw_fd(),
        };
        let tsc_khz = if self.kvm || from.is_some() { None } else { clock::tsc_khz() };
        let mut command = Command::new(&self.program);
        command.args(self.machine(&spec, tsc_khz).arguments(descriptors)?);
        if from.is_some() {
            command.args(["-incoming", "defer"]);
        }
        self.confine(&mut command, &spec)?;
        tracing::debug!(?command, "starting QEMU");
        let MachineSpec { control, bulk, disks, disk_socket, .. } = spec;
        let inherited = [control, bulk, far].map(OwnedFd::from).into();
        let process = Process::start(command, inherited)?;
        let disk_socket = disk_socket.to_string_lossy().into_owned();
        let machine = QemuMachine::new(process, Qmp::new(near)?, disk_socket, &disks);
        if let Some(files) = from {
            machine.restore(&files)?;
        }
        Ok(Box::new(machine))
    }
}
