// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a source says about its virtual machine.

use crate::files::Files;
use crate::manifest::Manifest;
use crate::{Result, image};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tranship_block::BlockDevice;

/// A virtual machine as its source describes it.
#[derive(Debug, Serialize)]
pub struct Source {
    /// Name of the guest.
    pub name: String,
    /// What kind of source it was read from.
    pub kind: SourceKind,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// How they are arranged, if the source says so.
    pub cpu_topology: Option<CpuTopology>,
    /// How it boots.
    pub firmware: Firmware,
    /// Whether secure boot is switched on.
    pub secure_boot: bool,
    /// VM generation id in libvirt's form.
    pub genid: Option<String>,
    /// Fixed disks in the guest's order.
    pub disks: Vec<SourceDisk>,
    /// Network cards in order.
    pub nics: Vec<SourceNic>,
    /// CD and floppy drives.
    pub removables: Vec<Removable>,
    /// Sound card model.
    pub sound: Option<String>,
    /// What the source says the guest's operating system is, in the words of its product.
    pub guest_os: Option<String>,
    /// What was odd and what was left out.
    pub warnings: Vec<String>,
    #[serde(skip)]
    pub(crate) manifest: Option<Manifest>,
}

impl Source {
    /// Compares the files of the source with the checksums that came with it.
    ///
    /// `progress` is called with the bytes done and the bytes in all; `cancelled` is looked
    /// at just as often. The answer is warnings: files that are missing, or that there is
    /// no manifest at all.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Mismatch`] if contents differ, [`crate::ErrorKind::Cancelled`],
    /// and whatever reading the files brings up.
    pub fn verify_manifest(
        &self,
        progress: &dyn Fn(u64, u64),
        cancelled: &AtomicBool,
    ) -> Result<Vec<String>> {
        match &self.manifest {
            Some(manifest) => manifest.verify(progress, cancelled),
            None => Ok(vec!["there is no manifest: contents cannot be verified".to_owned()]),
        }
    }
}

/// What kind of source a guest came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// An OVF package in a tar archive.
    Ova,
    /// An OVF package as files in a folder.
    Ovf,
    /// A VMX file with its disks.
    Vmx,
    /// Disks without a description.
    Disks,
}

/// How virtual CPUs are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CpuTopology {
    /// Number of sockets.
    pub sockets: u32,
    /// Cores in each of them.
    pub cores_per_socket: u32,
}

impl CpuTopology {
    /// The arrangement of `vcpus` with so many cores per socket, if it comes out even.
    pub(crate) fn of(vcpus: u32, cores_per_socket: u32) -> Option<Self> {
        let even = cores_per_socket > 0 && vcpus.checked_rem(cores_per_socket) == Some(0);
        let sockets = vcpus.checked_div(cores_per_socket)?;
        (even && sockets > 0).then_some(Self { sockets, cores_per_socket })
    }
}

/// How a guest boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    /// A PC BIOS.
    Bios,
    /// UEFI.
    Uefi,
    /// The source does not say; the disks will.
    #[default]
    Unknown,
}

/// What a disk or drive hangs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Controller {
    /// IDE or ATA.
    Ide,
    /// SCSI, with the model if the source names one.
    Scsi(Option<String>),
    /// SATA (AHCI).
    Sata,
    /// NVMe.
    Nvme,
    /// The source does not say.
    Unknown,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceNic {
    /// MAC address, `aa:bb:cc:dd:ee:ff`.
    pub mac: Option<String>,
    /// What it is connected to.
    pub network: NetworkKind,
    /// Model in the words of the source.
    pub model: Option<String>,
    /// Number of its PCI slot, from which Linux makes names such as `ens192`.
    pub slot: Option<u32>,
}

/// What a network card is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// A bridge of this name.
    Bridge(String),
    /// A virtual network of this name.
    Network(String),
}

/// A drive for media.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Removable {
    /// What kind of media.
    pub kind: RemovableKind,
    /// What it hangs on.
    pub controller: Controller,
    /// Its place there.
    pub unit: Option<u32>,
}

/// What kind of media a drive takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RemovableKind {
    /// CD or DVD.
    Cdrom,
    /// Floppy disk.
    Floppy,
}

/// Where a disk lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Location {
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
    },
    /// A part of an archive.
    Member {
        /// The archive.
        archive: PathBuf,
        /// First byte of the member's data.
        offset: u64,
        /// Bytes of data.
        len: u64,
    },
    /// An export of an NBD server.
    Export {
        /// Its URI.
        uri: String,
    },
}

/// A fixed disk.
#[derive(Clone, Debug, Serialize)]
pub struct SourceDisk {
    /// Its number among the guest's disks, from 0.
    pub index: usize,
    /// What it hangs on.
    pub controller: Controller,
    /// Its place there.
    pub unit: Option<u32>,
    /// Image format, for example `vmdk`.
    pub format: String,
    /// File or archive member, for humans.
    pub name: String,
    /// Where that is.
    pub location: Location,
    #[serde(skip)]
    pub(crate) files: Arc<Files>,
}

impl SourceDisk {
    /// The bytes that the guest sees, for reading. Other files of the image are found
    /// among the files of the source only.
    ///
    /// # Errors
    ///
    /// Whatever opening the image brings up; a snapshot without its parent is
    /// [`crate::ErrorKind::Unsupported`].
    pub fn open(&self) -> Result<Arc<dyn BlockDevice>> {
        image::open(&self.files, &self.name, &self.format)
    }
}
