// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cluster arithmetic and the meaning of table entries.

use tranship_block::{Error, Result};

/// L1, L2: the cluster has a reference count of exactly one and may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// L2: the cluster is compressed.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// L2, version 3: the cluster reads as zero.
pub(crate) const ZERO: u64 = 1;
/// L1, L2: bits 9 to 55, the offset in the file.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Refcount table: bits 9 to 63.
const BLOCK_OFFSET: u64 = 0xffff_ffff_ffff_fe00;

/// A length in memory as a number of bytes on disk.
pub(crate) fn to_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// A number of bytes on disk as a length in memory.
pub(crate) fn to_usize(len: u64) -> Result<usize> {
    usize::try_from(len).map_err(|_| Error::unsupported(format!("{len} bytes exceed memory")))
}

/// Where the bytes of one guest cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// The backing image decides; zeroes without one.
    Unallocated,
    /// Reads as zero; a reserved host cluster, if any, may hold anything.
    Zero { reserved: Option<Host> },
    /// Stored as it is.
    Data(Host),
    /// Stored compressed in at most `len` bytes from byte `start` of the file.
    Compressed { start: u64, len: u64 },
}

/// A host cluster that a table entry refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    /// Byte offset in the file, a multiple of the cluster size.
    pub(crate) offset: u64,
    /// Whether the entry claims to be the only reference.
    pub(crate) copied: bool,
}

/// Sizes that follow from the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Between 9 and 21: checked when the header is read.
    pub(crate) cluster_bits: u32,
    /// At most 6: checked when the header is read.
    pub(crate) refcount_order: u32,
    pub(crate) version: u32,
}

impl Geometry {
    /// Bytes in a cluster.
    pub(crate) fn cluster(self) -> u64 {
        1_u64.wrapping_shl(self.cluster_bits)
    }

    /// Bytes in a cluster, as a length in memory: at most 2 MiB.
    pub(crate) fn cluster_len(self) -> usize {
        1_usize.wrapping_shl(self.cluster_bits)
    }

    /// The number of the cluster that holds byte `offset`.
    pub(crate) fn index(self, offset: u64) -> u64 {
        offset.wrapping_shr(self.cluster_bits)
    }

    /// Byte offset of cluster `index`; saturates, so that it lies past any file.
    pub(crate) fn offset(self, index: u64) -> u64 {
        index.saturating_mul(self.cluster())
    }

    /// Bytes between the start of the cluster and `offset`.
    pub(crate) fn within(self, offset: u64) -> u64 {
        offset & self.cluster().wrapping_sub(1)
    }

    /// Clusters needed for `bytes`.
    pub(crate) fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster())
    }

    /// Entries of 8 bytes in a table of one cluster.
    pub(crate) fn entries(self) -> u64 {
        self.cluster() / 8
    }

    /// The L1 index and the L2 index of guest cluster `index`.
    pub(crate) fn l1_l2(self, index: u64) -> (usize, usize) {
        let bits = self.cluster_bits.wrapping_sub(3);
        let l1 = usize::try_from(index.wrapping_shr(bits)).unwrap_or(usize::MAX);
        let l2 = index & self.entries().wrapping_sub(1);
        (l1, usize::try_from(l2).unwrap_or(usize::MAX))
    }

    /// First guest cluster of L2 table `l1_index`.
    pub(crate) fn first_of(self, l1_index: usize) -> u64 {
        to_u64(l1_index).saturating_mul(self.entries())
    }

    /// L1 entries needed for a disk of `size` bytes.
    pub(crate) fn l1_entries(self, size: u64) -> u64 {
        self.clusters_for(size).div_ceil(self.entries())
    }

    /// Largest value of a reference count.
    pub(crate) fn refcount_max(self) -> u64 {
        u64::MAX.wrapping_shr(64_u32.wrapping_sub(1_u32.wrapping_shl(self.refcount_order)))
    }

    /// Clusters that one refcount block counts.
    pub(crate) fn per_block(self) -> u64 {
        self.cluster().saturating_mul(8).wrapping_shr(self.refcount_order)
    }

    /// The offset in an L1 entry, `None` for an entry that is not used.
    pub(crate) fn l2_offset(self, entry: u64, guest: u64) -> Result<Option<Host>> {
        let offset = entry & OFFSET;
        if entry & !(OFFSET | COPIED) != 0 || self.within(offset) != 0 {
            return Err(Error::corrupt(format!(
                "L1 entry {entry:#x} for guest offset {guest:#x} has reserved bits or an \
                 offset that is no multiple of the cluster size"
            )));
        }
        match (offset, entry) {
            (0, 0) => Ok(None),
            (0, _) => Err(Error::corrupt(format!(
                "L1 entry {entry:#x} for guest offset {guest:#x} has flags, but no offset"
            ))),
            _ => Ok(Some(Host { offset, copied: entry & COPIED != 0 })),
        }
    }

    /// The offset in a refcount table entry, 0 for a block that does not exist.
    pub(crate) fn block_offset(self, entry: u64) -> Result<u64> {
        if entry & !BLOCK_OFFSET != 0 || self.within(entry) != 0 {
            return Err(Error::corrupt(format!(
                "refcount table entry {entry:#x} is no multiple of the cluster size"
            )));
        }
        Ok(entry)
    }

    /// What an L2 entry says about the cluster at guest offset `guest`.
    pub(crate) fn mapping(self, entry: u64, guest: u64) -> Result<Mapping> {
        if entry & COMPRESSED != 0 {
            return self.compressed(entry, guest);
        }
        let flags = if self.version >= 3 { COPIED | ZERO } else { COPIED };
        let offset = entry & OFFSET;
        if entry & !(OFFSET | flags) != 0 || self.within(offset) != 0 {
            return Err(Error::corrupt(format!(
                "L2 entry {entry:#x} for guest offset {guest:#x} has reserved bits or an \
                 offset that is no multiple of the cluster size"
            )));
        }
        let copied = entry & COPIED != 0;
        if offset == 0 && copied {
            return Err(Error::corrupt(format!(
                "L2 entry {entry:#x} for guest offset {guest:#x} claims the header's cluster"
            )));
        }
        Ok(match (entry & ZERO != 0, offset) {
            (true, 0) => Mapping::Zero { reserved: None },
            (true, _) => Mapping::Zero { reserved: Some(Host { offset, copied }) },
            (false, 0) => Mapping::Unallocated,
            (false, _) => Mapping::Data(Host { offset, copied }),
        })
    }

    fn compressed(self, entry: u64, guest: u64) -> Result<Mapping> {
        if entry & COPIED != 0 {
            return Err(Error::corrupt(format!(
                "L2 entry {entry:#x} for guest offset {guest:#x} is compressed and copied"
            )));
        }
        // The width of the sector count grows with the cluster size, from 1 to 13 bits.
        let shift = 62_u32.wrapping_sub(self.cluster_bits.wrapping_sub(8));
        let start = entry & 1_u64.wrapping_shl(shift).wrapping_sub(1);
        let sectors = (entry & COMPRESSED.wrapping_sub(1)).wrapping_shr(shift);
        let len = sectors.saturating_add(1).saturating_mul(512).saturating_sub(start & 511);
        if start == 0 {
            return Err(Error::corrupt(format!(
                "compressed L2 entry {entry:#x} for guest offset {guest:#x} has no offset"
            )));
        }
        Ok(Mapping::Compressed { start, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::ErrorKind;

    fn geometry(cluster_bits: u32, version: u32) -> Geometry {
        Geometry { cluster_bits, refcount_order: 4, version }
    }

    #[test]
    fn entries_decode_to_the_four_kinds() {
        let host = |copied| Host { offset: 0x50000, copied };
        let table = [
            (0, Mapping::Unallocated),
            (1, Mapping::Zero { reserved: None }),
            (0x50001 | COPIED, Mapping::Zero { reserved: Some(host(true)) }),
            (0x50000, Mapping::Data(host(false))),
            // 64 KiB clusters: bits 54 to 61 count the additional sectors.
            (COMPRESSED | 3 << 54 | 0x1234, Mapping::Compressed { start: 0x1234, len: 1996 }),
        ];
        for (entry, expected) in table {
            assert_eq!(geometry(16, 3).mapping(entry, 0).unwrap(), expected, "{entry:#x}");
        }
    }

    #[test]
    fn entries_that_the_format_does_not_know_are_corrupt() {
        for (entry, version) in [
            (COPIED, 3),
            (0x50200, 3),
            (0x50002, 3),
            (1 << 57 | 0x50000, 3),
            (1, 2),
            (COMPRESSED | COPIED | 0x1000, 3),
            (COMPRESSED, 3),
        ] {
            let error = geometry(16, version).mapping(entry, 0x7000).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x}");
            assert!(error.message().contains("guest offset 0x7000"), "{error}");
        }
    }

    #[test]
    fn the_widest_and_narrowest_counts() {
        let max = |order| Geometry { cluster_bits: 16, refcount_order: order, version: 3 };
        assert_eq!(max(0).refcount_max(), 1);
        assert_eq!(max(4).refcount_max(), 65_535);
        assert_eq!(max(6).refcount_max(), u64::MAX);
        assert_eq!(max(0).per_block(), 524_288);
        assert_eq!(max(6).per_block(), 8192);
    }
}
