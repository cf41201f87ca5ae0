// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Domains as libvirt describes them: the metadata of a converted guest.
//!
//! [`Domain`] has what we write and what a boot test reads, and nothing else. The layout of
//! what [`Domain::to_xml`] writes is the one that virt-v2v's users expect: single quotes,
//! two spaces, and the elements in virt-v2v's order.

mod osinfo;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub(crate) use osinfo::osinfo_url;
pub(crate) use read::LONGEST;

use std::fmt;
use std::path::PathBuf;

/// A virtual machine in libvirt's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name; not empty, without slashes and control characters.
    pub name: String,
    /// VM generation id.
    pub genid: Option<String>,
    /// The operating system, as the URL that the osinfo database has for it.
    pub osinfo: Option<String>,
    /// Memory in KiB.
    pub memory_kib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// How they are arranged.
    pub topology: Option<Topology>,
    /// Architecture, such as `x86_64`.
    pub arch: String,
    /// Machine type: `q35`, `pc`, or a versioned name of one of them.
    pub machine: String,
    /// How it boots.
    pub firmware: Firmware,
    /// What its clock shows at the start.
    pub clock: Clock,
    /// Fixed disks in order.
    pub disks: Vec<Disk>,
    /// Drives without media.
    pub drives: Vec<Drive>,
    /// Model of the SCSI controllers; `None` for libvirt's choice.
    pub scsi_model: Option<String>,
    /// Network cards in order.
    pub nics: Vec<Nic>,
    /// Model of the sound card.
    pub sound: Option<String>,
    /// Whether it has virtio's source of random numbers.
    pub rng: bool,
    /// Whether it has virtio's memory balloon.
    pub balloon: bool,
    /// Whether it can tell of a kernel panic (pvpanic).
    pub panic: bool,
}

impl Domain {
    /// A machine of today without disks and network cards: 64-bit x86, q35, BIOS, clock in
    /// UTC, with all virtio devices that need no configuration.
    pub fn new(name: impl Into<String>, memory_kib: u64, vcpus: u32) -> Self {
        Self {
            name: name.into(),
            genid: None,
            osinfo: None,
            memory_kib,
            vcpus,
            topology: None,
            arch: "x86_64".into(),
            machine: "q35".into(),
            firmware: Firmware::Bios,
            clock: Clock::Utc,
            disks: Vec::new(),
            drives: Vec::new(),
            scsi_model: None,
            nics: Vec::new(),
            sound: None,
            rng: true,
            balloon: true,
            panic: true,
        }
    }
}

/// How virtual CPUs are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Cores in each socket.
    pub cores: u32,
    /// Threads in each core.
    pub threads: u32,
}

/// How a machine boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Firmware {
    /// A PC BIOS.
    #[default]
    Bios,
    /// UEFI.
    Uefi {
        /// Whether only signed programs are started.
        secure_boot: bool,
    },
}

/// What the machine's clock shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// Universal time, as Linux wants it.
    #[default]
    Utc,
    /// Local time, as Windows wants it.
    Localtime,
}

/// What a disk or a drive hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// AHCI.
    Sata,
    /// Parallel ATA.
    Ide,
    /// SCSI.
    Scsi,
    /// USB mass storage.
    Usb,
    /// The floppy controller.
    Fdc,
}

/// Every bus with libvirt's name and the beginning of its target names.
const BUSES: [(Bus, &str, &str); 6] = [
    (Bus::Virtio, "virtio", "vd"),
    (Bus::Sata, "sata", "sd"),
    (Bus::Ide, "ide", "hd"),
    (Bus::Scsi, "scsi", "sd"),
    (Bus::Usb, "usb", "sd"),
    (Bus::Fdc, "fdc", "fd"),
];

impl Bus {
    /// The name that libvirt has for it.
    pub fn name(self) -> &'static str {
        BUSES.iter().find(|(bus, ..)| *bus == self).map_or("", |(_, name, _)| name)
    }

    fn from_name(name: &str) -> Option<Self> {
        BUSES.iter().find(|(_, known, _)| *known == name).map(|(bus, ..)| *bus)
    }

    /// The bus that libvirt assumes for a target called `target`.
    fn from_target(target: &str) -> Option<Self> {
        match target.get(..2)? {
            "vd" => Some(Self::Virtio),
            "sd" => Some(Self::Scsi),
            "hd" => Some(Self::Ide),
            "fd" => Some(Self::Fdc),
            _ => None,
        }
    }

    /// The target name of the `index`th disk or drive (from 0) whose names begin as on this
    /// bus: `vda`, `vdb`, … `vdz`, `vdaa`.
    pub fn target(self, index: usize) -> String {
        let prefix = BUSES.iter().find(|(bus, ..)| *bus == self).map_or("", |(.., prefix)| prefix);
        let mut letters = Vec::new();
        let mut rest = Some(index);
        while let Some(index) = rest {
            letters.push(char::from(b'a' + u8::try_from(index % 26).unwrap_or(0)));
            rest = (index / 26).checked_sub(1);
        }
        prefix.chars().chain(letters.into_iter().rev()).collect()
    }
}

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A fixed disk in a file or on a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The absolute path.
    pub path: PathBuf,
    /// QEMU's name of the format.
    pub format: String,
    /// libvirt's name for the disk, such as `vda`.
    pub target: String,
    /// What it hangs on.
    pub bus: Bus,
    /// Its turn in booting, from 1.
    pub boot_order: Option<u32>,
}

/// A drive for removable media, with nothing in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// What kind of media it takes.
    pub kind: DriveKind,
    /// libvirt's name for it, such as `sda` or `fda`.
    pub target: String,
    /// What it hangs on.
    pub bus: Bus,
}

/// What kind of media a drive takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriveKind {
    /// CD or DVD.
    Cdrom,
    /// Floppy disk.
    Floppy,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// MAC address; `None` for a random one.
    pub mac: Option<String>,
    /// What it is connected to.
    pub connection: Connection,
    /// Model in libvirt's words, such as `virtio` or `e1000`.
    pub model: String,
}

/// What a network card is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Connection {
    /// A virtual network of libvirt.
    Network(String),
    /// A bridge of the host.
    Bridge(String),
    /// QEMU's own network. What is read for anything that is neither of the others.
    User,
}
