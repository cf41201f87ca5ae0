// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The dynamic header: where the block allocation table is, and who the parent is.

use crate::footer::{Footer, array, checksum, seal};
use crate::geometry::SECTOR;
use tranship_block::{BigEndian, BlockDevice, Error, Result};

/// Bytes of a dynamic header.
pub(crate) const HEADER: usize = 1024;
/// Entries of the table that are kept in memory: 32 MiB, a disk of 2 TiB in blocks of 256 KiB.
pub(crate) const MOST_ENTRIES: u64 = 8 << 20;
/// Places for parent locators.
pub(crate) const LOCATORS: usize = 8;
const CHECKSUM_AT: usize = 36;
const NAME_AT: usize = 64;
const NAME_LEN: usize = 512;
const LOCATORS_AT: usize = 576;
const LOCATOR_LEN: usize = 24;
const RESERVED_AT: usize = 768;
const RESERVED: usize = 256;

/// A place where the parent's name is stored for one platform.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Locator {
    /// Four letters for the platform and its way to write a name.
    pub(crate) code: [u8; 4],
    /// Bytes that are reserved; some writers count sectors.
    pub(crate) space: u32,
    /// Bytes of the name.
    pub(crate) len: u32,
    /// Byte in the file.
    pub(crate) offset: u64,
}

/// The fields of a dynamic header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) table_offset: u64,
    pub(crate) max_entries: u32,
    pub(crate) block_size: u32,
    pub(crate) parent_id: [u8; 16],
    pub(crate) parent_timestamp: u32,
    /// UTF-16, without the padding.
    pub(crate) parent_name: Vec<u16>,
    pub(crate) locators: [Locator; LOCATORS],
    /// What is behind the fields that the specification has: kept as it is.
    pub(crate) reserved: Vec<u8>,
    pub(crate) warnings: Vec<String>,
}

impl Header {
    /// Reads the header that `footer` points to.
    pub(crate) fn read(file: &dyn BlockDevice, footer: &Footer, salvage: bool) -> Result<Self> {
        let at = footer.data_offset;
        let len = u64::try_from(HEADER).unwrap_or(u64::MAX);
        if at > file.size() || len > file.size().saturating_sub(at) {
            return Err(Error::corrupt(format!(
                "data offset is {at:#x}, expected a dynamic header within the file of {} bytes",
                file.size()
            )));
        }
        let mut bytes = vec![0; HEADER];
        file.read_at(&mut bytes, at)?;
        Self::parse(&bytes, salvage).map_err(|error| error.at(at))
    }

    fn parse(bytes: &[u8], salvage: bool) -> Result<Self> {
        let fields = BigEndian(bytes, "dynamic header");
        if fields.bytes("cookie", 0, 8)? != b"cxsparse" {
            return Err(Error::corrupt("dynamic header does not start with \"cxsparse\""));
        }
        let mut warnings = Vec::new();
        let (stored, computed) =
            (fields.u32("checksum", CHECKSUM_AT)?, checksum(bytes, CHECKSUM_AT));
        if stored != computed {
            let text =
                format!("dynamic header has checksum {stored:#010x}, expected {computed:#010x}");
            if !salvage {
                return Err(Error::corrupt(text));
            }
            warnings.push(text);
        }
        let version = fields.u32("header version", 24)?;
        if version >> 16 != 1 {
            return Err(Error::unsupported(format!(
                "dynamic header has version {version:#x}, expected 0x10000"
            )));
        }
        let block_size = fields.u32("block size", 32)?;
        if !block_size.is_power_of_two() || u64::from(block_size) < SECTOR {
            return Err(Error::corrupt(format!(
                "block size is {block_size}, expected a power of two of at least 512"
            )));
        }
        let name = fields.bytes("parent name", NAME_AT, NAME_LEN)?;
        let name = name.as_chunks().0.iter().map(|unit| u16::from_be_bytes(*unit));
        let mut locators = [Locator::default(); LOCATORS];
        for (index, locator) in locators.iter_mut().enumerate() {
            let at = index.saturating_mul(LOCATOR_LEN).saturating_add(LOCATORS_AT);
            let part = BigEndian(fields.bytes("parent locator", at, LOCATOR_LEN)?, "locator");
            *locator = Locator {
                code: array(&part, "platform code", 0)?,
                space: part.u32("data space", 4)?,
                len: part.u32("data length", 8)?,
                offset: part.u64("data offset", 16)?,
            };
        }
        Ok(Self {
            table_offset: fields.u64("table offset", 16)?,
            max_entries: fields.u32("max table entries", 28)?,
            block_size,
            parent_id: array(&fields, "parent unique id", 40)?,
            parent_timestamp: fields.u32("parent timestamp", 56)?,
            parent_name: name.take_while(|unit| *unit != 0).collect(),
            locators,
            reserved: fields.bytes("reserved part", RESERVED_AT, RESERVED)?.to_vec(),
            warnings,
        })
    }

    /// The header as it is stored, with its checksum.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(b"cxsparse");
        bytes.extend(u64::MAX.to_be_bytes());
        bytes.extend(self.table_offset.to_be_bytes());
        bytes.extend(0x0001_0000_u32.to_be_bytes());
        bytes.extend(self.max_entries.to_be_bytes());
        bytes.extend(self.block_size.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.parent_id);
        bytes.extend(self.parent_timestamp.to_be_bytes());
        bytes.extend([0; 4]);
        let name = self.parent_name.iter().take(NAME_LEN / 2);
        bytes.extend(name.flat_map(|unit| unit.to_be_bytes()));
        bytes.resize(LOCATORS_AT, 0);
        for locator in &self.locators {
            bytes.extend(locator.code);
            bytes.extend(locator.space.to_be_bytes());
            bytes.extend(locator.len.to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(locator.offset.to_be_bytes());
        }
        bytes.extend(&self.reserved);
        bytes.resize(HEADER, 0);
        seal(&mut bytes, CHECKSUM_AT);
        bytes
    }

    /// Entries that a disk of `size` bytes needs.
    pub(crate) fn entries_for(&self, size: u64) -> u64 {
        size.div_ceil(u64::from(self.block_size).max(1))
    }

    /// Checks that the table is in the file and large enough for a disk of `size` bytes.
    pub(crate) fn check(&self, file_size: u64, size: u64, salvage: bool) -> Result<()> {
        let needed = self.entries_for(size);
        let entries = u64::from(self.max_entries);
        if entries < needed {
            return Err(Error::corrupt(format!(
                "block allocation table has {entries} entries, expected at least {needed} for \
                 {size} bytes in blocks of {}",
                self.block_size
            )));
        }
        if needed > MOST_ENTRIES {
            return Err(Error::unsupported(format!(
                "disk has {needed} blocks of {} bytes, expected at most {MOST_ENTRIES}",
                self.block_size
            )));
        }
        let len = if salvage { needed } else { entries }.saturating_mul(4);
        if self.table_offset > file_size || len > file_size.saturating_sub(self.table_offset) {
            return Err(Error::corrupt(format!(
                "block allocation table of {entries} entries ends past the file's size of \
                 {file_size} bytes"
            ))
            .at(self.table_offset));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_being_stored_and_names_what_is_wrong() {
        let mut locators = [Locator::default(); LOCATORS];
        locators[7] = Locator { code: *b"W2ru", space: 512, len: 10, offset: 4096 };
        let header = Header {
            table_offset: 1536,
            max_entries: 20,
            block_size: 2 << 20,
            parent_id: [3; 16],
            parent_timestamp: 5,
            parent_name: "base.vhd".encode_utf16().collect(),
            locators,
            reserved: vec![4; RESERVED],
            warnings: Vec::new(),
        };
        let bytes = header.to_bytes();
        assert_eq!(Header::parse(&bytes, false).unwrap(), header);
        let changed = |at: usize, new: &[u8]| {
            let mut bytes = bytes.clone();
            bytes[at..at + new.len()].copy_from_slice(new);
            seal(&mut bytes, if at == CHECKSUM_AT { 1020 } else { CHECKSUM_AT });
            Header::parse(&bytes, false).unwrap_err().to_string()
        };
        assert!(changed(0, b"x").contains("cxsparse"));
        assert!(changed(CHECKSUM_AT, &[1; 4]).contains("checksum"));
        assert!(changed(24, &[9]).contains("version"));
        assert!(changed(32, &3_u32.to_be_bytes()).contains("block size is 3,"));
        assert!(changed(32, &0_u32.to_be_bytes()).contains("block size is 0,"));
        assert!(Header::parse(&bytes[..700], false).is_err());

        header.check(1536 + 80, 40 << 20, false).unwrap();
        let error = header.check(1536 + 79, 40 << 20, false).unwrap_err();
        assert!(error.to_string().contains("past the file's size"), "{error}");
        let error = header.check(1 << 20, (40 << 20) + 1, false).unwrap_err();
        assert!(error.to_string().contains("expected at least 21"), "{error}");
    }
}
