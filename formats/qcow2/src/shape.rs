// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The form that L2 entries have in an image, for walking them without its device.

use crate::first_cluster::FirstCluster;
use crate::geometry::{COMPRESSED, COPIED, Geometry, Mapping, OFFSET, ZERO};
use crate::header::{DATA_FILE, EXTENDED_L2, Header};
use tranship_block::{BlockDevice, Error, Result};

/// Bytes that are read at once from a table.
const PIECE: u64 = 1 << 20;

/// What an L2 entry refers to in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reference {
    /// Nothing.
    None,
    /// A whole cluster at this byte, which the entry claims for itself if `copied`.
    Cluster { offset: u64, copied: bool },
    /// At most `len` bytes from byte `start`.
    Compressed { start: u64, len: u64 },
}

/// How L2 tables are laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) geometry: Geometry,
    /// Entries have a second word, the bitmap of subclusters.
    pub(crate) is_extended: bool,
    /// Clusters of the guest are in another file and not counted.
    pub(crate) has_data_file: bool,
}

impl Shape {
    pub(crate) fn new(header: &Header) -> Self {
        Self {
            geometry: header.geometry(),
            is_extended: header.incompatible_features & EXTENDED_L2 != 0,
            has_data_file: header.incompatible_features & DATA_FILE != 0,
        }
    }

    /// Words of 8 bytes in one entry.
    pub(crate) fn words(self) -> usize {
        if self.is_extended { 2 } else { 1 }
    }

    /// Guest clusters that one L2 table maps.
    pub(crate) fn entries(self) -> u64 {
        if self.is_extended { self.geometry.cluster() / 16 } else { self.geometry.cluster() / 8 }
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub(crate) fn l1_entries(self, size: u64) -> u64 {
        self.geometry.clusters_for(size).div_ceil(self.entries())
    }

    /// What the entry `words` at guest offset `guest` refers to.
    pub(crate) fn reference(self, words: &[u64], guest: u64) -> Result<Reference> {
        let entry = words.first().copied().unwrap_or(0);
        let fault = |what: &str| {
            Err(Error::corrupt(format!("L2 entry {entry:#x} for guest offset {guest:#x} {what}")))
        };
        if let Some(&bitmap) = words.get(1) {
            let (zero, allocated) = (bitmap >> 32, bitmap & 0xffff_ffff);
            if entry & COMPRESSED != 0 && bitmap != 0 {
                return fault("is compressed, but has subclusters");
            }
            if entry & COMPRESSED == 0 && entry & ZERO != 0 {
                return fault("has the zero flag, which subclusters replace");
            }
            if zero & allocated != 0 {
                return fault("has subclusters that are allocated and zero at once");
            }
            let nowhere = entry & OFFSET == 0 && !(self.has_data_file && entry & COPIED != 0);
            if entry & COMPRESSED == 0 && nowhere && allocated != 0 {
                return fault("has allocated subclusters, but no offset");
            }
        }
        if self.has_data_file {
            if entry & COMPRESSED != 0 {
                return fault("is compressed, which a data file does not allow");
            }
            let is_used = entry & (OFFSET | COPIED) != 0;
            if is_used && entry & OFFSET != guest {
                return fault("has another offset in the data file");
            }
            if is_used && entry & OFFSET == 0 {
                return Ok(Reference::Cluster { offset: 0, copied: true });
            }
        }
        Ok(match self.geometry.mapping(entry, guest)? {
            Mapping::Unallocated | Mapping::Zero { reserved: None } => Reference::None,
            Mapping::Zero { reserved: Some(host) } | Mapping::Data(host) => {
                Reference::Cluster { offset: host.offset, copied: host.copied }
            }
            Mapping::Compressed { start, len } => Reference::Compressed { start, len },
        })
    }

    /// The clusters that `reference` touches in a file of `size` bytes: first and number.
    pub(crate) fn touched(self, reference: Reference, size: u64) -> Option<(u64, u64)> {
        let (start, len) = match reference {
            Reference::None => return None,
            Reference::Cluster { .. } if self.has_data_file => return None,
            Reference::Cluster { offset, .. } => (offset, self.geometry.cluster()),
            // The length is an upper bound, rounded up to sectors.
            Reference::Compressed { start, len } => {
                (start, len.min(size.saturating_sub(start)).max(1))
            }
        };
        let first = self.geometry.index(start);
        let end = self.geometry.clusters_for(start.saturating_add(len));
        Some((first, end.saturating_sub(first)))
    }
}

/// Reads a table of 64-bit entries at `offset`; holes of the file cost nothing but memory.
pub(crate) fn read_sparse(file: &dyn BlockDevice, offset: u64, entries: u64) -> Result<Vec<u64>> {
    let mut table = Vec::new();
    let end = offset.saturating_add(entries.saturating_mul(8));
    if end > file.size() {
        return Err(Error::corrupt(format!(
            "table of {entries} entries ends past the file's {} bytes",
            file.size()
        ))
        .at(offset));
    }
    let mut bytes = Vec::new();
    let mut at = offset;
    while at < end {
        let mut len = end.saturating_sub(at).min(PIECE);
        let extent = file.extent_at(at)?;
        if extent.kind.reads_zero() {
            // Whole entries only: extents know nothing of them.
            len = extent.len.min(end.saturating_sub(at)) & !7;
            if len > 0 {
                let zeroes = crate::geometry::to_usize(len / 8)?;
                table.resize(table.len().saturating_add(zeroes), 0);
                at = at.saturating_add(len);
                continue;
            }
            len = 8;
        }
        bytes.resize(crate::geometry::to_usize(len)?, 0);
        file.read_at(&mut bytes, at)?;
        table.extend(bytes.as_chunks::<8>().0.iter().map(|raw| u64::from_be_bytes(*raw)));
        at = at.saturating_add(len);
    }
    Ok(table)
}

/// Reads a large table in pieces, and hands its entries out one after the other.
pub(crate) fn each_entry(
    file: &dyn BlockDevice,
    offset: u64,
    entries: u64,
    mut take: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let mut done = 0;
    while done < entries {
        let now = entries.saturating_sub(done).min(PIECE);
        let at = offset.saturating_add(done.saturating_mul(8));
        read_sparse(file, at, now)?.into_iter().try_for_each(&mut take)?;
        done = done.saturating_add(now);
    }
    Ok(())
}

/// Where the header extension for LUKS says that its header lies.
pub(crate) fn crypto_header(first: &FirstCluster) -> Option<(u64, u64)> {
    let content = first.extension(0x0537_be77)?;
    let fields = tranship_block::BigEndian(content, "encryption header extension");
    Some((fields.u64("offset", 0).ok()?, fields.u64("length", 8).ok()?))
}
