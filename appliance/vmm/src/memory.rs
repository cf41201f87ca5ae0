// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's memory.
//!
//! Pages of 2 MiB shorten a boot by a third or more, but only where guest address and our own
//! agree modulo 2 MiB. Distributions leave huge pages off for shared memory
//! (`shmem_enabled`), so memory is anonymous unless that switch or hugetlbfs says otherwise.

mod mapping;

use crate::layout::{HIGH_START, LOW_END};
use crate::{Error, Result};
use mapping::Mapping;
use std::fs::File;
use std::sync::Arc;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

/// Guest memory as every part of the machine uses it.
pub type Ram = GuestMemoryMmap<()>;

const HUGE_PAGE: usize = 2 << 20;
const SMALL_PAGE: usize = 4096;

/// What the memory is made of.
#[derive(Debug)]
pub enum Backing {
    /// Anonymous pages, huge where the kernel has some.
    Anonymous,
    /// A memory file of ordinary pages, huge where `shmem_enabled` allows it.
    Shared,
    /// Pages of hugetlbfs, which the host's owner has set aside.
    HugePages,
    /// A copy on write of this file: a snapshot's memory.
    Private(Arc<File>),
}

/// Memory with the mapping below it.
#[derive(Debug)]
pub struct Memory {
    /// The memory as the guest sees it.
    pub ram: Ram,
    /// Whether a page that was never touched may not be there when it is asked for.
    scarce: bool,
    /// Dropped after `ram`, which points into it.
    _mappings: Vec<Mapping>,
}

/// Splits the size around the hole for devices.
fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_END);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HIGH_START, bytes - low));
    }
    ranges
}

impl Memory {
    /// Memory of `mib` MiB.
    ///
    /// # Errors
    ///
    /// A size that makes no sense, and the operating system's.
    pub fn new(mib: u32, backing: &Backing) -> Result<Self> {
        if !(64..=1 << 20).contains(&mib) || !mib.is_multiple_of(2) {
            return Err(Error::Config(format!(
                "{mib} MiB of memory, expected an even number from 64 to 1048576"
            )));
        }
        let bytes = u64::from(mib) << 20;
        // A snapshot's memory is mapped below, over anonymous memory.
        let (file, saved) = match backing {
            Backing::Anonymous => (None, None),
            Backing::Shared => (Some(memory_file(bytes, false)?), None),
            Backing::HugePages => (Some(memory_file(bytes, true)?), None),
            Backing::Private(file) => (None, Some(whole(file, bytes)?)),
        };
        let shared = matches!(backing, Backing::Shared | Backing::HugePages);
        let (mut regions, mut mappings) = (Vec::new(), Vec::new());
        let mut offset = 0;
        for (start, len) in ranges(bytes) {
            let size = usize::try_from(len)
                .map_err(|_| Error::Memory(format!("{len} bytes are too many")))?;
            let mapping = Mapping::new(size, file.as_deref(), offset, shared)?;
            if let Some(saved) = &saved {
                mapping.cover(saved, offset)?;
            }
            let mut builder = MmapRegionBuilder::new(size)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(mapping.flags());
            if let Some(file) = &file {
                builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
            }
            // SAFETY: the mapping has `size` bytes and is unmapped after the region is gone:
            // fields are dropped in order, and nobody else gets the mapping.
            let region = unsafe { builder.with_raw_mmap_pointer(mapping.start().as_ptr()) }
                .build()
                .map_err(|error| Error::Memory(error.to_string()))?;
            let region = GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| Error::Memory(format!("no room at {start:#x}")))?;
            regions.push(region);
            mappings.push(mapping);
            offset += len;
        }
        let ram = Ram::from_regions(regions).map_err(|error| Error::Memory(error.to_string()))?;
        let scarce = matches!(backing, Backing::HugePages);
        Ok(Self { ram, scarce, _mappings: mappings })
    }
}

/// A file that ends before the memory does would end us at the first access beyond.
fn whole(file: &Arc<File>, bytes: u64) -> Result<Arc<File>> {
    let data = file.metadata().map_err(Error::system("the size of the snapshot's memory"))?;
    if !data.is_file() || data.len() != bytes {
        return Err(Error::Snapshot(format!(
            "its memory is a file of {} bytes, expected {bytes}",
            data.len()
        )));
    }
    Ok(Arc::clone(file))
}

impl Memory {
    /// Whether there may be anything but zeroes in `len` bytes of a region.
    ///
    /// Reading memory that was never touched costs a page of zeroes that all share, but in
    /// hugetlbfs a page of its own, and there may be none left.
    pub(crate) fn may_hold_data(
        &self,
        region: &GuestRegionMmap,
        at: u64,
        len: usize,
    ) -> Result<bool> {
        if !self.scarce {
            return Ok(true);
        }
        let start = region
            .get_host_address(MemoryRegionAddress(at))
            .map_err(|error| Error::Memory(error.to_string()))?;
        let mut resident = vec![0; len.div_ceil(SMALL_PAGE)];
        // SAFETY: the call looks at page tables only, and writes a byte for each page.
        let outcome = unsafe { libc::mincore(start.cast(), len, resident.as_mut_ptr()) };
        if outcome != 0 {
            return Err(
                Error::system("asking for touched memory")(std::io::Error::last_os_error()),
            );
        }
        Ok(resident.iter().any(|page| page & 1 != 0))
    }
}

fn memory_file(bytes: u64, huge: bool) -> Result<Arc<File>> {
    use rustix::fs::MemfdFlags;
    let mut flags = MemfdFlags::CLOEXEC;
    if huge {
        flags |= MemfdFlags::HUGETLB;
    }
    let file = rustix::fs::memfd_create("guest memory", flags)
        .map_err(Error::system("a file for guest memory"))?;
    rustix::fs::ftruncate(&file, bytes)
        .map_err(Error::system("the size of the file for guest memory"))?;
    Ok(Arc::new(File::from(file)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn memory_leaves_a_hole_for_devices() {
        assert_eq!(ranges(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ranges(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn every_backing_can_be_used_and_is_aligned() {
        for backing in [Backing::Anonymous, Backing::Shared] {
            let memory = Memory::new(64, &backing).unwrap();
            memory.ram.write_obj(7_u64, GuestAddress(0x1000)).unwrap();
            assert_eq!(memory.ram.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 7);
            for region in memory.ram.iter() {
                let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap();
                assert_eq!(host.addr() % HUGE_PAGE, 0);
            }
        }
    }

    #[test]
    fn a_private_copy_leaves_the_file_alone() {
        let file = memory_file(64 << 20, false).unwrap();
        let memory = Memory::new(64, &Backing::Private(Arc::clone(&file))).unwrap();
        memory.ram.write_obj(9_u64, GuestAddress(0)).unwrap();
        let again = Memory::new(64, &Backing::Private(file)).unwrap();
        assert_eq!(again.ram.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
    }

    #[test]
    fn holes_of_a_saved_memory_are_memory() {
        use std::os::unix::fs::FileExt;
        let file = memory_file(64 << 20, false).unwrap();
        let marks: [u64; 5] = [0, (2 << 20) - 1, 9 << 20, (31 << 20) + 5, (64 << 20) - 1];
        for at in marks {
            file.write_all_at(&[7], at).unwrap();
        }
        let memory = Memory::new(64, &Backing::Private(Arc::clone(&file))).unwrap();
        for at in marks {
            assert_eq!(memory.ram.read_obj::<u8>(GuestAddress(at)).unwrap(), 7, "{at:#x}");
        }
        // All of it can be written, and none of that reaches the file.
        for at in (0..64 << 20).step_by(4096) {
            memory.ram.write_obj(1_u8, GuestAddress(at)).unwrap();
        }
        let mut all = vec![0; 64 << 20];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte != 0).count(), marks.len());
        assert!(all.iter().all(|byte| matches!(byte, 0 | 7)));
    }

    #[test]
    fn odd_sizes_are_refused() {
        for mib in [0, 63, 65, u32::MAX] {
            assert!(Memory::new(mib, &Backing::Anonymous).is_err());
        }
    }
}
