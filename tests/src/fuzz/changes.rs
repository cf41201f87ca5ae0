// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changing a disk that may be broken, and knowing what it has to read as afterwards.

use super::case::{OPS, Op};
use tranship_block::{BlockDevice, Span, Zeroing};

/// What is known about a range that was written.
#[derive(Debug)]
struct Known {
    start: u64,
    /// None where something else may be by now.
    bytes: Vec<Option<u8>>,
}

/// Everything that a disk has promised.
#[derive(Debug, Default)]
pub(crate) struct Promises(Vec<Known>);

impl Promises {
    /// Everything promised is there.
    pub(crate) fn verify(&self, device: &dyn BlockDevice) {
        self.verify_last(device, usize::MAX);
    }

    /// The last `count` promises are kept.
    fn verify_last(&self, device: &dyn BlockDevice, count: usize) {
        for known in self.0.iter().rev().take(count) {
            let mut next = known.start;
            for run in known.bytes.chunk_by(|one, other| one.is_some() == other.is_some()) {
                let at = next;
                next += run.len() as u64;
                let Some(expected) = run.iter().copied().collect::<Option<Vec<u8>>>() else {
                    continue;
                };
                let mut found = vec![0xee; expected.len()];
                let read = device.read_at(&mut found, at);
                assert!(read.is_ok(), "what was written cannot be read: {read:?}");
                let wrong = expected.iter().zip(&found).position(|(one, other)| one != other);
                assert!(wrong.is_none(), "what was written at {at:#x} is gone from byte {wrong:?}");
            }
        }
    }

    /// All that overlaps `span` has changed.
    fn overwrite(&mut self, span: Span, bytes: impl Fn(u64) -> Option<u8>) {
        for known in &mut self.0 {
            for (at, byte) in (known.start..).zip(&mut known.bytes) {
                if at >= span.start && at < span.end() {
                    *byte = bytes(at);
                }
            }
        }
        let len = span.len.min(70_000);
        let bytes = (span.start..span.start + len).map(bytes).collect();
        self.0.push(Known { start: span.start, bytes });
    }
}

/// Does all of `ops`. If the disk is sound, each has to read back at once.
pub(crate) fn change(device: &dyn BlockDevice, ops: &[Op; OPS], is_sound: bool) -> Promises {
    let mut promises = Promises::default();
    let size = device.size();
    for (number, op) in ops.iter().enumerate() {
        let span = span(*op, size);
        let value = (number as u8).wrapping_mul(29) | 1;
        match op.kind % 8 {
            0..=3 => {
                let byte = |at: u64| (at as u8).wrapping_mul(3).wrapping_add(value) | 1;
                let bytes: Vec<u8> = (span.start..span.end()).map(byte).collect();
                let done = device.write_at(&bytes, span.start).is_ok();
                promises.overwrite(span, |at| done.then(|| byte(at)));
            }
            kind @ 4..=5 => {
                let mode = if kind == 4 { Zeroing::MayUnmap } else { Zeroing::KeepAllocated };
                let done = device.write_zeroes(span, mode).is_ok();
                promises.overwrite(span, |_| done.then_some(0));
            }
            6 => {
                let _ = device.discard(span);
                promises.overwrite(span, |_| None);
            }
            _ => {
                let _ = device.flush();
            }
        }
        if is_sound {
            promises.verify_last(device, 1);
        }
    }
    promises
}

fn span(op: Op, size: u64) -> Span {
    // Places close to the ends are as likely as all others together.
    let place = u64::from(op.place);
    let at = match place >> 14 {
        0 => place,
        1 => (place & 0x3fff) * 512,
        2 => size.saturating_sub(place & 0x3fff),
        _ => (size >> 14).saturating_mul(place & 0x3fff),
    };
    let at = at.min(size);
    let len = match op.len {
        len @ 0..64 => u64::from(len) * 512,
        len @ 64..128 => u64::from(len) * 509,
        len @ 128..250 => u64::from(len - 127),
        len => u64::from(len - 249) << 16,
    };
    Span::new(at, len.min(size - at))
}
