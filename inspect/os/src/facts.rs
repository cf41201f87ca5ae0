// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What inspection finds out about one operating system.

use crate::bootloader::Bootloader;
use crate::fstab::{CryptVolume, Mount};
use crate::kernels::Kernel;
use crate::network::Network;
use crate::services::{AgentState, HypervisorTool};
use serde::{Serialize, Serializer};
use tranship_protocol::GuestPath;

/// Everything that is known about one operating system before anything is changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// Which operating system it is.
    pub os: OperatingSystem,
    /// The lines of `/etc/fstab`.
    pub mounts: Vec<Mount>,
    /// The lines of `/etc/crypttab`.
    pub crypt: Vec<CryptVolume>,
    /// Installed kernels, newest first.
    pub kernels: Vec<Kernel>,
    /// What starts the kernel.
    pub bootloader: Bootloader,
    /// Version of the kernel that starts unless somebody chooses another.
    pub default_kernel: Option<String>,
    /// Installed packages.
    pub packages: Packages,
    /// Tools of other hypervisors.
    pub tools: Vec<HypervisorTool>,
    /// Whether QEMU's guest agent is there.
    pub agent: AgentState,
    /// Configured network interfaces.
    pub network: Network,
    /// Whether SELinux labels matter.
    pub selinux: SeLinux,
    /// What the guest keeps its hardware clock in.
    pub clock: Clock,
    /// Time zone, such as `Europe/Berlin`.
    pub timezone: Option<String>,
    /// Directories below `/boot/efi/EFI`, which only guests that start by UEFI have.
    pub efi_directories: Vec<String>,
    /// Files that were not understood, in words.
    pub notes: Vec<String>,
}

/// Which operating system it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OperatingSystem {
    /// Kind of operating system.
    pub kind: Kind,
    /// Distribution: `debian`, `ubuntu`, `rhel`, `fedora`...; `unknown` if nothing says.
    pub distro: String,
    /// Distributions that are converted in the same way.
    pub family: Family,
    /// The name it gives itself.
    pub product_name: Option<String>,
    /// Major and minor version.
    pub version: Option<(u32, u32)>,
    /// Code name, such as `bookworm`.
    pub codename: Option<String>,
    /// Processor architecture of its programs, as `uname -m` says.
    pub arch: Option<String>,
    /// Host name.
    pub hostname: Option<String>,
    /// Short identifier of the osinfo database, such as `debian12`.
    pub osinfo: Option<String>,
    /// `deb`, `rpm`, `apk`, `pacman`.
    pub package_format: Option<String>,
    /// `apt`, `dnf`, `yum`, `zypper`, `apk`, `pacman`.
    pub package_management: Option<String>,
    /// What starts its services.
    pub init: Init,
}

/// Kind of operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Linux.
    Linux,
}

/// Distributions that are converted in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Debian, Ubuntu and what is made of them.
    Debian,
    /// Red Hat Enterprise Linux, Fedora and their rebuilds.
    RedHat,
    /// SUSE and openSUSE.
    Suse,
    /// ALT.
    Alt,
    /// Arch.
    Arch,
    /// Alpine.
    Alpine,
    /// Anything else.
    Other,
}

/// What starts the services of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// systemd, with its version if a file says.
    Systemd {
        /// Version, such as 252.
        version: Option<u32>,
    },
    /// System V init, or Upstart, which reads the same links.
    SysV,
    /// OpenRC.
    OpenRc,
    /// None of these.
    Unknown,
}

/// Installed packages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Packages {
    /// Read from dpkg's status file, sorted by name.
    Dpkg(Vec<Package>),
    /// There is a database that this version does not read.
    NotRead {
        /// Format of the packages, such as `rpm`.
        format: String,
    },
    /// No package database was found.
    None,
}

impl Packages {
    /// The installed package of this name; `None` also where packages were not read.
    pub fn find(&self, name: &str) -> Option<&Package> {
        match self {
            Self::Dpkg(list) => list.iter().find(|package| package.name == name),
            Self::NotRead { .. } | Self::None => None,
        }
    }

    /// The packages that were read.
    pub fn list(&self) -> &[Package] {
        match self {
            Self::Dpkg(list) => list,
            Self::NotRead { .. } | Self::None => &[],
        }
    }
}

/// One installed package.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Package {
    /// Name without architecture.
    pub name: String,
    /// Version as the package manager writes it.
    pub version: String,
    /// Architecture.
    pub arch: String,
}

/// Whether SELinux labels matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SeLinux {
    /// No SELinux, or it is switched off.
    Off,
    /// Files need labels.
    On,
}

/// What a guest keeps its hardware clock in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// Universal time, the default of Linux.
    Utc,
    /// Local time.
    Local,
}

/// Writes a path as text, with replacement characters where it is not UTF-8.
pub fn path_text<S: Serializer>(path: &GuestPath, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&path.to_text())
}

/// Writes a path that may be absent as text.
pub fn optional_path_text<S: Serializer>(
    path: &Option<GuestPath>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => to.serialize_some(&path.to_text()),
        None => to.serialize_none(),
    }
}

/// Writes paths as a list of texts.
pub fn path_list_text<S: Serializer>(paths: &[GuestPath], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(paths.iter().map(GuestPath::to_text))
}
