// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where files can share blocks, `convert -C` makes a copy that takes no space.
//!
//! Needs root, to mount a filesystem of its own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use std::process::{Command, Stdio};
use support::{Place, installed};

/// Runs in a mount namespace of its own: however it ends, nothing stays mounted. Prints
/// where the blocks of both disks lie.
const SCRIPT: &str = r#"
truncate -s 400M fs.img
"$@" fs.img >mkfs.out 2>&1
mkdir fs
mount -o loop fs.img fs 2>mount.err || exit 77
cd fs
head -c 20M /dev/urandom >disk.raw
truncate -s 60M disk.raw
# The end is within a block.
head -c 10000384 /dev/urandom >>disk.raw
sync -f .
df -B1 --output=used . >../used.before
"$TRANSHIP" image convert -C -f raw -O raw --statistics ../statistics.json disk.raw copy.raw
sync -f .
df -B1 --output=used . >../used.after
cmp disk.raw copy.raw
filefrag -v disk.raw >../disk.frag
filefrag -v copy.raw >../copy.frag
# No image format can take blocks over as they are; the bytes are copied.
"$TRANSHIP" image convert -C -f raw -O qcow2 disk.raw copy.q
"$TRANSHIP" image convert -C -O raw copy.q again.raw
cmp disk.raw again.raw
# A change of the copy is none of the disk.
printf x | dd of=copy.raw conv=notrunc status=none
cmp disk.raw again.raw
"#;

/// Bytes of the disk that are no hole.
const DATA: u64 = (20 << 20) + 10_000_384;

/// First block in the file, first block of the filesystem and number of blocks, of every
/// shared extent.
fn shared(frag: &str) -> Vec<[u64; 3]> {
    let number = |text: &str| text.split("..").next().unwrap().trim().parse().unwrap();
    let extent = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        let [index, logical, physical, len, .., flags] = fields[..] else { return None };
        let is_extent = index.trim().parse::<u64>().is_ok() && flags.contains("shared");
        is_extent.then(|| [logical, physical, len].map(number))
    };
    frag.lines().filter_map(extent).collect()
}

fn copy_takes_no_space(make: &[&str]) {
    let Some(place) = Place::new() else { return };
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can mount a filesystem");
        return;
    }
    if !["unshare", "filefrag", make[0]].into_iter().all(installed) {
        return;
    }
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-euc", SCRIPT, "sh"])
        .args(make)
        .current_dir(place.path("."))
        .env("TRANSHIP", support::program().unwrap().canonicalize().unwrap())
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let read = |name: &str| std::fs::read_to_string(place.path(name)).unwrap();
    if output.status.code() == Some(77) || stderr.starts_with("unshare: ") {
        let mount = std::fs::read_to_string(place.path("mount.err")).unwrap_or_default();
        eprintln!("skipped: {} cannot be mounted here: {mount}{stderr}", make[0]);
        return;
    }
    assert!(output.status.success(), "{:?}: {}\n{stderr}", make, output.status);

    let statistics: Value = serde_json::from_str(&read("statistics.json")).unwrap();
    let copied = &statistics["copied"];
    assert_eq!((&copied["bytes_written"], &copied["bytes_read"]), (&0.into(), &0.into()));
    assert!(copied["bytes_offloaded"].as_u64().unwrap() >= DATA, "{copied}");
    let [before, after] = ["used.before", "used.after"]
        .map(|name| read(name).lines().last().unwrap().trim().parse::<u64>().unwrap());
    assert!(after < before + (1 << 20), "{before} bytes are in use before, {after} after");
    let [disk, copy] = ["disk.frag", "copy.frag"].map(|name| shared(&read(name)));
    assert_eq!(disk, copy);
    assert_eq!(copy.iter().map(|[.., len]| len).sum::<u64>(), DATA.div_ceil(4096));
}

#[test]
fn a_copy_on_xfs_takes_no_space() {
    copy_takes_no_space(&["mkfs.xfs", "-q", "-m", "reflink=1", "-b", "size=4096"]);
}

#[test]
fn a_copy_on_btrfs_takes_no_space() {
    copy_takes_no_space(&["mkfs.btrfs", "-q"]);
}

#[test]
fn only_shared_extents_count() {
    let frag = "File size of a is 8192 (2 blocks of 4096 bytes)\n \
                ext:     logical_offset:        physical_offset: length:   expected: flags:\n   \
                0:        0..    5119:         24..      5143:   5120:             shared\n   \
                1:    15360..   17801:      15384..     17825:   2442:             last,eof\n";
    assert_eq!(shared(frag), [[0, 24, 5120]]);
}
