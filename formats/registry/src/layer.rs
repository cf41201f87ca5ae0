// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an open disk consists of.

use crate::Format;
use std::path::PathBuf;
use std::sync::Arc;
use tranship_block::{BlockDevice, Storage};
use tranship_qcow2::Qcow2;
use tranship_vdi::Vdi;
use tranship_vhdx::Vhdx;
use tranship_vmdk::Vmdk;
use tranship_vpc::Vpc;

/// An open disk.
#[derive(Debug)]
pub struct Opened {
    /// What the guest sees.
    pub device: Arc<dyn BlockDevice>,
    /// The format of the first image.
    pub format: Format,
    /// The first image.
    pub path: PathBuf,
    /// All images that contribute, the first one first.
    pub chain: Vec<(PathBuf, Format)>,
    /// What the user should know, each a sentence without a full stop.
    pub warnings: Vec<String>,
    /// The images themselves, the first one first. The parts of a split disk are one.
    pub layers: Vec<Layer>,
}

impl Opened {
    /// The first image, if it is of this format.
    pub fn qcow2(&self) -> Option<&Arc<Qcow2>> {
        match &self.layers.first()?.disk {
            Disk::Qcow2(disk) => Some(disk),
            _ => None,
        }
    }
}

/// One image of a chain.
#[derive(Debug)]
pub struct Layer {
    /// What its user or the image above it calls it.
    pub name: String,
    /// Where it was found; the name, if it is in no file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The bytes of its file.
    pub file: Arc<dyn BlockDevice>,
    /// The same, if it may be changed.
    pub storage: Option<Arc<dyn Storage>>,
    /// What it holds.
    pub disk: Disk,
}

/// The disk in an image, by its format.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Disk {
    /// The bytes of a file.
    Raw(Arc<dyn BlockDevice>),
    /// QCOW2.
    Qcow2(Arc<Qcow2>),
    /// VMDK, with all its extents.
    Vmdk(Arc<Vmdk>),
    /// VHD.
    Vpc(Arc<Vpc>),
    /// VHDX.
    Vhdx(Arc<Vhdx>),
    /// VDI.
    Vdi(Arc<Vdi>),
    /// A format that is only read.
    Other(Arc<dyn BlockDevice>),
}

impl Disk {
    /// The disk as every format has it.
    pub fn device(&self) -> Arc<dyn BlockDevice> {
        match self {
            Self::Raw(device) | Self::Other(device) => Arc::clone(device),
            Self::Qcow2(disk) => Arc::<Qcow2>::clone(disk),
            Self::Vmdk(disk) => Arc::<Vmdk>::clone(disk),
            Self::Vpc(disk) => Arc::<Vpc>::clone(disk),
            Self::Vhdx(disk) => Arc::<Vhdx>::clone(disk),
            Self::Vdi(disk) => Arc::<Vdi>::clone(disk),
        }
    }
}
