// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk of the guest, and how its contents reach the machine.

use crate::backend::SpecDisk;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use tranship_block::{BlockDevice, DiskMeter};
use tranship_nbd::Export;
use tranship_protocol::{disk_name, disk_serial};
use tranship_vmm::channel::MOST_DESCRIPTORS;

/// A disk of the guest.
#[derive(Clone, Debug)]
pub struct Drive {
    /// Its contents.
    pub device: Arc<dyn BlockDevice>,
    /// Whether the appliance may only read it.
    pub read_only: bool,
    /// Whether the appliance's flushes reach it. Not needed for a disk that is thrown away
    /// if anything fails.
    pub durable: bool,
    /// The image that `device` was opened from, if its contents are to be had there, too: our own
    /// monitor then opens it in its own process. `device` is not used any more in that case, and
    /// given up if nobody else has it.
    pub image: Option<Image>,
}

/// An image by the files that it consists of.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its path.
    pub path: PathBuf,
    /// Its format's name; recognised if it is not given.
    pub format: Option<String>,
    /// Its files under the names by which it asks for them, and whether they are written.
    pub files: Arc<Vec<(PathBuf, bool, File)>>,
    /// Whether it is only read, and what is written is thrown away.
    pub discard: bool,
    /// What counts it, and what it is held to. It knows the image's files, and gets the figures of
    /// a machine that opens the image when that has ended.
    pub meter: DiskMeter,
}

impl Image {
    /// Whether it fits into one message: its names, which have to be text, and its descriptors
    /// with one for what is written.
    fn travels(&self) -> bool {
        let names = self.files.iter().map(|(path, _, _)| path).chain([&self.path]);
        let lengths = names.map(|path| path.to_str().map(str::len));
        let bytes = lengths.sum::<Option<usize>>();
        self.files.len() < MOST_DESCRIPTORS && bytes.is_some_and(|bytes| bytes <= MOST_NAMES)
    }
}

/// Bytes of all names in a message. In JSON each can become six.
const MOST_NAMES: usize = 8 << 10;

/// A disk that the guest has.
#[derive(Debug)]
pub(crate) struct Slot {
    index: usize,
    /// Gone once the machine has opened the image itself.
    device: Option<Arc<dyn BlockDevice>>,
    sector_size: u32,
    read_only: bool,
    durable: bool,
    image: Option<Arc<Image>>,
}

impl Slot {
    pub(crate) fn new(index: usize, drive: Drive) -> Self {
        Self {
            index,
            sector_size: drive.device.sector_size(),
            read_only: drive.read_only,
            durable: drive.durable,
            image: drive.image.map(Arc::new),
            device: Some(drive.device),
        }
    }

    /// The name by which the guest API knows the disk.
    pub(crate) fn name(&self) -> String {
        disk_name(self.index)
    }

    /// What the machine is told, and the export that it is served from unless the machine opens
    /// the image itself, for which this side lets go of it.
    pub(crate) fn hand_over(&mut self, opens_images: bool) -> (SpecDisk, Option<Export>) {
        let name = export_name(self.index);
        let travels = |image: &Arc<Image>| {
            let travels = image.travels();
            if !travels {
                tracing::debug!(
                    name,
                    "the image has too many files or odd names to be handed over"
                );
            }
            travels
        };
        let disk = SpecDisk {
            export: name.clone(),
            serial: disk_serial(self.index),
            read_only: self.read_only,
            sector_size: self.sector_size,
            durable: self.durable,
            image: self.image.clone().filter(|image| opens_images && travels(image)),
        };
        if disk.image.is_some() {
            // Two owners of one image would not know of each other's changes.
            self.device = None;
        }
        let export = self.device.as_ref().map(|device| Export {
            description: self.name(),
            read_only: self.read_only,
            ..Export::new(name, Arc::clone(device))
        });
        (disk, export)
    }
}

/// The name of the export for disk number `index`.
pub(crate) fn export_name(index: usize) -> String {
    format!("disk{index}")
}
