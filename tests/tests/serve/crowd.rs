// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A thousand clients at once.

use crate::bench::{Bench, Who};
use crate::client::Client;
use crate::support::{Running, SHORT};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use std::fs;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

const CROWD: usize = 1000;

/// Lets this process and its children have as many files as they may.
fn many_files() -> bool {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let enough = maximum.or(current).is_none_or(|most| most > 4096);
    if !enough {
        eprintln!("skipped: this process may have {maximum:?} files only");
    }
    enough
}

/// A number of `/proc/PID/status`.
pub(crate) fn status(server: &Running, key: &str) -> usize {
    let text = fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
}

/// Bytes of memory that a server has.
pub(crate) fn resident(server: &Running) -> usize {
    status(server, "VmRSS") << 10
}

pub(crate) fn descriptors(server: &Running) -> usize {
    fs::read_dir(format!("/proc/{}/fd", server.id())).unwrap().count()
}

/// Waits until it holds.
pub(crate) fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < SHORT, "{what}");
        sleep(Duration::from_millis(10));
    }
}

fn client(bench: &Bench) -> Client {
    let mut client = Client::connect(&bench.path("s"));
    client.go(true);
    client
}

fn reads(client: &mut Client) {
    assert_eq!(client.errno(0, 0, 0, 4096), 0);
}

#[test]
fn a_thousand_clients_are_served_with_little_memory() {
    let Some(bench) = Bench::new() else { return };
    if !many_files() {
        return;
    }
    bench.disk("d.qcow2", "qcow2");
    let server = bench.start(Who::Serve, "-t -x vda -e 0 -f qcow2 @d.qcow2");
    let before = (resident(&server), status(&server, "Threads"), descriptors(&server));
    let mut clients: Vec<Client> = (0..CROWD)
        .map(|_| {
            let mut client = client(&bench);
            reads(&mut client);
            client
        })
        .collect();
    // Everybody asks at the same time, and then each gets an answer.
    for client in &mut clients {
        client.request(0, 0, 1 << 20, 1 << 20);
    }
    let most = resident(&server);
    for client in &mut clients {
        while !matches!(client.reply(), crate::client::Reply::Chunk { done: true, .. }) {}
    }
    let most = most.max(resident(&server)).saturating_sub(before.0);
    let threads = status(&server, "Threads");
    assert!(most < 768 << 20, "{most} bytes for {CROWD} clients");
    assert!(threads < 3 * CROWD, "{threads} threads for {CROWD} clients");
    drop(clients);
    soon("threads stay", || status(&server, "Threads") <= before.1 + 1);
    soon("descriptors stay", || descriptors(&server) <= before.2 + 1);
    reads(&mut client(&bench));
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}

#[test]
fn those_beyond_the_limit_wait_and_cost_nothing() {
    let Some(bench) = Bench::new() else { return };
    if !many_files() {
        return;
    }
    bench.disk("d.raw", "raw");
    let server = bench.start(Who::Serve, "-r -t -x vda -e 50 -f raw @d.raw");
    let mut guests: Vec<Client> = (0..50).map(|_| client(&bench)).collect();
    // The queue of the socket is finite, and who does not fit into it is told so.
    let path = bench.path("s");
    let waiting: Vec<_> = (0..CROWD)
        .filter_map(|_| {
            let socket = rustix::net::socket_with(
                rustix::net::AddressFamily::UNIX,
                rustix::net::SocketType::STREAM,
                rustix::net::SocketFlags::NONBLOCK,
                None,
            )
            .unwrap();
            let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
            rustix::net::connect(&socket, &address).ok()?;
            Some(UnixStream::from(socket))
        })
        .collect();
    assert!(!waiting.is_empty());
    guests.iter_mut().for_each(reads);
    assert!(descriptors(&server) < 80, "{} descriptors", descriptors(&server));
    assert!(status(&server, "Threads") < 200, "{} threads", status(&server, "Threads"));
    // Those who have gone leave their places to those who still wait.
    drop(waiting);
    drop(guests.split_off(25));
    let mut late = client(&bench);
    reads(&mut late);
    guests.iter_mut().for_each(reads);
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}

#[test]
fn a_server_without_descriptors_serves_those_it_has() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    let plain = bench.server(Who::Serve, "-k @s -r -t -x vda -e 0 -f raw @d.raw");
    let limited = bench.behind("ulimit -n 40; exec", &plain);
    let mut server = bench.place.start(limited);
    let socket = bench.path("s");
    server.until("a socket", SHORT, || UnixStream::connect(&socket).is_ok());
    let mut first = client(&bench);
    // Most of these are never greeted.
    let crowd: Vec<UnixStream> = (0..100).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    soon("descriptors are left", || descriptors(&server) >= 38);
    for _ in 0..10 {
        reads(&mut first);
    }
    // Silence is no way to keep others out for as long as a handshake may take.
    let begun = Instant::now();
    reads(&mut client(&bench));
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    drop(crowd);
    reads(&mut client(&bench));
    reads(&mut first);
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}

#[test]
fn a_thousand_half_open_connections_give_way() {
    let Some(bench) = Bench::new() else { return };
    if !many_files() {
        return;
    }
    bench.disk("d.raw", "raw");
    let server = bench.start(Who::Serve, "-r -t -x vda -e 0 --handshake-limit 3 -f raw @d.raw");
    let before = (status(&server, "Threads"), descriptors(&server));
    let mut guests = client(&bench);
    let path = bench.path("s");
    let crowd = std::thread::spawn(move || -> Vec<UnixStream> {
        (0..CROWD).map(|_| UnixStream::connect(&path).unwrap()).collect()
    });
    // Those who talk are served all the time, and others get in among them.
    for _ in 0..20 {
        reads(&mut guests);
        reads(&mut client(&bench));
        assert!(status(&server, "Threads") < 200, "{} threads", status(&server, "Threads"));
    }
    let crowd = crowd.join().unwrap();
    soon("they stay", || descriptors(&server) <= before.1 + 2);
    drop(crowd);
    soon("threads stay", || status(&server, "Threads") <= before.0 + 2);
    reads(&mut guests);
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}
