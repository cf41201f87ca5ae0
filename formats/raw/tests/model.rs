// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A raw file behaves as a device in memory does, whatever is done to it.
#![allow(clippy::unwrap_used, reason = "failing is what tests do")]

use proptest::prelude::*;
use std::io::{IoSlice, IoSliceMut};
use tranship_block::{
    BlockDevice, ErrorKind, Extents, MemoryDevice, Span, Storage, Zeroing, is_zero,
};
use tranship_raw::{Access, RawFile};

const SIZE: u64 = 300_000;

#[derive(Clone, Debug)]
enum Op {
    Write(u64, usize, u8),
    WriteVectored(u64, Vec<usize>, u8),
    Zero(u64, u64, bool),
    SetLen(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..SIZE, 1..40_000_usize, 1..=255_u8).prop_map(|(a, l, b)| Op::Write(a, l, b)),
        2 => (0..SIZE, prop::collection::vec(0..9000_usize, 0..5), 1..=255_u8)
            .prop_map(|(a, l, b)| Op::WriteVectored(a, l, b)),
        3 => (0..SIZE, 0..90_000_u64, any::<bool>()).prop_map(|(a, l, k)| Op::Zero(a, l, k)),
        1 => (SIZE / 2..SIZE).prop_map(Op::SetLen),
    ]
}

fn apply(device: &dyn Storage, op: &Op) -> std::result::Result<(), ErrorKind> {
    match op {
        Op::Write(at, len, byte) => device.write_at(&vec![*byte; *len], *at),
        Op::WriteVectored(at, lens, byte) => {
            let total: usize = lens.iter().sum();
            if Span::new(*at, total as u64).check_within(device.size()).is_err() {
                // Devices may differ in how much of it they write before they notice.
                return Err(ErrorKind::Usage);
            }
            let all: Vec<Vec<u8>> = lens.iter().map(|len| vec![*byte; *len]).collect();
            let slices: Vec<IoSlice<'_>> = all.iter().map(|buf| IoSlice::new(buf)).collect();
            device.write_vectored_at(&slices, *at)
        }
        Op::Zero(at, len, keep) => {
            let mode = if *keep { Zeroing::KeepAllocated } else { Zeroing::MayUnmap };
            device.write_zeroes(Span::new(*at, *len), mode)
        }
        Op::SetLen(len) => device.set_len(*len),
    }
    .map_err(|error| error.kind())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn same_bytes_as_memory(ops in prop::collection::vec(op(), 1..25), direct: bool) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = maybe_direct(RawFile::create(&path, SIZE).unwrap(), direct);
        let model = MemoryDevice::new(vec![0; usize::try_from(SIZE).unwrap()]);
        for op in &ops {
            prop_assert_eq!(apply(&file, op), apply(&model, op), "{:?}", op);
            check_extents(&file, &model.snapshot());
        }
        file.flush().unwrap();
        drop(file);
        let file = maybe_direct(RawFile::open(&path, Access::ReadOnly).unwrap(), direct);
        let expected = model.snapshot();
        let mut bytes = vec![1; expected.len()];
        file.read_at(&mut bytes, 0).unwrap();
        prop_assert!(bytes == expected);

        let mut parts = vec![1; expected.len()];
        let (a, b) = parts.split_at_mut(1000);
        file.read_vectored_at(&mut [IoSliceMut::new(a), IoSliceMut::new(b)], 0).unwrap();
        prop_assert!(parts == expected);

        check_extents(&file, &expected);
    }
}

/// The extents cover the file, and are right about zeroes.
fn check_extents(file: &RawFile, expected: &[u8]) {
    let mut covered = 0;
    for run in Extents::new(file, Span::new(0, u64::MAX)) {
        let (span, kind) = run.unwrap();
        assert_eq!(span.start, covered);
        covered = span.end();
        let range = usize::try_from(span.start).unwrap()..usize::try_from(covered).unwrap();
        assert!(!kind.reads_zero() || is_zero(&expected[range]), "{span:?}");
    }
    assert_eq!(covered, file.size());
}

/// The file with direct I/O, if that is wanted and the test's file system has it.
fn maybe_direct(file: RawFile, direct: bool) -> RawFile {
    if !direct {
        return file;
    }
    let (path, read_only) = (file.path().to_owned(), file.is_read_only());
    file.into_direct().unwrap_or_else(|error| {
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        eprintln!("skipped: direct I/O: {error}");
        let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        RawFile::open(&path, access).unwrap()
    })
}

#[test]
fn holes_are_found_from_any_offset_and_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let file = RawFile::create(&path, 40 * 65_536).unwrap();
    let mut expected = vec![0; 40 * 65_536];
    for page in (1..40).step_by(3) {
        let at = page * 65_536;
        file.write_at(&vec![7; 65_536], at).unwrap();
        let at = usize::try_from(at).unwrap();
        expected[at..at + 65_536].fill(7);
    }
    file.flush().unwrap();
    check_extents(&file, &expected);
    for step in [1_u64, 7, 39] {
        for turn in 0..80 {
            let offset = turn * step * 32_768 % file.size();
            let extent = file.extent_at(offset).unwrap();
            let start = usize::try_from(offset).unwrap();
            let end = start + usize::try_from(extent.len).unwrap();
            assert!(!extent.kind.reads_zero() || is_zero(&expected[start..end]), "{offset}");
            assert!(extent.kind.reads_zero() || extent.offset == Some(offset));
        }
    }
}

#[test]
fn what_another_writer_stores_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let writer = RawFile::create(&path, 1 << 20).unwrap();
    let reader = RawFile::open(&path, Access::ReadOnly).unwrap();
    assert!(reader.extent_at(0).unwrap().kind.reads_zero());
    assert!(reader.extent_at(65_536).unwrap().kind.reads_zero());
    writer.write_at(&[1; 4096], 65_536).unwrap();
    assert!(!reader.extent_at(65_536).unwrap().kind.reads_zero());
    assert!(!writer.extent_at(65_536).unwrap().kind.reads_zero());
}

#[test]
fn the_kernel_copies_from_file_to_file() {
    let folder = tempfile::tempdir().unwrap();
    let source = RawFile::create(&folder.path().join("a"), 100_000).unwrap();
    source.write_at(&vec![5; 70_000], 20_000).unwrap();
    let target = RawFile::create(&folder.path().join("b"), 120_000).unwrap();
    let options = tranship_block::CopyOptions {
        zero_block: 0,
        target_is_zero: true,
        ..tranship_block::CopyOptions::default()
    };
    let copied = tranship_block::copy(&source, &target, &options, &()).unwrap();
    assert!(copied.bytes_offloaded >= 70_000 || copied.bytes_written >= 70_000, "{copied:?}");
    let mut bytes = vec![1; 120_000];
    target.read_at(&mut bytes, 0).unwrap();
    assert!(is_zero(&bytes[..20_000]) && is_zero(&bytes[90_000..]));
    assert!(bytes[20_000..90_000].iter().all(|byte| *byte == 5));
    let range = source.file_range(0).unwrap();
    let error = target.write_from_file(30_000, &range).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn nothing_is_written_through_a_read_only_handle() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    RawFile::create(&path, 10).unwrap();
    let file = RawFile::open(&path, Access::ReadOnly).unwrap();
    let span = Span::new(0, 5);
    for result in [
        file.write_at(&[1], 0),
        file.write_zeroes(span, Zeroing::MayUnmap),
        file.discard(span),
        file.set_len(20),
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Usage);
    }
    file.flush().unwrap();
}

#[test]
fn reads_past_the_end_and_of_a_file_cut_short_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let file = RawFile::create(&path, 8192).unwrap();
    let error = file.read_at(&mut [0; 2], 8191).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Usage, Some(8191)));
    assert_eq!(error.path(), Some(path.as_path()));
    std::fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = file.read_at(&mut [0; 8192], 0).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Io, Some(100)));
}

/// Zeroes that have to keep their space have it on every file system, tmpfs included, which
/// can only give space back and take it again.
#[test]
fn zeroes_keep_their_space_if_they_have_to() {
    use std::os::unix::fs::MetadataExt;
    let folders = [std::env::temp_dir(), "/dev/shm".into()];
    for folder in folders.into_iter().filter(|folder| folder.is_dir()) {
        let file = tempfile::Builder::new().tempfile_in(&folder).unwrap();
        let space = || file.as_file().metadata().unwrap().blocks() * 512;
        let raw = RawFile::open(file.path(), Access::ReadWrite).unwrap();
        raw.set_len(SIZE).unwrap();
        raw.write_at(&vec![7; 100_000], 50_000).unwrap();
        let span = Span::new(40_000, 200_000);
        raw.write_zeroes(span, Zeroing::KeepAllocated).unwrap();
        assert!(space() >= span.len, "{} in {}", space(), folder.display());
        let mut bytes = vec![1; 200_000];
        raw.read_at(&mut bytes, span.start).unwrap();
        assert!(is_zero(&bytes));
        raw.write_zeroes(span, Zeroing::MayUnmap).unwrap();
        assert!(space() < 20_000, "{} in {}", space(), folder.display());
    }
}
