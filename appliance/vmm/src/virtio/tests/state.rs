// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that pause, go on, and are taken into another machine.

use super::*;
use crate::virtio::transport::FunctionState;

/// Pauses the device, takes its state, and lets it go on.
fn save(driver: &mut Driver) -> std::result::Result<FunctionState, String> {
    driver.function.pause();
    let saved = driver.function.save();
    driver.function.resume();
    saved
}

/// A machine with `device` in the place and with the memory of another, whose device pauses.
fn moved(driver: &mut Driver, device: Box<dyn VirtioDevice>) -> Driver {
    driver.function.pause();
    let saved = driver.function.save().unwrap();
    let mut other = Driver::new(device);
    other.memory.ram.write_slice(&driver.take(0, 16 << 20), GuestAddress(0)).unwrap();
    other.queues.clone_from(&driver.queues);
    other.features = driver.features;
    other.function.restore(saved).unwrap();
    other.function.resume();
    other
}

#[test]
fn a_disk_goes_on_after_a_pause_and_elsewhere() {
    for features in [!0, !F_EVENT_IDX, !F_INDIRECT_DESC] {
        let (_, blk) = disk(1 << 20, false);
        let mut driver = Driver::new(blk);
        driver.start(features);
        let mut suppressed = false;
        for round in 1..200 {
            // More requests than the rings have places.
            assert_eq!(driver.request(0, round, 512, true), 0);
            if round == 70 {
                save(&mut driver).unwrap();
            }
            if round == 140 {
                // Flushes after each write from now on, which is no feature but a register.
                driver.function.write_bar(0x2020, &[0]);
                suppressed = true;
                driver = moved(&mut driver, disk(1 << 20, false).1);
            }
            assert_eq!(driver.get(0x2020, 1), u64::from(!suppressed));
            let expected = u8::try_from(round).unwrap();
            assert_eq!(driver.take(BUFFERS + 0x1000, 1), [expected]);
        }
        assert!(!driver.is_broken());
        // A driver that asks to be told only of a certain request is not told of others.
        let told = !driver.sent.0.lock().unwrap().is_empty();
        assert_eq!(told, driver.features & F_EVENT_IDX == 0);
    }
}

#[test]
fn what_is_offered_during_a_pause_is_served_after_it() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::ready(blk);
    driver.function.pause();
    driver.put(BUFFERS, &[0; 16]);
    driver.send(
        0,
        &[(BUFFERS, 16, false), (BUFFERS + 0x1000, 512, true), (BUFFERS + 0x100, 1, true)],
    );
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.take(rings(0) + 0x2002, 2), [0, 0]);
    let mut other = moved(&mut driver, disk(1 << 20, false).1);
    driver.function.resume();
    assert_eq!(driver.used(0).1, 513);
    assert_eq!(other.used(0).1, 513);
}

#[test]
fn another_device_is_refused() {
    let (_, blk) = disk(1 << 20, false);
    let saved = save(&mut Driver::ready(blk)).unwrap();
    let console = |names: &[&str]| -> Box<dyn VirtioDevice> {
        let port =
            |name: &&str| Port { name: (*name).to_owned(), stream: UnixStream::pair().unwrap().0 };
        Box::new(Console::new(names.iter().map(port).collect()).unwrap())
    };
    let others: Vec<(Box<dyn VirtioDevice>, &str)> = vec![
        (console(&[]), "device type 2, expected 3"),
        (Box::new(Rng::default()), "device type 2, expected 4"),
        (disk(1 << 21, false).1, "another disk"),
        (disk(1 << 20, true).1, "the features cannot be"),
    ];
    for (device, expected) in others {
        let mut other = Driver::new(device);
        let error = other.function.restore(saved.clone()).unwrap_err();
        assert!(error.contains(expected), "{error}");
        // Nothing of the state was taken over.
        assert_eq!(other.status(), 0);
    }
    let saved = save(&mut Driver::ready(console(&["a"]))).unwrap();
    let error = Driver::new(console(&["b"])).function.restore(saved).unwrap_err();
    assert_eq!(error, "ports a, expected b");
}

#[test]
fn a_broken_device_is_not_saved() {
    let (_, blk) = disk(1 << 20, false);
    let mut driver = Driver::ready(blk);
    driver.descriptor(0, 0, BUFFERS, 8, 0, 0);
    driver.offer(0, 0);
    driver.wait_until("broken", Driver::is_broken);
    assert_eq!(save(&mut driver).unwrap_err(), "the device waits for a reset");
    driver.start(u64::MAX);
    assert_eq!(driver.request(0, 1, 512, true), 0);
    save(&mut driver).unwrap();
}

/// A console with port "a" and one before it that nobody uses, and the far end of the stream.
fn two_ports() -> (Box<Console>, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = |name: &str, stream| Port { name: name.into(), stream };
    let ports = vec![port("unused", UnixStream::pair().unwrap().0), port("a", far)];
    (Box::new(Console::new(ports).unwrap()), near)
}

/// The same whose port "a" the guest has opened.
fn opened() -> (Driver, UnixStream) {
    let (console, near) = two_ports();
    let mut driver = Driver::ready(console);
    driver.put(BUFFERS, &[1, 0, 0, 0, 6, 0, 1, 0]);
    driver.send(3, &[(BUFFERS, 8, false)]);
    driver.used(3);
    (driver, near)
}

fn converse(driver: &mut Driver, near: &mut UnixStream, text: [u8; 4]) {
    near.write_all(&text).unwrap();
    driver.send(4, &[(BUFFERS + 0x3000, 64, true)]);
    assert_eq!(driver.used(4).1, 4);
    assert_eq!(driver.take(BUFFERS + 0x3000, 4), text);
    driver.send(5, &[(BUFFERS + 0x3000, 4, false)]);
    driver.used(5);
    let mut answer = [0; 4];
    near.read_exact(&mut answer).unwrap();
    assert_eq!(answer, text);
}

#[test]
fn ports_stay_open_over_a_snapshot() {
    let (mut driver, mut near) = opened();
    converse(&mut driver, &mut near, *b"here");
    save(&mut driver).unwrap();
    converse(&mut driver, &mut near, *b"on  ");
    let (console, mut other_near) = two_ports();
    let mut other = moved(&mut driver, console);
    converse(&mut other, &mut other_near, *b"away");
    driver.function.resume();
    converse(&mut driver, &mut near, *b"here");
}

#[test]
fn a_conversation_that_is_under_way_is_not_saved() {
    let (mut driver, mut near) = opened();
    near.write_all(b"something").unwrap();
    let error = save(&mut driver).unwrap_err();
    assert_eq!(error, "port a has bytes that the guest has not taken yet");
    driver.send(4, &[(BUFFERS + 0x3000, 64, true)]);
    driver.used(4);
    save(&mut driver).unwrap();
    // More than the stream takes.
    for _ in 0..u64::from(SIZE) / 2 {
        driver.send(5, &[(BUFFERS, 32 << 10, false)]);
    }
    driver.used(5);
    driver.wait_until("a full stream", |driver| {
        save(driver) == Err("port a has bytes of the guest that nobody has read yet".into())
    });
    let reader = std::thread::spawn(move || {
        let mut near = near;
        let all = u64::from(SIZE) / 2 * (32 << 10);
        std::io::copy(&mut (&mut near).take(all), &mut std::io::sink()).unwrap();
        near
    });
    for _ in 1..u64::from(SIZE) / 2 {
        driver.used(5);
    }
    let _near = reader.join().unwrap();
    save(&mut driver).unwrap();
}

#[test]
fn a_port_that_had_hung_up_is_there_again() {
    let (mut driver, near) = opened();
    driver.send(4, &[(BUFFERS + 0x3000, 64, true)]);
    near.shutdown(std::net::Shutdown::Write).unwrap();
    driver.send(2, &[(BUFFERS + 0x2000, 64, true)]);
    driver.used(2);
    assert_eq!(driver.take(BUFFERS + 0x2000, 8), [1, 0, 0, 0, 6, 0, 0, 0]);
    let (console, mut other_near) = two_ports();
    let mut other = moved(&mut driver, console);
    other.send(2, &[(BUFFERS + 0x2000, 64, true)]);
    other.used(2);
    assert_eq!(other.take(BUFFERS + 0x2000, 8), [1, 0, 0, 0, 6, 0, 1, 0]);
    // The buffer that waited since before the snapshot is used first.
    other_near.write_all(b"hi").unwrap();
    assert_eq!(other.used(4).1, 2);
    assert_eq!(other.take(BUFFERS + 0x3000, 2), b"hi");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// Whatever the registers hold is there again in another device.
    #[test]
    fn every_register_outlives_a_snapshot(
        accesses in prop::collection::vec((0..0x1_0000_u64, 1..9_usize, any::<[u8; 8]>(), any::<bool>()), 0..100),
        started in any::<bool>(),
    ) {
        let (_, blk) = disk(1 << 20, false);
        let mut driver = Driver::new(blk);
        if started {
            driver.start(u64::MAX);
        }
        for (offset, len, data, config) in accesses {
            let place = usize::try_from(offset).unwrap() & 0xff;
            let offset = if offset & 1 == 0 { offset } else { offset & 0x3f };
            if config {
                driver.function.write_config(place, &data[..len]);
            } else {
                driver.function.write_bar(offset, &data[..len]);
            }
        }
        driver.function.pause();
        if let Ok(saved) = driver.function.save() {
            let bytes = postcard::to_stdvec(&saved).unwrap();
            let read: FunctionState = postcard::from_bytes(&bytes).unwrap();
            prop_assert_eq!(&read, &saved);
            let (_, blk) = disk(1 << 20, false);
            let mut other = Driver::new(blk);
            prop_assert_eq!(other.function.restore(read), Ok(()));
            prop_assert_eq!(other.function.save(), Ok(saved));
            for at in (0..0x100).step_by(4) {
                let (mut old, mut new) = ([0; 4], [0; 4]);
                driver.function.read_config(at, &mut old);
                other.function.read_config(at, &mut new);
                prop_assert_eq!(old, new, "{:#x}", at);
            }
            for at in (0..0x40).chain(0x2000..0x2040).chain(0x8000..0x8020).chain([0xc000]) {
                prop_assert_eq!(driver.get(at, 1), other.get(at, 1), "{:#x}", at);
            }
        }
    }

    /// Bytes that are wrong are refused or make a state that a driver could have made.
    #[test]
    fn rubbish_in_a_state_does_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        kind in 0..3,
    ) {
        let device = || -> Box<dyn VirtioDevice> {
            match kind {
                0 => disk(1 << 20, false).1,
                1 => Box::new(Rng::default()),
                _ => {
                    let (_, far) = UnixStream::pair().unwrap();
                    Box::new(Console::new(vec![Port { name: "x".into(), stream: far }]).unwrap())
                }
            }
        };
        let mut bytes = postcard::to_stdvec(&save(&mut Driver::ready(device())).unwrap()).unwrap();
        for (index, value) in changes {
            *index.get_mut(&mut bytes) = value;
        }
        let mut driver = Driver::new(device());
        if let Ok(state) = postcard::from_bytes::<FunctionState>(&bytes)
            && driver.function.restore(state).is_ok()
        {
            driver.function.resume();
        }
        driver.start(u64::MAX);
        prop_assert!(!driver.is_broken());
        if kind == 0 {
            prop_assert_eq!(driver.request(0, 1, 512, true), 0);
        }
    }
}
