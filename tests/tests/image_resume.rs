// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A copy that was killed twice and went on twice, beside one that nobody disturbed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;
use support::{Finished, Place, host, installed};

const MIB: u64 = 1 << 20;

/// Longest time of a copy of a few MiB.
const COPY: Duration = Duration::from_mins(1);

/// A sparse disk: checkpoints are far from each other, and data lies behind each of them.
fn disk(place: &Place) {
    let file = File::create(place.path("disk.raw")).unwrap();
    file.set_len(800 * MIB).unwrap();
    for (start, mibs) in [(3, 2), (290, 6), (560, 6), (799, 1)] {
        for number in 0..mibs {
            let mut bytes: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8).collect();
            let at = (start + number) * MIB;
            bytes[..8].copy_from_slice(&at.to_le_bytes());
            file.write_all_at(&bytes, at).unwrap();
        }
    }
}

fn image(place: &Place, words: &str) -> Finished {
    let words: Vec<&str> = ["image"].into_iter().chain(words.split_whitespace()).collect();
    place.run(&words, COPY)
}

/// Bytes that are done, as the unfinished copy has written them down.
fn done(place: &Place) -> u64 {
    let state = place.path(".t.img.tranship-part/.tranship-state");
    // There is a moment in which the new state is not there yet.
    let state: Option<Value> =
        fs::read(state).ok().and_then(|text| serde_json::from_slice(&text).ok());
    state.map_or(0, |state| state["done"].as_u64().unwrap())
}

#[test]
fn a_killed_copy_ends_as_one_that_nobody_disturbed() {
    let Some(place) = Place::new() else { return };
    if !installed("qemu-img") {
        return;
    }
    disk(&place);
    for format in ["raw", "qcow2", "vhdx", "vmdk"] {
        let words = format!("convert -f raw -O {format} --resume disk.raw");
        image(&place, &format!("{words} --hash calm.hash calm.img")).ended_with(0);

        let words = format!("{words} --hash t.hash t.img");
        let slow = words.replace("convert", "convert -r 6M");
        let slow: Vec<&str> = ["image"].into_iter().chain(slow.split_whitespace()).collect();
        let mut passed = 0;
        for _ in 0..2 {
            let mut running = place.start(place.tranship(&slow));
            running.until("checkpoint", COPY, || done(&place) > passed);
            passed = done(&place);
            running.signal(Signal::KILL);
            assert_eq!(running.wait(COPY).signal, Some(Signal::KILL.as_raw()));
            assert!(!place.path("t.img").exists(), "{format}");
        }
        assert!((512 * MIB..800 * MIB).contains(&passed), "{format}: {passed}");
        image(&place, &words).ended_with(0);

        let read = |name: &str| fs::read(place.path(name)).unwrap();
        assert!(read("t.hash") == read("calm.hash"), "{format}: the manifests differ");
        if format == "raw" {
            assert!(read("t.img") == read("calm.img"));
        }
        for (hash, disk) in [("t.hash", "t.img"), ("calm.hash", "t.img"), ("t.hash", "calm.img")] {
            image(&place, &format!("verify -f {format} --hash {hash} {disk}")).ended_with(0);
        }
        let [disk, ours, calm] = ["disk.raw", "t.img", "calm.img"].map(|name| place.text(name));
        for [a, of_a, b] in [["raw", &disk, &ours], [format, &calm, &ours]] {
            host("qemu-img", &["compare", "-f", a, "-F", format, of_a, b]);
        }
        if format != "raw" {
            host("qemu-img", &["check", "-f", format, &ours]);
        }
        // Going on costs no space.
        let len = |name: &str| fs::metadata(place.path(name)).unwrap().len();
        assert!(len("t.img") <= len("calm.img") + 4 * MIB, "{format}: {}", len("t.img"));
        for name in ["t.hash", "t.img", "calm.hash", "calm.img"] {
            fs::remove_file(place.path(name)).unwrap();
        }
        let parts = support::names(&place.path("."));
        assert!(!parts.iter().any(|name| name.contains("tranship")), "{parts:?}");
    }
}
