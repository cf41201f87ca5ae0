// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Work on a disk, and the model that it is compared with.

use proptest::prelude::*;
use tranship_block::{BlockDevice, Extents, Span, Zeroing, is_zero};

/// Something that is done to a disk.
#[derive(Clone, Debug)]
pub enum Op {
    /// Bytes of [`pattern`]: offset, length, seed.
    Write(u64, usize, u64),
    /// Zeroes: offset, length, mode.
    Zero(u64, u64, Zeroing),
    /// Offset and length; may keep the bytes or make any of them zero.
    Discard(u64, u64),
    /// All of it on stable storage.
    Flush,
    /// The caller closes the disk and opens it again.
    Reopen,
}

/// Lists of operations on a disk of `size` bytes whose unit of mapping is `unit` bytes.
/// Half of the ranges are whole units, for which formats take other paths.
pub fn operations(size: u64, unit: u64, most: usize) -> impl Strategy<Value = Vec<Op>> {
    let len = (unit * 3).min(size).max(2);
    let mode = prop_oneof![Just(Zeroing::MayUnmap), Just(Zeroing::KeepAllocated)];
    let range = (0..size, 1..len, any::<bool>()).prop_map(move |(at, len, whole)| {
        if whole { (at / unit * unit, len.next_multiple_of(unit)) } else { (at, len) }
    });
    let op = prop_oneof![
        6 => (range.clone(), any::<u64>())
            .prop_map(|((at, len), seed)| Op::Write(at, len as usize, seed)),
        2 => (range.clone(), mode).prop_map(|((at, len), mode)| Op::Zero(at, len, mode)),
        2 => range.prop_map(|(at, len)| Op::Discard(at, len)),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 1..most)
}

/// Does `op` to `device` and to `model`, the bytes that it should have afterwards.
///
/// A discard may leave bytes or make them zero, each byte on its own: what the device
/// made of it is taken over into the model after it was found to be one of the two.
pub fn apply(device: &dyn BlockDevice, model: &mut [u8], op: &Op) {
    let size = device.size();
    let clip = |at: u64, len: u64| Span::new(at.min(size), len.min(size - at.min(size)));
    let range = |span: Span| span.start as usize..span.end() as usize;
    match op {
        Op::Write(at, len, seed) => {
            let span = clip(*at, *len as u64);
            let bytes = pattern(span.len as usize, *seed);
            device.write_at(&bytes, span.start).unwrap();
            model[range(span)].copy_from_slice(&bytes);
        }
        Op::Zero(at, len, mode) => {
            let span = clip(*at, *len);
            device.write_zeroes(span, *mode).unwrap();
            model[range(span)].fill(0);
        }
        Op::Discard(at, len) => {
            let span = clip(*at, *len);
            device.discard(span).unwrap();
            let mut now = vec![0xee; span.len as usize];
            device.read_at(&mut now, span.start).unwrap();
            for (was, is) in model[range(span)].iter_mut().zip(now) {
                assert!(is == *was || is == 0, "discard of {span:?} invented bytes");
                *was = is;
            }
        }
        Op::Flush => device.flush().unwrap(),
        Op::Reopen => {}
    }
}

/// The disk has these bytes, and its extents cover it and tell the truth about zeroes.
pub fn verify(device: &dyn BlockDevice, model: &[u8]) {
    let found = contents(device);
    if let Some(at) = found.iter().zip(model).position(|(a, b)| a != b) {
        panic!("byte {at:#x} is {:#x}, expected {:#x}", found[at], model[at]);
    }
    assert_eq!(found.len(), model.len());
    let mut covered = 0;
    for run in Extents::new(device, Span::new(0, u64::MAX)) {
        let (span, kind) = run.unwrap();
        assert_eq!(span.start, covered);
        covered = span.end();
        let bytes = &model[span.start as usize..covered as usize];
        assert!(!kind.reads_zero() || is_zero(bytes), "{span:?} is {kind:?}, but has data");
    }
    assert_eq!(covered, device.size());
}

/// All bytes of a disk.
pub fn contents(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0xee; device.size() as usize];
    device.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Bytes that differ from place to place and from seed to seed, never zero.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8 | 1
        })
        .collect()
}

/// Writes to all of `device` and `model` from four threads. Each writes every fourth piece of
/// an odd length, so that all of them meet in every unit of mapping, and flushes now and then.
pub fn write_from_threads(device: &dyn BlockDevice, model: &mut [u8]) {
    const THREADS: usize = 4;
    const PIECE: usize = 1536;
    let pieces = model.len() / PIECE;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for piece in (thread..pieces).step_by(THREADS) {
                    let at = (piece * PIECE) as u64;
                    device.write_at(&pattern(PIECE, piece as u64), at).unwrap();
                    if piece % 97 == 0 {
                        device.flush().unwrap();
                    }
                }
            });
        }
    });
    for (number, piece) in model.chunks_exact_mut(PIECE).enumerate() {
        piece.copy_from_slice(&pattern(PIECE, number as u64));
    }
}
