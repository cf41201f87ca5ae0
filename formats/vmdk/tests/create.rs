// SPDX-License-Identifier: Apache-2.0 OR MIT
//! New disks of every kind: qemu-img understands them, and they are what was asked for.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "for tests alone")]

mod folder;

use std::sync::Arc;
use tranship_block::{BlockDevice, Encoding, ErrorKind, MemoryDevice, PackedTarget, PackedUnit};
use tranship_format_testing::{contents, has_tool, pattern, qemu_img, raw_by_qemu, verify};
use tranship_raw::RawFile;
use tranship_vmdk::{Adapter, CreateOptions, NoFiles, ParentLink, StreamTarget, Subformat};

const GRAIN: usize = 64 << 10;

#[test]
fn every_kind_can_be_created_written_and_read_by_qemu() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for subformat in Subformat::ALL {
        for zeroed_grain in [false, true] {
            let name = format!("{}-{zeroed_grain}.vmdk", subformat.word());
            let size = (2 << 20) + 3 * 512;
            let mut options = CreateOptions::new(size, subformat, &name);
            options.zeroed_grain = zeroed_grain;
            options.adapter = Adapter::LsiLogic;
            let path = folder::create(folder.path(), &options).unwrap();
            let disk = folder::open(&path).unwrap();
            assert_eq!((disk.size(), disk.create_type()), (size, subformat.word()));
            assert!(disk.warnings().is_empty(), "{:?}", disk.warnings());
            assert_eq!(disk.database()["adaptertype"], "lsilogic");
            drop(disk);
            let mut model = vec![0; size as usize];
            if subformat != Subformat::StreamOptimized {
                let disk = folder::open_writable(&path).unwrap();
                let cid = disk.cid();
                for (at, len) in [(0, 512), (1_000_000, 200_000), (size as usize - 700, 700)] {
                    let bytes = pattern(len, at as u64);
                    disk.write_at(&bytes, at as u64).unwrap();
                    model[at..at + len].copy_from_slice(&bytes);
                }
                disk.flush().unwrap();
                assert_ne!(disk.cid(), cid);
                verify(&disk, &model);
                let cid = disk.cid();
                drop(disk);
                assert_eq!(folder::open(&path).unwrap().cid(), cid);
            }
            assert!(raw_by_qemu("vmdk", folder.path(), &path) == model, "{name} differs");
            if !matches!(subformat, Subformat::Vmfs) {
                qemu_img(&["check", "-q"], &[&path]);
            }
            let info = qemu_img(&["info", "--output=json"], &[&path]);
            assert!(info.contains(&format!("\"create-type\": \"{}\"", subformat.word())), "{info}");
        }
    }
}

#[test]
fn qemu_writes_to_what_was_created() {
    if !has_tool("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let options = CreateOptions::new(3 << 30, Subformat::TwoGbMaxExtentSparse, "split.vmdk");
    let path = folder::create(folder.path(), &options).unwrap();
    let run = std::process::Command::new("qemu-io")
        .args(["-f", "vmdk", "-c", "write -P 7 2046M 3M"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let disk = folder::open(&path).unwrap();
    assert_eq!(disk.extents().len(), 2);
    let mut bytes = vec![0; 5 << 20];
    disk.read_at(&mut bytes, 2045 << 20).unwrap();
    for (number, mib) in bytes.chunks(1 << 20).enumerate() {
        let value = if (1..4).contains(&number) { 7 } else { 0 };
        assert!(mib.iter().all(|byte| *byte == value), "MiB {number}");
    }
}

/// Packs `bytes` on several threads and stores them in order.
fn stream(target: &StreamTarget, bytes: &[u8]) {
    let mut packed: Vec<(u64, Encoding, Vec<u8>)> = std::thread::scope(|scope| {
        let parts: Vec<_> = bytes.chunks(50 * GRAIN).enumerate().collect();
        let threads: Vec<_> = parts
            .into_iter()
            .map(|(part, bytes)| {
                scope.spawn(move || {
                    let mut all = Vec::new();
                    for (number, grain) in bytes.chunks(GRAIN).enumerate() {
                        let mut arena = vec![1, 2, 3];
                        let encoding = target.pack(grain, &mut arena).unwrap();
                        let offset = (part * 50 + number) * GRAIN;
                        all.push((offset as u64, encoding, arena.split_off(3)));
                    }
                    all
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    packed.sort_by_key(|(offset, _, _)| *offset);
    for group in packed.chunks(7) {
        let arena: Vec<u8> = group.iter().flat_map(|(_, _, data)| data.clone()).collect();
        let units: Vec<PackedUnit> = group
            .iter()
            .map(|(offset, encoding, data)| PackedUnit {
                offset: *offset,
                len: data.len(),
                encoding: *encoding,
            })
            .collect();
        target.store(&arena, &units).unwrap();
    }
}

#[test]
fn streams_are_read_by_qemu_and_by_us() {
    let folder = tempfile::tempdir().unwrap();
    let size = (70 << 20) + 512;
    let mut bytes = vec![0; size];
    bytes[..5000].copy_from_slice(&pattern(5000, 1));
    bytes[10 << 20..11 << 20].copy_from_slice(&pattern(1 << 20, 2));
    bytes[20 << 20..22 << 20].fill(b'x');
    bytes[60 << 20..61 << 20].fill(b'y');
    bytes[size - 600..].copy_from_slice(&pattern(600, 3));
    let path = folder.path().join("stream.vmdk");
    let mut options = CreateOptions::new(size as u64, Subformat::StreamOptimized, "stream.vmdk");
    options.hardware_version = 14;
    let storage = Arc::new(RawFile::create(&path, 0).unwrap());
    let target = StreamTarget::create(storage.clone(), &options).unwrap();
    stream(&target, &bytes);
    assert!(!tranship_vmdk::probe(&contents(&*storage)[..4096]), "it is no disk before its end");
    target.finish().unwrap();
    assert_eq!(target.finish().unwrap_err().kind(), ErrorKind::Usage);

    let disk = folder::open(&path).unwrap();
    assert!(disk.warnings().is_empty(), "{:?}", disk.warnings());
    assert!(disk.extents()[0].compressed);
    verify(&disk, &bytes);
    let file = contents(&*storage);
    assert!(file.len() < 9 << 20, "{} bytes", file.len());
    assert!(file[file.len() - 512..].iter().all(|byte| *byte == 0), "end of stream");
    assert_eq!(&file[file.len() - 1024..file.len() - 1020], b"KDMV");
    assert_eq!(&file[56..64], [0xff; 8]);

    if has_tool("qemu-img") {
        assert!(raw_by_qemu("vmdk", folder.path(), &path) == bytes);
        qemu_img(&["check", "-q"], &[&path]);
        let info = qemu_img(&["info"], &[&path]);
        assert!(info.contains("compressed: true"), "{info}");
    }
}

#[test]
fn streams_refuse_what_is_out_of_order() {
    let options = CreateOptions::new(1 << 20, Subformat::StreamOptimized, "s.vmdk");
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let target = StreamTarget::create(storage.clone(), &options).unwrap();
    let mut arena = Vec::new();
    let encoding = target.pack(&pattern(GRAIN, 1), &mut arena).unwrap();
    let unit = |offset| [PackedUnit { offset, len: arena.len(), encoding }];
    target.store(&arena, &unit(3 * GRAIN as u64)).unwrap();
    for offset in [0, 3 * GRAIN as u64, 4 * GRAIN as u64 + 512, 1 << 20] {
        let error = target.store(&arena, &unit(offset)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{offset}: {error}");
    }
    let mut bad = options.clone();
    bad.compression_level = 0;
    assert!(StreamTarget::create(storage.clone(), &bad).is_err());
    bad.compression_level = 6;
    bad.subformat = Subformat::Vmfs;
    assert!(StreamTarget::create(storage, &bad).is_err());
}

#[test]
fn snapshots_name_their_parent() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let base = CreateOptions::new(1 << 20, Subformat::MonolithicSparse, "base.vmdk");
    let base = folder::create(folder.path(), &base).unwrap();
    folder::open_writable(&base).unwrap().write_at(&pattern(9999, 4), 70_000).unwrap();
    let cid = folder::open(&base).unwrap().cid().unwrap();
    let mut options = CreateOptions::new(1 << 20, Subformat::MonolithicSparse, "child.vmdk");
    options.parent = Some(ParentLink { name: "base.vmdk".to_owned(), cid });
    let child = folder::create(folder.path(), &options).unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[70_000..79_999].copy_from_slice(&pattern(9999, 4));
    assert!(raw_by_qemu("vmdk", folder.path(), &child) == expected);
}

#[test]
fn flat_extents_can_be_given_their_space() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    for (name, preallocate) in [("thin.vmdk", false), ("thick.vmdk", true)] {
        let mut options = CreateOptions::new(1 << 20, Subformat::Vmfs, name);
        options.preallocate = preallocate;
        folder::create(folder.path(), &options).unwrap();
        let facts = std::fs::metadata(folder.path().join(options.extent_name(0))).unwrap();
        assert_eq!(facts.len(), 1 << 20);
        // Some file systems can reserve nothing; none takes space for what is not asked for.
        assert!(preallocate || facts.blocks() == 0, "{} blocks", facts.blocks());
    }
    let mut options = CreateOptions::new(1 << 20, Subformat::MonolithicSparse, "d.vmdk");
    options.preallocate = true;
    let error = folder::create(folder.path(), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn what_cannot_be_expressed_is_refused() {
    let kind = |change: &dyn Fn(&mut CreateOptions)| {
        let mut options = CreateOptions::new(1 << 20, Subformat::MonolithicFlat, "d.vmdk");
        change(&mut options);
        let storage = MemoryDevice::new(Vec::new());
        tranship_vmdk::create(&storage, &NoFiles, &options).unwrap_err().kind()
    };
    assert_eq!(kind(&|_| ()), ErrorKind::Denied);
    assert_eq!(kind(&|options| options.size = 0), ErrorKind::Usage);
    assert_eq!(kind(&|options| options.size = u64::MAX), ErrorKind::Usage);
    assert_eq!(kind(&|options| options.name = "a\"b".to_owned()), ErrorKind::Usage);
    let parent = Some(ParentLink { name: "p".to_owned(), cid: 1 });
    assert_eq!(kind(&|options| options.parent = parent.clone()), ErrorKind::Usage);
    let huge = |options: &mut CreateOptions| {
        options.size = 9 << 40;
        options.subformat = Subformat::TwoGbMaxExtentFlat;
    };
    assert_eq!(kind(&huge), ErrorKind::Unsupported);
    let error = "seSparse".parse::<Subformat>().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!("streamoptimized".parse::<Subformat>().unwrap(), Subformat::StreamOptimized);
    assert_eq!("LSILOGIC".parse::<Adapter>().unwrap(), Adapter::LsiLogic);
    assert!("scsi".parse::<Adapter>().is_err());
}
