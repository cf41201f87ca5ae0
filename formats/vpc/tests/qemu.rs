// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qemu-img and this crate agree on the contents of images that either of them made.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::path::Path;
use support::{assert_clean, open, read_only, writable};
use tranship_block::{BlockDevice, Span, Storage, Zeroing};
use tranship_format_testing::{
    Op, apply, contents, has_tool, pattern, qemu_img, qemu_img_status, raw_by_qemu, verify,
};
use tranship_raw::RawFile;
use tranship_vpc::{
    CreateOptions, Footer, Kind, NewParent, OpenOptions, SizeSource, Sizing, Vpc, create,
};

const SIZE: usize = 9 << 20;

/// Data, holes and written zeroes.
fn disk() -> Vec<u8> {
    let mut disk = pattern(SIZE, 3);
    disk[1 << 20..3 << 20].fill(0);
    disk[4 << 20..(6 << 20) + 1000].fill(0);
    disk
}

/// Whole blocks and parts, stored and missing ones.
fn changes(size: u64) -> Vec<Op> {
    let block = 2 << 20;
    vec![
        Op::Write(10, 1000, 1),
        Op::Write(block - 100, 5000, 2),
        Op::Zero(100_000, 3 << 20, Zeroing::MayUnmap),
        Op::Flush,
        Op::Write(2 * block + 700, 70_000, 3),
        Op::Discard(3 * block, block),
        Op::Flush,
        Op::Write(3 * block + 5, 300, 4),
        Op::Write(size - 5, 5, 5),
    ]
}

#[test]
fn images_made_by_qemu_read_and_change_alike() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("source.raw");
    std::fs::write(&raw, disk()).unwrap();
    for subformat in ["dynamic", "fixed"] {
        for force_size in [false, true] {
            let name = format!("{subformat}-{force_size}");
            let path = folder.path().join(&name);
            let options = format!("subformat={subformat},force_size={force_size}");
            let options = options.replace("true", "on").replace("false", "off");
            qemu_img(&["convert", "-f", "raw", "-O", "vpc", "-o", &options], &[&raw, &path]);
            let mut model = raw_by_qemu("vpc", folder.path(), &path);
            assert!(model[..SIZE] == disk(), "{name}");
            let image = Vpc::open_read_only(read_only(&path), OpenOptions::default()).unwrap();
            assert_eq!(image.size() == SIZE as u64, force_size, "{name}");
            assert_eq!(image.warnings(), [] as [&str; 0]);
            verify(&image, &model);
            drop(image);
            assert_clean(&*writable(&path));

            let image = open(&writable(&path), None);
            for op in changes(image.size()) {
                apply(&image, &mut model, &op);
            }
            verify(&image, &model);
            drop(image);
            assert!(raw_by_qemu("vpc", folder.path(), &path) == model, "{name}: changed by us");
            assert_clean(&*writable(&path));
        }
    }
}

fn create_at(path: &Path, options: &CreateOptions) {
    create(&RawFile::create(path, 0).unwrap(), options).unwrap();
}

#[test]
fn images_made_here_read_alike_and_qemu_may_write_them() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        (Kind::Dynamic, Sizing::Geometry),
        (Kind::Dynamic, Sizing::Exact),
        (Kind::Fixed, Sizing::Geometry),
        (Kind::Fixed, Sizing::Exact),
        (Kind::Fixed, Sizing::Azure),
    ];
    for (number, (kind, sizing)) in cases.into_iter().enumerate() {
        let path = folder.path().join(format!("{number}"));
        let options = CreateOptions { kind, sizing, ..CreateOptions::new(SIZE as u64) };
        create_at(&path, &options);
        let image = open(&writable(&path), None);
        assert_eq!(image.size(), options.virtual_size().unwrap());
        let mut model = vec![0; image.size() as usize];
        for op in changes(image.size()) {
            apply(&image, &mut model, &op);
        }
        image.resize(image.size() + (5 << 20)).unwrap();
        model.resize(image.size() as usize, 0);
        apply(&image, &mut model, &Op::Write(image.size() - 9000, 9000, 6));
        drop(image);
        assert!(raw_by_qemu("vpc", folder.path(), &path) == model, "{kind:?} {sizing:?}");

        let status = std::process::Command::new("qemu-io")
            .args(["-f", "vpc", "-c", "write -P 7 2500000 3000000"])
            .arg(&path)
            .output()
            .unwrap();
        assert!(status.status.success(), "{status:?}");
        model[2_500_000..5_500_000].fill(7);
        verify(&open(&writable(&path), None), &model);
        assert_clean(&*writable(&path));
    }
}

#[test]
fn sizes_and_footers_are_those_of_qemu() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for size in [512, 100_000, 1 << 20, 33 << 20, 504 << 20, 9 << 30, 130 << 30, 500 << 30] {
        for (sizing, force) in [(Sizing::Geometry, "off"), (Sizing::Exact, "on")] {
            let theirs = folder.path().join("theirs");
            let force = format!("force_size={force}");
            let text = size.to_string();
            qemu_img(&["create", "-q", "-f", "vpc", "-o", &force], &[&theirs, Path::new(&text)]);
            let options = CreateOptions { sizing, ..CreateOptions::new(size) };
            let ours = folder.path().join("ours");
            create_at(&ours, &options);
            let theirs = Footer::read(&*read_only(&theirs)).unwrap();
            let found = Footer::read(&*read_only(&ours)).unwrap();
            std::fs::remove_file(&ours).unwrap();
            let same =
                Footer { timestamp: found.timestamp, unique_id: found.unique_id, ..theirs.clone() };
            assert_eq!(found, same, "{size} {sizing:?}");
            assert_eq!(found.virtual_size(None), options.virtual_size().unwrap());
        }
    }
}

#[test]
fn the_size_can_be_chosen_as_in_qemu() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    // 9 MiB are no product of a geometry.
    create_at(&path, &CreateOptions { sizing: Sizing::Geometry, ..CreateOptions::new(0) });
    create_at_size(&path, SIZE as u64);
    for (source, text) in [(SizeSource::Chs, "chs"), (SizeSource::CurrentSize, "current_size")] {
        let options = OpenOptions { force_size_calc: Some(source), ..OpenOptions::default() };
        let ours = Vpc::open_read_only(read_only(&path), options).unwrap().size();
        let image = format!(
            "driver=vpc,force_size_calc={text},file.driver=file,file.filename={}",
            path.display()
        );
        let info = qemu_img(&["info", "--output=json", "--image-opts", &image], &[]);
        assert!(info.contains(&format!("\"virtual-size\": {ours},")), "{ours}: {info}");
    }
}

/// An image of a creator that nobody knows, whose geometry says less than its size.
fn create_at_size(path: &Path, size: u64) {
    let storage = writable(path);
    create(&*storage, &CreateOptions { sizing: Sizing::Exact, ..CreateOptions::new(size) })
        .unwrap();
    let end = storage.size() - 512;
    let mut footer = vec![0; 512];
    storage.read_at(&mut footer, end).unwrap();
    footer[28..32].copy_from_slice(b"test");
    footer[56..60].copy_from_slice(&[0, 200, 5, 17]);
    footer[64..68].fill(0);
    let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    storage.write_at(&footer, end).unwrap();
    storage.write_at(&footer, 0).unwrap();
}

#[test]
fn a_footer_of_511_bytes_is_one() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for kind in [Kind::Fixed, Kind::Dynamic] {
        let path = folder.path().join(format!("{kind:?}"));
        create_at(&path, &CreateOptions { kind, ..CreateOptions::new(SIZE as u64) });
        let image = open(&writable(&path), None);
        let mut model = vec![0; image.size() as usize];
        apply(&image, &mut model, &Op::Write(5000, 100_000, 1));
        drop(image);
        let storage = writable(&path);
        storage.set_len(storage.size() - 1).unwrap();
        assert!(raw_by_qemu("vpc", folder.path(), &path) == model);
        let image = open(&writable(&path), None);
        assert_eq!(image.warnings(), [] as [&str; 0]);
        verify(&image, &model);
        apply(&image, &mut model, &Op::Write(7 << 20, 100_000, 1));
        drop(image);
        verify(&open(&writable(&path), None), &model);
        assert!(raw_by_qemu("vpc", folder.path(), &path) == model);
    }
}

#[test]
fn qemu_takes_a_child_for_an_image() {
    if !has_tool("qemu-img") {
        return;
    }
    // It ignores the parent, but not the rest: what the child has is where it looks for it.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("child");
    let parent = NewParent { unique_id: support::PARENT_ID, ..NewParent::default() };
    create_at(&path, &CreateOptions::differencing(SIZE as u64, parent));
    let base = disk();
    let image = open(&writable(&path), Some(&base));
    image.write_at(&pattern(2 << 20, 9), 2 << 20).unwrap();
    drop(image);
    let found = raw_by_qemu("vpc", folder.path(), &path);
    assert_eq!(found.len(), SIZE);
    assert!(found[2 << 20..4 << 20] == pattern(2 << 20, 9));
    let mut model = base.clone();
    model[2 << 20..4 << 20].copy_from_slice(&pattern(2 << 20, 9));
    verify(&open(&writable(&path), Some(&base)), &model);
}

#[test]
fn a_table_of_qemu_grows() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let path = folder.path().join("image");
    std::fs::write(&raw, disk()).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "vpc"], &[&raw, &path]);
    let image = open(&writable(&path), None);
    image.resize(600 << 20).unwrap();
    image.write_at(&[9; 1000], 500 << 20).unwrap();
    drop(image);
    let status = qemu_img_status(&["compare", "-f", "raw", "-F", "vpc"], &[&raw, &path]);
    assert_eq!(status.status.code(), Some(1));
    let image = open(&writable(&path), None);
    image.write_zeroes(Span::new(500 << 20, 1000), Zeroing::KeepAllocated).unwrap();
    drop(image);
    qemu_img(&["compare", "-q", "-f", "raw", "-F", "vpc"], &[&raw, &path]);
    assert_clean(&*writable(&path));
    let image = open(&writable(&path), None);
    image.resize(SIZE as u64).unwrap();
    assert!(contents(&image) == disk());
}
