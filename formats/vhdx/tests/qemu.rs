// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qemu-img and this crate agree on the contents of images that either of them made.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;
use support::bytes_of;
use tranship_block::{
    BlockDevice, CopyOptions, MemoryDevice, Repair, Span, Storage, Zeroing, copy,
};
use tranship_format_testing::{Op, apply, has_tool, pattern, qemu_img, raw_by_qemu};
use tranship_raw::{Access, RawFile};
use tranship_vhdx::{CreateOptions, OpenOptions, Shrink, Subformat, Vhdx, check, compact, create};

const SIZE: usize = 5 << 20;

fn storage(path: &Path) -> Arc<dyn Storage> {
    Arc::new(RawFile::open(path, Access::ReadWrite).unwrap())
}

fn open(path: &Path) -> Vhdx {
    Vhdx::open(storage(path), OpenOptions::default()).unwrap()
}

fn read(path: &Path) -> Vec<u8> {
    let file = Arc::new(RawFile::open(path, Access::ReadOnly).unwrap());
    bytes_of(&Vhdx::open_read_only(file, OpenOptions::default()).unwrap())
}

/// Data, holes and written zeroes.
fn disk() -> Vec<u8> {
    let mut disk = pattern(SIZE, 3);
    disk[300_000..900_000].fill(b'a');
    disk[1_000_000..3_000_000].fill(0);
    disk
}

/// Some of everything.
fn change(image: &Vhdx, model: &mut [u8]) {
    let ops = [
        Op::Write(10, 1000, 1),
        Op::Write(990_000, 200_000, 2),
        Op::Zero(500_000, 300_000, Zeroing::MayUnmap),
        Op::Zero(2 << 20, 1 << 20, Zeroing::MayUnmap),
        Op::Flush,
        Op::Write(1_600_000, 5000, 3),
        Op::Discard(3 << 20, 1 << 20),
        Op::Flush,
        Op::Write(SIZE as u64 - 5, 5, 5),
    ];
    for op in &ops {
        apply(image, model, op);
    }
}

fn clean_by_both(path: &Path) {
    qemu_img(&["check", "-q", "-f", "vhdx"], &[path]);
    let file = RawFile::open(path, Access::ReadOnly).unwrap();
    let report = check(&file, Repair::Nothing).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.details);
}

#[test]
fn images_made_by_qemu_read_and_change_alike() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("disk.raw");
    std::fs::write(&raw, disk()).unwrap();
    for options in [
        "subformat=dynamic",
        "subformat=dynamic,block_size=1M",
        "subformat=dynamic,block_size=2M,log_size=3M",
        "subformat=dynamic,block_size=4M,block_state_zero=off",
        "subformat=dynamic,block_size=64M",
        "subformat=dynamic,block_size=256M",
        "subformat=fixed",
        "subformat=fixed,block_size=1M,block_state_zero=off",
        "subformat=fixed,block_size=4M,block_state_zero=off",
    ] {
        let path = folder.path().join("by-qemu.vhdx");
        qemu_img(&["convert", "-O", "vhdx", "-o", options], &[&raw, &path]);
        assert!(read(&path) == disk(), "{options}");
        clean_by_both(&path);
        let image = open(&path);
        assert_eq!(image.subformat() == Subformat::Fixed, options.contains("fixed"));
        let mut model = disk();
        change(&image, &mut model);
        drop(image);
        clean_by_both(&path);
        assert!(raw_by_qemu("vhdx", folder.path(), &path) == model, "{options}");
        assert!(read(&path) == model, "{options}");
    }
}

#[test]
fn images_made_here_read_alike() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ours.vhdx");
    for bits in 20..=28 {
        for (fixed, block_state_zero) in [(false, true), (false, false), (true, true)] {
            if fixed && bits > 23 {
                continue;
            }
            let options = CreateOptions {
                block_size: Some(1 << bits),
                fixed,
                block_state_zero,
                log_size: if bits == 21 { 2 << 20 } else { 1 << 20 },
                ..CreateOptions::new(SIZE as u64)
            };
            let _ = std::fs::remove_file(&path);
            let file = RawFile::create(&path, 0).unwrap();
            create(&file, &options).unwrap();
            clean_by_both(&path);
            let image = open(&path);
            let mut model = vec![0; SIZE];
            change(&image, &mut model);
            drop(image);
            clean_by_both(&path);
            support::assert_clean(&RawFile::open(&path, Access::ReadOnly).unwrap());
            assert!(raw_by_qemu("vhdx", folder.path(), &path) == model, "{options:?}");
        }
    }
}

#[test]
fn a_converted_disk_is_read_resized_and_compacted_alike() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ours.vhdx");
    let file = RawFile::create(&path, 0).unwrap();
    let options = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(SIZE as u64) };
    create(&file, &options).unwrap();
    let image = open(&path);
    let source = MemoryDevice::read_only(disk());
    let how = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    copy(&source, &image, &how, &()).unwrap();
    // As a reader that comes before the writer has gone sees it: the log is dirty.
    let early = folder.path().join("early.vhdx");
    std::fs::copy(&path, &early).unwrap();
    image.resize(8 << 20, Shrink::KeepData).unwrap();
    image.discard(Span::new(0, 1 << 20)).unwrap();
    drop(image);
    let mut model = disk();
    model.resize(8 << 20, 0);
    model[..1 << 20].fill(0);
    clean_by_both(&path);
    assert!(raw_by_qemu("vhdx", folder.path(), &path) == model);
    let compacted = compact(&storage(&path)).unwrap();
    assert!(compacted.after < compacted.before);
    clean_by_both(&path);
    assert!(raw_by_qemu("vhdx", folder.path(), &path) == model);

    assert!(read(&early) == disk());
    qemu_img(&["check", "-q", "-r", "all", "-f", "vhdx"], &[&early]);
    assert!(raw_by_qemu("vhdx", folder.path(), &early) == disk());
    assert!(read(&early) == disk());
}

#[test]
fn large_disks_have_the_same_layout_rules() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.vhdx");
    let file = RawFile::create(&path, 0).unwrap();
    create(&file, &CreateOptions::new(3 << 40)).unwrap();
    let image = open(&path);
    // Behind several sector bitmaps in the BAT.
    for at in [0_u64, 4 << 30, (2 << 40) + 12_345, (3 << 40) - 512] {
        image.write_at(&pattern(512, at), at / 512 * 512).unwrap();
    }
    drop(image);
    clean_by_both(&path);
    for at in [0_u64, 4 << 30, (2 << 40) + 12_345, (3 << 40) - 512] {
        let sector = (at / 512).to_string();
        let out = folder.path().join("sector.raw");
        let options = [
            "dd",
            "-f",
            "vhdx",
            "-O",
            "raw",
            "bs=512",
            &format!("skip={sector}"),
            &format!("count={}", at / 512 + 1),
        ];
        let (input, output) = (format!("if={}", path.display()), format!("of={}", out.display()));
        let mut args = options.to_vec();
        args.extend([input.as_str(), output.as_str()]);
        qemu_img(&args, &[]);
        assert_eq!(std::fs::read(&out).unwrap()[..512], pattern(512, at), "{at}");
    }
}

#[test]
fn an_empty_terabyte_is_one_extent() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty.vhdx");
    qemu_img(&["create", "-q", "-f", "vhdx"], &[&path, Path::new("1T")]);
    let started = std::time::Instant::now();
    let image = Vhdx::open_read_only(storage(&path), OpenOptions::default()).unwrap();
    let extent = image.extent_at(0).unwrap();
    assert_eq!((extent.len, extent.kind.reads_zero()), (1 << 40, true));
    eprintln!("opened and mapped in {:?}", started.elapsed());
}
