// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is to be converted, and into what.

use std::path::PathBuf;
use std::str::FromStr;
use tranship_appliance::Settings;
use tranship_block::Meter;

/// Where the guest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// An OVA file, a folder with an OVF in it, or an OVF file (`-i ova`).
    Ova(PathBuf),
    /// A VMware virtual machine's .vmx file (`-i vmx`).
    Vmx(PathBuf),
    /// Disk images without a description (`-i disk`).
    Disks {
        /// The images, in order.
        paths: Vec<PathBuf>,
        /// Their format (`-if`); found by looking if absent.
        format: Option<String>,
    },
}

/// Format of the target disks (`-of`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TargetFormat {
    /// Plain bytes, virt-v2v's default.
    #[default]
    Raw,
    /// QCOW2 version 3.
    Qcow2,
}

impl TargetFormat {
    /// The name, as in libvirt's XML.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Which of several operating systems is converted (`--root`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RootChoice {
    /// The only one; several are an error.
    #[default]
    Single,
    /// The first one.
    First,
    /// The one on this device.
    Device(String),
}

impl FromStr for RootChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "single" => Ok(Self::Single),
            "first" => Ok(Self::First),
            device if device.starts_with("/dev/") => Ok(Self::Device(device.to_owned())),
            other => Err(format!("{other:?} is not single, first or a device such as /dev/sda2")),
        }
    }
}

/// Whether a network name stands for a bridge or a virtual network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkType {
    /// A virtual network of libvirt.
    Network,
    /// A bridge of the host.
    Bridge,
}

/// One rule of `--network`, `--bridge` or `--mac`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkRule {
    /// Networks (or bridges) called `from` become `to`; without `from` all others do.
    Name {
        /// Which of the two kinds of names it is about; it does not change.
        kind: NetworkType,
        /// The source's name; `None` for the default rule.
        from: Option<String>,
        /// The target's name.
        to: String,
    },
    /// The NIC with this MAC address is connected to `to`.
    Mac {
        /// The address, in lower case.
        mac: String,
        /// Network or bridge.
        kind: NetworkType,
        /// The target's name.
        to: String,
    },
}

/// How an encrypted volume is opened (`--key`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The device, the UUID of the encrypted volume, or `all`.
    pub id: String,
    /// The key itself.
    pub secret: Vec<u8>,
}

/// Who renews the guest's initramfs (`--rebuild-initramfs`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitramfsMode {
    /// We append an archive with the drivers; no program of the guest runs.
    #[default]
    Append,
    /// The guest's own tool, in the appliance.
    Guest,
}

/// A conversion to a folder of this machine (`-o local`).
// The booleans are independent switches of the command line.
#[allow(clippy::struct_excessive_bools)]
#[derive(Clone, Debug)]
pub struct Request {
    /// Where the guest is.
    pub input: Input,
    /// The folder for disks and XML (`-os`).
    pub folder: PathBuf,
    /// Format of the disks (`-of`).
    pub format: TargetFormat,
    /// Whether the disks get all their space at once (`-oa preallocated`).
    pub preallocated: bool,
    /// The guest's new name (`-on`).
    pub name: Option<String>,
    /// Which operating system.
    pub root: RootChoice,
    /// Networks of the target.
    pub networks: Vec<NetworkRule>,
    /// Keys of encrypted volumes.
    pub keys: Vec<Key>,
    /// Whether unused blocks are left out.
    pub trim: bool,
    /// Who renews the initramfs.
    pub initramfs: InitramfsMode,
    /// Whether a manifest's checksums are compared.
    pub verify_manifest: bool,
    /// What counts the disks of source and target, and holds them to a rate.
    pub meter: Meter,
    /// Whether results of an earlier run with other inputs are replaced.
    pub force: bool,
    /// How the appliance is started.
    pub appliance: Settings,
    /// Where the appliance is kept and what it is made of.
    pub image: tranship_appliance_image::BuildOptions,
}
