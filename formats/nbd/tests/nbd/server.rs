// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket's life, and clients that come, stay and misbehave.

use crate::client::Reply;
use crate::client::{ACK, Client, export, header, info, sample, serve, serve_one};
use crate::transmission::rigged;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;
use tranship_block::{ErrorKind, MemoryDevice};
use tranship_nbd::{Limits, Server};

#[test]
fn the_socket_is_private_and_goes_away() {
    let place = serve_one(sample());
    let path = place.socket();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    place.running.stop().unwrap();
    assert!(!path.exists());
}

#[test]
fn a_live_socket_and_a_file_are_refused_and_a_stale_socket_replaced() {
    let place = serve_one(sample());
    let bind = |path| Server::bind(path, vec![], Limits::default());
    assert_eq!(bind(place.socket()).unwrap_err().kind(), ErrorKind::Busy);
    let file = place.folder.path().join("file");
    fs::write(&file, b"kept").unwrap();
    assert_eq!(bind(file.clone()).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(fs::read(&file).unwrap(), b"kept");
    let stale = place.folder.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    let server = bind(stale.clone()).unwrap();
    drop(server);
    assert!(!stale.exists());
    let twice = vec![export("a", sample()), export("a", sample())];
    let error = Server::bind(stale, twice, Limits::default()).unwrap_err();
    assert_eq!(error.to_string(), "two exports are called \"a\"");
}

#[test]
fn exports_can_be_added_and_replaced_while_clients_stay() {
    let place = serve_one(sample());
    let mut old = place.connect();
    old.go(false);
    let small = Arc::new(MemoryDevice::new(vec![9; 512]));
    place.running.add_export(export("vda", small.clone())).unwrap();
    place.running.add_export(export("vdb", small)).unwrap();
    assert_eq!(old.errno(0, 0, 4096, 4096), 0);
    for name in ["vda", "vdb"] {
        let mut client = place.connect();
        client.say(&3u32.to_be_bytes());
        assert_eq!(client.option(7, &info(name, &[])).0, ACK);
        assert_eq!(client.errno(0, 0, 0, 512), 0);
        assert_eq!(client.errno(0, 0, 512, 1), 22);
    }
}

#[test]
fn stopping_ends_idle_clients_and_unfinished_handshakes() {
    let place = serve_one(sample());
    let mut idle = place.connect();
    idle.go(true);
    let mut unfinished = place.connect();
    place.running.stop().unwrap();
    assert!(idle.is_closed());
    assert!(unfinished.is_closed());
}

#[test]
fn stopping_answers_what_is_in_flight_and_flushes() {
    let device = rigged(None, false);
    let place = serve_one(device.clone());
    let mut client = place.connect();
    client.go(true);
    client.request(0, 0, 0, 512);
    // The second request shows that the first one has been read.
    client.request(0, 0, 4096, 512);
    assert!(matches!(client.reply(), Reply::Chunk { done: true, .. }));
    let stopping = std::thread::spawn(move || place.running.stop());
    std::thread::sleep(Duration::from_millis(50));
    assert!(!device.was_flushed() && !stopping.is_finished());
    device.open();
    assert!(matches!(client.reply(), Reply::Chunk { done: true, kind: 1, .. }));
    stopping.join().unwrap().unwrap();
    assert!(device.was_flushed());
    assert!(client.is_closed());
}

#[test]
fn a_device_that_hangs_does_not_keep_the_server_from_stopping() {
    let device = rigged(None, false);
    let limits = Limits { stop: Duration::from_millis(100), ..Limits::default() };
    let place = serve(vec![export("vda", device.clone())], limits);
    let mut client = place.connect();
    client.go(true);
    client.request(0, 0, 0, 512);
    client.request(0, 0, 4096, 512);
    client.reply();
    assert_eq!(place.running.stop().unwrap_err().kind(), ErrorKind::Busy);
    assert!(client.is_closed());
    device.open();
}

#[test]
fn a_client_that_takes_no_replies_is_cut_off() {
    let limits = Limits { send_stall: Duration::from_secs(2), ..Limits::default() };
    let device = Arc::new(MemoryDevice::new(vec![1; 8 << 20]));
    let place = serve(vec![export("vda", device)], limits);
    let mut greedy = place.connect();
    greedy.go(true);
    for cookie in 0..16 {
        greedy.say(&header(0, 0, cookie, 0, 8 << 20));
    }
    let mut other = place.connect();
    other.go(true);
    assert_eq!(other.errno(0, 0, 0, 1 << 20), 0);
    while place.running.connections() > 1 {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(other.errno(0, 0, 0, 1 << 20), 0);
}

#[test]
fn further_clients_wait_for_a_place() {
    let limits = Limits { connections: 1, ..Limits::default() };
    let place = serve(vec![export("vda", sample())], limits);
    let mut first = place.connect();
    first.go(false);
    let path = place.socket();
    let second = std::thread::spawn(move || {
        let mut second = Client::connect(&path);
        second.go(false);
        second.errno(0, 0, 0, 512)
    });
    assert_eq!(first.errno(0, 0, 0, 512), 0);
    assert!(!second.is_finished());
    drop(first);
    assert_eq!(second.join().unwrap(), 0);
}

#[test]
fn many_clients_see_each_others_writes() {
    let device = Arc::new(MemoryDevice::new(vec![0; 64 << 10]));
    let place = serve_one(device.clone());
    std::thread::scope(|scope| {
        for number in 0..8u64 {
            let place = &place;
            scope.spawn(move || {
                let mut client = place.connect();
                client.go(number % 2 == 0);
                let bytes = vec![u8::try_from(number).unwrap() + 1; 8192];
                client.say(&[header(0, 1, 7, number * 8192, 8192), bytes].concat());
                client.reply();
            });
        }
    });
    let snapshot = device.snapshot();
    for (number, bytes) in snapshot.chunks(8192).enumerate() {
        assert!(bytes.iter().all(|byte| usize::from(*byte) == number + 1));
    }
}
