// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks made by qemu-img, read back: same bytes, same extents, however they are split.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "for tests alone")]

mod folder;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tranship_block::{BlockDevice, DenyAll, Extent, ExtentKind, Extents, Span, Zeroing, is_zero};
use tranship_raw::{Access, RawFile};
use tranship_vmdk::{OpenOptions, Parent, Vmdk};

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

/// A file that counts the reads of it.
#[derive(Debug)]
struct Counted(RawFile, AtomicUsize);

impl BlockDevice for Counted {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> tranship_block::Result<()> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.read_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> tranship_block::Result<()> {
        self.0.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> tranship_block::Result<Extent> {
        self.0.extent_at(offset)
    }
    fn flush(&self) -> tranship_block::Result<()> {
        Ok(())
    }
}

fn counted(path: &Path) -> (Arc<Counted>, Vmdk) {
    let file = RawFile::open(path, Access::ReadOnly).unwrap();
    let file = Arc::new(Counted(file, AtomicUsize::new(0)));
    let disk = Vmdk::open(file.clone(), &DenyAll, OpenOptions::default()).unwrap();
    (file, disk)
}

#[test]
fn an_empty_tebibyte_is_one_extent_after_few_reads() {
    let folder = tempfile::tempdir().unwrap();
    if !qemu_img(folder.path(), &["create", "-f", "vmdk", "empty.vmdk", "1T"]) {
        return;
    }
    let (file, disk) = counted(&folder.path().join("empty.vmdk"));
    let runs: Vec<_> = Extents::new(&disk, Span::new(0, u64::MAX)).map(Result::unwrap).collect();
    assert_eq!(runs, [(Span::new(0, 1 << 40), ExtentKind::Hole)]);
    // 64 MiB of tables in pieces of 1 MiB, and the headers.
    let reads = file.1.load(Ordering::Relaxed);
    assert!(reads < 80, "{reads} reads");
}

#[test]
fn neighbouring_grains_are_read_at_once() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("raw"), noise(7, 4 * MIB)).unwrap();
    for (subformat, most) in [("monolithicSparse", 1), ("streamOptimized", 4)] {
        let option = format!("subformat={subformat}");
        let arguments = ["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "raw", "d.vmdk"];
        if !qemu_img(folder.path(), &arguments) {
            return;
        }
        let (file, disk) = counted(&folder.path().join("d.vmdk"));
        disk.read_at(&mut [0; 1], 0).unwrap();
        let before = file.1.load(Ordering::Relaxed);
        let mut bytes = vec![0; 2 * MIB];
        disk.read_at(&mut bytes, MIB as u64).unwrap();
        let reads = file.1.load(Ordering::Relaxed) - before;
        assert!(reads <= most, "{subformat}: {reads} reads");
    }
}
