// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices whose driver uses the interrupt pin.

use super::*;

const ISR: u64 = 0x1000;
const COMMAND: usize = 4;
const STATUS: usize = 6;
/// The first slot's line.
const LINE: u32 = 16;

impl Driver {
    fn changes(&self) -> Vec<(u32, bool)> {
        std::mem::take(&mut *self.changes.0.lock().unwrap())
    }

    /// Whether the status register says that an interrupt is pending.
    fn has_interrupt(&mut self) -> bool {
        let (mut byte, mut word) = ([0], [0; 4]);
        self.function.read_config(STATUS, &mut byte);
        self.function.read_config(COMMAND, &mut word);
        assert_eq!(word[2], byte[0]);
        byte[0] & 8 != 0
    }

    /// A request whose interrupt has arrived.
    fn interrupting_request(&mut self) {
        assert_eq!(self.request(0, 1, 512, true), 0);
        self.wait_until("an interrupt", |driver| {
            driver.has_interrupt() || !driver.sent.0.lock().unwrap().is_empty()
        });
    }
}

fn driver(has_vectors: bool) -> Driver {
    let mut driver = Driver::wired(disk(1 << 20, false).1, has_vectors);
    driver.start(!F_EVENT_IDX);
    driver
}

#[test]
fn a_disk_without_vectors_asserts_its_line_until_the_driver_looks() {
    let mut driver = driver(false);
    assert_eq!(driver.msix_control(), None);
    let mut pin = [0];
    driver.function.read_config(0x3d, &mut pin);
    assert_eq!(pin, [1]);
    // No vector can be chosen.
    driver.set(0x16, 0, 2);
    assert_eq!((driver.get(0x10, 2), driver.get(0x1a, 2)), (0xffff, 0xffff));
    for _ in 0..2 {
        assert!(!driver.has_interrupt());
        driver.interrupting_request();
        assert_eq!(driver.changes(), [(LINE, true)]);
        assert_eq!(driver.get(ISR, 1), 1);
        assert_eq!(driver.get(ISR, 1), 0);
        assert_eq!(driver.changes(), [(LINE, false)]);
    }
    assert!(driver.sent.0.lock().unwrap().is_empty());
}

#[test]
fn messages_close_the_pin() {
    let mut driver = driver(true);
    driver.interrupting_request();
    assert!(!driver.has_interrupt());
    assert_eq!((driver.get(ISR, 1), driver.changes()), (0, vec![]));
    // Off: what comes now goes to the pin, and is not sent when they are on again.
    let control = driver.msix_control().unwrap();
    driver.function.write_config(control, &[0, 0]);
    driver.sent.0.lock().unwrap().clear();
    driver.interrupting_request();
    assert_eq!(driver.changes(), [(LINE, true)]);
    driver.function.write_config(control, &[0, 0x80]);
    assert_eq!(driver.changes(), [(LINE, false)]);
    assert!(!driver.has_interrupt());
    assert!(driver.sent.0.lock().unwrap().is_empty());
}

#[test]
fn a_disabled_pin_says_only_that_something_is_pending() {
    let mut driver = driver(false);
    driver.function.write_config(COMMAND, &[2, 4]);
    driver.interrupting_request();
    assert!(driver.has_interrupt());
    assert_eq!(driver.changes(), []);
    driver.function.write_config(COMMAND, &[2, 0]);
    assert_eq!(driver.changes(), [(LINE, true)]);
    driver.function.write_config(COMMAND, &[2, 4]);
    assert_eq!(driver.changes(), [(LINE, false)]);
    assert_eq!(driver.get(ISR, 1), 1);
    driver.function.write_config(COMMAND, &[2, 0]);
    assert_eq!(driver.changes(), []);
}

#[test]
fn a_reset_and_the_end_of_the_device_let_go_of_the_line() {
    let mut device = driver(false);
    device.interrupting_request();
    device.set(0x14, 0, 1);
    assert_eq!(device.changes(), [(LINE, true), (LINE, false)]);
    assert!(!device.has_interrupt());
    device.start(!F_EVENT_IDX);
    device.interrupting_request();
    let Driver { function, changes, .. } = device;
    drop(function);
    let last = changes.0.lock().unwrap().last().copied();
    assert_eq!(last, Some((LINE, false)));
}

#[test]
fn a_broken_driver_is_told_at_the_pin() {
    let mut driver = driver(false);
    driver.offer(0, SIZE);
    driver.wait_until("broken", Driver::is_broken);
    driver.wait_until("told", Driver::has_interrupt);
    assert_eq!(driver.get(ISR, 1) & 2, 2);
}

#[test]
fn an_asserted_line_outlives_a_snapshot() {
    let mut old = driver(false);
    old.interrupting_request();
    old.function.pause();
    let saved = old.function.save().unwrap();
    let mut new = Driver::wired(disk(1 << 20, false).1, false);
    new.memory.ram.write_slice(&old.take(0, 16 << 20), GuestAddress(0)).unwrap();
    new.function.restore(saved.clone()).unwrap();
    assert_eq!(new.changes(), [(LINE, true)]);
    assert!(new.has_interrupt());
    assert_eq!(new.function.save().unwrap(), saved);
    assert_eq!(new.get(ISR, 1), 1);
    // With vectors it is another device.
    assert!(Driver::wired(disk(1 << 20, false).1, true).function.restore(saved).is_err());
}
