// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver without a guest, and a disk in memory for it.

use crate::Result;
use crate::memory::{Backing, Memory};
use crate::pci::Address;
use crate::pci::msix::MessageSink;
use crate::pci::msix::tests::Sent;
use crate::pci::pin::tests::Changes;
use crate::pci::pin::{LineSink, Lines};
use crate::virtio::blk::{Blk, Presentation};
use crate::virtio::transport::{Doorbells, Function, Wires};
use crate::virtio::worker::Spawner;
use crate::virtio::{F_EVENT_IDX, VirtioDevice, status};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, Extent, Span, Zeroing};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Where the driver keeps the rings of a queue, and buffers.
pub(super) const RINGS: u64 = 0x10_0000;
pub(super) const RINGS_EACH: u64 = 0x1_0000;
pub(super) const BUFFERS: u64 = 0x80_0000;
pub(super) const SIZE: u16 = 64;
/// Long enough on any machine for something that takes microseconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug)]
struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn connect(&self, _address: u64, _event: &EventFd) -> Result<()> {
        Ok(())
    }

    fn disconnect(&self, _address: u64, _event: &EventFd) -> Result<()> {
        Ok(())
    }
}

/// A disk in memory that counts flushes and can be made to wait.
#[derive(Debug, Default)]
pub(super) struct Store {
    pub(super) bytes: Mutex<Vec<u8>>,
    pub(super) flushes: Mutex<u32>,
    pub(super) slow: AtomicBool,
}

impl BlockDevice for Store {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> tranship_block::Result<()> {
        if self.slow.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let at = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> tranship_block::Result<()> {
        let at = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[at..at + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> tranship_block::Result<()> {
        let (at, len) = (usize::try_from(span.start).unwrap(), usize::try_from(span.len).unwrap());
        self.bytes.lock().unwrap()[at..at + len].fill(0);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> tranship_block::Result<Extent> {
        unreachable!("nobody asks for the extent at {offset}")
    }

    fn flush(&self) -> tranship_block::Result<()> {
        *self.flushes.lock().unwrap() += 1;
        Ok(())
    }
}

pub(super) struct Driver {
    pub(super) function: Function,
    pub(super) memory: Memory,
    pub(super) sent: Arc<Sent>,
    /// How the interrupt lines changed.
    pub(super) changes: Arc<Changes>,
    pub(super) features: u64,
    /// Of each queue: the next free descriptor, the next place in the available ring, how
    /// much of the used ring was seen.
    pub(super) queues: Vec<(u16, u16, u16)>,
}

impl Driver {
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::wired(device, true)
    }

    pub(super) fn wired(device: Box<dyn VirtioDevice>, has_vectors: bool) -> Self {
        let memory = Memory::new(64, &Backing::Anonymous).unwrap();
        let sent = Arc::new(Sent::default());
        let queues = device.queue_sizes().iter().map(|_| (0, 0, 0)).collect();
        let changes = Arc::new(Changes::default());
        let address = Address::of(0).unwrap();
        let wires = Wires {
            messages: Arc::clone(&sent) as Arc<dyn MessageSink>,
            has_vectors,
            pin: Lines::new(&(Arc::clone(&changes) as Arc<dyn LineSink>)).pin(address),
            doorbells: Arc::new(NoDoorbells),
        };
        let (ram, spawner) = (memory.ram.clone(), Spawner::new().unwrap());
        let function = Function::new(device, address, ram, wires, spawner).unwrap();
        Self { function, memory, sent, changes, features: 0, queues }
    }

    pub(super) fn get(&mut self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read_bar(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    pub(super) fn set(&mut self, offset: u64, value: u64, len: usize) {
        self.function.write_bar(offset, &value.to_le_bytes()[..len]);
    }

    pub(super) fn status(&mut self) -> u8 {
        u8::try_from(self.get(0x14, 1)).unwrap()
    }

    /// The whole way from a reset to a running device.
    pub(super) fn start(&mut self, features: u64) {
        self.set(0x14, 0, 1);
        self.set(0x14, 1, 1);
        self.set(0x14, 3, 1);
        let mut offered = 0;
        for half in 0..2 {
            self.set(0x00, half, 4);
            offered |= self.get(0x04, 4) << (32 * half);
        }
        self.features = features & offered;
        for half in 0..2 {
            self.set(0x08, half, 4);
            self.set(0x0c, self.features >> (32 * half) & 0xffff_ffff, 4);
        }
        self.set(0x14, 11, 1);
        assert_ne!(self.status() & status::FEATURES_OK, 0);
        // MSI-X: the configuration's vector is 0, each queue has its own.
        let vectors = u64::try_from(self.queues.len()).unwrap() + 1;
        for vector in 0..vectors {
            self.set(0x8000 + vector * 16, 0xfee0_0000, 8);
            self.set(0x8000 + vector * 16 + 8, vector, 8);
        }
        if let Some(control) = self.msix_control() {
            self.function.write_config(control, &0x8000_u16.to_le_bytes());
        }
        self.set(0x10, 0, 2);
        for index in 0..self.queues.len() {
            self.memory.ram.write_slice(&[0; 0x4000], GuestAddress(rings(index))).unwrap();
            self.queues[index] = (0, 0, 0);
            self.set(0x16, index as u64, 2);
            self.set(0x18, SIZE.into(), 2);
            self.set(0x1a, index as u64 + 1, 2);
            self.set(0x20, rings(index), 8);
            self.set(0x28, rings(index) + 0x1000, 8);
            self.set(0x30, rings(index) + 0x2000, 8);
            self.set(0x1c, 1, 2);
        }
        self.set(0x14, 15, 1);
    }

    /// Where MSI-X is switched on.
    pub(super) fn msix_control(&mut self) -> Option<usize> {
        let mut at = [0];
        self.function.read_config(0x34, &mut at);
        while at != [0] {
            let mut head = [0; 2];
            self.function.read_config(at[0].into(), &mut head);
            if head[0] == 0x11 {
                return Some(usize::from(at[0]) + 2);
            }
            at = [head[1]];
        }
        None
    }

    pub(super) fn ready(device: Box<dyn VirtioDevice>) -> Self {
        let mut driver = Self::new(device);
        driver.start(!F_EVENT_IDX);
        driver
    }

    /// Puts a descriptor into the table of a queue.
    pub(super) fn descriptor(
        &mut self,
        queue: usize,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = rings(queue) + u64::from(index) * 16;
        self.describe(at, address, len, flags, next);
    }

    pub(super) fn describe(&mut self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let ram = &self.memory.ram;
        ram.write_obj(address, GuestAddress(at)).unwrap();
        ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain that begins at `head` available and rings.
    pub(super) fn offer(&mut self, queue: usize, head: u16) {
        let (_, available, _) = self.queues[queue];
        let ring = rings(queue) + 0x1000;
        let ram = &self.memory.ram;
        ram.write_obj(head, GuestAddress(ring + 4 + u64::from(available % SIZE) * 2)).unwrap();
        self.queues[queue].1 = available.wrapping_add(1);
        ram.store(self.queues[queue].1, GuestAddress(ring + 2), Ordering::SeqCst).unwrap();
        self.set(0x3000 + queue as u64 * 4, queue as u64, 2);
    }

    /// Sends buffers (address, length, whether the device writes).
    pub(super) fn send(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.queues[queue].0;
        for (index, (address, len, write)) in (0..).zip(buffers) {
            let place = (head + index) % SIZE;
            let more = usize::from(index) + 1 < buffers.len();
            let flags = if *write { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.descriptor(queue, place, *address, *len, flags, (place + 1) % SIZE);
        }
        let count = u16::try_from(buffers.len()).unwrap();
        self.queues[queue].0 = (head + count) % SIZE;
        self.offer(queue, head);
        head
    }

    /// Waits for the next used chain: its head and the bytes written.
    pub(super) fn used(&mut self, queue: usize) -> (u32, u32) {
        let ring = rings(queue) + 0x2000;
        let seen = self.queues[queue].2;
        let begun = Instant::now();
        loop {
            let index: u16 =
                self.memory.ram.load(GuestAddress(ring + 2), Ordering::SeqCst).unwrap();
            if index != seen {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "nothing was used");
            std::thread::sleep(Duration::from_micros(100));
        }
        self.queues[queue].2 = seen.wrapping_add(1);
        let at = ring + 4 + u64::from(seen % SIZE) * 8;
        let read = |at| self.memory.ram.read_obj::<u32>(GuestAddress(at)).unwrap();
        (read(at), read(at + 4))
    }

    pub(super) fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < PATIENCE, "{what}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    pub(super) fn is_broken(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(super) fn take(&mut self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// A request to a disk with its data at [`BUFFERS`] + 0x1000; its status.
    pub(super) fn request(&mut self, kind: u32, sector: u64, data: u32, write: bool) -> u8 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.put(BUFFERS, &header);
        self.put(BUFFERS + 0x100, &[0xee]);
        let mut buffers = vec![(BUFFERS, 16, false)];
        if data > 0 {
            buffers.push((BUFFERS + 0x1000, data, write));
        }
        buffers.push((BUFFERS + 0x100, 1, true));
        let head = self.send(0, &buffers);
        let (used, written) = self.used(0);
        assert_eq!(used, u32::from(head));
        let status = self.take(BUFFERS + 0x100, 1)[0];
        let expected = if status == 0 && write { data.min(written.max(1) - 1) + 1 } else { 1 };
        assert_eq!(written, expected);
        status
    }
}

/// A function that no driver has looked at.
pub(crate) fn idle(device: Box<dyn VirtioDevice>) -> Function {
    Driver::new(device).function
}

pub(super) fn rings(queue: usize) -> u64 {
    RINGS + queue as u64 * RINGS_EACH
}

pub(super) fn disk(size: usize, read_only: bool) -> (Arc<Store>, Box<Blk>) {
    let bytes = (0..size).map(|at| u8::try_from(at / 512 % 251).unwrap()).collect();
    let store = Arc::new(Store { bytes: Mutex::new(bytes), ..Store::default() });
    let how = Presentation {
        serial: "tranship-7".into(),
        read_only,
        durable: true,
        sector_size: 4096,
        queues: 1,
    };
    let blk = Blk::new(Arc::clone(&store) as Arc<dyn BlockDevice>, how);
    (store, Box::new(blk))
}
