// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The machine around the guest, and what the user wants.

use serde::Serialize;

/// The machine that the guest leaves and the one it moves to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MachineFacts {
    /// Disks in their order.
    pub disks: Vec<Disk>,
    /// Network cards in their order.
    pub nics: Vec<Nic>,
    /// How it starts.
    pub firmware: Firmware,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// Linux' name for it before the move, such as `sda`.
    pub source_name: String,
    /// Linux' name for it afterwards, such as `vda`.
    pub target_name: String,
    /// What lies on it.
    pub volumes: Vec<Volume>,
}

/// A filesystem, swap space or encrypted volume on a partition or a whole disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// Partition number; `None` if it fills the whole disk.
    pub partition: Option<u32>,
    /// Its UUID, as `blkid` prints it.
    pub uuid: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// UUID of the partition.
    pub partuuid: Option<String>,
}

/// One network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Nic {
    /// Hardware address, which it keeps.
    pub mac: String,
    /// PCI slot number that the old firmware announced (`pciSlotNumber` of VMware), from
    /// which names such as `ens192` were made.
    pub slot: Option<u32>,
}

/// How a machine starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// By a boot sector.
    #[default]
    Bios,
    /// By a program on the EFI system partition.
    Uefi,
}

/// Who makes the initramfs ready for KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum InitramfsMethod {
    /// An archive with the drivers is appended; no program of the guest is run.
    #[default]
    Append,
    /// The guest's own tool makes it anew.
    Guest,
}

/// A package that is put into the guest for its first start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AgentPackage {
    /// File name, such as `qemu-guest-agent_7.2_amd64.deb`.
    pub name: String,
    /// The file.
    #[serde(skip)]
    pub content: Vec<u8>,
}

/// What the user wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Options {
    /// Who makes the initramfs ready.
    pub initramfs: InitramfsMethod,
    /// Add `console=ttyS0` where no console is named yet, so that `virsh console` works.
    pub serial_console: bool,
    /// Install QEMU's guest agent at the first start.
    pub install_agent: bool,
    /// Remove the packages of the old hypervisor's tools at the first start.
    pub remove_tools: bool,
    /// Packages for the agent, for guests that reach no repository.
    pub agent_packages: Vec<AgentPackage>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            initramfs: InitramfsMethod::Append,
            serial_console: true,
            install_agent: true,
            remove_tools: true,
            agent_packages: Vec::new(),
        }
    }
}
