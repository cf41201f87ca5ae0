// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image compact --trim`: what a guest has deleted goes out of its VHDX, by way of the
//! appliance.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::process::{Command, Stdio};
use support::{APPLIANCE, Place, SHORT, host, installed};

const MIB: u64 = 1 << 20;

/// Where the partition begins.
const PARTITION: u64 = MIB;

/// Files of 16 MiB that the guest has had.
const DELETED: [&str; 4] = ["old-a", "old-b", "old-c", "old-d"];

/// Bytes that no compression and no zero detection makes smaller.
fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()[7]
        })
        .collect()
}

/// What debugfs does to the filesystem on a raw disk.
fn debugfs(place: &Place, disk: &str, words: &[&str]) -> String {
    let disk = format!("{}?offset={PARTITION}", place.text(disk));
    host("debugfs", &[words, &[disk.as_str()]].concat())
}

/// A partition with an ext4 in which most of the files have been deleted: their bytes are
/// still on the disk, and only the filesystem knows that nobody needs them.
fn disk(place: &Place) {
    let tree = place.path("tree");
    for folder in ["kept", "gone"] {
        fs::create_dir_all(tree.join(folder)).unwrap();
    }
    fs::write(tree.join("kept/noise"), noise(6 * MIB, 1)).unwrap();
    fs::write(tree.join("kept/note"), "still here\n").unwrap();
    for (name, seed) in DELETED.into_iter().zip(2..) {
        fs::write(tree.join("gone").join(name), noise(16 * MIB, seed)).unwrap();
    }
    let raw = place.path("disk.raw");
    fs::File::create(&raw).unwrap().set_len(192 * MIB).unwrap();
    let raw = place.text("disk.raw");
    let table = format!("label: dos\nstart={}, type=83\n", PARTITION / 512);
    fs::write(place.path("table"), table).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    let parted = Command::new("sfdisk")
        .args(["--quiet", &raw])
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .stdin(Stdio::from(fs::File::open(place.path("table")).unwrap()))
        .status()
        .unwrap();
    assert!(parted.success());
    let offset = format!("offset={PARTITION}");
    let tree = tree.to_str().unwrap();
    host("mke2fs", &["-q", "-F", "-t", "ext4", "-E", &offset, "-d", tree, &raw, "190M"]);
    for name in DELETED {
        debugfs(place, "disk.raw", &["-w", "-R", &format!("rm /gone/{name}")]);
    }
}

#[test]
fn what_a_guest_has_deleted_goes_out_of_its_vhdx() {
    let Some(place) = Place::new() else { return };
    if !["mke2fs", "debugfs", "e2fsck", "sfdisk", "qemu-img"].into_iter().all(installed) {
        return;
    }
    disk(&place);
    let vhdx = place.text("disk.vhdx");
    let raw = place.text("disk.raw");
    let words = ["image", "convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", &raw, &vhdx];
    place.run(&words, SHORT).ended_with(0);
    let len = || fs::metadata(&vhdx).unwrap().len();

    // Without the filesystem's word there is next to nothing to give back.
    let full = len();
    place.run(&["image", "compact", &vhdx], SHORT).ended_with(0);
    assert!(len() + 8 * MIB > full, "{full} {}", len());

    let run = place.run(&["image", "compact", "--trim", &vhdx], APPLIANCE).ended_with(0);
    assert!(run.stdout.contains("trimmed: "), "{}{}", run.stdout, run.stderr);
    assert!(len() + 50 * MIB < full, "{full} {}\n{}{}", len(), run.stdout, run.stderr);
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());

    host("qemu-img", &["check", "-f", "vhdx", &vhdx]);
    place.run(&["image", "check", &vhdx], SHORT).ended_with(0);
    let after = place.text("after.raw");
    host("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", &vhdx, &after]);
    assert_eq!(fs::metadata(&after).unwrap().len(), 192 * MIB);
    let filesystem = format!("{after}?offset={PARTITION}");
    host("e2fsck", &["-f", "-n", &filesystem]);
    let dumped = place.text("noise");
    debugfs(&place, "after.raw", &["-R", &format!("dump /kept/noise {dumped}")]);
    assert!(fs::read(&dumped).unwrap() == noise(6 * MIB, 1), "a file has other bytes");
    assert_eq!(debugfs(&place, "after.raw", &["-R", "cat /kept/note"]), "still here\n");
    assert!(!debugfs(&place, "after.raw", &["-R", "ls -p /gone"]).contains("old-"));
}
