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
    /// L2 entries of 16 bytes, which map 32 subclusters each; only with `cluster_bits` of
    /// 14 or more.
    pub(crate) extended: bool,
    /// Payload is in another file, where it has the offset that it has in the guest.
    pub(crate) external: bool,
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

    /// Entries of an L2 table, which has one cluster.
    pub(crate) fn entries(self) -> u64 {
        if self.extended { self.cluster() / 16 } else { self.cluster() / 8 }
    }

    /// Words of 8 bytes in an L2 entry.
    pub(crate) fn words(self) -> usize {
        if self.extended { 2 } else { 1 }
    }

    /// log2 of the smallest piece that is mapped on its own: a subcluster or a cluster.
    pub(crate) fn unit_bits(self) -> u32 {
        if self.extended { self.cluster_bits.wrapping_sub(5) } else { self.cluster_bits }
    }

    /// Bytes of the smallest piece that is mapped on its own.
    pub(crate) fn unit(self) -> u64 {
        1_u64.wrapping_shl(self.unit_bits())
    }

    /// Such pieces in a cluster: 32 or 1.
    pub(crate) fn units_per_cluster(self) -> u64 {
        if self.extended { 32 } else { 1 }
    }

    /// The L1 index and the L2 index of guest cluster `index`.
    pub(crate) fn l1_l2(self, index: u64) -> (usize, usize) {
        let bits = self.cluster_bits.wrapping_sub(if self.extended { 4 } else { 3 });
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

    /// What an L2 entry says about the cluster at guest offset `guest`; an extended entry's
    /// subclusters are [`Self::unit_mapping`]'s.
    pub(crate) fn mapping(self, entry: u64, guest: u64) -> Result<Mapping> {
        if entry & COMPRESSED != 0 {
            return self.compressed(entry, guest);
        }
        let zero = if self.version >= 3 && !self.extended { ZERO } else { 0 };
        let flags = COPIED | zero;
        let offset = entry & OFFSET;
        if entry & !(OFFSET | flags) != 0 || self.within(offset) != 0 {
            return Err(Error::corrupt(format!(
                "L2 entry {entry:#x} for guest offset {guest:#x} has reserved bits or an \
                 offset that is no multiple of the cluster size"
            )));
        }
        let copied = entry & COPIED != 0;
        if self.external {
            return self.external(entry, guest);
        }
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

    /// With a data file, an offset of 0 is that of guest cluster 0 if COPIED is set.
    fn external(self, entry: u64, guest: u64) -> Result<Mapping> {
        let host = Host { offset: entry & OFFSET, copied: entry & COPIED != 0 };
        let is_there = host.offset != 0 || host.copied;
        if is_there && host.offset != guest & !self.cluster().wrapping_sub(1) {
            return Err(Error::corrupt(format!(
                "L2 entry {entry:#x} for guest offset {guest:#x} maps another offset of the \
                 data file"
            )));
        }
        Ok(match (entry & ZERO != 0, is_there) {
            (true, false) => Mapping::Zero { reserved: None },
            (true, true) => Mapping::Zero { reserved: Some(host) },
            (false, false) => Mapping::Unallocated,
            (false, true) => Mapping::Data(host),
        })
    }

    /// What an L2 entry says about piece `unit` of the cluster at guest offset `guest`: a
    /// host offset is that of the piece. `bitmap` is the entry's second word, if it has one.
    pub(crate) fn unit_mapping(
        self,
        entry: u64,
        bitmap: u64,
        unit: u64,
        guest: u64,
    ) -> Result<Mapping> {
        let cluster = self.mapping(entry, guest)?;
        if !self.extended {
            return Ok(cluster);
        }
        let fault = |what: &str| {
            Error::corrupt(format!(
                "extended L2 entry {entry:#x} with bitmap {bitmap:#018x} for guest offset \
                 {guest:#x} {what}"
            ))
        };
        let (allocated, zero) = unit_bits(unit);
        let distance = unit.saturating_mul(self.unit());
        match (cluster, bitmap & allocated != 0, bitmap & zero != 0) {
            (Mapping::Compressed { .. }, ..) if bitmap != 0 => {
                Err(fault("is compressed and has subclusters"))
            }
            (Mapping::Compressed { .. }, ..) => Ok(cluster),
            (_, true, true) => Err(fault("has a subcluster that is allocated and zero")),
            (Mapping::Data(host), true, _) => {
                Ok(Mapping::Data(Host { offset: host.offset.saturating_add(distance), ..host }))
            }
            (_, true, _) => Err(fault("has an allocated subcluster, but no offset")),
            (Mapping::Data(host), _, true) => Ok(Mapping::Zero {
                reserved: Some(Host { offset: host.offset.saturating_add(distance), ..host }),
            }),
            (_, _, true) => Ok(Mapping::Zero { reserved: None }),
            _ => Ok(Mapping::Unallocated),
        }
    }

    fn compressed(self, entry: u64, guest: u64) -> Result<Mapping> {
        if self.external {
            return Err(Error::corrupt(format!(
                "L2 entry {entry:#x} for guest offset {guest:#x} is compressed, but the image \
                 has a data file"
            )));
        }
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

/// The bits of a bitmap that say that a subcluster is allocated, and that it is zero.
pub(crate) fn unit_bits(unit: u64) -> (u64, u64) {
    let shift = u32::try_from(unit & 31).unwrap_or(0);
    (1_u64.wrapping_shl(shift), 1_u64.wrapping_shl(shift.wrapping_add(32)))
}

/// The allocation bits of `count` subclusters from `first` on; the bits that say zero are
/// 32 further up.
pub(crate) fn unit_mask(first: u64, count: u64) -> u64 {
    let end = first.saturating_add(count).min(32);
    (first..end).fold(0, |mask, unit| mask | unit_bits(unit).0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::ErrorKind;

    fn geometry(cluster_bits: u32, version: u32) -> Geometry {
        Geometry { cluster_bits, refcount_order: 4, version, extended: false, external: false }
    }

    #[test]
    fn a_bitmap_decides_about_each_subcluster() {
        let extended = Geometry { extended: true, ..geometry(16, 3) };
        let host = |offset| Host { offset, copied: true };
        let entry = 0x50000 | COPIED;
        let bitmap = 1 | 1 << 33 | 1 << 31;
        let table = [
            (0, Mapping::Data(host(0x50000))),
            (1, Mapping::Zero { reserved: Some(host(0x50800)) }),
            (2, Mapping::Unallocated),
            (31, Mapping::Data(host(0x5f800))),
        ];
        for (unit, expected) in table {
            assert_eq!(extended.unit_mapping(entry, bitmap, unit, 0).unwrap(), expected, "{unit}");
        }
        assert_eq!(
            extended.unit_mapping(0, 1 << 32, 0, 0).unwrap(),
            Mapping::Zero { reserved: None }
        );
        for (entry, bitmap) in
            [(entry, 1 | 1 << 32), (0, 1), (entry | ZERO, 1), (COMPRESSED | 0x1000, 1)]
        {
            let error = extended.unit_mapping(entry, bitmap, 0, 0x7000).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x} {bitmap:#x}");
        }
        assert_eq!(
            (unit_mask(0, 32), unit_mask(3, 2), unit_mask(31, 9)),
            (0xffff_ffff, 24, 1 << 31)
        );
    }

    #[test]
    fn a_data_file_has_the_offsets_of_the_guest() {
        let external = Geometry { external: true, ..geometry(16, 3) };
        let data = |offset| Mapping::Data(Host { offset, copied: true });
        assert_eq!(external.mapping(COPIED, 0).unwrap(), data(0));
        assert_eq!(external.mapping(0, 0).unwrap(), Mapping::Unallocated);
        assert_eq!(external.mapping(COPIED | 0x50000, 0x50000).unwrap(), data(0x50000));
        for entry in [COPIED | 0x50000, COMPRESSED | 0x60000, 0x50000] {
            assert!(external.mapping(entry, 0x60000).is_err(), "{entry:#x}");
        }
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
        let max = |order| Geometry { refcount_order: order, ..geometry(16, 3) };
        assert_eq!(max(0).refcount_max(), 1);
        assert_eq!(max(4).refcount_max(), 65_535);
        assert_eq!(max(6).refcount_max(), u64::MAX);
        assert_eq!(max(0).per_block(), 524_288);
        assert_eq!(max(6).per_block(), 8192);
    }
}
