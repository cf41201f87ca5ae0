// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that are not there yet, fail now and then, or die and come back without what
//! they had not written.

use crate::servers::Server;
use crate::{COPY, MIB, fails, junk, place, same};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// qemu-nbd on a port of its own, with the image `target`. Dropping it kills it.
struct OverTcp {
    child: Child,
    port: u16,
}

impl OverTcp {
    fn start(folder: &Path, port: u16) -> Self {
        let child = Command::new("qemu-nbd")
            .args(["-t", "-e", "4", "-b", "127.0.0.1", "-f", "raw", "-p"])
            .arg(port.to_string())
            .arg("target")
            .current_dir(folder)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let begun = std::time::Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < COPY, "qemu-nbd does not listen at port {port}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child, port }
    }

    fn uri(&self) -> String {
        format!("nbd://127.0.0.1:{}", self.port)
    }

    /// As when the machine loses power: what was not flushed is gone.
    fn crash(mut self) -> u16 {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.port
    }
}

impl Drop for OverTcp {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Whether anything but zeroes is in the file.
fn has_data(path: &Path, at: u64) -> bool {
    let mut bytes = [0; 512];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut bytes, at));
    read.is_ok() && bytes.iter().any(|byte| *byte != 0)
}

/// Makes everything from `start` on what it was before the copy.
fn lose(path: &Path, start: u64) {
    let file = File::options().write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(start).unwrap();
    file.set_len(len).unwrap();
}

#[test]
fn what_a_crashed_server_has_lost_is_written_again() {
    let Some(place) = place() else { return };
    for flags in [&["--retry", "30"][..], &["--retry", "30", "-C", "1", "--hash", "h"]] {
        File::create(place.path("target")).unwrap().set_len(crate::SIZE).unwrap();
        let server = OverTcp::start(&place.path("."), free_port());
        let uri = server.uri();
        let words = [&["copy", "-v", "--limit-rate", "4M"], flags, &["disk", &uri]].concat();
        let mut running = place.start(place.tranship(&words));
        let target = place.path("target");
        running.until("data", COPY, || has_data(&target, 2 * MIB));
        let port = server.crash();
        lose(&target, 0);
        let server = OverTcp::start(&place.path("."), port);
        let finished = running.wait(COPY).ended_with(0);
        finished.saying("copying again from byte 0").saying("have to be written again");
        drop(server);
        same(&place.path("disk"), &target, "a server that lost everything");
    }
    place.run(&["image", "verify", "-f", "raw", "--hash", "h", "target"], COPY).ended_with(0);
}

#[test]
fn without_a_budget_a_crashed_server_ends_the_copy() {
    let Some(place) = place() else { return };
    File::create(place.path("target")).unwrap().set_len(crate::SIZE).unwrap();
    let server = OverTcp::start(&place.path("."), free_port());
    let uri = server.uri();
    let mut running = place.start(place.tranship(&["copy", "--limit-rate", "4M", "disk", &uri]));
    let target = place.path("target");
    running.until("data", COPY, || has_data(&target, 2 * MIB));
    let port = server.crash();
    let _again = OverTcp::start(&place.path("."), port);
    let finished = running.wait(COPY).ended_with(1);
    finished.saying("closed the connection").saying("holds a part of the copy alone");
}

#[test]
fn a_copy_goes_back_no_further_than_to_the_last_flush() {
    const DISK: u64 = 700 * MIB;
    let Some(place) = place() else { return };
    let big = File::create(place.path("big")).unwrap();
    big.set_len(DISK).unwrap();
    for (start, mibs) in [(1, 2), (300, 20), (690, 3)] {
        for number in 0..mibs {
            let at = (start + number) * MIB;
            let bytes: Vec<u8> = (0..MIB).map(|byte| ((byte + at) % 251) as u8).collect();
            big.write_all_at(&bytes, at).unwrap();
        }
    }
    place.run(&["copy", "--hash", "calm", "big", "null:"], COPY).ended_with(0);
    let target = place.path("target");
    File::create(&target).unwrap().set_len(DISK).unwrap();
    let server = OverTcp::start(&place.path("."), free_port());
    let uri = server.uri();
    let words = ["--resume", "--retry", "30", "-v", "--limit-rate", "6M", "--hash", "h"];
    let words = [&["copy"], &words[..], &["big", &uri]].concat();
    let mut running = place.start(place.tranship(&words));
    let journal = place.path("h.journal");
    let done = || -> u64 {
        let stored = fs::read(&journal).ok();
        let stored: Option<Value> = stored.and_then(|text| serde_json::from_slice(&text).ok());
        stored.map_or(0, |stored| stored["done"].as_u64().unwrap())
    };
    running.until("checkpoint", COPY, || done() > 0);
    running.until("data above", COPY, || has_data(&target, 310 * MIB));
    let passed = done();
    let port = server.crash();
    lose(&target, passed);
    let server = OverTcp::start(&place.path("."), port);
    let finished = running.wait(COPY).ended_with(0);
    finished.saying(&format!("copying again from byte {passed}:"));
    drop(server);
    same(&place.path("big"), &target, "a server that lost what it had not flushed");
    assert!(fs::read(place.path("h")).unwrap() == fs::read(place.path("calm")).unwrap());
    assert!(!journal.exists());
}

#[test]
fn a_server_that_is_not_there_yet_is_waited_for() {
    let Some(place) = place() else { return };
    let socket = place.text("late.sock");
    let uri = format!("nbd+unix:///?socket={socket}");
    let mut running = place.start(place.tranship(&["copy", "--retry", "30", &uri, "new"]));
    let begun = std::time::Instant::now();
    running.until("a while", COPY, || begun.elapsed() > Duration::from_millis(300));
    let _server = Server::start(&place, "late", "nbdkit -f -U SOCKET file disk");
    running.wait(COPY).ended_with(0);
    same(&place.path("disk"), &place.path("new"), "a late server");
    let begun = std::time::Instant::now();
    fails(&place, &["--retry", "1", "nbd+unix:///?socket=/nowhere", "x"], &["cannot connect"]);
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

#[test]
fn errors_that_go_away_are_survived_with_a_budget_alone() {
    let Some(place) = place() else { return };
    let words = "nbdkit -f -U SOCKET --filter=error file disk error=EIO error-pread-rate=10%";
    let server = Server::start(&place, "reads", words);
    let uri = server.uri();
    let small = ["--request-size=64K", "--no-extents"];
    crate::copies(&place, true, &[&small[..], &["--retry", "5", &uri, "new"]].concat());
    same(&place.path("disk"), &place.path("new"), "a server that fails to read");
    fails(&place, &[&small[..], &[&uri, "x"]].concat(), &["reading the source failed", "EIO"]);
}

#[test]
fn a_full_server_is_not_asked_again() {
    let Some(place) = place() else { return };
    let words = "nbdkit -f -U SOCKET --filter=error file target error=ENOSPC \
                 error-pwrite-rate=100%";
    junk(&place.path("target"));
    let server = Server::start(&place, "full", words);
    let begun = std::time::Instant::now();
    fails(&place, &["--retry", "30", "disk", &server.uri()], &["ENOSPC", "at offset 0x0"]);
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_server_that_was_started_ends_with_a_killed_copy() {
    let Some(place) = place() else { return };
    let words = ["--filter=delay", "file", "disk", "delay-read=300ms", "]", "new"];
    let words = [&["copy", "-C", "1", "-R", "1", "[", "nbdkit"], &words[..]].concat();
    let mut running = place.start(place.tranship(&words));
    running.until("server", COPY, || place.processes().iter().any(|name| name == "nbdkit"));
    running.signal(Signal::KILL);
    running.wait(COPY);
    let begun = std::time::Instant::now();
    while !place.processes().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", place.processes());
        std::thread::sleep(Duration::from_millis(10));
    }
}
