// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Growing disks.
#![allow(clippy::unwrap_used, reason = "for tests alone")]

mod folder;

use folder::Memory;
use std::sync::Arc;
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Repair, Storage};
use tranship_format_testing::{has_tool, pattern, qemu_img, qemu_img_status, verify};
use tranship_raw::RawFile;
use tranship_vmdk::{CreateOptions, NoFiles, OpenOptions, ResizeOptions, Subformat, Vmdk, check};

#[test]
fn disks_grow() {
    let folder = tempfile::tempdir().unwrap();
    let data = pattern(100_000, 5);
    for (subformat, large, extents) in [
        (Subformat::MonolithicSparse, 70 << 20, 1),
        (Subformat::MonolithicSparse, 30 << 30, 1),
        (Subformat::MonolithicFlat, 70 << 20, 1),
        (Subformat::Vmfs, 70 << 20, 1),
        (Subformat::TwoGbMaxExtentSparse, 5 << 30, 3),
        (Subformat::TwoGbMaxExtentFlat, 5_u64 << 30, 3),
    ] {
        let name = format!("{}-{large}.vmdk", subformat.word());
        let create = CreateOptions::new(3 << 20, subformat, &name);
        let path = folder::create(folder.path(), &create).unwrap();
        let write = |at| {
            let disk = folder::open_writable(&path).unwrap();
            disk.write_at(&data, at).unwrap();
            disk.flush().unwrap();
        };
        write((3 << 20) - 100_000);
        let storage = RawFile::open(&path, tranship_raw::Access::ReadWrite).unwrap();
        let files = folder::beside(&path);
        let error =
            tranship_vmdk::resize(&storage, &files, 1 << 20, ResizeOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        tranship_vmdk::resize(&storage, &files, 3 << 20, ResizeOptions::default()).unwrap();
        tranship_vmdk::resize(&storage, &files, large, ResizeOptions::default()).unwrap();
        write(large - 200_000);
        let disk = folder::open(&path).unwrap();
        assert!(disk.warnings().is_empty(), "{:?}", disk.warnings());
        assert_eq!((disk.size(), disk.extents().len()), (large, extents), "{name}");
        let storage = RawFile::open(&path, tranship_raw::Access::ReadOnly).unwrap();
        let report = check(&storage, &files, Repair::Nothing).unwrap();
        assert!(report.is_clean(), "{name}: {report:?}");
        let raw = folder.path().join("raw");
        let _ = std::fs::remove_file(&raw);
        let model = RawFile::create(&raw, large).unwrap();
        model.write_at(&data, (3 << 20) - 100_000).unwrap();
        model.write_at(&data, large - 200_000).unwrap();
        for at in [(3 << 20) - 100_000, large - 200_000] {
            let mut found = vec![0; 100_000];
            disk.read_at(&mut found, at).unwrap();
            assert!(found == data, "{name}");
        }
        if has_tool("qemu-img") {
            let compare = ["compare", "-q", "-f", "vmdk", "-F", "raw"];
            let run = qemu_img_status(&compare, &[&path, &raw]);
            assert!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));
            if subformat != Subformat::Vmfs {
                qemu_img(&["check", "-q"], &[&path]);
            }
        }
    }
}

#[test]
fn what_lies_behind_the_end_does_not_come_to_light() {
    let folder = tempfile::tempdir().unwrap();
    for subformat in [Subformat::MonolithicSparse, Subformat::MonolithicFlat] {
        let name = format!("{}.vmdk", subformat.word());
        let path = folder::create(folder.path(), &CreateOptions::new(100 << 10, subformat, &name));
        let path = path.unwrap();
        let disk = folder::open_writable(&path).unwrap();
        disk.write_at(&[7; 1024], 99 << 10).unwrap();
        disk.flush().unwrap();
        drop(disk);
        // The second half of the last grain, or bytes behind a flat extent.
        let last = if subformat == Subformat::MonolithicSparse {
            path.clone()
        } else {
            path.with_file_name("monolithicFlat-flat.vmdk")
        };
        let file = RawFile::open(&last, tranship_raw::Access::ReadWrite).unwrap();
        if subformat == Subformat::MonolithicSparse {
            let end = file.size();
            file.write_at(&[9; 512], end - 512).unwrap();
        } else {
            file.set_len(110 << 10).unwrap();
            file.write_at(&[9; 512], 109 << 10).unwrap();
        }
        drop(file);
        let storage = RawFile::open(&path, tranship_raw::Access::ReadWrite).unwrap();
        let files = folder::beside(&path);
        tranship_vmdk::resize(&storage, &files, 1 << 20, ResizeOptions::default()).unwrap();
        let mut expected = vec![0; 1 << 20];
        expected[99 << 10..100 << 10].fill(7);
        verify(&folder::open(&path).unwrap(), &expected);
    }
}

#[test]
fn disks_that_cannot_grow_are_left_alone() {
    let head = "# Disk DescriptorFile\nversion=1\nCID=00000001\n";
    let kind = "createType=\"twoGbMaxExtentFlat\"\n";
    let split = format!("{head}{kind}");
    for (text, preallocate, expected) in [
        (format!("{head}parentCID=00000002\nRW 8 FLAT \"a\" 0\n"), false, "is a snapshot"),
        (format!("{head}RW 8 FLAT \"a\" 0\nRDONLY 8 FLAT \"b\" 0\n"), false, "RDONLY"),
        (format!("{head}RW 8 FLAT \"a\" 8\nRW 8 FLAT \"a\" 0\n"), false, "lies behind"),
        (format!("{head}RW 8 SPARSE \"a\"\n"), true, "reserved in flat extents"),
        (format!("{split}RW 8 FLAT \"a\" 0\n"), false, "cannot be guessed"),
        (format!("{head}RW 8 VMFS \"a\" 8\nRW 8 FLAT \"a\" 0\n"), false, "lies behind"),
        (
            format!("{split}RW 8 FLAT \"x-f003.vmdk\" 0\nRW 8 FLAT \"x-f002.vmdk\" 0\n"),
            false,
            "lists already",
        ),
        (format!("{head}RW 8 VMFSSPARSE \"a\"\n"), false, "type VMFSSPARSE"),
        (
            format!("{head}encoding=\"windows-1252\"\nRW 8 FLAT \"\u{e9}\" 0\n"),
            false,
            "save the descriptor as UTF-8",
        ),
    ] {
        let files = Memory::default();
        let bytes = vec![1; 16 * 512];
        for name in ["a", "b"] {
            files.put(name, Arc::new(MemoryDevice::new(bytes.clone())));
        }
        let storage = MemoryDevice::new(text.clone().into_bytes());
        let options = ResizeOptions { preallocate };
        let error = tranship_vmdk::resize(&storage, &files, 5 << 30, options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{text}\n{error}");
        assert!(error.to_string().contains(expected), "{text}\n{error}");
        assert_eq!(storage.snapshot(), text.as_bytes());
        for name in ["a", "b"] {
            let file = tranship_vmdk::ExtentFiles::open(&files, name, false).unwrap();
            assert_eq!(file.size(), 16 * 512, "{text}");
        }
    }
}

#[test]
fn a_last_grain_that_the_file_cuts_off_becomes_whole() {
    let folder = tempfile::tempdir().unwrap();
    for large in [128 << 10, 40 << 20] {
        let name = format!("{large}.vmdk");
        let create = CreateOptions::new(100 << 10, Subformat::MonolithicSparse, &name);
        let path = folder::create(folder.path(), &create).unwrap();
        let disk = folder::open_writable(&path).unwrap();
        disk.write_at(&[7; 1024], 99 << 10).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let storage = RawFile::open(&path, tranship_raw::Access::ReadWrite).unwrap();
        // 36 KiB of the last grain belong to the disk.
        storage.set_len(storage.size() - (28 << 10)).unwrap();
        let files = folder::beside(&path);
        tranship_vmdk::resize(&storage, &files, large, ResizeOptions::default()).unwrap();
        let report = check(&storage, &files, Repair::Nothing).unwrap();
        assert!(report.is_clean(), "{report:?}");
        let mut expected = vec![0; usize::try_from(large).unwrap()];
        expected[99 << 10..100 << 10].fill(7);
        verify(&folder::open(&path).unwrap(), &expected);
    }
}

#[test]
fn what_a_sparse_extent_hides_does_not_come_to_light() {
    const LISTED: u64 = (4 << 20) + 512;
    let text = format!("# Disk DescriptorFile\nversion=1\nRW {} SPARSE \"a\"\n", LISTED / 512);
    for (at, is_hidden) in [
        (0, false),
        (LISTED - 512, false),
        (LISTED, true),
        (LISTED + 65536, true),
        (7 << 20, false),
    ] {
        let extent = Arc::new(MemoryDevice::new(Vec::new()));
        let create = CreateOptions::new(8 << 20, Subformat::MonolithicSparse, "a");
        tranship_vmdk::create(&*extent, &NoFiles, &create).unwrap();
        let open = || Vmdk::open_writable(extent.clone(), &NoFiles, OpenOptions::default());
        open().unwrap().write_at(&[9; 512], at).unwrap();
        let before = extent.snapshot();
        let files = Memory::default();
        files.put("a", extent.clone());
        let storage = Arc::new(MemoryDevice::new(text.clone().into_bytes()));
        let result = tranship_vmdk::resize(&*storage, &files, 6 << 20, ResizeOptions::default());
        if is_hidden {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{at:#x}: {error}");
            assert!(error.to_string().contains("behind the end"), "{at:#x}: {error}");
            assert!(storage.snapshot() == text.as_bytes() && extent.snapshot() == before);
            continue;
        }
        result.unwrap();
        let disk = Vmdk::open(storage, &files, OpenOptions::default()).unwrap();
        let mut expected = vec![0; 6 << 20];
        if at < LISTED {
            let at = usize::try_from(at).unwrap();
            expected[at..at + 512].fill(9);
        }
        verify(&disk, &expected);
    }
}

#[test]
fn a_file_on_vmfs_keeps_its_offset() {
    let files = Memory::default();
    let file = Arc::new(MemoryDevice::new(vec![1; 16 * 512]));
    files.put("a", file.clone());
    let head = "# Disk DescriptorFile\nversion=1\n";
    let storage = MemoryDevice::new(format!("{head}RW 8 VMFS \"a\" 8\n").into_bytes());
    tranship_vmdk::resize(&storage, &files, 12 * 512, ResizeOptions::default()).unwrap();
    assert_eq!(storage.snapshot(), format!("{head}RW 12 VMFS \"a\" 8\n").as_bytes());
    assert!(file.snapshot() == [vec![1; 16 * 512], vec![0; 4 * 512]].concat());
}
