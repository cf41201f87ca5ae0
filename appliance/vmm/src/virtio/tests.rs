// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices without a guest: a driver in the test plays by the rules, or does not.

mod driver;
mod hostile;
mod pin;
mod rounds;
mod state;

pub(crate) use driver::idle;

use super::console::{Console, Port};
use super::rng::Rng;
use super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice, status};
use crate::pci;
use crate::pci::Address;
use crate::pci::msix::tests::Sent;
use crate::pci::pin::tests::Changes;
use crate::pci::pin::{LineSink, Lines};
use driver::{BUFFERS, Driver, INDIRECT, NEXT, PATIENCE, SIZE, WRITE, disk, rings};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

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
