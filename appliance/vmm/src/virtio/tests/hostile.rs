// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drivers that resize queues, nest tables and lay rings over each other.

use super::*;
use crate::memory::Ram;
use crate::pci::msix::Msix;
use crate::virtio::blk::QUEUE_SIZE;
use crate::virtio::chain::{Broken, Chain};
use crate::virtio::worker::{MOST_AT_ONCE, Serve, drain, event};
use crate::virtio::{ActiveQueue, Link};
use virtio_queue::{Queue, QueueT};

/// From a reset to a started device whose first queue has this size and these rings.
fn start_with(driver: &mut Driver, size: u16, rings: [u64; 3]) {
    driver.set(0x14, 0, 1);
    driver.set(0x14, 3, 1);
    for (half, features) in [(0, F_INDIRECT_DESC), (1, 1)] {
        driver.set(0x08, half, 4);
        driver.set(0x0c, features, 4);
    }
    driver.set(0x14, 11, 1);
    driver.memory.ram.write_slice(&[0; 0x4000], GuestAddress(super::rings(0))).unwrap();
    driver.queues[0] = (0, 0, 0);
    driver.set(0x16, 0, 2);
    driver.set(0x18, size.into(), 2);
    for (field, at) in [0x20, 0x28, 0x30].into_iter().zip(rings) {
        driver.set(field, at, 8);
    }
    driver.set(0x1c, 1, 2);
    driver.set(0x14, 15, 1);
}

fn usual() -> [u64; 3] {
    [rings(0), rings(0) + 0x1000, rings(0) + 0x2000]
}

#[test]
fn a_queue_has_a_size_that_the_device_offers_or_none() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::new(blk);
    driver.set(0x16, 0, 2);
    assert_eq!(driver.get(0x18, 2), u64::from(QUEUE_SIZE));
    for (size, sound) in [
        (0, false),
        (1, true),
        (2, true),
        (3, false),
        (4, true),
        (64, true),
        (100, false),
        (256, true),
        (512, true),
        (513, false),
        (1024, false),
        (0x8000, false),
        (0xffff, false),
    ] {
        start_with(&mut driver, size, usual());
        assert_eq!(driver.is_broken(), !sound, "{size}");
        if sound && size >= 4 {
            assert_eq!(driver.request(0, 1, 512, true), 0, "{size}");
        }
    }
    // A reset gives the largest size back.
    driver.set(0x14, 0, 1);
    driver.set(0x16, 0, 2);
    assert_eq!((driver.get(0x18, 2), driver.get(0x1c, 2)), (u64::from(QUEUE_SIZE), 0));
}

#[test]
fn a_queue_that_runs_keeps_its_size_and_its_place() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::ready(blk);
    assert_eq!(driver.request(0, 1, 512, true), 0);
    for (field, value, len) in
        [(0x18, 4, 2), (0x18, 0, 2), (0x1c, 0, 2), (0x20, 0, 8), (0x28, 1 << 40, 8), (0x30, 1, 4)]
    {
        let before = driver.get(field, len);
        driver.set(field, value, len);
        assert_eq!(driver.get(field, len), before, "{field:#x}");
        assert_eq!(driver.request(0, 2, 512, true), 0, "{field:#x}");
    }
    // Queues that do not exist take nothing.
    for queue in [1, 0xffff] {
        driver.set(0x16, queue, 2);
        driver.set(0x18, 8, 2);
        driver.set(0x1c, 1, 2);
        assert_eq!((driver.get(0x18, 2), driver.get(0x1c, 2)), (0, 0));
        driver.set(0x3000 + queue * 4, queue, 2);
    }
    assert_eq!(driver.request(0, 3, 512, true), 0);
}

#[test]
fn tables_lead_nowhere_but_to_buffers() {
    let table = BUFFERS + 0x8000;
    let most = u32::from(SIZE) * 16;
    for (what, entries, len, flags) in [
        ("a loop in a table", vec![(BUFFERS, 16, NEXT, 1), (BUFFERS, 16, NEXT, 0)], 32, INDIRECT),
        ("a table that leads to itself", vec![(table, 32, INDIRECT, 0)], 32, INDIRECT),
        (
            "a table in a table",
            vec![(BUFFERS, 16, NEXT, 1), (table + 0x100, 32, INDIRECT, 0)],
            32,
            INDIRECT,
        ),
        ("a next behind the table", vec![(BUFFERS, 16, NEXT, 2)], 32, INDIRECT),
        ("a table that goes on", vec![(BUFFERS, 16, 0, 0)], 16, INDIRECT | NEXT),
        ("a table with a hole at its end", vec![(BUFFERS, 16, NEXT, 1)], most * 1000, INDIRECT),
        ("a table without an end", vec![(BUFFERS, 16, NEXT, 1)], !15, INDIRECT),
    ] {
        let (store, blk) = disk(1 << 20, false);
        let before = store.bytes.lock().unwrap().clone();
        let mut driver = Driver::ready(blk);
        for (index, (address, len, flags, next)) in (0..).zip(entries) {
            driver.describe(table + index * 16, address, len, flags, next);
        }
        driver.descriptor(0, 0, table, len, flags, 0);
        driver.offer(0, 0);
        driver.wait_until(what, Driver::is_broken);
        assert_eq!(*store.bytes.lock().unwrap(), before, "{what}");
        driver.start(u64::MAX);
        assert_eq!(driver.request(0, 1, 512, true), 0, "after {what}");
    }
}

#[test]
fn a_chain_is_as_long_as_the_queue_and_no_longer() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::new(blk);
    // The field that says how many buffers a request may have.
    let most = driver.get(0x2000 + 12, 4);
    assert_eq!(most + 2, u64::from(QUEUE_SIZE));
    let (table, data) = (BUFFERS + 0x8000, BUFFERS + 0x10000);
    for (segments, sound) in [(most, true), (most + 1, false)] {
        start_with(&mut driver, QUEUE_SIZE, usual());
        driver.put(BUFFERS, &[0; 16]);
        driver.describe(table, BUFFERS, 16, NEXT, 1);
        for (index, next) in (1..=segments).zip(2..) {
            driver.describe(table + index * 16, data + index * 1024, 512, NEXT | WRITE, next);
        }
        driver.describe(table + (segments + 1) * 16, BUFFERS + 0x100, 1, WRITE, 0);
        let len = u32::try_from(segments + 2).unwrap() * 16;
        driver.descriptor(0, 0, table, len, INDIRECT, 0);
        driver.offer(0, 0);
        if sound {
            assert_eq!(driver.used(0), (0, u32::try_from(segments).unwrap() * 512 + 1));
            for index in 1..=segments {
                let sector = u8::try_from((index - 1) % 251).unwrap();
                assert_eq!(driver.take(data + index * 1024, 512), [sector; 512], "{index}");
            }
        } else {
            driver.wait_until("a longer one", Driver::is_broken);
        }
    }
}

/// Serves a request while another processor makes the next one available.
struct Asked(usize);

impl Serve for Asked {
    fn serve(&mut self, _: Chain, ram: &Ram) -> std::result::Result<u32, Broken> {
        self.0 += 1;
        assert!(self.0 < 100_000, "nobody looks whether it is time to stop");
        let index = GuestAddress(usual()[1] + 2);
        let asked: u16 = ram.load(index, Ordering::SeqCst).unwrap();
        ram.store(asked.wrapping_add(1), index, Ordering::SeqCst).unwrap();
        Ok(0)
    }
}

#[test]
fn a_driver_that_never_stops_asking_is_not_listened_to_for_ever() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::new(blk);
    driver.descriptor(0, 0, BUFFERS, 16, 0, 0);
    let [table, available, used] = usual();
    driver.memory.ram.write_obj(1_u16, GuestAddress(available + 2)).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(available)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
    queue.set_ready(true);
    let mut active = ActiveQueue { queue, index: 0, kick: event().unwrap() };
    let lines = Lines::new(&(Arc::new(Changes::default()) as Arc<dyn LineSink>));
    let pin = lines.pin(Address::of(0).unwrap());
    let link = Link::new(Arc::new(Msix::new(1, Arc::new(Sent::default()))), pin, 1);
    for round in 1..=3 {
        let mut asked = Asked(0);
        drain(&mut active, &driver.memory.ram, &link, &mut asked).unwrap();
        assert_eq!(asked.0, MOST_AT_ONCE, "round {round}");
        // It comes back to what is left.
        assert!(active.kick.read().is_ok());
    }
}

#[test]
fn rings_over_each_other_do_no_harm() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::new(blk);
    let [table, available, used] = usual();
    for rings in [[table, available, available], [table, table, used], [table, available, table]] {
        start_with(&mut driver, 4, rings);
        driver.put(BUFFERS, &[0; 16]);
        driver.descriptor(0, 0, BUFFERS, 16, NEXT, 1);
        driver.descriptor(0, 1, BUFFERS + 0x100, 513, WRITE, 0);
        driver.offer(0, 0);
        driver.start(u64::MAX);
        assert_eq!(driver.request(0, 1, 512, true), 0, "{rings:x?}");
    }
}

#[test]
fn a_reset_in_the_middle_of_requests_leaves_a_device_that_works() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::ready(blk);
    for round in 0_u16..50 {
        driver.put(BUFFERS, &[0; 16]);
        for _ in 0..=round % 8 {
            let buffers =
                [(BUFFERS, 16, false), (BUFFERS + 0x1000, 512, true), (BUFFERS + 0x100, 1, true)];
            driver.send(0, &buffers);
        }
        driver.start(u64::MAX);
        assert_eq!(driver.request(0, u64::from(round), 512, true), 0, "round {round}");
        assert_eq!(driver.take(BUFFERS + 0x1000, 1), [u8::try_from(round % 251).unwrap()]);
    }
}
