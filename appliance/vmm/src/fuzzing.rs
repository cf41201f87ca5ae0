// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices without a guest, in the hands of a fuzzer: it says what lies in memory and what the
//! driver does. Whatever that is, nothing may panic, hang or touch what is not the guest's.
#![allow(
    clippy::missing_panics_doc,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "panicking is how findings are told"
)]

mod seeds;

pub use seeds::seeds;

use crate::board::Board;
use crate::layout::{BAR_SIZE, BAR_WINDOW, ECAM, PCI_ADDRESS};
use crate::memory::Ram;
use crate::pci::Address;
use crate::pci::msix::MessageSink;
use crate::pci::pin::{LineSink, Lines};
use crate::virtio::VirtioDevice;
use crate::virtio::blk::{Blk, Presentation};
use crate::virtio::console::{Console, Port};
use crate::virtio::rng::Rng;
use crate::virtio::transport::{Doorbells, Function, Wires};
use crate::virtio::worker::{Spawner, event};
use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use tranship_block::{BlockDevice, Extent, Span, Zeroing};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// Memory of the guest: small, so that a few flipped bits lead outside.
const MEMORY: usize = 128 << 10;
/// Bytes of the disk.
const DISK: usize = 64 << 10;
/// Bytes of what the driver does at once: what, how long, where, with which value.
const STEP: usize = 12;
/// The most steps: more find nothing new.
const MOST_STEPS: usize = 64;
/// Each queue's part of memory, in which rings lie as [`rings`] says.
const QUEUE_AREA: u64 = 0x800;
const QUEUE_SIZE: u16 = 16;

/// Takes messages nowhere.
#[derive(Debug)]
struct Nowhere;

impl MessageSink for Nowhere {
    fn send(&self, _: u64, _: u32) {}
}

impl LineSink for Nowhere {
    fn set(&self, _: u32, _: bool) {}
}

impl Doorbells for Nowhere {
    fn connect(&self, _: u64, _: &EventFd) -> crate::Result<()> {
        Ok(())
    }

    fn disconnect(&self, _: u64, _: &EventFd) -> crate::Result<()> {
        Ok(())
    }
}

/// A disk in memory that panics where a request leaves it.
#[derive(Debug)]
struct Store(Mutex<Vec<u8>>);

impl BlockDevice for Store {
    fn size(&self) -> u64 {
        DISK as u64
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> tranship_block::Result<()> {
        let at = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.0.lock().unwrap()[at..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> tranship_block::Result<()> {
        let at = usize::try_from(offset).unwrap();
        self.0.lock().unwrap()[at..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _: Zeroing) -> tranship_block::Result<()> {
        let (at, len) = (usize::try_from(span.start).unwrap(), usize::try_from(span.len).unwrap());
        self.0.lock().unwrap()[at..][..len].fill(0);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> tranship_block::Result<Extent> {
        panic!("nobody asks for the extent at {offset}")
    }

    fn flush(&self) -> tranship_block::Result<()> {
        Ok(())
    }
}

fn disk(read_only: bool) -> Box<dyn VirtioDevice> {
    let bytes = (0..DISK).map(|at| u8::try_from(at / 512 % 251).unwrap()).collect();
    let how = Presentation {
        serial: "fuzz".into(),
        read_only,
        durable: true,
        sector_size: 512,
        queues: 1,
    };
    Box::new(Blk::new(Arc::new(Store(Mutex::new(bytes))), how))
}

/// A console with two ports, and the far ends of their streams.
fn console() -> (Box<dyn VirtioDevice>, Vec<UnixStream>) {
    let (ports, far) = ["one", "two"]
        .map(|name| {
            let (near, far) = UnixStream::pair().unwrap();
            far.set_nonblocking(true).unwrap();
            std::io::Write::write_all(&mut &far, b"something to receive").unwrap();
            (Port { name: name.into(), stream: near }, far)
        })
        .into_iter()
        .unzip();
    (Box::new(Console::new(ports).unwrap()), far)
}

fn function(device: Box<dyn VirtioDevice>, index: usize, ram: &Ram) -> Function {
    let address = Address::of(index).unwrap();
    let spawner = Spawner::new().unwrap();
    let lines = Lines::new(&(Arc::new(Nowhere) as Arc<dyn LineSink>));
    let wires = Wires {
        messages: Arc::new(Nowhere),
        // Some have only a pin.
        has_vectors: index.is_multiple_of(2),
        pin: lines.pin(address),
        doorbells: Arc::new(Nowhere),
    };
    Function::new(device, address, ram.clone(), wires, spawner).unwrap()
}

/// Memory with the input in it; what is left of the input.
fn memory(input: &[u8]) -> (Ram, &[u8]) {
    let ram = Ram::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let Some(([low, high], rest)) = input.split_first_chunk() else { return (ram, &[]) };
    let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
    let (image, steps) = rest.split_at(len);
    ram.write_slice(image, GuestAddress(0)).unwrap();
    (ram, steps)
}

/// Where the rings of a queue lie: descriptors, available ring, used ring. `overlaid` has them
/// lie over each other, so that answers become requests.
fn rings(queue: u64, overlaid: u8) -> [u64; 3] {
    let start = queue.wrapping_mul(QUEUE_AREA);
    let at = |offset: u64| start.wrapping_add(offset);
    match overlaid & 3 {
        0 => [start, at(0x100), at(0x200)],
        1 => [start, at(0x100), at(0x100)],
        2 => [start, start, at(0x100)],
        _ => [start, at(0x100), start],
    }
}

/// Starts the device as a driver does: the first byte of an input says how.
fn start(function: &mut Function, queues: u64, how: u8) {
    // Version 1, indirect descriptors, event indices if wished for, and what few devices have:
    // several ports, flushes.
    let mut offered = [0; 4];
    function.read_bar(0x04, &mut offered);
    let wanted = 1 << 28 | u32::from(how & 1) << 29 | 1 << 1 | u32::from(how & 2) << 8;
    let low = u64::from(wanted & u32::from_le_bytes(offered));
    let mut write = |offset, value: u64, len: usize| {
        function.write_bar(offset, &value.to_le_bytes()[..len]);
    };
    write(0x14, 0, 1);
    write(0x14, 3, 1);
    for (half, features) in [(0, low), (1, 1)] {
        write(0x08, half, 4);
        write(0x0c, features, 4);
    }
    write(0x14, 11, 1);
    for queue in 0..queues {
        write(0x16, queue, 2);
        write(0x18, QUEUE_SIZE.into(), 2);
        write(0x1a, queue, 2);
        for (field, address) in [0x20, 0x28, 0x30].into_iter().zip(rings(queue, how >> 4)) {
            write(field, address, 8);
        }
        write(0x1c, 1, 2);
    }
    write(0x14, 15, 1);
}

/// What a step does with a function, its memory or, on the whole board, with ports.
struct Step {
    what: u8,
    len: usize,
    at: u64,
    value: [u8; 8],
}

fn steps(input: &[u8]) -> impl Iterator<Item = Step> {
    input.chunks_exact(STEP).take(MOST_STEPS).map(|bytes| Step {
        what: bytes[0],
        len: 1 << (bytes[1] & 3),
        at: u64::from(u16::from_le_bytes([bytes[2], bytes[3]])),
        value: bytes[4..].try_into().unwrap(),
    })
}

/// A device that was started, and what the driver does then.
fn drive(device: Box<dyn VirtioDevice>, input: &[u8]) {
    let Some((how, input)) = input.split_first() else { return };
    let queues = u64::try_from(device.queue_sizes().len()).unwrap();
    let (ram, rest) = memory(input);
    let mut function = function(device, 0, &ram);
    start(&mut function, queues, *how);
    for step in steps(rest) {
        let data = &step.value[..step.len];
        let mut space = [0; 8];
        match step.what % 6 {
            0 => function.write_bar(step.at, data),
            1 => function.read_bar(step.at, &mut space[..step.len]),
            2 => function.write_config(usize::try_from(step.at & 0xfff).unwrap(), data),
            3 => function
                .read_config(usize::try_from(step.at & 0xfff).unwrap(), &mut space[..step.len]),
            4 => drop(ram.write_slice(data, GuestAddress(step.at))),
            _ => function.write_bar(0x3000 + (step.at & 0xff) * 4, &step.value[..2]),
        }
    }
    function.reset();
}

/// Requests to a disk.
pub fn disk_requests(input: &[u8]) {
    let read_only = input.first().is_some_and(|how| how & 8 != 0);
    drive(disk(read_only), input);
}

/// Messages and bytes of a console's ports.
pub fn console_ports(input: &[u8]) {
    let (device, far) = console();
    drive(device, input);
    for mut stream in far {
        let mut bytes = [0; 4096];
        while stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
    }
}

/// All that a processor can reach: ports, configuration space and the registers of all devices,
/// in any order.
pub fn board(input: &[u8]) {
    let (ram, rest) = memory(input);
    let nowhere = File::options().write(true).open("/dev/null").unwrap();
    let board = Board::new(event().unwrap(), nowhere, event().unwrap());
    let (console, _far) = console();
    let devices = [console, Box::new(Rng::default()) as Box<dyn VirtioDevice>, disk(false)];
    for (index, device) in devices.into_iter().enumerate() {
        board.pci.add(Address::of(index).unwrap(), function(device, index, &ram));
    }
    for step in steps(rest) {
        let data = &step.value[..step.len];
        let mut space = [0; 8];
        let space = &mut space[..step.len];
        // Device number and register share the 16 bits; ports have the few that do something.
        let config = ECAM + (step.at & 0x7fff);
        let register = BAR_WINDOW
            + (step.at >> 14) * BAR_SIZE
            + (u64::from(step.value[7]) << 8 & 0xff00 | step.at & 0xff);
        let port = match step.at & 7 {
            0 => PCI_ADDRESS,
            near @ 1..5 => PCI_ADDRESS + 3 + u16::try_from(near).unwrap(),
            _ => u16::try_from(step.at >> 3).unwrap(),
        };
        match step.what % 8 {
            0 => board.write_memory(register, data),
            1 => board.read_memory(register, space),
            2 => board.write_memory(config, data),
            3 => board.read_memory(config, space),
            4 => board.write_port(port, data),
            5 => board.read_port(port, space),
            6 => drop(ram.write_slice(data, GuestAddress(step.at))),
            _ => board.write_memory(u64::from_le_bytes(step.value), data),
        }
    }
    for (_, function) in board.pci.all() {
        crate::pci::lock(&function).reset();
    }
}

#[cfg(test)]
mod tests;
