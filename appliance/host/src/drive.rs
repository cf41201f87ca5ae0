// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk of the guest, and how its contents reach the machine.

use crate::backend::SpecDisk;
use crate::{Error, ErrorKind, Result};
use rustix::fd::OwnedFd;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tranship_block::{BlockDevice, DiskMeter};
use tranship_nbd::{Address, ClientOptions, Dialer, Export, Remote};
use tranship_protocol::{disk_name, disk_serial};
use tranship_vmm::channel::{MOST_DESCRIPTORS, NewServer};

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
    /// The exports of servers that it consists of.
    pub servers: Arc<Vec<Server>>,
    /// Whether it is only read, and what is written is thrown away.
    pub discard: bool,
    /// What counts it, and what it is held to. It knows the image's files, and gets the figures of
    /// a machine that opens the image when that has ended.
    pub meter: DiskMeter,
}

/// An export that an image consists of.
#[derive(Debug)]
pub struct Server {
    name: String,
    address: Address,
    options: ClientOptions,
    /// The connections, until they are handed over.
    remote: Mutex<Option<Arc<Remote>>>,
}

impl Server {
    /// The export at `address`, which is asked for as `name` and was opened as `remote` with
    /// these options.
    pub fn new(
        name: String,
        address: Address,
        options: ClientOptions,
        remote: Arc<Remote>,
    ) -> Self {
        Self { name, address, options, remote: Mutex::new(Some(remote)) }
    }

    fn remote(&self) -> MutexGuard<'_, Option<Arc<Remote>>> {
        self.remote.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Descriptors that go with it: a line to who makes connections, and the connections.
    fn descriptors(&self) -> usize {
        self.remote().as_ref().map_or(1, |remote| remote.connections().saturating_add(1))
    }

    /// Whether its connections are encrypted: keys stay in this process.
    fn is_encrypted(&self) -> bool {
        self.remote().as_ref().is_some_and(|remote| remote.facts().tls)
    }

    /// What the machine is told, with descriptors. The connections that there are go along the
    /// first time; whoever starts such a machine again has others made.
    pub(crate) fn hand_over(&self) -> Result<(NewServer, Vec<OwnedFd>)> {
        let dialer = Dialer::start(self.address.clone(), self.options.clone());
        let dialer = dialer.map_err(|error| {
            Error::new(ErrorKind::Io, format!("connections to {}", self.address)).because(error)
        })?;
        let remote = self.remote().take();
        let handed_over = remote.map(|remote| remote.hand_over()).unwrap_or_default();
        let (connections, sockets): (Vec<_>, Vec<_>) = handed_over.into_iter().unzip();
        let descriptors = [dialer].into_iter().chain(sockets).collect();
        Ok((NewServer { name: self.name.clone(), connections }, descriptors))
    }
}

impl Image {
    /// Why it cannot be opened in another process. Its names have to be text, and they and its
    /// descriptors, with one for what is written, have to fit into one message.
    fn stays(&self) -> Option<&'static str> {
        let paths = self.files.iter().map(|(path, _, _)| path).chain([&self.path]);
        let paths = paths.map(|path| path.to_str().map(str::len)).sum::<Option<usize>>();
        let names: usize = self.servers.iter().map(|server| server.name.len()).sum();
        let servers: usize = self.servers.iter().map(Server::descriptors).sum();
        if paths.is_none_or(|paths| paths.saturating_add(names) > MOST_NAMES) {
            Some("its names are no text or too long")
        } else if self.files.len().saturating_add(servers) >= MOST_DESCRIPTORS {
            Some("it consists of too many files")
        } else if self.servers.iter().any(Server::is_encrypted) {
            Some("its server is spoken to over TLS")
        } else {
            None
        }
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
            let why = image.stays();
            if let Some(why) = why {
                tracing::debug!(disk = name, "served from here: {why}");
            }
            why.is_none()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use tranship_block::MemoryDevice;

    fn slot(names: &[PathBuf]) -> Slot {
        let file = |name: &PathBuf| (name.clone(), false, tempfile::tempfile().unwrap());
        let image = Image {
            path: names[0].clone(),
            format: None,
            files: Arc::new(names.iter().map(file).collect()),
            servers: Arc::default(),
            discard: false,
            meter: DiskMeter::default(),
        };
        let device = Arc::new(MemoryDevice::new(vec![0; 512]));
        Slot::new(0, Drive { device, read_only: true, durable: false, image: Some(image) })
    }

    #[test]
    fn what_does_not_travel_is_served_from_here() {
        let names = |count: usize| (0..count).map(|n| PathBuf::from(format!("/d/{n}"))).collect();
        let long = PathBuf::from(format!("/{}", "d/".repeat(4096)));
        let odd = PathBuf::from(OsStr::from_bytes(b"/d/\xff"));
        let cases: [(Vec<PathBuf>, bool); 5] = [
            (names(1), true),
            (names(MOST_DESCRIPTORS - 1), true),
            (names(MOST_DESCRIPTORS), false),
            (vec![long], false),
            (vec![odd], false),
        ];
        for (names, travels) in cases {
            for opens_images in [true, false] {
                let (disk, export) = slot(&names).hand_over(opens_images);
                assert_eq!(disk.image.is_some(), travels && opens_images, "{:?}", names[0]);
                assert_eq!(export.is_none(), disk.image.is_some());
            }
        }
    }
}
