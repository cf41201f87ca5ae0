// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lengths, and reading structures that have to be there.

use tranship_block::{BlockDevice, Error, Result};

/// Everything outside of the header section lies at multiples of this.
pub(crate) const MIB: u64 = 1 << 20;

/// What the log writes at once, and so the unit in which metadata changes.
pub(crate) const SECTOR: usize = 4096;

/// [`SECTOR`] as a number of bytes of the file.
pub(crate) const SECTOR_BYTES: u64 = 4096;

/// A length in memory as a number of bytes on disk.
pub(crate) fn to_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// A number of bytes on disk as a length in memory.
pub(crate) fn to_usize(len: u64) -> Result<usize> {
    usize::try_from(len).map_err(|_| Error::unsupported(format!("{len} bytes exceed memory")))
}

/// Rounds up to whole MiB; saturates to a value past any file.
pub(crate) fn mib_up(len: u64) -> u64 {
    len.checked_next_multiple_of(MIB).unwrap_or(u64::MAX)
}

/// Rounds down to whole MiB.
pub(crate) fn mib_down(len: u64) -> u64 {
    len & !(MIB.wrapping_sub(1))
}

/// The `len` bytes of the structure `what` at `offset`; `len` was checked for sanity.
pub(crate) fn read(file: &dyn BlockDevice, what: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
    if offset.saturating_add(to_u64(len)) > file.size() {
        return Err(Error::corrupt(format!(
            "{what} of {len} bytes ends past the file's {} bytes: the image is incomplete",
            file.size()
        ))
        .at(offset));
    }
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Puts `field` at byte `at` of a structure that is being built.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    let place = bytes.get_mut(at..).and_then(|tail| tail.get_mut(..field.len()));
    if let Some(place) = place {
        place.copy_from_slice(field);
    }
}

/// CRC-32C of a structure, whose checksum field at byte 4 counts as zero.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    let (head, tail) = bytes.split_at(bytes.len().min(4));
    let sum = crc32c::crc32c_append(crc32c::crc32c(head), &[0; 4]);
    crc32c::crc32c_append(sum, tail.get(4..).unwrap_or_default())
}

/// Fills in the checksum at byte 4.
pub(crate) fn seal(bytes: &mut [u8]) {
    let sum = checksum(bytes);
    put(bytes, 4, &sum.to_le_bytes());
}
