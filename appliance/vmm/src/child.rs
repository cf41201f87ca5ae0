// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The machine as a process of its own: everything it needs comes as open descriptors.
//!
//! The parent writes an [`Order`] into a file and starts this program again with the number
//! of that file's descriptor. Before the first instruction of the guest runs, the process
//! gives up what it does not need ([`crate::confine`]).

use crate::machine::{Disk, Machine, Parts};
use crate::memory::Backing;
use crate::{Error, Result, confine};
use rustix::io::FdFlags;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use tranship_block::BlockDevice;
use tranship_nbd::{ClientOptions, Remote};
use tranship_raw::{Access, RawFile};

/// The most that an order may be long: 256 disks take a fraction.
const MOST: u64 = 1 << 20;

/// What the process is to run. Numbers are those of descriptors that it inherits.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// `/dev/kvm`.
    pub kvm: RawFd,
    /// The uncompressed kernel.
    pub kernel: RawFd,
    /// Its initramfs.
    pub initramfs: RawFd,
    /// Its command line.
    pub command_line: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Whether the memory is to be pages of hugetlbfs.
    pub huge_pages: bool,
    /// Number of processors.
    pub processors: u8,
    /// Byte streams under their names.
    pub ports: Vec<(String, RawFd)>,
    /// The disks in order.
    pub disks: Vec<OrderedDisk>,
}

/// A disk of an [`Order`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrderedDisk {
    /// At most 20 bytes by which the guest knows it.
    pub serial: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the guest's flushes reach it.
    pub durable: bool,
    /// Logical sector size in bytes: 512 or 4096.
    pub sector_size: u32,
    /// Where its contents are.
    pub source: Source,
}

/// Where the contents of a disk are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Source {
    /// A file with the bytes as they are.
    Raw(RawFd),
    /// An export of the NBD server at the other end of a connected socket.
    Nbd {
        /// The socket.
        socket: RawFd,
        /// The export's name.
        export: String,
    },
}

impl Order {
    /// Every descriptor that the order names.
    fn descriptors(&self) -> BTreeSet<RawFd> {
        let disks = self.disks.iter().map(|disk| match &disk.source {
            Source::Raw(fd) | Source::Nbd { socket: fd, .. } => *fd,
        });
        let ports = self.ports.iter().map(|(_, fd)| *fd);
        disks.chain(ports).chain([self.kvm, self.kernel, self.initramfs]).collect()
    }
}

/// Takes a descriptor that was inherited; each number can be taken once.
struct Inheritance(BTreeSet<RawFd>);

impl Inheritance {
    fn take(&mut self, number: RawFd, what: &str) -> Result<OwnedFd> {
        if !self.0.remove(&number) {
            return Err(Error::Config(format!("descriptor {number} for {what} is named twice")));
        }
        // SAFETY: the number was checked to be open, it is above those of the standard
        // streams, and nobody else owns it: this process has opened nothing yet, and each
        // number is given out once.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)
            .map_err(Error::system(format!("descriptor {number} for {what}")))?;
        Ok(fd)
    }
}

/// Reads the order and checks that its descriptors exist.
fn read(number: RawFd) -> Result<(Order, Inheritance)> {
    let mut own = Inheritance(BTreeSet::from([number]));
    if number < 3 || !is_open(number) {
        return Err(Error::Config(format!("descriptor {number} for the order is not open")));
    }
    let mut file = File::from(own.take(number, "the order")?);
    file.seek(SeekFrom::Start(0)).map_err(Error::system("the order"))?;
    let mut text = Vec::new();
    file.take(MOST).read_to_end(&mut text).map_err(Error::system("the order"))?;
    let order: Order = serde_json::from_slice(&text)
        .map_err(|error| Error::Config(format!("the order: {error}")))?;
    let descriptors = order.descriptors();
    let expected = order.disks.len().saturating_add(order.ports.len()).saturating_add(3);
    if descriptors.len() != expected {
        return Err(Error::Config("the order names a descriptor twice".into()));
    }
    if let Some(number) = descriptors.iter().find(|number| **number < 3 || !is_open(**number)) {
        return Err(Error::Config(format!("descriptor {number} of the order is not open")));
    }
    Ok((order, Inheritance(descriptors)))
}

fn is_open(number: RawFd) -> bool {
    // SAFETY: the number is only asked about, and what does not exist is the answer.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_getfd(fd).is_ok()
}

/// Runs the machine that the order at descriptor `number` describes, to its end.
///
/// # Errors
///
/// An order that makes no sense, and whatever keeps the machine from running. How the guest
/// ended is told on the process' standard error by the caller.
pub fn run(number: RawFd) -> Result<crate::Ending> {
    let (order, mut inherited) = read(number)?;
    confine::give_up_privileges(&inherited.0)?;
    let mut disks = Vec::with_capacity(order.disks.len());
    for disk in &order.disks {
        disks.push(open(disk, &mut inherited)?);
    }
    let mut ports = Vec::with_capacity(order.ports.len());
    for (name, number) in &order.ports {
        let stream = UnixStream::from(inherited.take(*number, name)?);
        ports.push((name.clone(), stream));
    }
    let console = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::system("the console's output"))?;
    let backing = if order.huge_pages { Backing::HugePages } else { Backing::Anonymous };
    let mut machine = Machine::build(Parts {
        kvm: inherited.take(order.kvm, "/dev/kvm")?,
        kernel: File::from(inherited.take(order.kernel, "the kernel")?),
        initramfs: File::from(inherited.take(order.initramfs, "the initramfs")?),
        command_line: order.command_line,
        memory_mib: order.memory_mib,
        backing,
        processors: order.processors,
        disks,
        ports,
        console: File::from(console),
    })?;
    confine::allow_only_what_a_machine_needs()?;
    machine.start(true)?;
    // Without a limit it ends with an ending.
    let ending = machine.wait(None).unwrap_or(crate::Ending::Stopped);
    for (what, count) in machine.exits() {
        tracing::debug!(count, "exits: {what}");
    }
    machine.stop();
    Ok(ending)
}

fn open(disk: &OrderedDisk, inherited: &mut Inheritance) -> Result<Disk> {
    let failed = |error: tranship_block::Error| Error::Disk {
        serial: disk.serial.clone(),
        message: error.to_string(),
    };
    let device: Arc<dyn BlockDevice> = match &disk.source {
        Source::Raw(number) => {
            let file = File::from(inherited.take(*number, &disk.serial)?);
            let access = if disk.read_only { Access::ReadOnly } else { Access::ReadWrite };
            Arc::new(RawFile::from_file(file, &disk.serial, access).map_err(failed)?)
        }
        Source::Nbd { socket, export } => {
            let stream = UnixStream::from(inherited.take(*socket, &disk.serial)?);
            let options = ClientOptions {
                export: export.clone(),
                read_only: disk.read_only,
                ..ClientOptions::default()
            };
            Arc::new(Remote::from_stream(stream, &options).map_err(failed)?)
        }
    };
    Ok(Disk {
        device,
        serial: disk.serial.clone(),
        read_only: disk.read_only,
        durable: disk.durable,
        sector_size: disk.sector_size,
    })
}
