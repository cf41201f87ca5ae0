// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks made by qemu-img, read back: same bytes, same extents, however they are split.
#![allow(clippy::cast_possible_truncation, reason = "numbers of handmade disks are small")]

mod folder;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tranship_block::{BlockDevice, ExtentKind, Extents, Span, is_zero};
use tranship_vmdk::{OpenOptions, Parent};

const MIB: usize = 1 << 20;

fn qemu_img(folder: &Path, arguments: &[&str]) -> bool {
    let Ok(output) = Command::new("qemu-img").args(arguments).current_dir(folder).output() else {
        eprintln!("skipped: qemu-img is not installed");
        return false;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    true
}

/// Bytes that do not compress, from a linear congruential generator.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// 70 MiB and a bit, so that there are three grain tables, with data of several kinds.
fn pattern() -> Vec<u8> {
    let mut bytes = vec![0; 70 * MIB + 512];
    bytes[..4096].copy_from_slice(&noise(1, 4096));
    bytes[MIB..3 * MIB].copy_from_slice(&noise(2, 2 * MIB));
    bytes[5 * MIB + 512..6 * MIB].fill(b'x');
    bytes[33 * MIB..34 * MIB].copy_from_slice(&noise(3, MIB));
    let end = bytes.len();
    bytes[end - 700..].copy_from_slice(&noise(4, 700));
    bytes
}

#[test]
fn every_subformat_reads_as_written() {
    let folder = tempfile::tempdir().unwrap();
    let expected = pattern();
    std::fs::write(folder.path().join("raw"), &expected).unwrap();
    for subformat in [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "streamOptimized",
    ] {
        let name = format!("{subformat}.vmdk");
        let option = format!("subformat={subformat}");
        let arguments = ["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "raw", &name];
        if !qemu_img(folder.path(), &arguments) {
            return;
        }
        let disk = folder::open(&folder.path().join(&name)).unwrap();
        assert_eq!(disk.create_type(), subformat);
        assert_eq!(disk.size(), expected.len() as u64);
        assert!(disk.warnings().is_empty(), "{:?}", disk.warnings());
        assert!(folder::contents(&disk).unwrap() == expected, "{subformat} differs");

        let data: u64 = Extents::new(&disk, Span::new(0, u64::MAX))
            .map(Result::unwrap)
            .filter(|(_, kind)| *kind == ExtentKind::Data)
            .map(|(span, _)| span.len)
            .sum();
        // Grains that hold data: 1 + 32 + 16 + 16, and at the end one or two with 700 bytes.
        if !subformat.ends_with("Flat") {
            assert!((65 << 16..=67 << 16).contains(&data), "{subformat} has {data} bytes of data");
        }

        let threads: Vec<_> = (0..4_u64)
            .map(|seed| {
                let (disk, expected) = (&disk, &expected);
                move || {
                    let numbers = noise(seed + 10, 6 * 100);
                    for six in numbers.as_chunks::<6>().0 {
                        let start =
                            six[..3].iter().fold(0, |all, byte| all << 9 | usize::from(*byte));
                        let start = start % expected.len();
                        let len =
                            six[3..].iter().fold(0, |all, byte| all << 7 | usize::from(*byte));
                        let len = len.min(expected.len() - start);
                        let mut part = vec![1; len];
                        disk.read_at(&mut part, start as u64).unwrap();
                        assert!(part == expected[start..start + len], "{start} + {len}");
                    }
                }
            })
            .collect();
        std::thread::scope(|scope| {
            for thread in threads {
                scope.spawn(thread);
            }
        });
    }
}

#[test]
fn a_split_disk_crosses_its_extents() {
    let folder = tempfile::tempdir().unwrap();
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let name = format!("{subformat}.vmdk");
        let option = format!("subformat={subformat}");
        if !qemu_img(folder.path(), &["create", "-f", "vmdk", "-o", &option, &name, "5G"]) {
            return;
        }
        let io = ["-f", "vmdk", "-c", "write -P 7 2047M 2M", &name];
        match Command::new("qemu-io").args(io).current_dir(folder.path()).output() {
            Ok(output) if output.status.success() => {}
            _ => {
                eprintln!("skipped: qemu-io is not installed");
                return;
            }
        }
        let disk = folder::open(&folder.path().join(&name)).unwrap();
        assert_eq!(disk.extents().len(), 3);
        let mut part = vec![0; 4 * MIB];
        disk.read_at(&mut part, (2046 * MIB) as u64).unwrap();
        assert!(is_zero(&part[..MIB]) && is_zero(&part[3 * MIB..]));
        assert!(part[MIB..3 * MIB].iter().all(|byte| *byte == 7));
        // qemu-img allocates the first page of flat extents, so that there may be more.
        let written = (Span::new((2047 * MIB) as u64, (2 * MIB) as u64), ExtentKind::Data);
        let mut all = Extents::new(&disk, Span::new(0, u64::MAX)).map(Result::unwrap);
        assert!(all.any(|extent| extent == written), "{subformat}");
    }
}

#[test]
fn a_snapshot_needs_its_parent_and_shows_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut expected = vec![5; 4 * MIB];
    std::fs::write(folder.path().join("raw"), &expected).unwrap();
    if !qemu_img(folder.path(), &["convert", "-f", "raw", "-O", "vmdk", "raw", "base.vmdk"]) {
        return;
    }
    let create = ["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "child.vmdk"];
    qemu_img(folder.path(), &create);
    let io = ["-f", "vmdk", "-c", "write -P 9 1M 64k", "child.vmdk"];
    match Command::new("qemu-io").args(io).current_dir(folder.path()).output() {
        Ok(output) if output.status.success() => {}
        _ => return eprintln!("skipped: qemu-io is not installed"),
    }
    expected[MIB..MIB + (64 << 10)].fill(9);
    let child = folder.path().join("child.vmdk");
    let error = folder::open(&child).unwrap_err();
    assert!(error.to_string().contains("snapshot of \"base.vmdk\""), "{error}");

    let parent = || folder::open(&folder.path().join("base.vmdk")).unwrap();
    let cid = parent().cid();
    let options = |cid| OpenOptions {
        parent: Some(Parent { device: Arc::new(parent()), cid }),
        ..OpenOptions::default()
    };
    let disk = folder::open_with(&child, options(cid)).unwrap();
    assert!(folder::contents(&disk).unwrap() == expected);
    assert_eq!(disk.extent_at(0).unwrap().depth, 1);
    assert_eq!(disk.extent_at(MIB as u64).unwrap().depth, 0);
    let error = folder::open_with(&child, options(cid.map(|cid| cid ^ 1))).unwrap_err();
    assert!(error.to_string().contains("changed after the snapshot"), "{error}");
}
