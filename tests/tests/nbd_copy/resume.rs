// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies that were killed and went on, beside one that nobody disturbed.

use crate::servers::Server;
use crate::support::{Place, installed};
use crate::{COPY, MIB, same};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A sparse disk: checkpoints are far from each other, and data lies behind each of them.
const SIZE: u64 = 800 * MIB;

fn disk(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    for (start, mibs) in [(3, 2), (290, 6), (560, 6), (799, 1)] {
        for number in 0..mibs {
            let mut bytes: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8).collect();
            let at = (start + number) * MIB;
            bytes[..8].copy_from_slice(&at.to_le_bytes());
            file.write_all_at(&bytes, at).unwrap();
        }
    }
}

/// Bytes that are done, as the unfinished copy has written them down.
fn done(journal: &Path) -> u64 {
    // There is a moment in which the new one is not there yet.
    let stored: Option<Value> =
        fs::read(journal).ok().and_then(|text| serde_json::from_slice(&text).ok());
    stored.map_or(0, |stored| stored["done"].as_u64().unwrap())
}

/// Kills a slow copy after each of two checkpoints and lets a third one finish.
fn kill_and_go_on(place: &Place, target: &str, journal: &str) {
    let journal = place.path(journal);
    let words = ["copy", "--resume", "--hash", "t.hash", "--json", "disk", target];
    let slow: Vec<&str> =
        ["copy", "--limit-rate", "12M"].iter().chain(&words[1..]).copied().collect();
    let mut passed = 0;
    for _ in 0..2 {
        let mut running = place.start(place.tranship(&slow));
        running.until("checkpoint", COPY, || done(&journal) > passed);
        passed = done(&journal);
        running.signal(Signal::KILL);
        assert_eq!(running.wait(COPY).signal, Some(Signal::KILL.as_raw()));
    }
    assert!((512 * MIB..SIZE).contains(&passed), "{target}: {passed}");
    let finished = place.run(&words, COPY).ended_with(0);
    let told: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(told["resumed_from"].as_u64(), Some(passed), "{target}");
    assert!(told["copied"]["bytes_written"].as_u64().unwrap() < 9 * MIB, "{target}");
    let hashes = ["t.hash", "calm.hash"].map(|name| fs::read(place.path(name)).unwrap());
    assert!(hashes[0] == hashes[1], "{target}: the manifests differ");
    assert!(!journal.exists() && !place.path("t.hash.part").exists());
    fs::remove_file(place.path("t.hash")).unwrap();
}

#[test]
fn a_killed_copy_ends_as_one_that_nobody_disturbed() {
    let Some(place) = Place::new() else { return };
    if !installed("qemu-nbd") {
        return;
    }
    disk(&place.path("disk"));
    place.run(&["copy", "--hash", "calm.hash", "disk", "calm"], COPY).ended_with(0);

    kill_and_go_on(&place, "new", ".new.tranship-part/.tranship-state");
    same(&place.path("disk"), &place.path("new"), "new file");
    assert!(!place.path(".new.tranship-part").exists());

    fs::write(place.path("old"), vec![0xee; 1 << 20]).unwrap();
    kill_and_go_on(&place, "old", "t.hash.journal");
    same(&place.path("disk"), &place.path("old"), "file that was there");

    fs::write(place.path("target"), vec![0xee; 1 << 20]).unwrap();
    File::options().write(true).open(place.path("target")).unwrap().set_len(SIZE).unwrap();
    let server = Server::start(&place, "sink", "qemu-nbd -t -k SOCKET -f raw target");
    kill_and_go_on(&place, &server.uri(), "t.hash.journal");
    drop(server);
    same(&place.path("disk"), &place.path("target"), "export");
}

#[test]
fn a_copy_of_something_else_begins_anew() {
    let Some(place) = Place::new() else { return };
    disk(&place.path("disk"));
    fs::write(place.path("old"), "").unwrap();
    let words = ["copy", "--resume", "--hash", "t.hash", "--limit-rate", "12M", "disk", "old"];
    let mut running = place.start(place.tranship(&words));
    let journal = place.path("t.hash.journal");
    running.until("checkpoint", COPY, || done(&journal) > 0);
    running.signal(Signal::KILL);
    running.wait(COPY);
    let file = File::options().write(true).open(place.path("disk")).unwrap();
    file.write_all_at(b"changed", 0).unwrap();
    drop(file);
    let words = ["copy", "--resume", "--hash", "t.hash", "--json", "disk", "old"];
    let finished = place.run(&words, COPY).ended_with(0);
    let told: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(told["resumed_from"], 0);
    same(&place.path("disk"), &place.path("old"), "changed disk");
    // Without a place to write down how far it is, nothing can go on.
    place.run(&["copy", "--resume", "disk", "old"], COPY).ended_with(1).saying("needs --hash FILE");
}
