// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that break off, do not read and do not stop: the process stays small, and others
//! are served.

use crate::bench::{Bench, Who};
use crate::client::{Client, Reply, extended, header};
use crate::crowd::{descriptors, resident, soon};
use crate::support::{Running, SHORT, host};
use rustix::net::sockopt::{set_socket_linger, set_socket_timeout};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

const READ: u16 = 0;
const WRITE: u16 = 1;

/// A server on a port of its own, and on the socket `s`.
fn on_a_port(bench: &Bench, words: &str) -> (Running, SocketAddr) {
    let server = bench.start(Who::Serve, &format!("-p 0 -t -x vda -e 0 {words}"));
    soon("no port", || server.said().ends_with('\n'));
    let port = server.said().trim().parse().unwrap();
    (server, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

fn is_served(bench: &Bench) {
    let mut client = Client::connect(&bench.path("s"));
    client.go(true);
    assert_eq!(client.errno(0, READ, 0, 65_536), 0);
}

fn write(client: &mut Client, flags: u16, offset: u64, bytes: &[u8]) -> u32 {
    let len = u32::try_from(bytes.len()).unwrap();
    client.say(&[header(flags, WRITE, 7, offset, len), bytes.to_vec()].concat());
    match client.reply() {
        Reply::Simple { errno, .. } => errno,
        Reply::Chunk { payload, .. } => u32::from_be_bytes(*payload.first_chunk().unwrap()),
    }
}

/// Ends the connection by a reset.
fn reset(client: Client) {
    set_socket_linger(&client.0, Some(Duration::ZERO)).unwrap();
    drop(client);
}

#[test]
fn resets_in_the_middle_of_payloads_are_the_end_of_one_client() {
    let Some(bench) = Bench::new() else { return };
    for format in ["raw", "qcow2"] {
        let name = format!("d.{format}");
        let disk = bench.disk(&name, format);
        let expected = bench.raw(&disk, format);
        let (server, address) = on_a_port(&bench, &format!("-f {format} @{name}"));
        is_served(&bench);
        let before = descriptors(&server);
        for round in 0..40_usize {
            let mut client = Client::connect_tcp(address);
            client.go(round % 2 == 0);
            // Of a write there is all but the end, or hardly anything.
            client.say(&header(0, WRITE, 7, 0, 2 << 20));
            client.say(&vec![0xee; [1, 4095, 300_000, (2 << 20) - 1][round % 4]]);
            reset(client);
            let mut client = Client::connect_tcp(address);
            client.go(round % 2 == 0);
            for cookie in 0..4 {
                client.say(&header(0, READ, cookie, 0, 4 << 20));
            }
            client.take(1 + round * 1000);
            reset(client);
        }
        is_served(&bench);
        soon("descriptors stay", || descriptors(&server) <= before + 1);
        server.signal(Signal::TERM);
        let ended = server.wait(SHORT).ended_with(0);
        assert_eq!(ended.stderr, "", "clients that leave are no news");
        assert_eq!(bench.raw(&disk, format), expected, "{format}");
    }
}

#[test]
fn clients_that_do_not_read_cost_little_memory() {
    let Some(bench) = Bench::new() else { return };
    host("qemu-img", &["create", "-q", "-f", "qcow2", &bench.text("d.qcow2"), "64M"]);
    let fill = ["-f", "qcow2", "-c", "write -P 0x5a 0 64M", &bench.text("d.qcow2")];
    host("qemu-io", &fill);
    let (server, address) = on_a_port(&bench, "-r -f qcow2 @d.qcow2");
    is_served(&bench);
    let before = resident(&server);
    let greedy: Vec<Client> = (0..8)
        .map(|number| {
            let mut client = Client::connect_tcp(address);
            client.go(number % 2 == 0);
            let requests: Vec<u8> =
                (0..64).flat_map(|cookie| header(0, READ, cookie, 0, 32 << 20)).collect();
            client.say(&requests);
            client
        })
        .collect();
    let mut most = 0;
    for _ in 0..20 {
        is_served(&bench);
        most = most.max(resident(&server));
        std::thread::sleep(Duration::from_millis(25));
    }
    let grown = most.saturating_sub(before);
    // 16 GiB are asked for.
    assert!(grown < 300 << 20, "{grown} bytes more");
    drop(greedy);
    is_served(&bench);
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}

#[test]
fn a_flood_of_requests_is_read_no_faster_than_it_is_answered() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.qcow2", "qcow2");
    let (server, address) = on_a_port(&bench, "-f qcow2 @d.qcow2");
    is_served(&bench);
    let before = resident(&server);
    let flooding: Vec<Client> = [(READ, 4096), (3, 0), (77, 0), (7, 4 << 20)]
        .map(|(command, len)| {
            let mut client = Client::connect_tcp(address);
            client.go(true);
            let limit = Some(Duration::from_millis(500));
            set_socket_timeout(&client.0, rustix::net::sockopt::Timeout::Send, limit).unwrap();
            let requests = header(0, command, 7, 0, len).repeat(20_000);
            // 500 MB of requests whose answers nobody takes: it does not come to that.
            let took_all = (0..1000).all(|_| client.0.write_all(&requests).is_ok());
            assert!(!took_all, "all requests of command {command} were read");
            client
        })
        .into();
    let grown = resident(&server).saturating_sub(before);
    assert!(grown < 200 << 20, "{grown} bytes more");
    is_served(&bench);
    drop(flooding);
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}

#[test]
fn a_killed_client_leaves_what_was_acknowledged_and_a_whole_image() {
    let Some(bench) = Bench::new() else { return };
    fs::write(bench.path("source"), vec![0x77; 48 << 20]).unwrap();
    for format in ["raw", "qcow2", "vhdx"] {
        let disk = bench.text(&format!("d.{format}"));
        host("qemu-img", &["create", "-q", "-f", format, &disk, "64M"]);
        let words = format!("-t -x vda -e 0 -f {format} @d.{format}");
        let server = bench.start(Who::Serve, &words);
        // Not flushed by anybody.
        let mut quiet = Client::connect(&bench.path("s"));
        quiet.go(false);
        assert_eq!(write(&mut quiet, 0, 60 << 20, &vec![0x66; 1 << 20]), 0);
        for moment in [5, 20, 60] {
            let mut writing = Command::new("nbdcopy")
                .args([&bench.text("source"), &bench.uri("vda")])
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(moment));
            // It may have been quicker.
            let _ = kill_process(Pid::from_child(&writing), Signal::KILL);
            writing.wait().unwrap();
        }
        drop(quiet);
        let mut client = Client::connect(&bench.path("s"));
        client.go(false);
        client.request(0, READ, 60 << 20, 1 << 20);
        assert_eq!(client.reply(), Reply::Simple { errno: 0, cookie: 7 });
        assert!(client.take(1 << 20) == vec![0x66; 1 << 20], "{format}");
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
        let words = ["-r", "-f", format, "-c", "read -P 0x66 60M 1M", &disk];
        host("qemu-io", &words);
        if format != "raw" {
            host("qemu-img", &["check", "-q", "-f", format, &disk]);
        }
    }
}

#[test]
fn work_of_terabytes_ends_with_the_server_at_once() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.text("d.qcow2");
    host("qemu-img", &["create", "-q", "-f", "qcow2", &disk, "64T"]);
    let server = bench.start(Who::Serve, "-t -x vda -e 0 -f qcow2 @d.qcow2");
    let mut client = Client::connect(&bench.path("s"));
    client.go_extended(&["base:allocation"]);
    // All of the disk is one extent, asked for once.
    client.say(&extended(0, 7, 7, 0, 64 << 40));
    let Reply::Chunk { done: true, kind: 6, payload, .. } = client.reply() else {
        panic!("expected one status chunk");
    };
    let numbers: Vec<u64> =
        payload[8..].as_chunks().0.iter().map(|raw| u64::from_be_bytes(*raw)).collect();
    assert_eq!(numbers, [64 << 40, 3]);
    // In 32 bits it is a length that the next request can begin behind.
    let mut compact = Client::connect(&bench.path("s"));
    compact.go(true);
    compact.request(0, 7, 0, u32::MAX);
    let Reply::Chunk { done: true, kind: 5, payload, .. } = compact.reply() else {
        panic!("expected one status chunk");
    };
    let numbers: Vec<u32> =
        payload[4..].as_chunks().0.iter().map(|raw| u32::from_be_bytes(*raw)).collect();
    assert_eq!((numbers.len(), numbers[0] % 65_536, numbers[1]), (2, 0, 3));
    // Zeroes that have to be noted cluster by cluster, for a client that leaves, and for
    // one that stays.
    client.say(&extended(2, 6, 7, 0, 8 << 40));
    let mut leaving = Client::connect(&bench.path("s"));
    leaving.go_extended(&[]);
    leaving.say(&extended(2, 6, 7, 16 << 40, 8 << 40));
    drop(leaving);
    std::thread::sleep(Duration::from_millis(300));
    is_served(&bench);
    let begun = std::time::Instant::now();
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    host("qemu-img", &["check", "-q", "-f", "qcow2", &disk]);
}
