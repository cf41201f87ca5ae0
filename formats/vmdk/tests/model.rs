// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Random work on disks that are open for writing, against bytes in memory; what a power
//! cut leaves; and many writers at once.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "for tests alone")]

mod folder;

use folder::Memory;
use proptest::prelude::*;
use std::sync::Arc;
use tranship_block::{
    BlockDevice, DenyAll, ErrorKind, MemoryDevice, Repair, Span, Storage, Zeroing,
};
use tranship_format_testing::{Op, PowerCut, apply, contents, operations, pattern, verify};
use tranship_vmdk::{
    CreateOptions, NoFiles, OpenOptions, Parent, ParentLink, ResizeOptions, Subformat, Vmdk,
};

const GRAIN: u64 = 64 << 10;

fn parent_device(seed: u64, len: usize) -> Arc<MemoryDevice> {
    let mut bytes = pattern(len, seed);
    // Some of it is zero, so that both answers of its extents occur.
    bytes[..len / 3].fill(0);
    Arc::new(MemoryDevice::read_only(bytes))
}

fn options(parent: Option<&Arc<MemoryDevice>>) -> OpenOptions {
    OpenOptions {
        parent: parent.map(|parent| Parent { device: parent.clone(), cid: Some(0x77) }),
        ..OpenOptions::default()
    }
}

fn with_parent(mut create: CreateOptions, parent: bool) -> CreateOptions {
    create.parent = parent.then(|| ParentLink { name: "p.vmdk".to_owned(), cid: 0x77 });
    create
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn a_disk_equals_its_model(
        ops in operations(9 * GRAIN + 1536, GRAIN, 24),
        subformat in prop::sample::select(vec![
            Subformat::MonolithicSparse,
            Subformat::TwoGbMaxExtentSparse,
            Subformat::MonolithicFlat,
            Subformat::Vmfs,
            Subformat::VmfsSparse,
        ]),
        zeroed in any::<bool>(),
        has_parent in any::<bool>(),
    ) {
        let has_parent = has_parent
            && !matches!(subformat, Subformat::MonolithicFlat | Subformat::Vmfs);
        let size = 9 * GRAIN + 1536;
        let mut create = with_parent(CreateOptions::new(size, subformat, "d.vmdk"), has_parent);
        create.zeroed_grain = zeroed;
        let storage: Arc<dyn Storage> = Arc::new(MemoryDevice::new(Vec::new()));
        let files = Memory::default();
        tranship_vmdk::create(&*storage, &files, &create).unwrap();
        let parent = has_parent.then(|| parent_device(5, 7 * GRAIN as usize + 512));
        let mut model = vec![0; size as usize];
        if let Some(parent) = &parent {
            model[..parent.size() as usize].copy_from_slice(&parent.snapshot());
        }
        let open = || {
            Vmdk::open_writable(storage.clone(), &files, options(parent.as_ref())).unwrap()
        };
        let mut disk = open();
        for op in &ops {
            apply(&disk, &mut model, op);
            if matches!(op, Op::Reopen) {
                drop(disk);
                disk = open();
            }
        }
        verify(&disk, &model);
        drop(disk);
        let file: Arc<dyn BlockDevice> = storage.clone();
        let disk = Vmdk::open(file, &files, options(parent.as_ref())).unwrap();
        prop_assert!(disk.warnings().is_empty(), "{:?}", disk.warnings());
        verify(&disk, &model);
        let report = tranship_vmdk::check(&*storage, &files, Repair::Nothing).unwrap();
        prop_assert!(report.corruptions == 0, "{:?}", report);
    }

    #[test]
    fn a_power_cut_loses_nothing_that_was_flushed(
        ops in operations(4 * GRAIN, GRAIN, 10),
        zeroed in any::<bool>(),
        bare in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let size = 4 * GRAIN;
        let mut create = CreateOptions::new(size, Subformat::MonolithicSparse, "d.vmdk");
        create.zeroed_grain = zeroed;
        let memory = MemoryDevice::new(Vec::new());
        tranship_vmdk::create(&memory, &NoFiles, &create).unwrap();
        if bare {
            // Some writers leave out tables without grains.
            for directory in [21, 26] {
                memory.write_at(&[0; 512], directory * 512).unwrap();
            }
        }
        let cut = Arc::new(PowerCut::new(memory.snapshot()));
        let initially = vec![0; size as usize];
        let mut model = initially.clone();
        // Per byte: everything that it has been since the last flush.
        let mut states = vec![initially.clone()];
        {
            let disk = Vmdk::open_writable(cut.clone(), &NoFiles, options(None)).unwrap();
            for op in &ops {
                apply(&disk, &mut model, op);
                states.push(model.clone());
                if matches!(op, Op::Flush) {
                    cut.promise(&model);
                }
            }
        }
        cut.replay(&initially, seed, |bytes, promised| {
            let file = Arc::new(MemoryDevice::read_only(bytes));
            let disk = Vmdk::open(file.clone(), &DenyAll, options(None)).unwrap();
            let found = contents(&disk);
            let last = states.iter().rposition(|state| state == promised).unwrap_or(0);
            // What was promised may be an older state as well: take the earliest.
            let first = states.iter().position(|state| state == promised).unwrap_or(last);
            for (number, sector) in found.chunks(512).enumerate() {
                let range = number * 512..number * 512 + sector.len();
                if states[first..].iter().any(|state| state[range.clone()] == *sector) {
                    continue;
                }
                for (byte, at) in sector.iter().zip(range) {
                    assert!(
                        states[first..].iter().any(|state| state[at] == *byte),
                        "byte {at:#x} is {byte:#x}, which it never was since the flush"
                    );
                }
            }
            let report =
                tranship_vmdk::check(&*file, &NoFiles, Repair::Nothing).unwrap();
            assert_eq!(report.check_errors, 0, "{report:?}");
        });
    }
}

#[test]
fn writers_at_once_lose_nothing() {
    let size = 64 * GRAIN;
    for zeroed in [false, true] {
        let mut create = CreateOptions::new(size, Subformat::MonolithicSparse, "d.vmdk");
        create.zeroed_grain = zeroed;
        let storage = Arc::new(MemoryDevice::new(Vec::new()));
        tranship_vmdk::create(&*storage, &NoFiles, &create).unwrap();
        let disk = Vmdk::open_writable(storage.clone(), &NoFiles, options(None)).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let disk = &disk;
                // Every thread has a quarter of each 4 KiB, so that all meet in all grains.
                scope.spawn(move || {
                    for page in 0..size / 4096 {
                        let page = (page * 7 + thread) % (size / 4096);
                        let at = page * 4096 + thread * 1024;
                        disk.write_at(&pattern(1024, at), at).unwrap();
                        if page.is_multiple_of(100) {
                            disk.flush().unwrap();
                        }
                        let mut back = vec![0; 1024];
                        disk.read_at(&mut back, at).unwrap();
                        assert!(back == pattern(1024, at));
                    }
                });
            }
        });
        disk.flush().unwrap();
        drop(disk);
        let disk = Vmdk::open(storage.clone(), &DenyAll, options(None)).unwrap();
        let model: Vec<u8> = (0..size / 1024).flat_map(|kib| pattern(1024, kib * 1024)).collect();
        verify(&disk, &model);
        let report = tranship_vmdk::check(&*storage, &NoFiles, Repair::Nothing).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn declared_zeroes_take_no_space_and_come_back() {
    let size = 4 * GRAIN;
    let mut create =
        with_parent(CreateOptions::new(size, Subformat::MonolithicSparse, "d.vmdk"), true);
    create.zeroed_grain = true;
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    tranship_vmdk::create(&*storage, &NoFiles, &create).unwrap();
    let parent = Arc::new(MemoryDevice::read_only(pattern(size as usize, 1)));
    let disk = Vmdk::open_writable(storage.clone(), &NoFiles, options(Some(&parent))).unwrap();
    let before = storage.size();
    disk.write_zeroes(Span::new(0, size), Zeroing::MayUnmap).unwrap();
    disk.flush().unwrap();
    assert_eq!(storage.size(), before);
    verify(&disk, &vec![0; size as usize]);
    for _ in 0..5 {
        disk.write_at(&[7; 100], 50).unwrap();
        disk.write_zeroes(Span::new(0, GRAIN), Zeroing::MayUnmap).unwrap();
    }
    assert_eq!(storage.size(), before + GRAIN, "the grain goes where it was");
}

#[test]
fn an_extent_without_a_descriptor_can_be_written() {
    let files = Memory::default();
    let descriptor = MemoryDevice::new(Vec::new());
    let create = CreateOptions::new(1 << 20, Subformat::TwoGbMaxExtentSparse, "d.vmdk");
    tranship_vmdk::create(&descriptor, &files, &create).unwrap();
    let storage = files.0.lock().unwrap()["d-s001.vmdk"].clone();
    let mut model = vec![0; 1 << 20];
    // What looks like a descriptor is the guest's.
    let text = b"CID=12345678\n".repeat(100);
    for at in [0, 70_000] {
        let disk = Vmdk::open_writable(storage.clone(), &NoFiles, options(None)).unwrap();
        disk.write_at(&text, at as u64).unwrap();
        model[at..at + text.len()].copy_from_slice(&text);
        verify(&disk, &model);
    }
    let disk = Vmdk::open(storage.clone(), &DenyAll, options(None)).unwrap();
    verify(&disk, &model);
}

#[test]
fn only_what_can_be_written_is_opened_for_writing() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let create = CreateOptions::new(1 << 20, Subformat::StreamOptimized, "d.vmdk");
    tranship_vmdk::create(&*storage, &NoFiles, &create).unwrap();
    let kind = |storage: Arc<MemoryDevice>, options| {
        Vmdk::open_writable(storage, &NoFiles, options).unwrap_err().kind()
    };
    assert_eq!(kind(storage.clone(), options(None)), ErrorKind::Unsupported);
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    assert_eq!(kind(storage.clone(), salvage), ErrorKind::Usage);
    let read_only = Arc::new(MemoryDevice::read_only(storage.snapshot()));
    assert_eq!(kind(read_only, options(None)), ErrorKind::Usage);
    let files = Memory::default();
    files.put("a", Arc::new(MemoryDevice::new(vec![1; 512])));
    files.put("b", Arc::new(MemoryDevice::new(vec![2; 512])));
    let text = b"# Disk DescriptorFile\nCID=00000001\nRW 1 FLAT \"a\" 0\nRDONLY 1 FLAT \"b\" 0\n\
        RW 1 ZERO\n";
    let storage = Arc::new(MemoryDevice::new(text.to_vec()));
    let disk = Vmdk::open_writable(storage.clone(), &files, options(None)).unwrap();
    disk.write_at(&[9], 511).unwrap();
    assert_ne!(disk.cid(), Some(1));
    let error = disk.write_at(&[9], 512).unwrap_err();
    assert!(error.to_string().contains("RDONLY"), "{error}");
    assert!(disk.write_at(&[9], 1024).is_err());
    disk.write_zeroes(Span::new(1024, 512), Zeroing::MayUnmap).unwrap();
    assert_eq!(storage.snapshot().len(), text.len());
}

/// Creates a disk in a storage that holds `before`, and looks at everything that a power
/// cut could leave.
fn cut_creation(create: &CreateOptions, before: &[u8]) {
    let cut = PowerCut::new(before.to_vec());
    tranship_vmdk::create(&cut, &NoFiles, create).unwrap();
    let size = create.size as usize;
    let mut disks = 0;
    cut.replay(&[], 7, |bytes, _| {
        let file = Arc::new(MemoryDevice::read_only(bytes.clone()));
        if bytes == before || !tranship_vmdk::probe(&bytes[..bytes.len().min(4096)]) {
            return;
        }
        disks += 1;
        let disk = Vmdk::open(file, &DenyAll, options(None)).unwrap();
        assert!(contents(&disk) == vec![0; size]);
    });
    assert!(disks > 0);
}

#[test]
fn an_interrupted_creation_leaves_no_disk() {
    let old = Arc::new(MemoryDevice::new(Vec::new()));
    let create = CreateOptions::new(300_000, Subformat::MonolithicSparse, "d.vmdk");
    tranship_vmdk::create(&*old, &NoFiles, &create).unwrap();
    let disk = Vmdk::open_writable(old.clone(), &NoFiles, options(None)).unwrap();
    disk.write_at(&pattern(100_000, 3), 0).unwrap();
    drop(disk);
    for subformat in [Subformat::MonolithicSparse, Subformat::StreamOptimized] {
        let create = CreateOptions::new(100_352, subformat, "d.vmdk");
        cut_creation(&create, &[]);
        cut_creation(&create, &old.snapshot());
    }
}

#[test]
fn an_interrupted_resize_leaves_the_old_or_the_new_disk() {
    let memory = Arc::new(MemoryDevice::new(Vec::new()));
    let create = CreateOptions::new(1 << 20, Subformat::MonolithicSparse, "d.vmdk");
    tranship_vmdk::create(&*memory, &NoFiles, &create).unwrap();
    let disk = Vmdk::open_writable(memory.clone(), &NoFiles, options(None)).unwrap();
    disk.write_at(&pattern(5000, 3), 700_000).unwrap();
    drop(disk);
    let cut = PowerCut::new(memory.snapshot());
    tranship_vmdk::resize(&cut, &NoFiles, 40 << 20, ResizeOptions::default()).unwrap();
    let mut sizes = std::collections::BTreeSet::new();
    cut.replay(&[], 7, |bytes, _| {
        let file = Arc::new(MemoryDevice::read_only(bytes));
        let disk = Vmdk::open(file, &DenyAll, options(None)).unwrap();
        sizes.insert(disk.size());
        let mut found = vec![0; 5000];
        disk.read_at(&mut found, 700_000).unwrap();
        assert!(found == pattern(5000, 3));
        if disk.size() > 1 << 20 {
            assert!(disk.extent_at(2 << 20).unwrap().kind.reads_zero());
        }
    });
    assert_eq!(Vec::from_iter(sizes), [1 << 20, 40 << 20]);
}

#[test]
fn tables_that_were_left_out_are_added() {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    let create = CreateOptions::new(70 << 20, Subformat::MonolithicSparse, "d.vmdk");
    tranship_vmdk::create(&*storage, &NoFiles, &create).unwrap();
    let header = storage.snapshot();
    for at in [48, 56] {
        let sector = u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        storage.write_at(&[0; 12], sector * 512).unwrap();
    }
    let disk = Vmdk::open_writable(storage.clone(), &NoFiles, options(None)).unwrap();
    assert_eq!(disk.extent_at(0).unwrap().len, 70 << 20);
    let bytes = pattern(200_000, 6);
    disk.write_at(&bytes, (32 << 20) - 100_000).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let report = tranship_vmdk::check(&*storage, &NoFiles, Repair::Nothing).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.allocated_clusters, 4);
    let disk = Vmdk::open(storage, &DenyAll, options(None)).unwrap();
    let mut found = vec![0; 200_000];
    disk.read_at(&mut found, (32 << 20) - 100_000).unwrap();
    assert!(found == bytes);
    assert!(disk.extent_at(65 << 20).unwrap().kind.reads_zero());
}
