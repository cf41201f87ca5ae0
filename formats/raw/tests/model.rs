// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A raw file behaves as a device in memory does, whatever is done to it.

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
    fn same_bytes_as_memory(ops in prop::collection::vec(op(), 1..25)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = RawFile::create(&path, SIZE).unwrap();
        let model = MemoryDevice::new(vec![0; usize::try_from(SIZE).unwrap()]);
        for op in &ops {
            prop_assert_eq!(apply(&file, op), apply(&model, op), "{:?}", op);
        }
        file.flush().unwrap();
        drop(file);
        let file = RawFile::open(&path, Access::ReadOnly).unwrap();
        let expected = model.snapshot();
        let mut bytes = vec![1; expected.len()];
        file.read_at(&mut bytes, 0).unwrap();
        prop_assert!(bytes == expected);

        let mut parts = vec![1; expected.len()];
        let (a, b) = parts.split_at_mut(1000);
        file.read_vectored_at(&mut [IoSliceMut::new(a), IoSliceMut::new(b)], 0).unwrap();
        prop_assert!(parts == expected);

        let mut covered = 0;
        for run in Extents::new(&file, Span::new(0, u64::MAX)) {
            let (span, kind) = run.unwrap();
            prop_assert_eq!(span.start, covered);
            covered = span.end();
            let range = usize::try_from(span.start).unwrap()..usize::try_from(covered).unwrap();
            prop_assert!(!kind.reads_zero() || is_zero(&expected[range]));
        }
        prop_assert_eq!(covered, file.size());
    }
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
