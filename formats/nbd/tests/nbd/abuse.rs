// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that lie, stall, flood and vanish: none of them harms the others.

use crate::client::{
    Client, Place, Reply, export, extended, header, info, sample, serve, serve_one,
};
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, Extent, ExtentKind, MemoryDevice, Result, Span, Zeroing};
use tranship_nbd::Limits;

/// Fails if `place` does not come down to `connections`.
fn settles(place: &Place, connections: usize) {
    let started = Instant::now();
    while place.running.connections() > connections {
        assert!(started.elapsed() < Duration::from_secs(20), "connections stay");
        place.running.wait(Some(Duration::from_millis(100)));
    }
}

fn is_served(place: &Place) {
    let mut client = place.connect();
    client.go(true);
    assert_eq!(client.errno(0, 0, 0, 4096), 0);
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn clients_that_come_and_leave_at_once_leave_nothing_behind() {
    let place = serve_one(sample());
    is_served(&place);
    for _ in 0..2000 {
        drop(UnixStream::connect(place.socket()).unwrap());
    }
    is_served(&place);
    settles(&place, 0);
    // Other tests of this process have descriptors too.
    assert!(descriptors() < 1000, "{} descriptors", descriptors());
}

#[test]
fn half_open_handshakes_give_way_to_those_who_speak() {
    let limits = Limits { handshakes: 4, connections: 100, ..Limits::default() };
    let place = serve(vec![export("vda", sample())], limits);
    let path = place.socket();
    let idle: Vec<_> = (0..12).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let started = Instant::now();
    is_served(&place);
    // Three rounds of four, each of which may be silent for a second.
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    drop(idle);
    settles(&place, 0);
}

#[test]
fn a_byte_at_a_time_is_no_way_around_the_limit() {
    let limits = Limits { handshake: Duration::from_millis(500), ..Limits::default() };
    let place = serve(vec![export("vda", sample())], limits);
    let mut client = place.connect();
    let mut bytes = [3u32.to_be_bytes().to_vec(), vec![0; 4096]].concat();
    bytes[4..12].copy_from_slice(b"IHAVEOPT");
    let started = Instant::now();
    for byte in bytes {
        if client.0.write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
        assert!(started.elapsed() < Duration::from_secs(10), "the connection stays");
    }
}

#[test]
fn silence_in_the_middle_of_a_request_ends_the_connection() {
    let limits = Limits { receive_stall: Duration::from_millis(300), ..Limits::default() };
    let place = serve(vec![export("vda", sample())], limits);
    let write = header(0, 1, 7, 0, 1 << 20);
    for len in [10, write.len()] {
        let mut client = place.connect();
        client.go(true);
        client.say(&write[..len]);
        assert!(client.is_closed());
    }
    // Between requests a client may take its time.
    let mut client = place.connect();
    client.go(true);
    assert_eq!(client.errno(0, 0, 0, 4096), 0);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(client.errno(0, 0, 0, 4096), 0);
}

#[test]
fn a_client_that_vanishes_in_a_payload_writes_nothing() {
    let device = sample();
    let place = serve_one(device.clone());
    let before = device.snapshot();
    for sent in [0, 1, 4095, 300_000] {
        let mut client = place.connect();
        client.go(true);
        client.say(&header(0, 1, 7, 0, 400_000));
        client.say(&vec![0xee; sent]);
    }
    settles(&place, 0);
    assert!(device.snapshot() == before);
}

#[test]
fn hoarders_of_memory_leave_the_others_their_share() {
    let limits = Limits {
        server_bytes: 64 << 20,
        connection_bytes: 64 << 20,
        connections: 16,
        ..Limits::default()
    };
    let device = Arc::new(MemoryDevice::new(vec![0; 33 << 20]));
    let place = serve(vec![export("vda", device)], limits);
    // Together they take all that is not divided up, and say no more.
    let hoarders: Vec<Client> = (0..3)
        .map(|_| {
            let mut client = place.connect();
            client.go(true);
            client.say(&header(0, 1, 7, 0, 32 << 20));
            client
        })
        .collect();
    let mut client = place.connect();
    client.go(true);
    client.say(&[header(0, 1, 7, 0, 1 << 20), vec![1; 1 << 20]].concat());
    client.reply();
    assert_eq!(client.errno(0, 0, 0, 1 << 20), 0);
    drop(hoarders);
}

#[test]
fn a_flood_of_nonsense_is_answered_line_by_line() {
    let place = serve_one(sample());
    let mut client = place.connect();
    client.go(true);
    let packet: Vec<u8> = (0..20_000).flat_map(|at| header(0xff00, 77, at, at, 0)).collect();
    let mut writer = client.0.try_clone().unwrap();
    let sending = std::thread::spawn(move || writer.write_all(&packet).unwrap());
    for _ in 0..20_000 {
        client.reply();
    }
    sending.join().unwrap();
    assert_eq!(client.errno(0, 0, 0, 4096), 0);
    let statistics = place.running.statistics("vda").unwrap();
    assert_eq!((statistics.refused, statistics.errors), (20_000, 20_000));
}

#[test]
fn option_floods_and_lies_end_the_connection_only() {
    let place = serve_one(sample());
    for (number, data) in [
        (99_u32, vec![]),
        (6, info("nope", &[])),
        (9, [&[0, 0, 0, 0][..], &u32::MAX.to_be_bytes()].concat()),
        (10, vec![0xff; 100]),
    ] {
        let mut client = place.connect();
        client.say(&3u32.to_be_bytes());
        for _ in 0..256 {
            assert!(client.option(number, &data).0 & 0x8000_0000 != 0);
        }
        assert!(client.is_closed());
    }
    is_served(&place);
}

/// Zeroes as slowly as a disk, without end.
#[derive(Debug, Default)]
struct Slow(AtomicU64);

impl BlockDevice for Slow {
    fn size(&self) -> u64 {
        1 << 50
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }
    fn write_zeroes(&self, _: Span, _: Zeroing) -> Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(60));
        Ok(())
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Ok(Extent::new(ExtentKind::Hole, self.size() - offset))
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn endless_work_ends_with_the_client_or_the_server() {
    let device = Arc::new(Slow::default());
    // No worker is left to see the client leave.
    let limits = Limits { requests: 1, ..Limits::default() };
    let place = serve(vec![export("vda", device.clone())], limits);
    let zeroes = |place: &Place| {
        let mut client = place.connect();
        client.go_extended(&[]);
        let before = device.0.load(Ordering::SeqCst);
        client.say(&extended(0, 6, 7, 0, 8 << 40));
        while device.0.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
        client
    };
    drop(zeroes(&place));
    let started = Instant::now();
    settles(&place, 0);
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    let mut client = zeroes(&place);
    let started = Instant::now();
    place.running.stop().unwrap();
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    // The client hears that it was the server.
    let Reply::Chunk { done: true, payload, .. } = client.reply() else { panic!("no chunk") };
    assert_eq!(payload[..4], 108u32.to_be_bytes());
    assert!(client.is_closed());
}

#[test]
fn replies_that_nobody_reads_cost_one_connection_and_little_memory() {
    let resident = || {
        let text = fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let limits = Limits { send_stall: Duration::from_millis(500), ..Limits::default() };
    let device = Arc::new(Slow::default());
    let place = serve(vec![export("vda", device)], limits);
    let before = resident();
    let mut greedy = place.connect();
    greedy.go(false);
    for cookie in 0..64 {
        greedy.say(&header(0, 0, cookie, 0, 32 << 20));
    }
    is_served(&place);
    std::thread::sleep(Duration::from_millis(200));
    let grown = resident().saturating_sub(before);
    assert!(grown < 200 << 20, "{grown} bytes more");
    settles(&place, 0);
}
