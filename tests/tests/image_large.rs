// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks of several GiB, sparse: numbers that do not fit into 32 bits, beside qemu-img.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};
use std::time::Duration;
use support::{Place, host, installed};

const GIB: u64 = 1 << 30;

/// Longest time of a copy of a few MiB with many holes.
const COPY: Duration = Duration::from_mins(1);

/// A sparse disk with a page at each of these places.
fn sparse(place: &Place, name: &str, size: u64, pages: &[u64]) {
    let file = File::create(place.path(name)).unwrap();
    file.set_len(size).unwrap();
    for at in pages {
        let mut page = [0xa5; 4096];
        page[..8].copy_from_slice(&at.to_le_bytes());
        page[8..8 + name.len()].copy_from_slice(name.as_bytes());
        file.write_all_at(&page, *at).unwrap();
    }
}

/// Two raw disks and two images, the largest of them above 4 GiB, and 11 GiB together.
fn sources(place: &Place) {
    sparse(place, "one.raw", 5 * GIB, &[0, 4 * GIB - 4096, 4 * GIB, 5 * GIB - 4096]);
    sparse(place, "two.raw", 3 * GIB + 512, &[8192, 2 * GIB, 3 * GIB - 4096]);
    sparse(place, "three.raw", 2 * GIB, &[0, GIB + 4096]);
    sparse(place, "four.raw", GIB, &[512 << 20]);
    for (from, format, to) in [("three.raw", "qcow2", "three.q"), ("four.raw", "vmdk", "four.vmdk")]
    {
        let [from, to] = [from, to].map(|name| place.text(name));
        host("qemu-img", &["convert", "-f", "raw", "-O", format, &from, &to]);
    }
}

/// Both programs, with the same words but for the name of what they make.
fn both(place: &Place, words: &str, [ours, theirs]: [&str; 2]) {
    let named = |name: &str| -> Vec<String> {
        words.replace("TARGET", name).split_whitespace().map(str::to_owned).collect()
    };
    let words = [vec!["image".to_owned()], named(ours)].concat();
    place.run(&words, COPY).ended_with(0);
    let output = Command::new("qemu-img")
        .args(named(theirs))
        .current_dir(place.path("."))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Bytes of the guest's disk, for qemu-img.
fn size(place: &Place, format: &str, name: &str) -> u64 {
    let words = ["info", "--output", "json", "-f", format, &place.text(name)];
    let facts: Value = serde_json::from_str(&host("qemu-img", &words)).unwrap();
    facts["virtual-size"].as_u64().unwrap()
}

#[test]
fn several_large_disks_become_one_as_with_qemu_img() {
    let Some(place) = Place::new() else { return };
    if !installed("qemu-img") {
        return;
    }
    sources(&place);
    for (format, words, expected) in [
        ("raw", "convert -f raw -O raw one.raw two.raw TARGET", 8 * GIB + 512),
        ("raw", "convert -O raw two.raw one.raw three.q four.vmdk TARGET", 11 * GIB + 512),
        ("qcow2", "convert -O qcow2 four.vmdk one.raw three.q two.raw TARGET", 11 * GIB + 512),
        ("qcow2", "convert -c -O qcow2 three.q one.raw TARGET", 7 * GIB),
        ("vmdk", "convert -O vmdk two.raw one.raw four.vmdk TARGET", 9 * GIB + 512),
        ("vhdx", "convert -O vhdx one.raw three.q TARGET", 7 * GIB),
        ("vpc", "convert -O vpc -o force_size=on one.raw three.q TARGET", 7 * GIB),
    ] {
        both(&place, words, ["ours", "theirs"]);
        for name in ["ours", "theirs"] {
            assert_eq!(size(&place, format, name), expected, "{words}: {name}");
        }
        let [ours, theirs] = ["ours", "theirs"].map(|name| place.text(name));
        host("qemu-img", &["compare", "-f", format, "-F", format, &ours, &theirs]);
        // What is sparse stays so.
        let blocks = |name: &str| fs::metadata(place.path(name)).unwrap().blocks() * 512;
        assert!(blocks("ours") <= blocks("theirs") + (64 << 20), "{words}: {}", blocks("ours"));
        for name in ["ours", "theirs"] {
            fs::remove_file(place.path(name)).unwrap();
        }
    }
}

#[test]
fn dd_counts_past_4_gib_as_qemu_img_does() {
    let Some(place) = Place::new() else { return };
    if !installed("qemu-img") {
        return;
    }
    sources(&place);
    for (format, words) in [
        ("raw", "dd -f raw -O raw bs=64M skip=79 if=one.raw of=TARGET"),
        ("qcow2", "dd -f raw -O qcow2 bs=4096 skip=1310718 if=one.raw of=TARGET"),
        ("raw", "dd -f raw -O raw bs=512 skip=10485752 if=one.raw of=TARGET"),
    ] {
        both(&place, words, ["ours", "theirs"]);
        assert_eq!(size(&place, format, "ours"), size(&place, format, "theirs"), "{words}");
        let [ours, theirs] = ["ours", "theirs"].map(|name| place.text(name));
        host("qemu-img", &["compare", "-f", format, "-F", format, &ours, &theirs]);
    }
    // With a count qemu-img takes the skipped blocks for a part of it.
    let words = ["dd", "-f", "raw", "bs=1M", "skip=4095", "count=2", "if=one.raw", "of=middle"];
    place.run(&[&["image"], &words[..]].concat(), COPY).ended_with(0);
    let mut expected = vec![0; 2 << 20];
    let disk = File::open(place.path("one.raw")).unwrap();
    disk.read_exact_at(&mut expected, 4095 << 20).unwrap();
    assert!(expected[1 << 20] == 0 && expected[(1 << 20) + 4] == 1, "not the page at 4 GiB");
    assert!(fs::read(place.path("middle")).unwrap() == expected);
    // All of it; qemu-img would write every zero.
    let words = ["image", "dd", "-f", "raw", "-O", "qcow2", "bs=2M", "if=one.raw", "of=all.q"];
    place.run(&words, COPY).ended_with(0);
    assert_eq!(size(&place, "qcow2", "all.q"), 5 * GIB);
    let [all, one] = ["all.q", "one.raw"].map(|name| place.text(name));
    host("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &all, &one]);
}
