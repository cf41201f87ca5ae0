// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can run the appliance's machine, and which of them is chosen.

use crate::drive::Image;
use crate::own::Own;
use crate::qemu::Qemu;
use crate::{Error, ErrorKind, Result};
use std::fmt::Debug;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tranship_kvm::Verdict;

/// A disk of the machine: an export of our NBD server, or an image.
#[derive(Clone, Debug)]
pub struct SpecDisk {
    /// Name of the export.
    pub export: String,
    /// The image instead, for backends that open images.
    pub image: Option<Arc<Image>>,
    /// Serial number by which the agent knows the disk.
    pub serial: String,
    /// Whether the machine may only read it.
    pub read_only: bool,
    /// Logical sector size in bytes.
    pub sector_size: u32,
    /// Whether the machine's flushes reach the disk. Not needed where a crash means that
    /// the disk is thrown away.
    pub durable: bool,
}

/// Everything that a machine is made of.
#[derive(Debug)]
pub struct MachineSpec {
    /// The uncompressed kernel.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// The read-only image with tools.
    pub tools: PathBuf,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Whether the memory is to be pages of hugetlbfs.
    pub huge_pages: bool,
    /// Processors.
    pub processors: u32,
    /// More words for the kernel's command line.
    pub append: String,
    /// Socket of our NBD server.
    pub disk_socket: PathBuf,
    /// The guest's disks in order.
    pub disks: Vec<SpecDisk>,
    /// The machine's end of the control port.
    pub control: UnixStream,
    /// The machine's end of the bulk port.
    pub bulk: UnixStream,
}

/// A running machine; dropping it ends it.
pub trait Machine: Debug + Send + Sync {
    /// How it ended, in words, if it has.
    fn ended(&self) -> Option<String>;

    /// Waits for its end, at most `limit`; whether it has ended.
    fn wait(&self, limit: Duration) -> bool;

    /// Ends it at once.
    fn kill(&self);

    /// The end of what its console printed.
    fn console(&self) -> String;

    /// Plugs a disk in while the machine runs; the agent is asked to wait for it afterwards.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Launch`] if the machine does not take it.
    fn add_disk(&self, disk: &SpecDisk) -> Result<()>;

    /// Unplugs the disk with this serial number, which the agent has let go.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Launch`] if it is not there or does not leave.
    fn remove_disk(&self, serial: &str) -> Result<()>;

    /// Has the meters of disks that the machine serves itself count what it has counted. To be
    /// called before it goes away; what is not to be had is told in the trace alone. Backends whose disks
    /// are all served by this process have nothing to collect.
    fn collect(&self) {}

    /// Writes the machine, which has no disk of the user, into `files`. It stands still
    /// meanwhile and goes on afterwards.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Launch`] if the machine cannot be saved; it goes on all the same.
    fn save(&self, files: &SnapshotFiles) -> Result<()>;

    /// Writes the memory as an ELF core file, whether the guest runs or has come to its end by
    /// itself. It stands still meanwhile and goes on afterwards if it ran. `vmcoreinfo` is where
    /// the kernel's notes for debuggers are, address and size.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Launch`] if the machine does not do it.
    fn dump(&self, to: &File, vmcoreinfo: Option<(u64, u64)>) -> Result<()>;
}

/// What a saved machine is kept in: two files, open for reading and writing when it is saved and
/// for reading when it is restored.
#[derive(Debug)]
pub struct SnapshotFiles {
    /// Processors and devices.
    pub state: File,
    /// The memory, if the backend keeps it apart.
    pub memory: File,
}

/// Something that can run machines.
pub trait Backend: Debug + Send + Sync {
    /// Its name, as `--backend` takes it.
    fn name(&self) -> &'static str;

    /// Whether the machine opens images itself instead of asking our server for them.
    fn opens_images(&self) -> bool {
        false
    }

    /// How many disks can be plugged into a running machine.
    fn most_plugged(&self) -> usize;

    /// Everything about the backend and this `spec` that a snapshot depends on, besides the files
    /// that the machine boots from and the host's processor; `None` if it saves no machines.
    fn identity(&self, spec: &MachineSpec) -> Option<String>;

    /// Starts a machine, or goes on with one that was saved for the same `spec` with no disks.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Launch`] if the machine cannot even be started or the snapshot not be used.
    fn start(&self, spec: MachineSpec, from: Option<SnapshotFiles>) -> Result<Box<dyn Machine>>;
}

/// What the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// The best that works here.
    #[default]
    Auto,
    /// Our own monitor on the host's KVM, whatever the probe says.
    Kvm,
    /// QEMU with the host's KVM, whatever the probe says.
    QemuKvm,
    /// QEMU with emulation.
    Tcg,
}

impl FromStr for Preference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "qemu-kvm" => Ok(Self::QemuKvm),
            "tcg" | "qemu-tcg" => Ok(Self::Tcg),
            other => Err(Error::new(
                ErrorKind::Usage,
                format!("unknown backend {other:?}, expected auto, kvm, qemu-kvm or tcg"),
            )),
        }
    }
}

/// Which backend is used, and why.
#[derive(Debug)]
pub struct Choice {
    /// The backend; `None` if nothing can run here.
    pub backend: Option<Box<dyn Backend>>,
    /// One sentence that says why.
    pub reason: String,
    /// What to install or do for something better; empty if there is nothing better.
    pub remedy: String,
    /// What the probe of KVM found; `None` if it was not asked.
    pub verdict: Option<Verdict>,
}

impl Choice {
    /// The backend, or an error that says what to install.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoBackend`] if there is none.
    pub fn into_backend(self) -> Result<Box<dyn Backend>> {
        self.backend
            .ok_or_else(|| Error::new(ErrorKind::NoBackend, self.reason).with_remedy(self.remedy))
    }
}

/// Time after which the probe gives KVM up.
const PROBE_LIMIT: Duration = Duration::from_millis(1500);

/// Chooses the backend: the device node alone proves nothing, so KVM has to run a
/// micro-guest first.
///
/// `monitor` is the program that can be our own monitor: it calls [`crate::run_machine`] when
/// it is called by [`crate::MACHINE_NAME`]. Without one only QEMU is considered.
pub fn choose(preference: Preference, monitor: Option<&Path>) -> Choice {
    let chosen = |backend: Box<dyn Backend>, reason: String| Choice {
        backend: Some(backend),
        reason,
        remedy: String::new(),
        verdict: None,
    };
    let no_qemu = |reason: String| Choice {
        backend: None,
        reason: format!("{reason}no qemu-system-x86_64 is installed to run the appliance"),
        remedy: "install QEMU: apt-get install qemu-system-x86, or dnf install qemu-kvm".into(),
        verdict: None,
    };
    let qemu = |kvm| Qemu::find().map(|program| Box::new(Qemu::new(program, kvm)) as _);
    let own = || monitor.map(|program| Box::new(Own::new(program)) as _);
    match preference {
        Preference::Tcg => match qemu(false) {
            Some(qemu) => chosen(qemu, "QEMU with emulation, as requested".into()),
            None => no_qemu(String::new()),
        },
        Preference::QemuKvm => match qemu(true) {
            Some(qemu) => chosen(qemu, "QEMU with KVM, as requested".into()),
            None => no_qemu(String::new()),
        },
        Preference::Kvm => match own().or_else(|| qemu(true)) {
            Some(backend) => chosen(backend, "KVM, as requested".into()),
            None => no_qemu(String::new()),
        },
        Preference::Auto => {
            let verdict = tranship_kvm::probe(PROBE_LIMIT);
            let mut choice = if verdict.usable {
                match own().or_else(|| qemu(true)) {
                    Some(backend) => chosen(backend, verdict.reason.clone()),
                    None => no_qemu(format!("{}, but ", verdict.reason)),
                }
            } else {
                let why = format!("KVM is not usable ({})", verdict.reason);
                match qemu(false) {
                    Some(qemu) => Choice {
                        remedy: verdict.remedy.clone(),
                        ..chosen(qemu, format!("QEMU with emulation (TCG), since {why}"))
                    },
                    None => no_qemu(format!("{why}, and ")),
                }
            };
            choice.verdict = Some(verdict);
            choice
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preferences_have_names() {
        assert_eq!("auto".parse::<Preference>().unwrap(), Preference::Auto);
        assert_eq!("qemu-tcg".parse::<Preference>().unwrap(), Preference::Tcg);
        assert_eq!("xen".parse::<Preference>().unwrap_err().kind(), ErrorKind::Usage);
    }
}
