// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that our own crates make.

use crate::Seeds;
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use tranship_block::{BlockDevice, MemoryDevice, PackedTarget, PackedUnit, Span, Storage, Zeroing};
use tranship_format_testing::pattern;
use tranship_vmdk::{NoFiles, Subformat};

pub(crate) fn make(seeds: &Seeds) {
    qcow2(seeds);
    vhdx(seeds);
    vmdk(seeds);
    vpc(seeds);
}

fn storage() -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(Vec::new()))
}

/// Some data, some zeroes, something discarded.
fn fill(disk: &dyn BlockDevice) {
    let size = disk.size();
    for (number, at) in [0, 5000, size / 3, size / 2 + 100, size - 600].into_iter().enumerate() {
        let len = (300 + 400 * number).min((size - at) as usize);
        disk.write_at(&pattern(len, number as u64), at).unwrap();
    }
    disk.write_zeroes(Span::new(size / 3, 3000), Zeroing::KeepAllocated).unwrap();
    disk.discard(Span::new(0, size / 8)).unwrap();
    disk.flush().unwrap();
}

fn qcow2(seeds: &Seeds) {
    use tranship_qcow2::{
        Backing, Compression, CreateOptions, DataFile, OpenOptions, Preallocation, Qcow2,
        add_bitmap, create, create_snapshot,
    };
    let base = || CreateOptions::new(300 << 10);
    let small = |bits: u32| CreateOptions { cluster_bits: bits, ..base() };
    let below = Backing { name: "base.raw".to_owned(), format: Some("raw".to_owned()) };
    let variants = [
        base(),
        small(9),
        small(12),
        CreateOptions { version: 2, ..small(10) },
        CreateOptions { refcount_order: 0, ..small(11) },
        CreateOptions { refcount_order: 6, ..small(9) },
        CreateOptions { extended_l2: true, ..small(14) },
        CreateOptions { compression: Compression::Zstd, ..small(12) },
        CreateOptions { lazy_refcounts: true, ..small(12) },
        CreateOptions { preallocation: Preallocation::Metadata, ..small(12) },
        CreateOptions { backing: Some(below), ..small(12) },
    ];
    for options in variants {
        let file = storage();
        create(&*file, &options).unwrap();
        let backing = options.backing.is_some();
        let open = || {
            let backing = backing.then(|| -> Arc<dyn BlockDevice> {
                Arc::new(MemoryDevice::read_only(vec![1; 9000]))
            });
            Qcow2::open(file.clone(), OpenOptions { backing, ..OpenOptions::default() }).unwrap()
        };
        let disk = open();
        fill(&disk);
        let cluster = 1_u64 << options.cluster_bits;
        if options.preallocation == Preallocation::Off && options.size > 4 * cluster {
            let text: Vec<u8> =
                b"all the same ".iter().copied().cycle().take(cluster as usize).collect();
            disk.write_compressed(cluster * 3, &text).unwrap();
        }
        disk.finish().unwrap();
        drop(disk);
        seeds.add("qcow2", &[&file.snapshot()]);
        if options.refcount_order == 0 {
            continue;
        }
        create_snapshot(&*file, "one", UNIX_EPOCH).unwrap();
        if options.version > 2 {
            add_bitmap(&*file, "map", Some(4096)).unwrap();
        }
        let disk = open();
        disk.write_at(&pattern(5000, 3), 70_000).unwrap();
        disk.finish().unwrap();
        drop(disk);
        seeds.add("qcow2", &[&file.snapshot()]);
    }
    for raw in [false, true] {
        let (file, data) = (storage(), storage());
        let data_file = Some(DataFile { name: "data".to_owned(), storage: data.clone(), raw });
        create(&*file, &CreateOptions { data_file, ..small(12) }).unwrap();
        let options = OpenOptions { data_file: Some(data.clone()), ..OpenOptions::default() };
        let disk = Qcow2::open(file.clone(), options).unwrap();
        fill(&disk);
        disk.finish().unwrap();
        drop(disk);
        seeds.add("qcow2", &[&file.snapshot(), &data.snapshot()]);
    }
}

fn vhdx(seeds: &Seeds) {
    use tranship_vhdx::{CreateOptions, Guid, OpenOptions, Parent, ParentLocator, Vhdx, create};
    let base = || CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(3 << 20) };
    let linkage = Guid::parse("{11111111-2222-3333-4444-555555555555}").unwrap();
    let child = ParentLocator::new(linkage, Some(".\\base.vhdx"), Some("c:\\base.vhdx"));
    let variants = [
        base(),
        CreateOptions { fixed: true, ..base() },
        CreateOptions { logical_sector_size: 4096, ..base() },
        CreateOptions { block_state_zero: false, ..base() },
        CreateOptions { parent: Some(child), ..base() },
    ];
    for options in variants {
        let file = storage();
        create(&*file, &options).unwrap();
        seeds.add("vhdx", &[&file.snapshot()]);
        let parent = options.parent.is_some().then(|| Parent {
            device: Arc::new(MemoryDevice::read_only(vec![3; 3 << 20])),
            data_write_guid: linkage,
        });
        let options = OpenOptions { parent, ..OpenOptions::default() };
        let disk = Vhdx::open(file.clone(), options).unwrap();
        fill(&disk);
        // With the log in use.
        seeds.add("vhdx", &[&file.snapshot()]);
        drop(disk);
        seeds.add("vhdx", &[&file.snapshot()]);
    }
}

fn vmdk(seeds: &Seeds) {
    use tranship_vmdk::{CreateOptions, OpenOptions, ParentLink, Vmdk, create};
    let base = |subformat| CreateOptions::new(1 << 20, subformat, "disk.vmdk");
    let parent = ParentLink { name: "base.vmdk".to_owned(), cid: 7 };
    let variants = [
        base(Subformat::MonolithicSparse),
        CreateOptions { zeroed_grain: true, ..base(Subformat::MonolithicSparse) },
        CreateOptions { parent: Some(parent), ..base(Subformat::MonolithicSparse) },
    ];
    for options in variants {
        let file = storage();
        create(&*file, &NoFiles, &options).unwrap();
        seeds.add("vmdk", &[&file.snapshot()]);
        if options.parent.is_none() {
            let disk = Vmdk::open_writable(file.clone(), &NoFiles, OpenOptions::default()).unwrap();
            fill(&disk);
            drop(disk);
            seeds.add("vmdk", &[&file.snapshot()]);
            let line = "RW 2048 SPARSE \"disk-s001.vmdk\"";
            let text = descriptor("twoGbMaxExtentSparse", line, "ffffffff");
            seeds.add("vmdk", &[text.as_bytes(), &file.snapshot()]);
        }
    }
    let file = storage();
    let options = base(Subformat::StreamOptimized);
    let target = tranship_vmdk::StreamTarget::create(file.clone(), &options).unwrap();
    let mut arena = Vec::new();
    let encoding = target.pack(&vec![0x55; 1 << 16], &mut arena).unwrap();
    let units = [PackedUnit { offset: 1 << 16, len: arena.len(), encoding }];
    target.store(&arena, &units).unwrap();
    target.finish().unwrap();
    seeds.add("vmdk", &[&file.snapshot()]);
    let lines = ["FLAT \"disk-flat.vmdk\" 0", "VMFS \"disk-flat.vmdk\"", "ZERO"];
    for line in lines {
        let text = descriptor("vmfs", &format!("RW 2048 {line}"), "ffffffff");
        seeds.add("vmdk", &[text.as_bytes(), &pattern(4096, 1)]);
    }
    esx(seeds);
}

fn descriptor(kind: &str, extent: &str, parent: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={parent}\n\
         createType=\"{kind}\"\n{extent}\nddb.adapterType = \"ide\"\n"
    )
}

/// The two kinds of deltas that only ESX writes: tables for 1 MiB, with one grain.
fn esx(seeds: &Seeds) {
    let mut cowd = vec![0; 8 * 512 + 16384 + 4096];
    let put32 = |bytes: &mut Vec<u8>, at: usize, value: u32| {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    cowd[0..4].copy_from_slice(b"COWD");
    for (at, value) in [(4, 1), (8, 3), (12, 2048), (16, 1), (20, 4), (24, 1), (28, 50)] {
        put32(&mut cowd, at, value);
    }
    put32(&mut cowd, 4 * 512, 5);
    put32(&mut cowd, 5 * 512 + 8, 37);
    let text = descriptor("vmfsSparse", "RW 2048 VMFSSPARSE \"disk-delta.vmdk\"", "12345679");
    seeds.add("vmdk", &[text.as_bytes(), &cowd]);
    seeds.add("vmdk", &[&cowd]);
    let mut sparse = vec![0; 1 << 20];
    let numbers: [u64; 26] = [
        0xcafe_babe,
        0x2_0000_0001,
        2048,
        8,
        64,
        0,
        0,
        0,
        0,
        0,
        1,
        1,
        8,
        1,
        16,
        8,
        24,
        512,
        536,
        8,
        544,
        8,
        552,
        1024,
        0,
        0,
    ];
    for (index, number) in numbers.into_iter().enumerate() {
        sparse[index * 8..index * 8 + 8].copy_from_slice(&number.to_le_bytes());
    }
    sparse[512..520].copy_from_slice(&0xcafe_cafe_u64.to_le_bytes());
    sparse[16 * 512..16 * 512 + 8].copy_from_slice(&0x1000_0000_0000_0000_u64.to_le_bytes());
    sparse[24 * 512..24 * 512 + 8].copy_from_slice(&0x3000_0000_0000_0000_u64.to_le_bytes());
    sparse[552 * 512..552 * 512 + 4096].copy_from_slice(&pattern(4096, 1));
    let text = descriptor("seSparse", "RW 2048 SESPARSE \"disk-sesparse.vmdk\"", "12345679");
    seeds.add("vmdk", &[text.as_bytes(), &sparse]);
}

fn vpc(seeds: &Seeds) {
    use tranship_vpc::{CreateOptions, Kind, NewParent, OpenOptions, Parent, Sizing, Vpc, create};
    let base = || CreateOptions { block_size: 1 << 16, ..CreateOptions::new(1 << 20) };
    let link = NewParent {
        unique_id: [7; 16],
        relative: Some(".\\base.vhd".to_owned()),
        absolute: Some("C:\\base.vhd".to_owned()),
        ..NewParent::default()
    };
    let variants = [
        base(),
        CreateOptions { sizing: Sizing::Exact, block_size: 4096, ..base() },
        CreateOptions { kind: Kind::Fixed, ..base() },
        CreateOptions { block_size: 1 << 21, ..base() },
        CreateOptions { block_size: 1 << 16, ..CreateOptions::differencing(1 << 20, link) },
    ];
    for options in variants {
        let file = storage();
        create(&*file, &options).unwrap();
        seeds.add("vpc", &[&file.snapshot()]);
        let parent = options.parent.is_some().then(|| Parent {
            device: Arc::new(MemoryDevice::read_only(vec![3; 1 << 20])),
            unique_id: [7; 16],
        });
        let options = OpenOptions { parent, ..OpenOptions::default() };
        let disk = Vpc::open(file.clone() as Arc<dyn Storage>, options).unwrap();
        fill(&disk);
        drop(disk);
        seeds.add("vpc", &[&file.snapshot()]);
    }
}
