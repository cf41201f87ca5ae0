// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Broken images are refused, repaired or salvaged, and do no harm; images of other
//! writers read as recorded.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use std::sync::Arc;
use support::{BLOCK, in_memory, initially, open, open_bytes, over, read_only};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Repair, Result, Span};
use tranship_format_testing::{
    Op, apply, contents, damaged, digest, exercise, pattern, samples, verify,
};
use tranship_vpc::{Kind, OpenOptions, Parent, ParentRequest, Vpc, check};

const SIZE: u64 = 50_176;
const HEADER: usize = 512;
/// Where dynamic images of the tests have their table.
const TABLE: usize = 1536;

/// A disk with a few blocks in the file, and what is in it.
fn sample(kind: Kind, base: Option<&[u8]>) -> (Vec<u8>, Vec<u8>) {
    let storage = in_memory(kind, SIZE);
    let disk = open(&storage, base);
    let mut model = initially(SIZE as usize, base);
    for at in [20_000, 100, 45_000] {
        apply(&disk, &mut model, &Op::Write(at, 3000, at));
    }
    drop(disk);
    (storage.snapshot(), model)
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    bytes[at..at + new.len()].copy_from_slice(new);
}

fn entry(bytes: &[u8], index: usize) -> u32 {
    u32::from_be_bytes(*bytes[TABLE + 4 * index..].first_chunk().unwrap())
}

/// Puts a number into the dynamic header, with a new checksum.
fn put_in_header(bytes: &mut [u8], at: usize, number: u32) {
    put(bytes, HEADER + at, &number.to_be_bytes());
    put(bytes, HEADER + 36, &[0; 4]);
    let sum: u32 = bytes[HEADER..HEADER + 1024].iter().map(|byte| u32::from(*byte)).sum();
    put(bytes, HEADER + 36, &(!sum).to_be_bytes());
}

fn refused(bytes: Vec<u8>, text: &str) {
    let error = open_bytes(bytes, OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(text), "{error}");
}

#[test]
fn either_footer_is_enough_and_both_are_mended() {
    let (good, model) = sample(Kind::Dynamic, None);
    let end = good.len() - 512;
    for at in [0, end] {
        for repair in [Repair::Nothing, Repair::Leaks, Repair::All] {
            let mut bytes = good.clone();
            put(&mut bytes, at + 100, &[1]);
            let storage = Arc::new(MemoryDevice::new(bytes.clone()));
            let disk = Vpc::open_read_only(storage.clone(), OpenOptions::default()).unwrap();
            assert_eq!(disk.warnings().len(), 1);
            verify(&disk, &model);
            let report = check(&*storage, repair).unwrap();
            let found = (report.corruptions, report.corruptions_fixed);
            assert_eq!(found, if repair == Repair::All { (0, 1) } else { (1, 0) });
            let expected = if repair == Repair::All { &good } else { &bytes };
            assert!(storage.snapshot() == *expected, "{repair:?} of {at}");
        }
        // The next write mends them, too.
        let mut bytes = good.clone();
        put(&mut bytes, at, &[0; 512]);
        let storage = Arc::new(MemoryDevice::new(bytes));
        let disk = open(&storage, None);
        disk.write_at(&model[100..101], 100).unwrap();
        drop(disk);
        assert!(storage.snapshot() == good, "written with a lost footer at {at}");
    }
}

#[test]
fn an_unused_tail_is_a_leak_and_is_cut_or_used() {
    let (good, model) = sample(Kind::Dynamic, None);
    let mut bytes = good.clone();
    let footer = bytes.split_off(good.len() - 512);
    bytes.resize(bytes.len() + 30_000, 0xaa);
    bytes.extend(&footer);
    let storage = Arc::new(MemoryDevice::new(bytes));
    assert_eq!(check(&*storage, Repair::Nothing).unwrap().leaks, 3);
    let len = storage.size();
    let disk = open(&storage, None);
    assert_eq!(disk.warnings(), [] as [&str; 0]);
    let mut grown = model.clone();
    apply(&disk, &mut grown, &Op::Write(10_000, 10, 1));
    verify(&disk, &grown);
    assert_eq!(storage.size(), len, "the tail was not used");
    drop(disk);
    let report = check(&*storage, Repair::Leaks).unwrap();
    assert_eq!((report.leaks, report.leaks_fixed), (0, 2));
    assert!(storage.size() < len);
    verify(&open(&storage, None), &grown);
    assert!(check(&*storage, Repair::Nothing).unwrap().is_clean());
}

#[test]
fn blocks_that_are_not_there_are_refused_or_salvaged() {
    let (good, model) = sample(Kind::Dynamic, None);
    let (stored, other) = (entry(&good, 2), entry(&good, 0));
    let cases = [
        (other, "block 2 overlaps block 0"),
        (other + 1, "block 2 overlaps block 0"),
        (0, "block 2 lies on the copy of the footer"),
        (1, "block 2 lies on the dynamic header"),
        (3, "block 2 lies on the block allocation table"),
        (0x00ff_ffff, "block 2 ends at 0x200002000, past"),
    ];
    for (number, text) in cases {
        let mut bytes = good.clone();
        put(&mut bytes, TABLE + 8, &number.to_be_bytes());
        refused(bytes.clone(), text);
        let storage = MemoryDevice::read_only(bytes.clone());
        let report = check(&storage, Repair::Nothing).unwrap();
        assert_eq!(report.corruptions, 1);
        assert!(report.details[0].contains(text), "{:?}", report.details);
        let options = OpenOptions { salvage: true, ..OpenOptions::default() };
        let disk = open_bytes(bytes, options).unwrap();
        assert_eq!(disk.warnings().len(), 1);
        let mut rest = model.clone();
        rest[2 * BLOCK as usize..3 * BLOCK as usize].fill(0);
        verify(&disk, &rest);
    }
    assert_ne!(stored, other);
    // A file that was cut off.
    refused(good[..good.len() - 4096].to_vec(), "past the");
}

#[test]
fn headers_that_cannot_be_true_are_refused() {
    let (good, model) = sample(Kind::Dynamic, None);
    let cases = [
        (28, 3, "has 3 entries, expected at least 7"),
        (28, u32::MAX, "of 4294967295 entries ends past"),
        (32, 0, "block size is 0"),
        (32, 3000, "block size is 3000"),
        (20, u32::MAX, "ends past the file's size"),
        (20, 0, "block allocation table lies on the copy of the footer"),
        (20, 1024, "block allocation table lies on the dynamic header"),
    ];
    for (at, number, text) in cases {
        let mut bytes = good.clone();
        put_in_header(&mut bytes, at, number);
        refused(bytes.clone(), text);
        assert_eq!(check(&MemoryDevice::read_only(bytes), Repair::Nothing).unwrap().corruptions, 1);
    }
    let mut bytes = good.clone();
    put(&mut bytes, HEADER + 40, &[1]);
    refused(bytes.clone(), "dynamic header has checksum");
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let disk = open_bytes(bytes, options).unwrap();
    assert_eq!((disk.warnings().len(), disk.is_read_only()), (1, true));
    verify(&disk, &model);
}

#[test]
fn the_header_may_be_anywhere_and_keeps_what_is_not_understood() {
    let (good, mut model) = sample(Kind::Dynamic, None);
    let end = good.len() - 512;
    let mut footer = good[end..].to_vec();
    put(&mut footer, 16, &(end as u64).to_be_bytes());
    put(&mut footer, 85, &[1, 2, 3]);
    put(&mut footer, 64, &[0; 4]);
    let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
    put(&mut footer, 64, &(!sum).to_be_bytes());
    let mut bytes = [&good[..end], &good[HEADER..HEADER + 1024], &footer].concat();
    put(&mut bytes, 0, &footer);
    put(&mut bytes, HEADER, &[0xaa; 1024]);
    let storage = Arc::new(MemoryDevice::new(bytes));
    let disk = open(&storage, None);
    verify(&disk, &model);
    for at in [9000, 30_000, 40_000] {
        apply(&disk, &mut model, &Op::Write(at, 5000, at));
    }
    disk.resize(60 << 10).unwrap();
    model.resize(60 << 10, 0);
    drop(disk);
    let disk = open(&storage, None);
    verify(&disk, &model);
    assert_eq!(disk.footer().reserved[..4], [1, 2, 3, 0]);
    assert_eq!(disk.warnings(), [] as [&str; 0]);
}

#[test]
fn an_image_with_a_map_of_full_blocks_is_only_read() {
    let (mut bytes, model) = sample(Kind::Dynamic, None);
    put(&mut bytes, TABLE + 512, b"tdbatmap");
    let storage = Arc::new(MemoryDevice::new(bytes.clone()));
    let error = Vpc::open(storage, OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    verify(&open_bytes(bytes, OpenOptions::default()).unwrap(), &model);
}

#[test]
fn names_outside_the_file_do_not_matter() {
    let base = pattern(9000, 1);
    let (mut bytes, model) = sample(Kind::Differencing, Some(&base));
    for at in [16, 20] {
        put_in_header(&mut bytes, 576 + at, u32::MAX);
        let storage = Arc::new(MemoryDevice::new(bytes.clone()));
        let names = ParentRequest::read(&*storage).unwrap().unwrap().names;
        assert!(names.iter().all(|name| name.name.ends_with("base.vhd")), "{names:?}");
        let disk = open(&storage, Some(&base));
        let mut model = model.clone();
        apply(&disk, &mut model, &Op::Write(10_000, 20_000, 3));
        drop(disk);
        verify(&open(&storage, Some(&base)), &model);
    }
}

#[test]
fn a_fixed_disk_that_is_cut_is_refused_or_salvaged() {
    let (good, model) = sample(Kind::Fixed, None);
    let footer = &good[good.len() - 512..];
    let cut = [&good[..30_000], footer].concat();
    refused(cut.clone(), "fixed disk has 50176 bytes, but the file has 30000");
    assert_eq!(
        check(&MemoryDevice::read_only(cut.clone()), Repair::Nothing).unwrap().corruptions,
        1
    );
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let mut rest = model.clone();
    rest[30_000..].fill(0);
    verify(&open_bytes(cut, options).unwrap(), &rest);
    let long = [&good[..SIZE as usize], &[0; 1024], footer].concat();
    let disk = open_bytes(long, OpenOptions::default()).unwrap();
    assert!(disk.warnings()[0].contains("more than the 50176 bytes"), "{:?}", disk.warnings());
    verify(&disk, &model);
}

#[test]
fn clear_bits_hide_what_is_under_them() {
    let (good, model) = sample(Kind::Dynamic, None);
    let mut bytes = good.clone();
    let at = entry(&good, 0) as usize * 512;
    put(&mut bytes, at, &[0x7f, 0xff]);
    let mut hidden = model.clone();
    hidden[..512].fill(0);
    let disk = open_bytes(bytes.clone(), OpenOptions::default()).unwrap();
    assert!(disk.warnings()[0].contains("block 0 has data in sectors"), "{:?}", disk.warnings());
    verify(&disk, &hidden);

    let options = OpenOptions { ignore_bitmaps: true, ..OpenOptions::default() };
    verify(&open_bytes(bytes.clone(), options.clone()).unwrap(), &model);
    // What is written reads the same whoever reads it.
    for options in [options, OpenOptions::default()] {
        let mut model = if options.ignore_bitmaps { model.clone() } else { hidden.clone() };
        let storage = Arc::new(MemoryDevice::new(bytes.clone()));
        let disk = Vpc::open(storage.clone(), options).unwrap();
        apply(&disk, &mut model, &Op::Write(300, 500, 9));
        verify(&disk, &model);
        drop(disk);
        verify(&open(&storage, None), &model);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn damage_does_no_harm(
        which in 0..3_usize,
        salvage in any::<bool>(),
        bytes in (0..3_usize).prop_flat_map(|which| {
            let kind = [Kind::Fixed, Kind::Dynamic, Kind::Differencing][which];
            let base = (kind == Kind::Differencing).then(|| pattern(9000, 1));
            let (bytes, _) = sample(kind, base.as_deref());
            let end = bytes.len() as u64 - 512;
            let spans = [(0, 88), (512, 72), (1088, 48), (1536, 30), (2048, 30), (2560, 30), (end, 88)];
            damaged(bytes, spans.map(|(at, len)| Span::new(at, len)).to_vec())
        }),
    ) {
        let options = OpenOptions {
            salvage,
            ..over((which == 2).then_some(&[1; 9000][..]))
        };
        let _ = ParentRequest::read(&MemoryDevice::read_only(bytes.clone()));
        for repair in [Repair::Nothing, Repair::Leaks, Repair::All] {
            let storage = Arc::new(MemoryDevice::new(bytes.clone()));
            let _ = check(&*storage, repair);
            if repair == Repair::Nothing {
                prop_assert!(storage.snapshot() == bytes, "a check without repair wrote");
            }
            if let Ok(disk) = Vpc::open(storage.clone(), options.clone()) {
                exercise(&disk);
                change(&disk);
            }
            prop_assert!(storage.size() < 1 << 26);
        }
    }
}

/// Writing to what can be opened at all harms nothing either: errors, no panics.
fn change(disk: &Vpc) {
    let size = disk.size();
    for at in [0, size / 2, size.saturating_sub(1)] {
        let _ = disk.write_at(&[1], at);
        let _ = disk.discard(Span::new(at / 2, (size / 2).min(1 << 30)));
    }
    let _ = disk.flush();
    if size < 1 << 20 {
        let _ = disk.resize((size + 5000) / 512 * 512);
    }
}

fn open_sample(path: &std::path::Path) -> Result<Vpc> {
    let file = read_only(path);
    let parent = match ParentRequest::read(&*file)? {
        None => None,
        Some(request) => {
            let found = request.names.iter().map(|name| path.with_file_name(&name.name));
            let path = found.into_iter().find(|path| path.exists());
            path.map(|path| open_sample(&path))
                .transpose()?
                .map(|disk| Parent { unique_id: disk.unique_id(), device: Arc::new(disk) })
        }
    };
    Vpc::open_read_only(file, OpenOptions { parent, ..OpenOptions::default() })
}

#[test]
fn samples_do_as_recorded() {
    let all = samples();
    let folder = tempfile::tempdir().unwrap();
    for sample in all.iter().filter(|sample| sample.format.as_deref() == Some("vpc")) {
        let path = sample.unpack(folder.path(), &all);
        let found = open_sample(&path).and_then(|disk| Ok((disk.size(), digest(&disk)?, disk)));
        let name = &sample.path;
        match sample.expect.as_str() {
            "content" => {
                let (size, digest, disk) = found.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(Some(size), sample.virtual_size, "{name}");
                assert_eq!(Some(digest), sample.content_digest, "{name}");
                assert_eq!(disk.warnings(), [] as [&str; 0], "{name}");
                let storage = MemoryDevice::read_only(std::fs::read(&path).unwrap());
                let report = check(&storage, Repair::Nothing).unwrap();
                assert!(report.is_clean(), "{name}: {report:?}");
            }
            "open" => assert!(found.is_ok(), "{name}: {:?}", found.err()),
            "refuse" => assert!(found.is_err(), "{name}"),
            _ => {}
        }
        // A copy may be written.
        let storage = Arc::new(MemoryDevice::new(std::fs::read(&path).unwrap()));
        let parent = ParentRequest::read(&*storage).ok().flatten().map(|request| Parent {
            device: Arc::new(MemoryDevice::read_only(pattern(1 << 20, 1))),
            unique_id: request.unique_id,
        });
        let options = OpenOptions { parent, ..OpenOptions::default() };
        if let Ok(disk) = Vpc::open(storage.clone(), options.clone()) {
            change(&disk);
            if disk.size() < 1 << 23 {
                let now = contents(&disk);
                drop(disk);
                verify(&Vpc::open(storage, options).unwrap(), &now);
            }
        }
    }
}
