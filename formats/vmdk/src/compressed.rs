// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compressed grains: a marker with guest sector and size, then a zlib stream (RFC 1950).

use crate::SECTOR;
use crate::footer::MARKER;
use crate::layout::Layout;
use libdeflater::{DecompressionError, Decompressor};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span};

/// Inflated bytes that an extent keeps for readers of small pieces.
const CACHE: u64 = 2 << 20;

thread_local! {
    static DECOMPRESSOR: RefCell<Decompressor> = RefCell::new(Decompressor::new());
}

/// Most bytes that a compressed grain may have: deflate adds little to incompressible
/// data, and a larger number is an attack.
pub(crate) fn max_stored(layout: &Layout) -> u64 {
    layout.grain.get().saturating_mul(2).saturating_add(MARKER)
}

/// Inflates grain `index`, whose marker is at byte `at` of `file`, into `grain`, which has
/// the full size of a grain. `stored` holds the bytes of the file from `at` onward as far
/// as they have been read already.
pub(crate) fn inflate(
    file: &dyn BlockDevice,
    layout: &Layout,
    (index, at): (u64, u64),
    stored: &[u8],
    grain: &mut [u8],
) -> Result<()> {
    let fields = LittleEndian(stored, "grain marker");
    let lba = fields.u64("lba", 0)?;
    let size = u64::from(fields.u32("size", 8)?);
    let expected = index.saturating_mul(layout.grain.get() / SECTOR);
    if lba != expected {
        return Err(Error::corrupt(format!(
            "marker of grain {index} is for guest sector {lba}, expected {expected}"
        ))
        .at(at));
    }
    if size == 0 || size > max_stored(layout) {
        return Err(Error::corrupt(format!(
            "compressed size of grain {index} is {size} bytes, expected 1 to {}",
            max_stored(layout)
        ))
        .at(at));
    }
    let len = usize::try_from(size).unwrap_or(usize::MAX);
    if let Ok(data) = fields.bytes("data", 12, len) {
        return inflate_stream((index, at), layout, data, grain);
    }
    let start = at.saturating_add(MARKER);
    if Span::new(start, size).check_within(file.size()).is_err() {
        return Err(Error::corrupt(format!(
            "compressed grain {index} of {size} bytes ends past the file's size of {} bytes",
            file.size()
        ))
        .at(at));
    }
    let mut data = vec![0; len];
    file.read_at(&mut data, start)?;
    inflate_stream((index, at), layout, &data, grain)
}

fn inflate_stream(
    (index, at): (u64, u64),
    layout: &Layout,
    data: &[u8],
    grain: &mut [u8],
) -> Result<()> {
    let corrupt = |what: String| Err(Error::corrupt(what).at(at));
    let result = DECOMPRESSOR.with_borrow_mut(|inflater| inflater.zlib_decompress(data, grain));
    let len = match result {
        Ok(len) => len,
        Err(DecompressionError::InsufficientSpace) => {
            return corrupt(format!("grain {index} inflates to more than {} bytes", grain.len()));
        }
        Err(DecompressionError::BadData) => {
            return corrupt(format!("compressed data of grain {index} is damaged"));
        }
    };
    // Some writers cut the last grain to the capacity; any other must be whole.
    let needed = layout.needed_len(index);
    if u64::try_from(len).unwrap_or(u64::MAX) < needed {
        return corrupt(format!("grain {index} inflates to {len} bytes, expected {needed}"));
    }
    grain.get_mut(len..).unwrap_or_default().fill(0);
    Ok(())
}

/// The grains inflated last, for guests and servers that read less than a grain at a time.
#[derive(Debug, Default)]
pub(crate) struct GrainCache(Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>);

impl GrainCache {
    /// Grain `index` if it is still there.
    pub(crate) fn get(&self, index: u64) -> Option<Arc<Vec<u8>>> {
        let grains = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        grains.iter().find(|(number, _)| *number == index).map(|(_, grain)| Arc::clone(grain))
    }

    /// Keeps `grain` and drops the oldest ones.
    pub(crate) fn put(&self, index: u64, grain: Arc<Vec<u8>>) {
        let size = u64::try_from(grain.len()).unwrap_or(u64::MAX).max(1);
        let most = usize::try_from(CACHE.checked_div(size).unwrap_or(0)).unwrap_or(0).max(1);
        let mut grains = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        grains.push_front((index, grain));
        grains.truncate(most);
    }
}
