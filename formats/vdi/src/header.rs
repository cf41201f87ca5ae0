// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header of version 1.1.

use std::fmt::Write;
use tranship_block::{BlockDevice, Error, LittleEndian, Result};

/// The number at byte 64 of an image.
pub const SIGNATURE: u32 = 0xbeda_107f;
/// Bytes from the start of the file to the end of the header that every writer has.
const LEN: u64 = 0x1c8;
/// Where the part begins whose length the header states.
const SIZED_AT: u64 = 0x48;
/// Largest number of blocks that any reader takes.
const MOST_BLOCKS: u32 = 0x3fff_ffff;
/// Entries of the block map that are kept in memory: 32 MiB, 8 TiB in blocks of 1 MiB.
const MOST_ENTRIES: u64 = 8 << 20;
const SECTOR: u32 = 512;
const LARGEST_BLOCK: u32 = 256 << 20;

/// How an image stores its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Blocks that were written.
    Dynamic,
    /// All blocks.
    Fixed,
    /// Blocks that differ from a parent's.
    Differencing,
}

/// The fields of a header, checked against each other and the file's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// How the disk is stored.
    pub kind: Kind,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a block, a power of two.
    pub block_size: u32,
    /// Bytes in front of the data of each block.
    pub block_extra: u32,
    /// Blocks of the disk.
    pub blocks: u32,
    /// Blocks that are stored, as the header says.
    pub allocated: u32,
    /// Byte of the block map.
    pub map_offset: u64,
    /// Byte of the first block.
    pub data_offset: u64,
    /// Names the image.
    pub uuid: [u8; 16],
    /// Changes whenever the disk is written.
    pub modification: [u8; 16],
    /// The parent's `uuid`; zeroes if there is none.
    pub parent: [u8; 16],
    /// The parent's `modification`; zeroes if it is not known.
    pub parent_modification: [u8; 16],
}

impl Header {
    /// Reads the header of the image in `file`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] for headers that contradict themselves or
    /// the file's size, [`tranship_block::ErrorKind::Unsupported`] for other versions and
    /// kinds, and I/O errors.
    pub fn read(file: &dyn BlockDevice) -> Result<Self> {
        if file.size() < LEN {
            return Err(Error::corrupt(format!(
                "file of {} bytes is too short for a VDI header",
                file.size()
            )));
        }
        let mut bytes = vec![0; usize::try_from(LEN).unwrap_or(0)];
        file.read_at(&mut bytes, 0)?;
        Self::parse(&bytes, file.size())
    }

    fn parse(bytes: &[u8], file_size: u64) -> Result<Self> {
        let fields = LittleEndian(bytes, "VDI header");
        let signature = fields.u32("signature", 0x40)?;
        if signature != SIGNATURE {
            return Err(Error::corrupt(format!(
                "VDI signature is {signature:#010x}, expected {SIGNATURE:#010x}"
            ))
            .at(0x40));
        }
        let version = fields.u32("version", 0x44)?;
        if version >> 16 != 1 {
            return Err(Error::unsupported(format!(
                "VDI version is {}.{}, expected 1.1",
                version >> 16,
                version & 0xffff
            ))
            .at(0x44));
        }
        let uuid = |name: &str, at: usize| -> Result<[u8; 16]> {
            let bytes = fields.bytes(name, at, 16)?;
            bytes.first_chunk().copied().ok_or_else(|| Error::corrupt(format!("{name} is cut")))
        };
        // Headers that end early have none of the last UUID.
        let stated = u64::from(fields.u32("header size", 0x48)?).saturating_add(SIZED_AT);
        let parent_modification =
            if stated >= LEN { uuid("UUID of the parent's change", 0x1b8)? } else { [0; 16] };
        let kind = match fields.u32("image type", 0x4c)? {
            1 => Kind::Dynamic,
            2 => Kind::Fixed,
            4 => Kind::Differencing,
            3 => return Err(Error::unsupported("image type is 3 (undo), expected 1, 2 or 4")),
            other => {
                return Err(Error::corrupt(format!("image type is {other}, expected 1, 2 or 4")));
            }
        };
        let parent = uuid("UUID of the parent", 0x1a8)?;
        let header = Self {
            // Whoever names a parent needs it, whatever the type says.
            kind: if parent == [0; 16] { kind } else { Kind::Differencing },
            size: fields.u64("disk size", 0x170)?,
            block_size: fields.u32("block size", 0x178)?,
            block_extra: fields.u32("block extra data", 0x17c)?,
            blocks: fields.u32("blocks", 0x180)?,
            allocated: fields.u32("allocated blocks", 0x184)?,
            map_offset: fields.u32("block map offset", 0x154)?.into(),
            data_offset: fields.u32("data offset", 0x158)?.into(),
            uuid: uuid("UUID", 0x188)?,
            modification: uuid("UUID of the last change", 0x198)?,
            parent,
            parent_modification,
        };
        header.check(file_size)?;
        Ok(header)
    }

    fn check(&self, file_size: u64) -> Result<()> {
        let Self { size, block_size, block_extra, blocks, map_offset, .. } = self;
        if !block_size.is_power_of_two() || !(SECTOR..=LARGEST_BLOCK).contains(block_size) {
            return Err(Error::corrupt(format!(
                "block size is {block_size}, expected a power of two from {SECTOR} to \
                 {LARGEST_BLOCK}"
            ))
            .at(0x178));
        }
        if *block_extra > LARGEST_BLOCK || !block_extra.is_multiple_of(SECTOR) {
            return Err(Error::corrupt(format!(
                "extra data of a block has {block_extra} bytes, expected whole sectors"
            ))
            .at(0x17c));
        }
        if *blocks > MOST_BLOCKS {
            return Err(Error::corrupt(format!(
                "disk has {blocks} blocks, expected at most {MOST_BLOCKS}"
            ))
            .at(0x180));
        }
        let covered = u64::from(*blocks).saturating_mul(u64::from(*block_size));
        if *size > covered {
            return Err(Error::corrupt(format!(
                "disk has {size} bytes, but its {blocks} blocks only {covered}"
            ))
            .at(0x170));
        }
        if self.entries() > MOST_ENTRIES {
            return Err(Error::unsupported(format!(
                "disk has {} blocks, expected at most {MOST_ENTRIES}",
                self.entries()
            ))
            .at(0x180));
        }
        let map_len = self.entries().saturating_mul(4);
        if *map_offset < LEN || map_len > file_size.saturating_sub(*map_offset) {
            return Err(Error::corrupt(format!(
                "block map of {} entries at {map_offset:#x} is not within the file of \
                 {file_size} bytes",
                self.entries()
            ))
            .at(0x154));
        }
        Ok(())
    }

    /// Where the data of the block with `entry` is in the file.
    pub(crate) fn data_at(&self, entry: u32) -> u64 {
        let extra = u64::from(self.block_extra);
        let stride = u64::from(self.block_size).saturating_add(extra);
        let blocks = u64::from(entry).saturating_mul(stride);
        self.data_offset.saturating_add(blocks).saturating_add(extra)
    }

    /// Entries of the block map that the disk uses.
    pub(crate) fn entries(&self) -> u64 {
        self.size.div_ceil(u64::from(self.block_size).max(1))
    }
}

/// A UUID in the usual groups; the first three are stored with their low byte first.
pub fn format_uuid(uuid: &[u8; 16]) -> String {
    let (first, rest) = uuid.split_at(4);
    let (second, rest) = rest.split_at(2);
    let (third, rest) = rest.split_at(2);
    let numbers = [first, second, third];
    let stored = numbers.iter().flat_map(|number| number.iter().rev()).chain(rest);
    let mut text = String::with_capacity(36);
    for (index, byte) in stored.enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        // Writing into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 0x400];
        let numbers: [(usize, u32); 9] = [
            (0x40, SIGNATURE),
            (0x44, 0x0001_0001),
            (0x48, 0x190),
            (0x4c, 1),
            (0x154, 0x200),
            (0x158, 0x400),
            (0x170, 3 << 20),
            (0x178, 1 << 20),
            (0x180, 3),
        ];
        for (at, number) in numbers {
            bytes[at..][..4].copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn contradictions_are_named_with_their_place() {
        let cases: [(usize, u32, &str); 10] = [
            (0x40, 1, "signature is 0x00000001"),
            (0x44, 2, "version is 0.2"),
            (0x4c, 3, "type is 3 (undo)"),
            (0x4c, 9, "type is 9"),
            (0x178, 0, "block size is 0"),
            (0x178, 3 << 20, "block size is 3145728"),
            (0x17c, 100, "extra data of a block has 100"),
            (0x180, 2, "its 2 blocks only 2097152"),
            (0x180, u32::MAX, "disk has 4294967295 blocks"),
            (0x154, 0x3f8, "block map of 3 entries at 0x3f8"),
        ];
        assert_eq!(Header::read(&MemoryDevice::read_only(image())).unwrap().blocks, 3);
        for (at, number, text) in cases {
            let mut bytes = image();
            bytes[at..][..4].copy_from_slice(&number.to_le_bytes());
            let error = Header::read(&MemoryDevice::read_only(bytes)).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
        assert!(Header::read(&MemoryDevice::read_only(image()[..0x1c0].to_vec())).is_err());
    }

    #[test]
    fn an_image_that_names_a_parent_is_differencing() {
        let mut bytes = image();
        bytes[0x1a8] = 1;
        let header = Header::read(&MemoryDevice::read_only(bytes)).unwrap();
        assert_eq!(header.kind, Kind::Differencing);
        assert_eq!(format_uuid(&header.parent), "00000001-0000-0000-0000-000000000000");
    }
}
