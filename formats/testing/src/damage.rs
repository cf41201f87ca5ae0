// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images with wrong bytes in them.

use proptest::prelude::*;
use tranship_block::{BlockDevice, Extents, Span};

/// `image` with a few changes: numbers replaced by extreme ones, bits flipped, the end cut
/// off, pieces copied elsewhere. Most changes hit the places in `metadata`, if there are any.
pub fn damaged(image: Vec<u8>, metadata: Vec<Span>) -> impl Strategy<Value = Vec<u8>> {
    let len = image.len().max(1);
    let in_metadata = (any::<prop::sample::Index>(), any::<u64>()).prop_map(move |(index, at)| {
        if metadata.is_empty() {
            return at as usize % len;
        }
        let span = metadata[index.index(metadata.len())];
        (span.start + at % span.len.max(1)) as usize
    });
    let place = prop_oneof![4 => in_metadata, 1 => 0..len];
    let extreme = prop_oneof![
        Just(0_u64),
        Just(1),
        Just(u64::MAX),
        Just(u64::MAX >> 1),
        Just(1 << 63),
        Just(0xffff_ffff),
        Just(0x8000_0000_8000_0000),
        0_u64..70_000,
        any::<u64>(),
    ];
    let change = (place, 0_u8..12, extreme, 0..len);
    prop::collection::vec(change, 1..5).prop_map(move |changes| {
        let mut bytes = image.clone();
        for (at, what, number, other) in changes {
            let at = at.min(bytes.len().saturating_sub(1));
            // Most numbers of a format lie at multiples of their own size.
            let put = |bytes: &mut Vec<u8>, at: usize, new: &[u8]| {
                let end = (at + new.len()).min(bytes.len());
                bytes[at..end].copy_from_slice(&new[..end - at]);
            };
            match what {
                0..=1 => put(&mut bytes, at & !7, &number.to_be_bytes()),
                2..=3 => put(&mut bytes, at & !7, &number.to_le_bytes()),
                4 => put(&mut bytes, at & !3, &number.to_be_bytes()[4..]),
                5 => put(&mut bytes, at & !3, &number.to_le_bytes()[..4]),
                6 => put(&mut bytes, at & !1, &number.to_be_bytes()[6..]),
                7..=8 => put(&mut bytes, at, &[number as u8]),
                9 => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << (number % 8);
                    }
                }
                10 => {
                    let from = other.min(bytes.len());
                    let piece = bytes[from..(from + 64).min(bytes.len())].to_vec();
                    put(&mut bytes, at, &piece);
                }
                _ => bytes.truncate(other.max(1)),
            }
        }
        bytes
    })
}

/// Uses a disk that may be broken: walks some extents, reads some places. Errors are
/// fine; panics, hangs and floods are what this is to find.
pub fn exercise(device: &dyn BlockDevice) {
    let size = device.size();
    for run in Extents::new(device, Span::new(0, u64::MAX)).take(1000) {
        if run.is_err() {
            break;
        }
    }
    let mut buf = vec![0; 70_000];
    for place in 0..24_u64 {
        let at = (size / 24).saturating_mul(place).min(size);
        let len = usize::try_from(size - at).unwrap_or(usize::MAX).min(buf.len());
        let _ = device.read_at(&mut buf[..len], at);
    }
    let tail = size.min(512) as usize;
    let _ = device.read_at(&mut buf[..tail], size - tail as u64);
}
