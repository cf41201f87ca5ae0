// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices without a guest: a driver in the test plays by the rules, or does not.

mod hostile;
mod pin;
mod rounds;
mod state;

use super::blk::{Blk, Presentation};
use super::console::{Console, Port};
use super::rng::Rng;
use super::transport::{Doorbells, Function, Wires};
use super::worker::Spawner;
use super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice, status};
use crate::memory::{Backing, Memory};
use crate::pci::Address;
use crate::pci::msix::MessageSink;
use crate::pci::msix::tests::Sent;
use crate::pci::pin::tests::Changes;
use crate::pci::pin::{LineSink, Lines};
use crate::{Result, pci};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, Extent, Span, Zeroing};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Where the driver keeps the rings of a queue, and buffers.
const RINGS: u64 = 0x10_0000;
const RINGS_EACH: u64 = 0x1_0000;
const BUFFERS: u64 = 0x80_0000;
const SIZE: u16 = 64;
/// Long enough on any machine for something that takes microseconds.
const PATIENCE: Duration = Duration::from_secs(20);

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
struct Store {
    bytes: Mutex<Vec<u8>>,
    flushes: Mutex<u32>,
    slow: AtomicBool,
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

struct Driver {
    function: Function,
    memory: Memory,
    sent: Arc<Sent>,
    /// How the interrupt lines changed.
    changes: Arc<Changes>,
    features: u64,
    /// Of each queue: the next free descriptor, the next place in the available ring, how
    /// much of the used ring was seen.
    queues: Vec<(u16, u16, u16)>,
}

impl Driver {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::wired(device, true)
    }

    fn wired(device: Box<dyn VirtioDevice>, has_vectors: bool) -> Self {
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

    fn get(&mut self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read_bar(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, value: u64, len: usize) {
        self.function.write_bar(offset, &value.to_le_bytes()[..len]);
    }

    fn status(&mut self) -> u8 {
        u8::try_from(self.get(0x14, 1)).unwrap()
    }

    /// The whole way from a reset to a running device.
    fn start(&mut self, features: u64) {
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
    fn msix_control(&mut self) -> Option<usize> {
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

    fn ready(device: Box<dyn VirtioDevice>) -> Self {
        let mut driver = Self::new(device);
        driver.start(!F_EVENT_IDX);
        driver
    }

    /// Puts a descriptor into the table of a queue.
    fn descriptor(
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

    fn describe(&mut self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let ram = &self.memory.ram;
        ram.write_obj(address, GuestAddress(at)).unwrap();
        ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain that begins at `head` available and rings.
    fn offer(&mut self, queue: usize, head: u16) {
        let (_, available, _) = self.queues[queue];
        let ring = rings(queue) + 0x1000;
        let ram = &self.memory.ram;
        ram.write_obj(head, GuestAddress(ring + 4 + u64::from(available % SIZE) * 2)).unwrap();
        self.queues[queue].1 = available.wrapping_add(1);
        ram.store(self.queues[queue].1, GuestAddress(ring + 2), Ordering::SeqCst).unwrap();
        self.set(0x3000 + queue as u64 * 4, queue as u64, 2);
    }

    /// Sends buffers (address, length, whether the device writes).
    fn send(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u16 {
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
    fn used(&mut self, queue: usize) -> (u32, u32) {
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

    fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < PATIENCE, "{what}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn is_broken(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn take(&mut self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// A request to a disk with its data at [`BUFFERS`] + 0x1000; its status.
    fn request(&mut self, kind: u32, sector: u64, data: u32, write: bool) -> u8 {
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

fn rings(queue: usize) -> u64 {
    RINGS + queue as u64 * RINGS_EACH
}

fn disk(size: usize, read_only: bool) -> (Arc<Store>, Box<Blk>) {
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

#[test]
fn a_disk_reads_writes_flushes_and_tells_its_name() {
    let (store, blk) = disk(1 << 20, false);
    let mut driver = Driver::ready(blk);
    assert_eq!(driver.get(0x2000, 8), 2048);
    assert_eq!(driver.get(0x2000 + 20, 4), 4096);
    assert_eq!(driver.request(0, 3, 1024, true), 0);
    let read = driver.take(BUFFERS + 0x1000, 1024);
    assert!(read[..512].iter().all(|byte| *byte == 3) && read[512..].iter().all(|byte| *byte == 4));
    driver.put(BUFFERS + 0x1000, &[0xab; 512]);
    assert_eq!(driver.request(1, 9, 512, false), 0);
    assert_eq!(store.bytes.lock().unwrap()[9 * 512..10 * 512], [0xab; 512]);
    assert_eq!(*store.flushes.lock().unwrap(), 0);
    assert_eq!(driver.request(4, 0, 0, false), 0);
    assert_eq!(*store.flushes.lock().unwrap(), 1);
    assert_eq!(driver.request(8, 0, 20, true), 0);
    assert_eq!(&driver.take(BUFFERS + 0x1000, 20)[..11], b"tranship-7\0");
    // Two sectors from sector 20 on become zero, with the flag that they may be given back.
    let mut range = 20_u64.to_le_bytes().to_vec();
    range.extend(2_u32.to_le_bytes());
    range.extend(1_u32.to_le_bytes());
    driver.put(BUFFERS + 0x1000, &range);
    assert_eq!(driver.request(13, 0, 16, false), 0);
    assert_eq!(store.bytes.lock().unwrap()[20 * 512..22 * 512], [0; 1024]);
    // The same as a discard: that has no flags.
    driver.put(BUFFERS + 0x1000, &range);
    assert_eq!(driver.request(11, 0, 16, false), 2);
    assert!(!driver.is_broken());
    assert!(driver.sent.0.lock().unwrap().iter().all(|message| message.1 == 1));
    // Write-through: every write is flushed.
    driver.set(0x2000 + 32, 0, 1);
    driver.put(BUFFERS + 0x1000, &[1; 512]);
    assert_eq!(driver.request(1, 0, 512, false), 0);
    assert_eq!(*store.flushes.lock().unwrap(), 2);
}

#[test]
fn what_is_not_on_the_disk_is_an_error() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::ready(blk);
    for (kind, sector, data, write, expected) in [
        (0, 2047, 1024, true, 1),
        (0, u64::MAX, 512, true, 1),
        (0, u64::MAX / 512, 512, true, 1),
        (0, 0, 100, true, 1),
        (1, 2048, 512, false, 1),
        (13, 0, 15, false, 1),
        (99, 0, 512, true, 2),
    ] {
        driver.put(BUFFERS + 0x1000, &[0; 4096]);
        assert_eq!(driver.request(kind, sector, data, write), expected, "{kind} {sector} {data}");
    }
    assert!(!driver.is_broken());
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let (store, blk) = disk(1 << 20, true);
    let before = store.bytes.lock().unwrap().clone();
    let mut driver = Driver::ready(blk);
    assert_ne!(driver.features & 1 << 5, 0);
    assert_eq!(driver.features & (1 << 13 | 1 << 14), 0);
    for kind in [1, 11, 13] {
        driver.put(BUFFERS + 0x1000, &[1; 512]);
        assert_eq!(driver.request(kind, 0, if kind == 1 { 512 } else { 16 }, false), 1);
    }
    assert_eq!(*store.bytes.lock().unwrap(), before);
}

#[test]
fn indirect_tables_and_split_headers_are_understood() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::ready(blk);
    assert_ne!(driver.features & F_INDIRECT_DESC, 0);
    let mut header = [0; 16];
    header[8] = 5;
    driver.put(BUFFERS, &header);
    let table = BUFFERS + 0x8000;
    // The header in two pieces, then data and status in one buffer.
    driver.describe(table, BUFFERS, 10, NEXT, 1);
    driver.describe(table + 16, BUFFERS + 10, 6, NEXT, 2);
    driver.describe(table + 32, BUFFERS + 0x1000, 513, WRITE, 0);
    driver.descriptor(0, 0, table, 48, INDIRECT, 0);
    driver.offer(0, 0);
    assert_eq!(driver.used(0), (0, 513));
    let data = driver.take(BUFFERS + 0x1000, 513);
    assert!(data[..512].iter().all(|byte| *byte == 5) && data[512] == 0);
}

/// Address, length, flags and next of a descriptor.
type Fields = (u64, u32, u16, u16);

/// Chains that no driver may make; the first descriptor is number 0.
fn malformed() -> Vec<(&'static str, Vec<Fields>)> {
    let far = 1 << 40;
    vec![
        ("a loop", vec![(BUFFERS, 16, NEXT, 0)]),
        ("a loop of two", vec![(BUFFERS, 16, NEXT, 1), (BUFFERS, 16, NEXT | WRITE, 0)]),
        ("a next that does not exist", vec![(BUFFERS, 16, NEXT, SIZE)]),
        ("a buffer outside", vec![(BUFFERS, 16, NEXT, 1), (far, 512, WRITE, 0)]),
        ("a buffer across the end", vec![(BUFFERS, 16, NEXT, 1), ((64 << 20) - 8, 512, WRITE, 0)]),
        ("an address that wraps", vec![(BUFFERS, 16, NEXT, 1), (u64::MAX - 4, 512, WRITE, 0)]),
        ("an empty buffer", vec![(BUFFERS, 16, NEXT, 1), (BUFFERS, 0, WRITE, 0)]),
        ("a header that is too short", vec![(BUFFERS, 8, NEXT, 1), (BUFFERS, 1, WRITE, 0)]),
        ("no room for a status", vec![(BUFFERS, 16, 0, 0)]),
        ("to read after to write", vec![(BUFFERS, 1, WRITE | NEXT, 1), (BUFFERS, 16, 0, 0)]),
        ("a table of odd length", vec![(BUFFERS, 17, INDIRECT, 0)]),
        ("an empty table", vec![(BUFFERS, 0, INDIRECT, 0)]),
        ("a table outside", vec![(far, 48, INDIRECT, 0)]),
    ]
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_reset() {
    let (store, blk) = disk(1 << 20, false);
    let before = store.bytes.lock().unwrap().clone();
    let mut driver = Driver::ready(blk);
    for (what, chain) in malformed() {
        driver.sent.0.lock().unwrap().clear();
        for (index, (address, len, flags, next)) in (0..).zip(&chain) {
            driver.descriptor(0, index, *address, *len, *flags, *next);
        }
        driver.offer(0, 0);
        driver.wait_until(what, Driver::is_broken);
        // Section 2.1.2: the driver is told by a configuration change.
        driver.wait_until(what, |driver| driver.sent.0.lock().unwrap().iter().any(|m| m.1 == 0));
        driver.start(u64::MAX);
        assert!(!driver.is_broken());
        assert_eq!(driver.request(0, 1, 512, true), 0, "after {what}");
    }
    assert_eq!(*store.bytes.lock().unwrap(), before);
}

#[test]
fn an_index_that_runs_away_breaks_the_device() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::ready(blk);
    let ring = GuestAddress(rings(0) + 0x1002);
    driver.memory.ram.store(SIZE + 1, ring, Ordering::SeqCst).unwrap();
    driver.set(0x3000, 0, 2);
    driver.wait_until("broken", Driver::is_broken);
}

#[test]
fn features_and_queues_are_checked() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::new(blk);
    // Without version 1, and with something that was not on offer.
    for features in [0, F_VERSION_1 | 1 << 60] {
        driver.set(0x14, 0, 1);
        driver.set(0x14, 3, 1);
        for half in 0..2 {
            driver.set(0x08, half, 4);
            driver.set(0x0c, features >> (32 * half) & 0xffff_ffff, 4);
        }
        driver.set(0x14, 11, 1);
        assert_eq!(driver.status() & status::FEATURES_OK, 0);
    }
    for (size, ring) in [(3, rings(0)), (SIZE.into(), 1 << 40), (SIZE.into(), rings(0) + 1)] {
        driver.set(0x14, 0, 1);
        driver.set(0x14, 3, 1);
        driver.set(0x08, 1, 4);
        driver.set(0x0c, 1, 4);
        driver.set(0x14, 11, 1);
        driver.set(0x16, 0, 2);
        driver.set(0x18, size, 2);
        for field in [0x20, 0x28, 0x30] {
            driver.set(field, ring, 8);
        }
        driver.set(0x1c, 1, 2);
        driver.set(0x14, 15, 1);
        assert!(driver.is_broken(), "{size} {ring:#x}");
    }
    driver.start(u64::MAX);
    assert_eq!(driver.request(0, 0, 512, true), 0);
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let (store, blk) = disk(1 << 20, false);
    let mut driver = Driver::ready(blk);
    store.slow.store(true, Ordering::Relaxed);
    driver.put(BUFFERS, &[0; 16]);
    for _ in 0..4 {
        driver.send(
            0,
            &[(BUFFERS, 16, false), (BUFFERS + 0x1000, 512, true), (BUFFERS + 0x100, 1, true)],
        );
    }
    driver.set(0x14, 0, 1);
    let after = driver.take(rings(0), 0x4000);
    std::thread::sleep(Duration::from_millis(120));
    assert_eq!(driver.take(rings(0), 0x4000), after, "the rings changed after the reset");
    assert_eq!(driver.status(), 0);
    driver.start(u64::MAX);
    assert_eq!(driver.request(0, 1, 512, true), 0);
}

#[test]
fn entropy_is_not_zero() {
    let mut driver = Driver::ready(Box::new(Rng::default()));
    driver.send(0, &[(BUFFERS, 64, true), (BUFFERS + 0x1000, 64, true)]);
    assert_eq!(driver.used(0).1, 128);
    assert_ne!(driver.take(BUFFERS, 64), [0; 64]);
    assert_ne!(driver.take(BUFFERS + 0x1000, 64), [0; 64]);
}

#[test]
fn ports_have_names_and_carry_bytes_both_ways() {
    // Port 0 has the first queues, those of the others come after the control messages'.
    for (number, queue) in [(0, 0), (1, 4)] {
        one_port_of_two(number, queue);
    }
}

fn one_port_of_two(number: u8, queue: usize) {
    let (mut near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut ports = vec![Port { name: "other".into(), stream: UnixStream::pair().unwrap().0 }];
    let port = Port { name: "org.example.0".into(), stream: far };
    ports.insert(usize::from(number), port);
    let mut driver = Driver::ready(Box::new(Console::new(ports).unwrap()));
    assert_eq!((driver.get(0x2004, 4), driver.queues.len()), (2, 6));
    let say = |driver: &mut Driver, event: u16, value: u16| {
        let mut bytes = u32::from(number).to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        driver.put(BUFFERS, &bytes);
        driver.send(3, &[(BUFFERS, 8, false)]);
        driver.used(3);
    };
    let hear = |driver: &mut Driver| {
        driver.send(2, &[(BUFFERS + 0x2000, 64, true)]);
        let (_, len) = driver.used(2);
        driver.take(BUFFERS + 0x2000, usize::try_from(len).unwrap())
    };
    say(&mut driver, 0, 1);
    for port in 0..2 {
        assert_eq!(hear(&mut driver), [port, 0, 0, 0, 1, 0, 0, 0]);
    }
    say(&mut driver, 3, 1);
    assert_eq!(&hear(&mut driver)[8..], b"org.example.0");
    assert_eq!(hear(&mut driver), [number, 0, 0, 0, 6, 0, 1, 0]);
    // What the host says before the guest has opened the port waits.
    near.write_all(b"hello").unwrap();
    say(&mut driver, 6, 1);
    driver.send(queue, &[(BUFFERS + 0x3000, 3, true)]);
    assert_eq!(driver.used(queue).1, 3);
    driver.send(queue, &[(BUFFERS + 0x3100, 64, true)]);
    assert_eq!(driver.used(queue).1, 2);
    assert_eq!(driver.take(BUFFERS + 0x3000, 3), b"hel");
    assert_eq!(driver.take(BUFFERS + 0x3100, 2), b"lo");
    driver.put(BUFFERS + 0x4000, b"answer");
    driver.send(queue + 1, &[(BUFFERS + 0x4000, 2, false), (BUFFERS + 0x4002, 4, false)]);
    driver.used(queue + 1);
    let mut answer = [0; 6];
    near.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    // Hanging up reaches the guest, and the other way round.
    near.shutdown(std::net::Shutdown::Write).unwrap();
    driver.send(queue, &[(BUFFERS + 0x3000, 64, true)]);
    assert_eq!(hear(&mut driver), [number, 0, 0, 0, 6, 0, 0, 0]);
    say(&mut driver, 6, 0);
    assert_eq!(near.read(&mut [0; 1]).unwrap(), 0);
    assert!(!driver.is_broken());
}

#[test]
fn a_stream_that_takes_nothing_holds_only_its_own_port() {
    let (near, far) = UnixStream::pair().unwrap();
    let port = Port { name: "full".into(), stream: far };
    let mut driver = Driver::ready(Box::new(Console::new(vec![port]).unwrap()));
    let mut sent: u64 = 0;
    // The socket's buffer fills, and the rest waits in the guest's memory.
    for _ in 0..u64::from(SIZE) / 2 {
        driver.send(1, &[(BUFFERS, 32 << 10, false)]);
        sent += 32 << 10;
    }
    driver.put(BUFFERS + 0x10_0000, &[0, 0, 0, 0, 0, 0, 1, 0]);
    driver.send(3, &[(BUFFERS + 0x10_0000, 8, false)]);
    driver.used(3);
    let reader = std::thread::spawn(move || {
        let mut near = near;
        std::io::copy(&mut (&mut near).take(sent), &mut std::io::sink()).unwrap()
    });
    for _ in 0..u64::from(SIZE) / 2 {
        driver.used(1);
    }
    assert_eq!(reader.join().unwrap(), sent);
}

#[test]
fn configuration_space_leads_into_the_bar_as_well() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::new(blk);
    let (mut at, mut found) = ([0], None);
    driver.function.read_config(0x34, &mut at);
    while at != [0] {
        let mut head = [0; 4];
        driver.function.read_config(at[0].into(), &mut head);
        if (head[0], head[3]) == (9, 5) {
            found = Some(usize::from(at[0]));
        }
        at = [head[1]];
    }
    let window = found.unwrap();
    let aim = |driver: &mut Driver, offset: u32, len: u32| {
        driver.function.write_config(window + 4, &[0; 4]);
        driver.function.write_config(window + 8, &offset.to_le_bytes());
        driver.function.write_config(window + 12, &len.to_le_bytes());
    };
    aim(&mut driver, 0x14, 1);
    driver.function.write_config(window + 16, &[3]);
    assert_eq!(driver.status(), 3);
    aim(&mut driver, 0x2000, 4);
    let mut data = [0; 4];
    driver.function.read_config(window + 16, &mut data);
    assert_eq!(u32::from_le_bytes(data), 2048);
    for (offset, len) in [(u32::MAX, 4), (0xfffe, 4), (0, 8), (1, 4)] {
        aim(&mut driver, offset, len);
        driver.function.read_config(window + 16, &mut data);
        driver.function.write_config(window + 16, &data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// Whatever lies in the rings: nothing panics, nothing outside of the buffers changes,
    /// and a reset makes the device whole.
    #[test]
    fn rubbish_in_the_rings_does_no_harm(
        descriptors in prop::collection::vec(
            (
                prop_oneof![Just(BUFFERS), Just(64 << 20), any::<u64>(), 0..64_u64 << 20],
                prop_oneof![Just(16_u32), Just(1), 0..4096_u32, any::<u32>()],
                0..8_u16,
                0..70_u16,
            ),
            1..24,
        ),
        heads in prop::collection::vec(any::<u16>(), 1..8),
        ahead in 0..100_u16,
        header in any::<[u8; 16]>(),
        kind in prop::sample::select(vec![0_usize, 1, 2]),
    ) {
        let device: Box<dyn VirtioDevice> = match kind {
            0 => disk(1 << 20, false).1,
            1 => Box::new(Rng::default()),
            _ => {
                let (_, far) = UnixStream::pair().unwrap();
                Box::new(Console::new(vec![Port { name: "x".into(), stream: far }]).unwrap())
            }
        };
        let mut driver = Driver::ready(device);
        let last = driver.queues.len() - 1;
        driver.put(BUFFERS, &header);
        for queue in [0, last] {
            for (index, (address, len, flags, next)) in (0..).zip(&descriptors) {
                driver.descriptor(queue, index, *address, *len, *flags, *next);
            }
            for (index, head) in (0_u64..).zip(&heads) {
                let at = rings(queue) + 0x1004 + index * 2;
                driver.memory.ram.write_obj(head % SIZE, GuestAddress(at)).unwrap();
            }
            let count = u16::try_from(heads.len()).unwrap();
            let index = if ahead > 90 { ahead } else { count };
            driver.memory.ram.store(index, GuestAddress(rings(queue) + 0x1002), Ordering::SeqCst).unwrap();
            driver.set(0x3000 + queue as u64 * 4, 0, 2);
        }
        driver.start(u64::MAX);
        prop_assert!(!driver.is_broken());
        if kind == 0 {
            prop_assert_eq!(driver.request(0, 1, 512, true), 0);
        }
    }

    /// Any access to any register, in any width.
    #[test]
    fn rubbish_in_the_registers_does_no_harm(
        accesses in prop::collection::vec(
            (any::<bool>(), 0..0x1_0000_u64, 1..9_usize, any::<[u8; 8]>(), any::<bool>()),
            0..200,
        ),
    ) {
        let (_, blk) = disk(1 << 20, false);
        let mut driver = Driver::new(blk);
        for (read, offset, len, mut data, config) in accesses {
            let place = usize::try_from(offset).unwrap() & 0xfff;
            // Most of the BAR is empty: aim at where there is something.
            let offset = if offset & 1 == 0 { offset } else { offset & 0x3f };
            match (read, config) {
                (true, true) => driver.function.read_config(place, &mut data[..len]),
                (true, false) => driver.function.read_bar(offset, &mut data[..len]),
                (false, true) => driver.function.write_config(place, &data[..len]),
                (false, false) => driver.function.write_bar(offset, &data[..len]),
            }
        }
        driver.start(u64::MAX);
        prop_assert_eq!(driver.request(0, 1, 512, true), 0);
    }
}

#[test]
fn buses_lead_to_devices() {
    let (_, blk) = disk(1 << 20, false);
    let driver = Driver::new(blk);
    let bus = pci::Pci::default();
    let address = Address::of(0).unwrap();
    let bar = u64::from(address.bar());
    assert!(bus.add(address, driver.function));
    let mut data = [0; 4];
    bus.read_ecam(1 << 12, &mut data);
    assert_eq!(data, [0xff; 4]);
    bus.read_ecam(0, &mut data);
    assert_eq!(data, [0xf4, 0x1a, 0x42, 0x10]);
    assert!(!bus.read_bar(bar, &mut data));
    bus.write_ecam(4, &[2, 0]);
    assert!(bus.read_bar(bar + 0x2000, &mut data));
    assert_eq!(u32::from_le_bytes(data), 2048);
    bus.write_ecam(4, &[0, 0]);
    assert!(!bus.read_bar(bar, &mut data));
}
