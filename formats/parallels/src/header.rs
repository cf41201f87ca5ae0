// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The 64-byte header of a growing image; the block allocation table (BAT) follows it.

use crate::SECTOR;
use std::num::NonZeroU64;
use tranship_block::{BlockDevice, Error, LittleEndian, Result};

/// Bytes of the header.
pub(crate) const HEADER_LEN: u64 = 64;
const OLD_MAGIC: &[u8; 16] = b"WithoutFreeSpace";
const EXTENDED_MAGIC: &[u8; 16] = b"WithouFreSpacExt";
const VERSION: u32 = 2;
const IN_USE: u32 = 0x746f_6e59;
/// What QEMU accepts: tables and clusters beyond are an attack.
const MAX_ENTRIES: u32 = 1 << 29;
const MAX_CLUSTER_SECTORS: u32 = (1 << 31) / 513;

/// A header whose numbers have been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whether it is the newer kind, whose table counts clusters and not sectors.
    pub extended: bool,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster: NonZeroU64,
    /// Entries of the BAT.
    pub entries: u32,
    /// Whether a writer has it open, or did not close it.
    pub dirty: bool,
    /// Bytes that one step of a table entry means.
    pub(crate) unit: u64,
    /// Byte at which the first cluster is put, if the header says so.
    data_offset: Option<NonZeroU64>,
}

impl Header {
    /// Reads and checks the header of `file`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if it is none, or if its numbers contradict
    /// the file or each other.
    pub fn read(file: &dyn BlockDevice) -> Result<Self> {
        let len = usize::try_from(file.size().min(HEADER_LEN)).unwrap_or(0);
        let mut bytes = vec![0; len];
        file.read_at(&mut bytes, 0)?;
        let header = Self::parse(&bytes)?;
        let table_end = HEADER_LEN.saturating_add(u64::from(header.entries).saturating_mul(4));
        if table_end > file.size() {
            return Err(Error::corrupt(format!(
                "BAT of {} entries ends past the file's size of {} bytes",
                header.entries,
                file.size()
            ))
            .at(32));
        }
        Ok(header)
    }

    /// Where the cluster with this entry lies.
    pub(crate) fn offset(&self, entry: u32) -> u64 {
        u64::from(entry).saturating_mul(self.unit)
    }

    /// Where the first cluster lies in an image that has one.
    pub(crate) fn data_start(&self) -> u64 {
        let table_len = u64::from(self.entries).saturating_mul(4);
        let table_end = HEADER_LEN.saturating_add(table_len).next_multiple_of(SECTOR);
        self.data_offset.map_or(table_end, NonZeroU64::get)
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let fields = LittleEndian(bytes, "Parallels header");
        let magic = fields.bytes("magic", 0, 16)?;
        let extended = magic == EXTENDED_MAGIC;
        if !extended && magic != OLD_MAGIC {
            return Err(Error::corrupt("magic is none of a Parallels image").at(0));
        }
        let version = fields.u32("version", 16)?;
        if version != VERSION {
            return Err(Error::unsupported(format!(
                "version of the Parallels image is {version}, expected {VERSION}"
            ))
            .at(16));
        }
        let tracks = fields.u32("tracks", 28)?;
        if tracks == 0 || tracks > MAX_CLUSTER_SECTORS {
            return Err(Error::corrupt(format!(
                "cluster has {tracks} sectors, expected 1 to {MAX_CLUSTER_SECTORS}"
            ))
            .at(28));
        }
        let cluster = u64::from(tracks).saturating_mul(SECTOR);
        let entries = fields.u32("bat_entries", 32)?;
        if entries > MAX_ENTRIES {
            return Err(Error::corrupt(format!(
                "BAT has {entries} entries, expected at most {MAX_ENTRIES}"
            ))
            .at(32));
        }
        // The upper half belongs to something else in old images.
        let sectors = if extended {
            fields.u64("nb_sectors", 36)?
        } else {
            u64::from(fields.u32("nb_sectors", 36)?)
        };
        let covered = u64::from(entries).saturating_mul(u64::from(tracks));
        if sectors > covered {
            return Err(Error::corrupt(format!(
                "disk has {sectors} sectors, but the BAT covers {covered} only"
            ))
            .at(36));
        }
        Ok(Self {
            extended,
            size: sectors.saturating_mul(SECTOR),
            cluster: NonZeroU64::new(cluster).unwrap_or(NonZeroU64::MIN),
            entries,
            dirty: fields.u32("inuse", 44)? == IN_USE,
            unit: if extended { cluster } else { SECTOR },
            data_offset: NonZeroU64::new(
                u64::from(fields.u32("data_off", 48)?).saturating_mul(SECTOR),
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::ErrorKind;

    fn header(magic: &[u8; 16]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..16].copy_from_slice(magic);
        bytes[16] = 2;
        bytes[28] = 63;
        bytes[32] = 10;
        bytes[36..40].copy_from_slice(&600_u32.to_le_bytes());
        bytes[44..48].copy_from_slice(&IN_USE.to_le_bytes());
        bytes
    }

    #[test]
    fn both_kinds_are_read() {
        let old = Header::parse(&header(OLD_MAGIC)).unwrap();
        assert_eq!((old.size, old.cluster.get(), old.unit), (600 * 512, 63 * 512, 512));
        assert!(old.dirty);
        let new = Header::parse(&header(EXTENDED_MAGIC)).unwrap();
        assert_eq!((new.size, new.unit), (600 * 512, 63 * 512));
    }

    #[test]
    fn wrong_numbers_are_named() {
        let cases: [(usize, u32, ErrorKind, &str); 6] = [
            (0, 7, ErrorKind::Corrupt, "magic is none"),
            (16, 3, ErrorKind::Unsupported, "version of the Parallels image is 3, expected 2"),
            (28, 0, ErrorKind::Corrupt, "cluster has 0 sectors"),
            (28, 5_000_000, ErrorKind::Corrupt, "cluster has 5000000 sectors"),
            (32, 0xffff_ffff, ErrorKind::Corrupt, "BAT has 4294967295 entries"),
            (36, 631, ErrorKind::Corrupt, "disk has 631 sectors, but the BAT covers 630 only"),
        ];
        for (at, value, kind, expected) in cases {
            let mut bytes = header(EXTENDED_MAGIC);
            bytes[at..at.saturating_add(4)].copy_from_slice(&value.to_le_bytes());
            let error = Header::parse(&bytes).unwrap_err();
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().starts_with(expected), "{error}");
        }
        assert!(Header::parse(&header(OLD_MAGIC)[..40]).is_err());
    }
}
