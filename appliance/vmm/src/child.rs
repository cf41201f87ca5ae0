// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The machine as a process of its own: everything it needs comes as open descriptors.
//!
//! The parent writes an [`Order`] into a file and starts this program again with the number
//! of that file's descriptor. Before the first instruction of the guest runs, the process
//! gives up what it does not need ([`crate::confine`]).

mod disk;

use crate::channel::{Channel, Message, NewDisk, Request, Source};
use crate::machine::{Machine, Parts};
use crate::memory::Backing;
use crate::{Ending, Error, Result, Snapshot, confine};
use rustix::event::{PollFd, PollFlags};
use rustix::io::FdFlags;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use tranship_block::{Counts, DiskMeter};

/// The most that an order may be long.
const MOST: u64 = 1 << 20;
/// The most that is read of a snapshot's state: more than one can have.
const MOST_STATE: u64 = 16 << 20;

/// What the process is to run. Numbers are those of descriptors that it inherits.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// `/dev/kvm`.
    pub kvm: RawFd,
    /// The uncompressed kernel.
    pub kernel: RawFd,
    /// Its initramfs.
    pub initramfs: RawFd,
    /// The line to the parent, a [`Channel`]. Disks come over it.
    pub channel: RawFd,
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
    /// The state and the memory of a saved machine, to go on with that instead of booting.
    pub snapshot: Option<(RawFd, RawFd)>,
    /// Read-only raw disks that belong to the machine itself, under their serial numbers.
    pub own_disks: Vec<(String, RawFd)>,
    /// Up to which level events are told on standard error; `None` to tell none.
    pub trace: Option<String>,
}

impl Order {
    /// Every descriptor that the order names.
    fn descriptors(&self) -> Vec<RawFd> {
        let named = self.ports.iter().chain(&self.own_disks).map(|(_, fd)| *fd);
        let saved = self.snapshot.iter().flat_map(|(state, memory)| [*state, *memory]);
        named.chain(saved).chain([self.kvm, self.kernel, self.initramfs, self.channel]).collect()
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
    let named = order.descriptors();
    let descriptors: BTreeSet<RawFd> = named.iter().copied().collect();
    if descriptors.len() != named.len() {
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
pub fn run(number: RawFd) -> Result<Ending> {
    let (order, mut inherited) = read(number)?;
    if let Some(level) = &order.trace {
        crate::trace::start(level);
    }
    confine::give_up_privileges(&inherited.0)?;
    allow_more_descriptors();
    let channel = Channel::from(inherited.take(order.channel, "the line to the parent")?);
    let mut disks = Vec::with_capacity(order.own_disks.len());
    for (serial, number) in &order.own_disks {
        let new = NewDisk {
            serial: serial.clone(),
            read_only: true,
            durable: false,
            sector_size: 512,
            rate: None,
            counts: false,
            source: Source::Raw,
        };
        let (disk, _) = disk::open(new, vec![inherited.take(*number, serial)?])?;
        disks.push(disk);
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
    let assembly = Parts {
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
    };
    let machine = match order.snapshot {
        None => Machine::build(assembly)?,
        Some((state, memory)) => {
            let state = File::from(inherited.take(state, "the snapshot's state")?);
            let memory = File::from(inherited.take(memory, "the snapshot's memory")?);
            Machine::restore(assembly, Snapshot::from_bytes(&whole(state)?)?, memory)?
        }
    };
    confine::allow_only_what_a_machine_needs()?;
    Served { machine, channel, meters: BTreeMap::new() }.serve()
}

/// All of the state's file.
fn whole(file: File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // What is longer is refused for its length.
    file.take(MOST_STATE).read_to_end(&mut bytes).map_err(Error::system("the snapshot's state"))?;
    Ok(bytes)
}

/// Takes as many descriptors as this process may have: hundreds of disks need more than it has at
/// first. Programs that use `select` are why there are fewer, and this is none of them.
pub fn allow_more_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// A machine and who asks something of it.
struct Served {
    machine: Machine,
    channel: Channel,
    /// Those of disks that are counted, by their serial numbers, which are never used again.
    meters: BTreeMap<String, DiskMeter>,
}

impl Served {
    /// Carries out what the parent asks for until it goes away.
    fn serve(mut self) -> Result<Ending> {
        let mut ending = None;
        loop {
            if ending.is_none() && self.wait()? {
                // It has ended: nothing of it moves any more when the parent hears that.
                self.machine.stop();
                let how = self.machine.wait(None).unwrap_or(Ending::Stopped);
                for (what, count) in self.machine.exits() {
                    tracing::debug!(count, "exits: {what}");
                }
                // A parent that is gone is noticed below.
                let _ = self.channel.send(&Message::Ended(how.to_string()), &[]);
                ending = Some(how);
            }
            let Some((request, descriptors)) = self.channel.receive::<Request>()? else { break };
            let answer = match self.carry_out(request, descriptors) {
                Ok(answer) => answer,
                Err(error) => Message::Failed(with_cause(&error)),
            };
            self.channel.send(&answer, &[])?;
        }
        self.machine.stop();
        Ok(ending.unwrap_or(Ending::Stopped))
    }

    /// Waits for a request or the machine's end; whether it is the end.
    fn wait(&self) -> Result<bool> {
        let end = self.machine.end_event();
        let mut both =
            [PollFd::new(&end, PollFlags::IN), PollFd::new(&self.channel, PollFlags::IN)];
        loop {
            match rustix::event::poll(&mut both, None) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::system("waiting for the parent")(error)),
                Ok(_) => return Ok(both.first().is_some_and(|end| !end.revents().is_empty())),
            }
        }
    }

    fn carry_out(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Message> {
        match request {
            Request::Add(new) => {
                let (disk, meter) = disk::open(new, descriptors)?;
                let serial = disk.serial.clone();
                self.machine.add_disk(disk)?;
                if meter.is_counted() {
                    self.meters.insert(serial, meter);
                }
            }
            Request::Remove { serial } => self.machine.remove_disk(&serial)?,
            Request::Count { serial, file } => {
                return self.counted(serial, file.as_deref()).map(Box::new).map(Message::Counted);
            }
            Request::Start => self.machine.start(true)?,
            Request::Save => {
                let [mut state, memory] = files(descriptors)?;
                let snapshot = self.machine.save(&memory)?;
                state
                    .write_all(&snapshot.to_bytes()?)
                    .map_err(Error::system("the state's file"))?;
            }
            Request::Dump { vmcoreinfo } => {
                let [file] = files(descriptors)?;
                self.machine.dump(vmcoreinfo, &file)?;
            }
        }
        Ok(Message::Done)
    }

    fn counted(&self, serial: String, file: Option<&Path>) -> Result<Counts> {
        let Some(meter) = self.meters.get(&serial) else {
            return Err(Error::Disk { serial, message: "it is not counted".into() });
        };
        // A file that was not opened here did nothing.
        Ok(meter.counts(file).unwrap_or_default())
    }
}

/// The files that have come with a request.
fn files<const COUNT: usize>(descriptors: Vec<OwnedFd>) -> Result<[File; COUNT]> {
    let files: Vec<File> = descriptors.into_iter().map(File::from).collect();
    files.try_into().map_err(|files: Vec<File>| {
        Error::Config(format!("{} descriptors came, expected {COUNT}", files.len()))
    })
}

fn with_cause(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
