// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mappings that the guest's memory consists of.

use super::HUGE_PAGE;
use crate::{Error, Result};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// Bytes of a snapshot's memory that are mapped where there is data: to look for smaller holes
/// takes longer than it is worth.
const PART: u64 = 8 << 20;

/// One mapping that begins at a multiple of 2 MiB, inside a larger reservation.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    size: usize,
    flags: i32,
    reserved: NonNull<libc::c_void>,
    reserved_size: usize,
}

// SAFETY: the mapping belongs to nobody's thread; the pointers are only used to unmap it.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing is read or written through a shared reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(super) fn new(size: usize, file: Option<&File>, offset: u64, shared: bool) -> Result<Self> {
        let failed = || Error::system("mapping guest memory")(std::io::Error::last_os_error());
        let reserved_size = size
            .checked_add(HUGE_PAGE)
            .ok_or_else(|| Error::Memory(format!("{size} bytes are too many")))?;
        let quiet = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses an address where nothing is.
        let reserved = unsafe {
            libc::mmap(std::ptr::null_mut(), reserved_size, libc::PROT_NONE, quiet, -1, 0)
        };
        let reserved = match NonNull::new(reserved) {
            Some(start) if reserved != libc::MAP_FAILED => start,
            _ => return Err(failed()),
        };
        let misaligned = reserved.as_ptr().addr() % HUGE_PAGE;
        let skip = if misaligned == 0 { 0 } else { HUGE_PAGE - misaligned };
        // Huge pages that are not reserved would be missed only when the guest touches them.
        let mut flags = if shared { 0 } else { libc::MAP_NORESERVE };
        flags |= if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        if file.is_none() {
            flags |= libc::MAP_ANONYMOUS;
        }
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| Error::Memory(format!("offset {offset} is too large")))?;
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: the fixed range lies inside the reservation just made, which nobody uses:
        // it begins less than 2 MiB into it and the reservation is 2 MiB longer.
        let start = unsafe {
            libc::mmap(
                reserved.byte_add(skip).as_ptr(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                fd,
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            let error = failed();
            // SAFETY: the reservation is ours and nothing points into it.
            unsafe { libc::munmap(reserved.as_ptr(), reserved_size) };
            return Err(error);
        }
        // Advice that is not taken costs nothing but speed; a core file of us is no place for
        // a guest's memory.
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
            // SAFETY: the range is the mapping just made.
            unsafe { libc::madvise(start, size, advice) };
        }
        let start = NonNull::new(start.cast()).unwrap_or(reserved.cast());
        Ok(Self { start, size, flags, reserved, reserved_size })
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn flags(&self) -> i32 {
        self.flags
    }
}

impl Mapping {
    /// Maps the parts of `file` from `offset` on that hold data over the memory, as copies on
    /// write. Large holes of the file stay what the memory was: there can be huge pages for
    /// what the guest uses next, and none of it is in the page cache, too.
    pub(super) fn cover(&self, file: &File, offset: u64) -> Result<()> {
        let failed = || Error::system("mapping the memory of the snapshot");
        for (start, end) in data(file, offset, self.size as u64)
            .map_err(Error::system("the holes in the memory of the snapshot"))?
        {
            let (Ok(skip), Ok(len), Ok(from)) = (
                usize::try_from(start),
                usize::try_from(end.saturating_sub(start)),
                libc::off_t::try_from(offset.saturating_add(start)),
            ) else {
                return Err(Error::Memory(format!("offset {start} is too large")));
            };
            // SAFETY: the range lies inside the mapping, which is ours and which nobody uses
            // yet.
            let place = unsafe {
                libc::mmap(
                    self.start.as_ptr().byte_add(skip).cast(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
                    file.as_raw_fd(),
                    from,
                )
            };
            if place == libc::MAP_FAILED {
                return Err(failed()(std::io::Error::last_os_error()));
            }
            // SAFETY: the range is the mapping just made.
            unsafe { libc::madvise(place, len, libc::MADV_DONTDUMP) };
        }
        Ok(())
    }
}

/// Parts of `size` bytes of `file` from `offset` on, counted from there, that hold all the data:
/// from the huge page on where some begins, [`PART`] bytes each.
fn data(file: &File, offset: u64, size: u64) -> rustix::io::Result<Vec<(u64, u64)>> {
    let huge = HUGE_PAGE as u64;
    let mut parts: Vec<(u64, u64)> = Vec::new();
    let mut at: u64 = 0;
    while at < size {
        let from = rustix::fs::SeekFrom::Data(offset.saturating_add(at));
        let start = match rustix::fs::seek(file, from) {
            Ok(start) => start.saturating_sub(offset),
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error),
        };
        if start >= size {
            break;
        }
        let start = (start / huge).saturating_mul(huge);
        at = start.saturating_add(PART).min(size);
        match parts.last_mut() {
            Some((_, end)) if *end == start => *end = at,
            _ => parts.push((start, at)),
        }
    }
    Ok(parts)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole reservation with all that was mapped over it is ours; the memory
        // that points into it is dropped before.
        unsafe { libc::munmap(self.reserved.as_ptr(), self.reserved_size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn all_data_is_in_parts_and_large_holes_are_not() {
        let mib = |parts: Vec<(u64, u64)>| -> Vec<(u64, u64)> {
            parts.into_iter().map(|(start, end)| (start >> 20, end >> 20)).collect()
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(128 << 20).unwrap();
        assert_eq!(data(&file, 0, 128 << 20).unwrap(), []);
        for at in [5 << 20, (21 << 20) + 7, (60 << 20) - 1, (128 << 20) - 1] {
            file.write_all_at(&[1], at).unwrap();
        }
        let all = [(4, 12), (20, 28), (58, 66), (126, 128)];
        assert_eq!(mib(data(&file, 0, 128 << 20).unwrap()), all);
        assert_eq!(mib(data(&file, 0, 40 << 20).unwrap()), all[..2]);
        assert_eq!(mib(data(&file, 20 << 20, 60 << 20).unwrap()), [(0, 8), (38, 46)]);
    }
}
