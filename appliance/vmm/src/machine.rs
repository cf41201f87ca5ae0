// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine from its parts to its end.

mod saving;

use crate::board::{Board, Ending};
use crate::memory::{Backing, Memory, Ram};
use crate::pci::msix::MessageSink;
use crate::pci::pin::{LineSink, Lines};
use crate::pci::{Address, MOST_DEVICES};
use crate::processors::Processors;
use crate::snapshot::processor::Savable;
use crate::virtio::VirtioDevice;
use crate::virtio::blk::{Blk, Presentation};
use crate::virtio::console::{Console, Port};
use crate::virtio::rng::Rng;
use crate::virtio::transport::{Doorbells, Function, Wires};
use crate::virtio::worker::Spawner;
use crate::{Error, Result, acpi, cpu, kernel, layout};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VmFd};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tranship_block::BlockDevice;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// The most processors: the appliance has no use for more.
pub const MOST_PROCESSORS: u8 = 8;

/// The most disks: what the buses hold besides the console and entropy.
pub const MOST_DISKS: usize = MOST_DEVICES - 2;

/// The most disks with interrupt vectors of their own, of which a guest with one processor has
/// some 200 for everything. Others share lines.
const MOST_WITH_VECTORS: usize = 64;

/// A disk of the machine.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Its contents.
    pub device: Arc<dyn BlockDevice>,
    /// At most 20 bytes by which the guest knows it.
    pub serial: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the guest's flushes reach it.
    pub durable: bool,
    /// Logical sector size in bytes that the guest sees: 512 or 4096.
    pub sector_size: u32,
}

/// Everything that a machine is made of.
#[derive(Debug)]
pub struct Parts {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The kernel as an uncompressed ELF file.
    pub kernel: File,
    /// Its initramfs.
    pub initramfs: File,
    /// Its command line, at most 2047 bytes.
    pub command_line: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// What the memory is made of.
    pub backing: Backing,
    /// Processors, at most [`MOST_PROCESSORS`].
    pub processors: u8,
    /// The disks in order.
    pub disks: Vec<Disk>,
    /// Byte streams under their names.
    pub ports: Vec<(String, UnixStream)>,
    /// Where the console prints to.
    pub console: File,
}

/// A machine that is ready to run or runs.
#[derive(Debug)]
pub struct Machine {
    board: Arc<Board>,
    processors: Processors,
    slots: Slots,
    /// What each processor says that it is.
    identifications: Vec<CpuId>,
    savable: Savable,
    vm: Arc<VmFd>,
    memory_mib: u32,
    /// The guest's memory goes last: the virtual machine uses it.
    memory: Memory,
}

/// What a device needs to be put into its place.
#[derive(Debug)]
struct Slots {
    messages: Arc<Messages>,
    lines: Lines,
    ram: Ram,
    spawner: Spawner,
    /// The disks by their serial numbers.
    disks: BTreeMap<String, Place>,
    processors: u8,
}

/// Where a disk is, and whether it has vectors.
#[derive(Clone, Copy, Debug)]
struct Place {
    address: Address,
    has_vectors: bool,
}

impl Slots {
    /// Puts a device into the first free place.
    fn put(
        &self,
        board: &Board,
        device: Box<dyn VirtioDevice>,
        has_vectors: bool,
    ) -> Result<Address> {
        let address = board.pci.free().ok_or_else(|| {
            Error::Config(format!("no room for more than {MOST_DEVICES} devices"))
        })?;
        let wires = Wires {
            messages: Arc::clone(&self.messages) as Arc<dyn MessageSink>,
            has_vectors,
            pin: self.lines.pin(address),
            doorbells: Arc::clone(&self.messages) as Arc<dyn Doorbells>,
        };
        let (ram, spawner) = (self.ram.clone(), self.spawner.clone());
        board.pci.add(address, Function::new(device, address, ram, wires, spawner)?);
        Ok(address)
    }

    /// Whether the next disk gets vectors.
    fn has_vectors_left(&self) -> bool {
        self.disks.values().filter(|place| place.has_vectors).count() < MOST_WITH_VECTORS
    }
}

/// Interrupt messages go to KVM at once, without a route for each.
#[derive(Debug)]
struct Messages(Arc<VmFd>);

impl MessageSink for Messages {
    fn send(&self, address: u64, data: u32) {
        let [a0, a1, a2, a3, b0, b1, b2, b3] = address.to_le_bytes();
        let message = kvm_msi {
            address_lo: u32::from_le_bytes([a0, a1, a2, a3]),
            address_hi: u32::from_le_bytes([b0, b1, b2, b3]),
            data,
            ..kvm_msi::default()
        };
        if let Err(error) = self.0.signal_msi(message) {
            tracing::debug!(%error, "an interrupt message was not delivered");
        }
    }
}

impl LineSink for Messages {
    fn set(&self, interrupt: u32, high: bool) {
        if let Err(error) = self.0.set_irq_line(interrupt, high) {
            tracing::debug!(%error, interrupt, high, "an interrupt line was not changed");
        }
    }
}

impl Doorbells for Messages {
    fn connect(&self, address: u64, event: &EventFd) -> Result<()> {
        self.0
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::kvm("connecting a doorbell"))
    }

    fn disconnect(&self, address: u64, event: &EventFd) -> Result<()> {
        self.0
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::kvm("disconnecting a doorbell"))
    }
}

impl Machine {
    /// Builds the machine; no instruction of the guest runs yet.
    ///
    /// # Errors
    ///
    /// Parts that make no sense or do not fit, and KVM's.
    pub fn build(parts: Parts) -> Result<Self> {
        Self::assemble(parts, true)
    }

    /// Puts the parts together, with the kernel in memory or with nothing in it.
    fn assemble(parts: Parts, load: bool) -> Result<Self> {
        let Parts { processors: count, memory_mib, .. } = parts;
        if !(1..=MOST_PROCESSORS).contains(&count) {
            return Err(Error::Config(format!(
                "{count} processors, from 1 to {MOST_PROCESSORS} are possible"
            )));
        }
        // SAFETY: the descriptor is ours and is given away here.
        let kvm = unsafe { <Kvm as std::os::fd::FromRawFd>::from_raw_fd(parts.kvm.into_raw_fd()) };
        let memory = Memory::new(memory_mib, &parts.backing)?;
        let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("creating a virtual machine"))?);
        vm.set_tss_address(layout::TSS).map_err(Error::kvm("placing the task state segment"))?;
        vm.create_irq_chip().map_err(Error::kvm("creating the interrupt controllers"))?;
        let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(timer).map_err(Error::kvm("creating the interval timer"))?;
        map(&vm, &memory)?;

        let serial = crate::virtio::worker::event()?;
        vm.register_irqfd(&serial, layout::SERIAL_INTERRUPT)
            .map_err(Error::kvm("the console's interrupt"))?;
        let end_event = crate::virtio::worker::event()?;
        let board = Arc::new(Board::new(serial, parts.console, end_event));
        let messages = Arc::new(Messages(Arc::clone(&vm)));
        let streams = parts.ports.into_iter();
        let streams = streams.map(|(name, stream)| Port { name, stream }).collect();
        let devices: [Box<dyn VirtioDevice>; 2] =
            [Box::new(Console::new(streams)?), Box::new(Rng::default())];
        let slots = Slots {
            lines: Lines::new(&(Arc::clone(&messages) as Arc<dyn LineSink>)),
            messages,
            ram: memory.ram.clone(),
            spawner: Spawner::new()?,
            disks: BTreeMap::new(),
            processors: count,
        };
        for device in devices {
            slots.put(&board, device, true)?;
        }

        let mut entry = None;
        if load {
            let tables = acpi::write(&memory.ram, count)?;
            let (mut kernel, mut initramfs) = (parts.kernel, parts.initramfs);
            let line = &parts.command_line;
            entry = Some(kernel::load(&memory.ram, &mut kernel, &mut initramfs, line, tables)?);
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("asking for processor features"))?;
        let savable = Savable::new(&kvm, &vm)?;
        let (mut vcpus, mut identifications) = (Vec::new(), Vec::new());
        for number in 0..count {
            let vcpu = vm.create_vcpu(number.into()).map_err(Error::kvm("creating a processor"))?;
            let identification = cpu::identification(&supported, number, count)?;
            cpu::prepare(&vcpu, &identification)?;
            identifications.push(identification);
            if number == 0
                && let Some(entry) = entry
            {
                cpu::enter_kernel(&vcpu, &memory.ram, entry)?;
            }
            vcpus.push(vcpu);
        }
        let processors = Processors::new(vcpus);
        let mut machine =
            Self { board, processors, slots, identifications, savable, vm, memory_mib, memory };
        for disk in parts.disks {
            machine.add_disk(disk)?;
        }
        Ok(machine)
    }

    /// Starts the processors, with `confined` under a filter of system calls each.
    ///
    /// # Errors
    ///
    /// A thread that cannot be started.
    pub fn start(&mut self, confined: bool) -> Result<()> {
        for (_, function) in self.board.pci.all() {
            // Those that the guest of a snapshot had started.
            crate::pci::lock(&function).resume();
        }
        self.processors.start(&self.board, confined)
    }

    /// Plugs a disk in. While the guest runs, it finds the disk when it looks at the bus again.
    ///
    /// # Errors
    ///
    /// A disk that cannot be presented, a serial number that is taken, and no room.
    pub fn add_disk(&mut self, disk: Disk) -> Result<()> {
        let refused = |message: String| Error::Disk { serial: disk.serial.clone(), message };
        if !matches!(disk.sector_size, 512 | 4096) {
            return Err(refused(format!(
                "sectors of {} bytes, expected 512 or 4096",
                disk.sector_size
            )));
        }
        if self.slots.disks.contains_key(&disk.serial) {
            return Err(refused("there is a disk with this serial number".into()));
        }
        let serial = disk.serial.clone();
        let has_vectors = self.slots.has_vectors_left();
        // More queues than processors would never be filled, and those of disks without vectors
        // would all have the same interrupt.
        let queues = if has_vectors { self.slots.processors.min(4) } else { 1 };
        let device = Box::new(blk(disk, queues.into()));
        let address = self.slots.put(&self.board, device, has_vectors)?;
        tracing::debug!(serial, %address, has_vectors, "a disk was plugged in");
        self.slots.disks.insert(serial, Place { address, has_vectors });
        Ok(())
    }

    /// Unplugs a disk. A guest that has not let go of it finds that nothing answers any more.
    ///
    /// # Errors
    ///
    /// No disk with this serial number.
    pub fn remove_disk(&mut self, serial: &str) -> Result<()> {
        let Place { address, .. } = self.slots.disks.remove(serial).ok_or_else(|| Error::Disk {
            serial: serial.to_owned(),
            message: "there is no such disk".into(),
        })?;
        if let Some(function) = self.board.pci.remove(address) {
            crate::pci::lock(&function).reset();
        }
        tracing::debug!(serial, %address, "a disk was unplugged");
        Ok(())
    }

    /// Becomes readable when the machine has ended.
    pub(crate) fn end_event(&self) -> BorrowedFd<'_> {
        crate::virtio::worker::descriptor(self.board.end_event())
    }

    /// Waits for the machine's end, at most `limit`.
    pub fn wait(&self, limit: Option<Duration>) -> Option<Ending> {
        self.board.wait(limit)
    }

    /// Ends the machine from outside.
    pub fn stop(&mut self) {
        self.board.end(Ending::Stopped);
        self.processors.end();
        for (_, function) in self.board.pci.all() {
            crate::pci::lock(&function).reset();
        }
    }

    /// Times that the guest left the processor for us, by reason.
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        self.board.exits.all()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn blk(disk: Disk, queues: u16) -> Blk {
    let how = Presentation {
        serial: disk.serial,
        read_only: disk.read_only,
        durable: disk.durable,
        sector_size: disk.sector_size,
        queues,
    };
    Blk::new(disk.device, how)
}

fn map(vm: &VmFd, memory: &Memory) -> Result<()> {
    for (slot, region) in (0..).zip(memory.ram.iter()) {
        let host = region
            .get_host_address(vm_memory::MemoryRegionAddress(0))
            .map_err(|error| Error::Memory(error.to_string()))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host.expose_provenance() as u64,
        };
        // SAFETY: the range is the region's mapping, which lives as long as the machine: it
        // is dropped after the virtual machine's descriptors.
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("mapping guest memory"))?;
    }
    Ok(())
}
