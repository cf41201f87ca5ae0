// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compressed clusters, written here and by qemu-img, in new images and in old ones.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use support::{clean, save};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, PackedTarget, PackedUnit, is_zero};
use tranship_format_testing::{
    Op, apply, contents, has_tool, pattern, qemu_img, qemu_img_status, raw_by_qemu, verify,
};
use tranship_qcow2::{
    Compression, CreateOptions, OpenOptions, PackedQcow2, Qcow2, create, create_packed,
};

const SIZE: usize = (5 << 20) + 512 * 3;

/// Text, noise, runs of one byte and zeroes.
fn disk() -> Vec<u8> {
    let mut disk = vec![0; SIZE];
    disk[..900_000].copy_from_slice(&pattern(900_000, 3));
    for (at, byte) in disk[900_000..3_000_000].iter_mut().enumerate() {
        *byte = b"the quick brown fox "[(at * at / 700 + at) % 20];
    }
    disk[3_000_000..3_500_000].fill(b'a');
    disk[4_200_000..].copy_from_slice(&pattern(SIZE - 4_200_000, 5));
    disk[SIZE - 70_000..].fill(b'z');
    disk
}

/// Packs on two threads and stores in order, as a conversion does it.
fn pack(target: &PackedQcow2, disk: &[u8]) {
    let unit = target.unit() as usize;
    let batch = unit * 8;
    let pack = |number: usize, bytes: &[u8]| {
        let mut arena = Vec::new();
        let mut units = Vec::new();
        for (index, cluster) in bytes.chunks(unit).enumerate() {
            if is_zero(cluster) {
                continue;
            }
            let before = arena.len();
            let encoding = target.pack(cluster, &mut arena).unwrap();
            let offset = (number * batch + index * unit) as u64;
            units.push(PackedUnit { offset, len: arena.len() - before, encoding });
        }
        (arena, units)
    };
    let batches: Vec<_> = disk.chunks(batch).collect();
    let (left, right) = batches.split_at(batches.len() / 2);
    let all = std::thread::scope(|scope| {
        let (first, others) = (0, left.len());
        let run = |start: usize, part: &[&[u8]]| {
            part.iter().enumerate().map(|(n, bytes)| pack(start + n, bytes)).collect::<Vec<_>>()
        };
        let other = scope.spawn(move || run(others, right));
        let mut all = run(first, left);
        all.extend(other.join().unwrap());
        all
    });
    for (arena, units) in &all {
        target.store(arena, units).unwrap();
    }
}

#[test]
fn packed_images_of_every_kind_are_good_for_qemu_and_small() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let raw = folder.path().join("raw");
    let disk = disk();
    std::fs::write(&raw, &disk).unwrap();
    for (bits, order, compression, extended_l2, version) in [
        (16, 4, Compression::Deflate, false, 3),
        (16, 4, Compression::Zstd, false, 3),
        (16, 4, Compression::Deflate, false, 2),
        (9, 4, Compression::Deflate, false, 3),
        (12, 0, Compression::Deflate, false, 3),
        (12, 1, Compression::Zstd, false, 3),
        (14, 6, Compression::Deflate, true, 3),
        (16, 3, Compression::Zstd, true, 3),
        (21, 2, Compression::Deflate, false, 3),
    ] {
        let name = format!("{bits} bits, order {order}, {compression:?}, version {version}");
        let options = CreateOptions {
            cluster_bits: bits,
            refcount_order: order,
            compression,
            extended_l2,
            version,
            ..CreateOptions::new(SIZE as u64)
        };
        let storage = Arc::new(MemoryDevice::new(Vec::new()));
        let target = create_packed(storage.clone(), &options).unwrap();
        pack(&target, &disk);
        save(&storage, &path);
        assert!(contents(target.image()) == disk, "{name}: before it is finished");
        assert!(!qemu_img_status(&["info", "-f", "qcow2"], &[&path]).status.success());
        target.finish().unwrap();
        drop(target);
        save(&storage, &path);
        if order == 4 && bits == 16 && version == 3 {
            let by_qemu = folder.path().join("by-qemu");
            let kind = if compression == Compression::Zstd { "zstd" } else { "zlib" };
            let option = format!("compression_type={kind}");
            let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option];
            qemu_img(&args, &[&raw, &by_qemu]);
            // Here a file ends with a whole cluster.
            let most = std::fs::metadata(&by_qemu).unwrap().len().next_multiple_of(1 << bits);
            assert!(storage.size() <= most, "{name}: {} > {most}", storage.size());
        }
        clean(&path, &name);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == disk, "{name}");

        let mut model = disk.clone();
        let image = Qcow2::open(storage.clone(), OpenOptions::default()).unwrap();
        verify(&image, &model);
        let mut piece = vec![0; 7000];
        for at in (0..SIZE - 7000).step_by(60_001) {
            image.read_at(&mut piece, at as u64).unwrap();
            assert!(piece == model[at..at + 7000], "{name} at {at}");
        }
        // Writing over compressed clusters frees what they share one by one.
        let ops = [
            Op::Write(1_000_000, 300_000, 1),
            Op::Write(2_000_001, 10, 2),
            Op::Zero(3_100_000, 200_000, tranship_block::Zeroing::MayUnmap),
            Op::Flush,
            Op::Discard(2_500_000, 400_000),
            Op::Write(2_600_000, 100_000, 3),
        ];
        for op in &ops {
            apply(&image, &mut model, op);
        }
        verify(&image, &model);
        drop(image);
        save(&storage, &path);
        clean(&path, &name);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{name}: changed");
    }
}

#[test]
fn units_out_of_order_are_refused() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let target = create_packed(storage, &CreateOptions::new(1 << 20)).unwrap();
    let mut arena = Vec::new();
    let encoding = target.pack(&vec![1; 65_536], &mut arena).unwrap();
    let unit = PackedUnit { offset: 65_536, len: arena.len(), encoding };
    target.store(&arena, &[unit]).unwrap();
    for offset in [0, 65_536, 131_073, 1 << 20] {
        let error = target.store(&arena, &[PackedUnit { offset, ..unit }]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{offset}: {error}");
    }
}

#[test]
fn compressed_writes_into_an_open_image() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let disk = disk();
    for (bits, order, compression) in
        [(16, 4, Compression::Deflate), (12, 1, Compression::Zstd), (16, 0, Compression::Deflate)]
    {
        let name = format!("{bits} bits, order {order}, {compression:?}");
        let options = CreateOptions {
            cluster_bits: bits,
            refcount_order: order,
            compression,
            ..CreateOptions::new(SIZE as u64)
        };
        let storage = Arc::new(MemoryDevice::new(Vec::new()));
        create(&*storage, &options).unwrap();
        let image = Qcow2::open(storage.clone(), OpenOptions::default()).unwrap();
        let mut model = vec![0; SIZE];
        apply(&image, &mut model, &Op::Write(1_000_000, 1_000_000, 1));
        // From two threads, over holes, data and other compressed clusters.
        for round in 0..2 {
            std::thread::scope(|scope| {
                for half in [0, 1] {
                    let (image, disk) = (&image, &disk);
                    scope.spawn(move || {
                        for (number, cluster) in disk.chunks(1 << bits).enumerate() {
                            let is_mine = number % 2 == half && (round == 0 || number % 3 == 0);
                            if is_mine && !is_zero(cluster) {
                                let at = (number as u64) << bits;
                                image.write_compressed(at, cluster).unwrap();
                            }
                        }
                    });
                }
            });
            image.flush().unwrap();
        }
        for (number, cluster) in disk.chunks(1 << bits).enumerate() {
            if !is_zero(cluster) {
                let at = number << bits;
                model[at..at + cluster.len()].copy_from_slice(cluster);
            }
        }
        verify(&image, &model);
        apply(&image, &mut model, &Op::Write(2_000_000, 100_000, 6));
        let error = image.write_compressed(512 << bits, &[0; 100]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        verify(&image, &model);
        drop(image);
        save(&storage, &path);
        clean(&path, &name);
        assert!(raw_by_qemu("qcow2", folder.path(), &path) == model, "{name}");
    }
}

#[test]
fn a_freed_cluster_of_streams_is_not_packed_any_further() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &CreateOptions::new(64 << 16)).unwrap();
    let image = Qcow2::open(storage, OpenOptions::default()).unwrap();
    let mut model = vec![0; 64 << 16];
    for round in 0..8_u8 {
        let at = usize::from(round) << 16;
        image.write_compressed(at as u64, &vec![round + 1; 65_536]).unwrap();
        model[at..at + 65_536].fill(round + 1);
        if round % 3 == 0 {
            // The cluster that has all streams goes, and somebody else gets it.
            apply(&image, &mut model, &Op::Zero(0, 32 << 16, tranship_block::Zeroing::MayUnmap));
            apply(&image, &mut model, &Op::Flush);
            apply(&image, &mut model, &Op::Write(40 << 16, 65_536, u64::from(round)));
        }
    }
    verify(&image, &model);
    let report = image.check().unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.details);
}
