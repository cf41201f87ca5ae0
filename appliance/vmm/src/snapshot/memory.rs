// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's memory as a sparse file.

use crate::memory::Memory;
use crate::{Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

const PAGE: usize = 4096;
/// Bytes looked at in one go: a huge page.
const PIECE: usize = 2 << 20;

/// Writes all memory into `file`, whatever was in there; pages of zeroes become holes. Returns
/// the number of bytes written.
///
/// Nobody may change the memory meanwhile.
pub(crate) fn write(memory: &Memory, file: &File) -> Result<u64> {
    let failed = || Error::system("writing the memory of the machine");
    // What was in the file before would show through the holes.
    file.set_len(0).map_err(failed())?;
    let size = memory.ram.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(size).map_err(failed())?;
    let mut buffer = vec![0; PIECE];
    let (mut place, mut written): (u64, u64) = (0, 0);
    for region in memory.ram.iter() {
        let mut at: u64 = 0;
        while at < region.len() {
            let left = usize::try_from(region.len().saturating_sub(at)).unwrap_or(PIECE);
            let piece = buffer.get_mut(..left.min(PIECE)).unwrap_or(&mut []);
            if memory.may_hold_data(region, at, piece.len())? {
                // A copy, so that what is looked at is what is written.
                region
                    .read_slice(piece, MemoryRegionAddress(at))
                    .map_err(|error| Error::Memory(error.to_string()))?;
                for (start, bytes) in runs(piece) {
                    let start = place.saturating_add(start as u64);
                    file.write_all_at(bytes, start).map_err(failed())?;
                    written = written.saturating_add(bytes.len() as u64);
                }
            }
            at = at.saturating_add(piece.len() as u64);
            place = place.saturating_add(piece.len() as u64);
        }
    }
    Ok(written)
}

/// The runs of pages in `bytes` that are not zero, each with its offset.
fn runs(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    const ZERO: [u8; PAGE] = [0; PAGE];
    let mut pages = bytes.chunks(PAGE).enumerate().peekable();
    std::iter::from_fn(move || {
        let is_zero = |page: &[u8]| ZERO.get(..page.len()) == Some(page);
        let (first, _) = pages.find(|(_, page)| !is_zero(page))?;
        let mut end = first.saturating_add(1);
        while pages.next_if(|(_, page)| !is_zero(page)).is_some() {
            end = end.saturating_add(1);
        }
        let start = first.saturating_mul(PAGE);
        let end = end.saturating_mul(PAGE).min(bytes.len());
        Some((start, bytes.get(start..end)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;
    use vm_memory::GuestAddress;

    #[test]
    fn only_pages_with_something_in_them_are_runs() {
        let mut bytes = vec![0; 6 * PAGE + 100];
        for at in [PAGE, 2 * PAGE + 7, 5 * PAGE, 6 * PAGE + 99] {
            bytes[at] = 1;
        }
        let found: Vec<_> = runs(&bytes).map(|(at, run)| (at, run.len())).collect();
        assert_eq!(found, [(PAGE, 2 * PAGE), (5 * PAGE, PAGE + 100)]);
        assert_eq!(runs(&[0; 3 * PAGE]).count(), 0);
        assert_eq!(runs(&[]).count(), 0);
    }

    #[test]
    fn memory_comes_back_and_the_file_is_sparse() {
        for backing in [Backing::Anonymous, Backing::Shared] {
            let memory = Memory::new(64, &backing).unwrap();
            let marks = [0_u64, PAGE as u64 * 3 + 9, (64 << 20) - 8];
            for at in marks {
                memory.ram.write_obj(at ^ 0x5555, GuestAddress(at)).unwrap();
            }
            let file = tempfile::tempfile().unwrap();
            // Something from before that must not be there afterwards.
            file.write_all_at(&[0xee; PAGE], 40 << 20).unwrap();
            assert_eq!(write(&memory, &file).unwrap(), 3 * PAGE as u64);
            let data = file.metadata().unwrap();
            assert_eq!(data.len(), 64 << 20);
            assert!(data.blocks() * 512 < 1 << 20, "{} blocks", data.blocks());
            let again = Memory::new(64, &Backing::Private(Arc::new(file))).unwrap();
            for at in marks {
                let found: u64 = again.ram.read_obj(GuestAddress(at)).unwrap();
                assert_eq!(found, at ^ 0x5555);
            }
            assert_eq!(again.ram.read_obj::<u64>(GuestAddress(40 << 20)).unwrap(), 0);
        }
    }

    #[test]
    fn a_file_of_another_size_is_no_memory() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        for size in [0, (64 << 20) - 1, (64 << 20) + 4096] {
            file.set_len(size).unwrap();
            let error = Memory::new(64, &Backing::Private(Arc::clone(&file))).unwrap_err();
            assert!(matches!(error, Error::Snapshot(_)), "{error}");
            assert!(error.to_string().contains("expected 67108864"), "{error}");
        }
    }
}
