// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Snapshot deltas of ESX, made by hand after their published layouts; qemu-img reads the
//! same bytes.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "for tests alone")]

mod folder;

use folder::Memory;
use proptest::prelude::*;
use std::sync::Arc;
use tranship_block::{
    BlockDevice, DenyAll, ErrorKind, ExtentKind, MemoryDevice, Repair, Span, Storage, Zeroing,
};
use tranship_format_testing::{PowerCut, damaged, exercise, has_tool, pattern, raw_by_qemu};
use tranship_vmdk::{OpenOptions, Parent, Vmdk, check, probe};

const SIZE: usize = 20 << 20;

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn append(image: &mut Vec<u8>, bytes: &[u8]) -> usize {
    image.resize(image.len().next_multiple_of(512), 0);
    let at = image.len();
    image.extend(bytes);
    at
}

/// A COWD extent of 20 MiB with grains of one sector: a table covers 2 MiB. Each run is a
/// place in the guest and its bytes, both multiples of a sector.
fn cowd(runs: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let mut image = vec![0; 5 * 512];
    put(&mut image, 0, b"COWD");
    let tables = SIZE.div_ceil(4096 * 512);
    for (at, value) in [(4, 1), (8, 3), (12, SIZE / 512), (16, 1), (20, 4), (24, tables)] {
        put(&mut image, at, &(value as u32).to_le_bytes());
    }
    for (at, bytes) in runs {
        for (number, sector) in bytes.chunks(512).enumerate() {
            let grain = at / 512 + number;
            let slot = 4 * 512 + grain / 4096 * 4;
            let mut table = u32::from_le_bytes(image[slot..slot + 4].try_into().unwrap()) as usize;
            if table == 0 {
                table = append(&mut image, &[0; 4096 * 4]) / 512;
                put(&mut image, slot, &(table as u32).to_le_bytes());
            }
            let place = append(&mut image, sector) / 512;
            let entry = table * 512 + grain % 4096 * 4;
            put(&mut image, entry, &(place as u32).to_le_bytes());
        }
    }
    let free = image.len() / 512;
    put(&mut image, 28, &(free as u32).to_le_bytes());
    image
}

const VOLATILE: usize = 512;
const DIRECTORY: usize = 1024;
const TABLES: usize = 1536;
const GRAINS: usize = TABLES + 3 * 64 * 512;

/// A seSparse extent of 20 MiB: 4 KiB grains, a table covers 16 MiB. Runs as above but of
/// 4 KiB; `zeroes` are grains that are unmapped (1) or zero (2).
fn sesparse(runs: &[(usize, Vec<u8>)], zeroes: &[(usize, u64)]) -> Vec<u8> {
    let mut image = vec![0; GRAINS];
    let fields = [
        (0, 0xcafe_babe),
        (1, 0x2_0000_0001),
        (2, SIZE / 512),
        (3, 8),
        (4, 64),
        (10, VOLATILE / 512),
        (11, 1),
        (16, DIRECTORY / 512),
        (17, 1),
        (18, TABLES / 512),
        (19, 3 * 64),
        (24, GRAINS / 512),
        (25, 1 << 20),
    ];
    for (index, value) in fields {
        put(&mut image, index * 8, &(value as u64).to_le_bytes());
    }
    put(&mut image, VOLATILE, &0xcafe_cafe_u64.to_le_bytes());
    // The tables are in the wrong order on purpose.
    for (slot, table) in [2_u64, 0].into_iter().enumerate() {
        put(&mut image, DIRECTORY + slot * 8, &(0x1000_0000_0000_0000 | table).to_le_bytes());
    }
    let entry_at = |grain: usize| {
        let table = if grain / 4096 == 0 { 2 } else { 0 };
        TABLES + table * 64 * 512 + grain % 4096 * 8
    };
    for (at, bytes) in runs {
        for (number, data) in bytes.chunks(4096).enumerate() {
            let index = ((image.len() - GRAINS) / 4096) as u64;
            image.extend(data);
            let entry = 3 << 60 | (index & 0xfff) << 48 | index >> 12;
            put(&mut image, entry_at(at / 4096 + number), &entry.to_le_bytes());
        }
    }
    for (grain, state) in zeroes {
        put(&mut image, entry_at(*grain), &(state << 60).to_le_bytes());
    }
    image
}

fn runs(unit: usize) -> Vec<(usize, Vec<u8>)> {
    vec![
        (0, pattern(unit, 1)),
        (3 * unit, pattern(5 * unit, 2)),
        (7 << 20, pattern(100 * unit, 3)),
        (SIZE - 2 * unit, pattern(2 * unit, 4)),
    ]
}

fn model(runs: &[(usize, Vec<u8>)], below: &[u8]) -> Vec<u8> {
    let mut model = below.to_vec();
    model.resize(SIZE, 0);
    for (at, bytes) in runs {
        model[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    model
}

fn descriptor(kind: &str, word: &str, parent: bool) -> Vec<u8> {
    let (cid, hint) =
        if parent { ("00000077", "parentFileNameHint=\"p.vmdk\"\n") } else { ("ffffffff", "") };
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID={cid}\n\
         createType=\"{kind}\"\n{hint}\
         RW {} {word} \"d-delta.vmdk\"\n",
        SIZE / 512
    )
    .into_bytes()
}

fn open(text: Vec<u8>, image: Vec<u8>, options: OpenOptions) -> tranship_block::Result<Vmdk> {
    let files = Memory::default();
    files.put("d-delta.vmdk", Arc::new(MemoryDevice::read_only(image)));
    Vmdk::open(Arc::new(MemoryDevice::read_only(text)), &files, options)
}

fn both() -> [(&'static str, &'static str, Vec<u8>, usize); 2] {
    [
        ("vmfsSparse", "VMFSSPARSE", cowd(&runs(512)), 512),
        ("seSparse", "SESPARSE", sesparse(&runs(4096), &[(1, 1), (2, 2)]), 4096),
    ]
}

#[test]
fn deltas_show_their_grains_and_the_disk_below() {
    let mut below = pattern(9999, 9).repeat(SIZE / 9999);
    below.truncate(SIZE - 5000);
    for (kind, word, image, unit) in both() {
        assert!(probe(&image[..64]));
        let mut expected = model(&runs(unit), &below);
        if unit == 4096 {
            expected[4096..3 * 4096].fill(0);
        }
        let device = Arc::new(MemoryDevice::read_only(below.clone()));
        let parent = Parent { device: device.clone(), cid: Some(0x77) };
        let options = OpenOptions { parent: Some(parent), ..OpenOptions::default() };
        let disk = open(descriptor(kind, word, true), image.clone(), options).unwrap();
        assert!(folder::contents(&disk).unwrap() == expected);
        assert_eq!(disk.extents()[0].grain, Some(unit as u64));
        let run = disk.extent_at(7 << 20).unwrap();
        assert_eq!((run.kind, run.depth), (ExtentKind::Data, 0));
        if unit == 4096 {
            assert_eq!(run.len, 100 * 4096);
        }
        assert_eq!(disk.extent_at(100_000).unwrap().depth, 1);

        let wrong = || OpenOptions {
            parent: Some(Parent { device: device.clone(), cid: Some(0x78) }),
            ..OpenOptions::default()
        };
        let error = open(descriptor(kind, word, true), image.clone(), wrong()).unwrap_err();
        assert!(error.to_string().contains("changed after the snapshot"), "{error}");
        let ignored = OpenOptions { ignore_cid: true, ..wrong() };
        let disk = open(descriptor(kind, word, true), image.clone(), ignored).unwrap();
        assert!(disk.warnings()[0].contains("changed after the snapshot"));
        assert!(folder::contents(&disk).unwrap() == expected);
    }
}

#[test]
fn qemu_reads_the_same_bytes() {
    if !has_tool("qemu-img") {
        return;
    }
    for (kind, word, image, unit) in both() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("d-delta.vmdk"), &image).unwrap();
        let path = folder.path().join("d.vmdk");
        std::fs::write(&path, descriptor(kind, word, false)).unwrap();
        assert!(raw_by_qemu("vmdk", folder.path(), &path) == model(&runs(unit), &[]), "{kind}");
    }
}

#[test]
fn a_delta_alone_is_refused_unless_it_is_salvaged() {
    for (_, _, image, unit) in both() {
        let file = Arc::new(MemoryDevice::read_only(image));
        let error = Vmdk::open(file.clone(), &DenyAll, OpenOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("open the descriptor"), "{error}");
        let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
        let disk = Vmdk::open(file, &DenyAll, salvage).unwrap();
        assert!(folder::contents(&disk).unwrap() == model(&runs(unit), &[]));
    }
}

#[test]
fn a_delta_without_its_parent_is_refused_unless_it_is_salvaged() {
    for (kind, word, image, unit) in both() {
        let text = descriptor(kind, word, true);
        let error = open(text.clone(), image.clone(), OpenOptions::default()).unwrap_err();
        assert!(error.to_string().contains("snapshot of \"p.vmdk\""), "{error}");
        let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
        let disk = open(text, image, salvage).unwrap();
        assert!(disk.warnings()[0].contains("snapshot of \"p.vmdk\""));
        assert!(folder::contents(&disk).unwrap() == model(&runs(unit), &[]));
    }
}

#[test]
fn a_dirty_journal_is_refused() {
    let mut image = sesparse(&runs(4096), &[]);
    image[VOLATILE + 24] = 1;
    let text = descriptor("seSparse", "SESPARSE", false);
    let error = open(text.clone(), image.clone(), OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("consolidate"), "{error}");
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    let disk = open(text, image, salvage).unwrap();
    assert!(disk.warnings()[0].contains("did not close"), "{:?}", disk.warnings());
}

#[test]
fn headers_and_entries_are_checked() {
    let cases: [(usize, u64, &str); 9] = [
        (8, 3, "version of the seSparse header is 0x3"),
        (24, 16, "grain size of the seSparse header is 0x10"),
        (32, 8, "grain table size of the seSparse header is 0x8"),
        (40, 1, "flags of the seSparse header is 0x1"),
        (16, 1 << 40, "the grain directory has room for 64 tables"),
        (136, 0, "the grain directory has room for 0 tables"),
        (VOLATILE, 1, "magic of the volatile header is 0x1"),
        (DIRECTORY, 5, "grain directory entry is 0x5"),
        (DIRECTORY, 0x1000_0000_0000_0003, "expected 0 or 0x10000000 above a table number below 3"),
    ];
    for (at, value, text) in cases {
        let mut image = sesparse(&runs(4096), &[]);
        put(&mut image, at, &value.to_le_bytes());
        let descriptor = descriptor("seSparse", "SESPARSE", false);
        let error = open(descriptor, image, OpenOptions::default()).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
    for entry in [u64::MAX, 0x4000_0000_0000_0000, 0x3000_ffff_ffff_ffff, 0x3fff_0000_0000_0000_u64]
    {
        let mut image = sesparse(&runs(4096), &[]);
        put(&mut image, TABLES + 2 * 64 * 512, &entry.to_le_bytes());
        let descriptor = descriptor("seSparse", "SESPARSE", false);
        let disk = open(descriptor, image, OpenOptions::default()).unwrap();
        let error = disk.read_at(&mut [0; 512], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
}

#[test]
fn check_counts_the_grains_of_deltas() {
    for (kind, word, image, unit) in both() {
        let files = Memory::default();
        files.put("d-delta.vmdk", Arc::new(MemoryDevice::read_only(image)));
        let text = MemoryDevice::read_only(descriptor(kind, word, false));
        let report = check(&text, &files, Repair::Nothing).unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.allocated_clusters, 108);
        assert_eq!(report.total_clusters, (SIZE / unit) as u64);
    }
}

/// Where the free space of a COWD extent begins, by its header and by what it refers to.
fn ends(image: &[u8]) -> (usize, usize) {
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    let tables = (0..word(24)).map(|number| word(2048 + number * 4)).filter(|table| *table != 0);
    let last = tables.map(|table| {
        let grains = (0..4096).map(|grain| word(table * 512 + grain * 4) + 1);
        grains.max().unwrap().max(table + 32)
    });
    (word(28) * 512, last.max().unwrap_or(4) * 512)
}

/// Writes over grains that are there, beside them, and in tables that are not there.
const WRITES: [(usize, usize); 5] = [
    (512, 3000),
    ((7 << 20) + 100, 300),
    ((8 << 20) - 5000, 10_000),
    ((13 << 20) + 1, 700_000),
    (SIZE - 700, 700),
];

#[test]
fn a_cowd_extent_is_written_and_qemu_reads_it() {
    for has_parent in [false, true] {
        let below = if has_parent { pattern(SIZE - 5120, 9) } else { Vec::new() };
        let mut expected = model(&runs(512), &below);
        let text: Arc<dyn Storage> =
            Arc::new(MemoryDevice::new(descriptor("vmfsSparse", "VMFSSPARSE", has_parent)));
        let delta = Arc::new(MemoryDevice::new(cowd(&runs(512))));
        let files = Memory::default();
        files.put("d-delta.vmdk", delta.clone());
        let options = || {
            let device = Arc::new(MemoryDevice::read_only(below.clone()));
            let parent = has_parent.then_some(Parent { device, cid: Some(0x77) });
            OpenOptions { parent, ..OpenOptions::default() }
        };
        let disk = Vmdk::open_writable(text.clone(), &files, options()).unwrap();
        for (seed, (at, len)) in (20..).zip(WRITES) {
            let bytes = pattern(len, seed);
            disk.write_at(&bytes, at as u64).unwrap();
            expected[at..at + len].copy_from_slice(&bytes);
        }
        let zeroes = Span::new(9 << 20, 100_000);
        disk.write_zeroes(zeroes, Zeroing::MayUnmap).unwrap();
        expected[9 << 20..(9 << 20) + 100_000].fill(0);
        disk.flush().unwrap();
        drop(disk);
        let image = delta.snapshot();
        let (free, used) = ends(&image);
        assert!(free >= used && free <= image.len(), "{free} {used} {}", image.len());
        let disk = Vmdk::open_writable(text.clone(), &files, options()).unwrap();
        assert!(folder::contents(&disk).unwrap() == expected);
        drop(disk);
        let report = check(&*text, &files, Repair::Nothing).unwrap();
        assert!(report.is_clean(), "{report:?}");
        if has_parent || !has_tool("qemu-img") {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("d-delta.vmdk"), &image).unwrap();
        let path = folder.path().join("d.vmdk");
        std::fs::write(&path, descriptor("vmfsSparse", "VMFSSPARSE", false)).unwrap();
        assert!(raw_by_qemu("vmdk", folder.path(), &path) == expected);
    }
}

#[test]
fn a_power_cut_leaves_a_cowd_extent_with_what_was_flushed() {
    let text: Arc<dyn Storage> =
        Arc::new(MemoryDevice::new(descriptor("vmfsSparse", "VMFSSPARSE", false)));
    let mut model = model(&runs(512), &[]);
    let initially = model.clone();
    let cut = Arc::new(PowerCut::new(cowd(&runs(512))));
    let files = Memory::default();
    files.put("d-delta.vmdk", cut.clone());
    let disk = Vmdk::open_writable(text.clone(), &files, OpenOptions::default()).unwrap();
    let mut states = vec![model.clone()];
    for (seed, (at, len)) in (20..).zip(WRITES) {
        let bytes = pattern(len.min(40_000), seed);
        disk.write_at(&bytes, at as u64).unwrap();
        model[at..at + bytes.len()].copy_from_slice(&bytes);
        disk.flush().unwrap();
        cut.promise(&model);
        states.push(model.clone());
    }
    drop(disk);
    let text = text_of(&*text);
    cut.replay(&initially, 11, |bytes, promised| {
        let (free, used) = ends(&bytes);
        assert!(free >= used, "{free} {used}");
        let disk = open(text.clone(), bytes, OpenOptions::default()).unwrap();
        let found = folder::contents(&disk).unwrap();
        let state = states.iter().position(|state| state == promised).unwrap();
        let next = states.get(state + 1).map_or(promised, Vec::as_slice);
        for (number, sector) in found.chunks(512).enumerate() {
            let range = number * 512..number * 512 + sector.len();
            if *sector == promised[range.clone()] || *sector == next[range.clone()] {
                continue;
            }
            let mut bytes = sector.iter().zip(range);
            let is_known = bytes.all(|(byte, at)| *byte == promised[at] || *byte == next[at]);
            assert!(is_known, "sector {number} after state {state}");
        }
    });
}

fn text_of(storage: &dyn Storage) -> Vec<u8> {
    let mut text = vec![0; storage.size() as usize];
    storage.read_at(&mut text, 0).unwrap();
    text
}

#[test]
fn a_sesparse_extent_is_not_written() {
    let text = descriptor("seSparse", "SESPARSE", false);
    let files = Memory::default();
    files.put("d-delta.vmdk", Arc::new(MemoryDevice::new(sesparse(&runs(4096), &[]))));
    let text = Arc::new(MemoryDevice::new(text));
    let error = Vmdk::open_writable(text, &files, OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("seSparse extents are read only"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn damaged_deltas_are_survived(
        first in damaged(cowd(&runs(512)), vec![Span::new(0, 32), Span::new(2048, 100)]),
        second in damaged(
            sesparse(&runs(4096), &[]),
            vec![Span::new(0, 208), Span::new(512, 32), Span::new(1024, 16), Span::new(1536, 64)],
        ),
        salvage in any::<bool>(),
    ) {
        for (kind, word, image) in [("vmfsSparse", "VMFSSPARSE", first), ("seSparse", "SESPARSE", second)] {
            let options = OpenOptions { salvage, ..OpenOptions::default() };
            let text = descriptor(kind, word, false);
            if let Ok(disk) = open(text.clone(), image.clone(), options) {
                exercise(&disk);
            }
            let files = Memory::default();
            files.put("d-delta.vmdk", Arc::new(MemoryDevice::new(image)));
            let text = Arc::new(MemoryDevice::new(text));
            let _ = check(&*text, &files, Repair::Nothing);
            if let Ok(disk) = Vmdk::open_writable(text, &files, OpenOptions::default()) {
                for at in [0, 5 << 20, SIZE as u64 - 5000] {
                    let _ = disk.write_at(&[7; 5000], at);
                }
                let _ = disk.flush();
            }
        }
    }
}
