// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header.

use tranship_block::{BlockDevice, Error, LittleEndian, Result};

/// First bytes of an image.
pub const MAGIC: [u8; 4] = *b"QED\0";
const LEN: usize = 64;
/// Bytes of the first-level table that are kept in memory.
const MOST_TABLE: u64 = 16 << 20;
const LONGEST_NAME: u32 = 1023;
const HAS_BACKING: u64 = 1;
const NEED_CHECK: u64 = 2;
const BACKING_IS_RAW: u64 = 4;

/// The backing file that an image asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name, exactly as the image has it; hostile until proven otherwise.
    pub name: String,
    /// `raw`, if the image says that it is; the format knows no other word.
    pub format: Option<&'static str>,
}

/// The fields of a header, checked against each other and the file's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of a cluster, a power of two.
    pub cluster_size: u32,
    /// Clusters of a table.
    pub table_size: u32,
    /// Clusters of the header.
    pub header_size: u32,
    /// Features that a reader has to know.
    pub features: u64,
    /// Features that a reader may ignore.
    pub compat_features: u64,
    /// Features that a writer switches off if it does not know them.
    pub autoclear_features: u64,
    /// Byte of the first-level table.
    pub l1_table_offset: u64,
    /// Bytes of the disk.
    pub image_size: u64,
    /// The backing file, if there is one.
    pub backing: Option<Backing>,
}

impl Header {
    /// Reads the header of the image in `file`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] for headers that contradict themselves or
    /// the file's size, [`tranship_block::ErrorKind::Unsupported`] for unknown features,
    /// and I/O errors.
    pub fn read(file: &dyn BlockDevice) -> Result<Self> {
        let len = u64::try_from(LEN).unwrap_or(u64::MAX).min(file.size());
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(LEN)];
        file.read_at(&mut bytes, 0)?;
        let fields = LittleEndian(&bytes, "QED header");
        if fields.bytes("magic", 0, 4)? != MAGIC {
            return Err(Error::corrupt("QED image does not start with \"QED\\0\""));
        }
        let mut header = Self {
            cluster_size: fields.u32("cluster size", 4)?,
            table_size: fields.u32("table size", 8)?,
            header_size: fields.u32("header size", 12)?,
            features: fields.u64("features", 16)?,
            compat_features: fields.u64("compatible features", 24)?,
            autoclear_features: fields.u64("autoclear features", 32)?,
            l1_table_offset: fields.u64("L1 table offset", 40)?,
            image_size: fields.u64("image size", 48)?,
            backing: None,
        };
        header.check(file.size())?;
        if header.features & HAS_BACKING != 0 {
            let at = fields.u32("backing file name offset", 56)?;
            let len = fields.u32("backing file name length", 60)?;
            header.backing = Some(header.read_backing(file, at, len)?);
        }
        Ok(header)
    }

    /// Whether the last writer did not close the image: clusters may be lost, none is
    /// wrong.
    pub fn needs_check(&self) -> bool {
        self.features & NEED_CHECK != 0
    }

    fn check(&self, file_size: u64) -> Result<()> {
        let unknown = self.features & !(HAS_BACKING | NEED_CHECK | BACKING_IS_RAW);
        if unknown != 0 {
            return Err(Error::unsupported(format!("unknown features {unknown:#x}")).at(16));
        }
        let cluster = self.cluster_size;
        if !cluster.is_power_of_two() || !(4096..=64 << 20).contains(&cluster) {
            return Err(Error::corrupt(format!(
                "cluster size is {cluster}, expected a power of two from 4096 to 67108864"
            ))
            .at(4));
        }
        let table = self.table_size;
        if !table.is_power_of_two() || table > 16 {
            return Err(Error::corrupt(format!(
                "table size is {table} clusters, expected 1, 2, 4, 8 or 16"
            ))
            .at(8));
        }
        let header_len = u64::from(self.header_size).saturating_mul(u64::from(cluster));
        if header_len == 0 {
            return Err(Error::corrupt("header size is 0 clusters").at(12));
        }
        let most = self.entries().saturating_mul(self.covered_by_l2());
        if self.image_size > most {
            return Err(Error::corrupt(format!(
                "image size is {} bytes, expected at most {most} for tables of {} entries",
                self.image_size,
                self.entries()
            ))
            .at(48));
        }
        let l1_len = self.l1_entries().saturating_mul(8);
        if l1_len > MOST_TABLE {
            return Err(Error::unsupported(format!(
                "L1 table has {} entries in use, expected at most {}",
                self.l1_entries(),
                MOST_TABLE / 8
            ))
            .at(48));
        }
        let l1 = self.l1_table_offset;
        let is_aligned = l1.is_multiple_of(u64::from(cluster));
        if !is_aligned || l1 < header_len || l1_len > file_size.saturating_sub(l1) {
            return Err(Error::corrupt(format!(
                "L1 table of {l1_len} bytes at {l1:#x} is not a cluster behind the header within \
                 the file of {file_size} bytes"
            ))
            .at(40));
        }
        Ok(())
    }

    fn read_backing(&self, file: &dyn BlockDevice, at: u32, len: u32) -> Result<Backing> {
        let header_len = u64::from(self.header_size).saturating_mul(u64::from(self.cluster_size));
        let end = u64::from(at).saturating_add(u64::from(len));
        if len == 0 || len > LONGEST_NAME || end > header_len.min(file.size()) {
            return Err(Error::corrupt(format!(
                "backing file name of {len} bytes at {at:#x} is not within the header, or longer \
                 than {LONGEST_NAME} bytes"
            ))
            .at(56));
        }
        let mut name = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(&mut name, at.into())?;
        let name = String::from_utf8(name)
            .map_err(|_| Error::corrupt("backing file name is not UTF-8").at(at.into()))?;
        let format = (self.features & BACKING_IS_RAW != 0).then_some("raw");
        Ok(Backing { name, format })
    }

    /// Entries of a table.
    pub(crate) fn entries(&self) -> u64 {
        self.table_len() / 8
    }

    /// Bytes of a table.
    pub(crate) fn table_len(&self) -> u64 {
        u64::from(self.table_size).saturating_mul(u64::from(self.cluster_size))
    }

    /// Bytes of the disk that a second-level table covers.
    pub(crate) fn covered_by_l2(&self) -> u64 {
        self.entries().saturating_mul(u64::from(self.cluster_size))
    }

    /// Entries of the first-level table that the disk uses.
    pub(crate) fn l1_entries(&self) -> u64 {
        self.image_size.div_ceil(self.covered_by_l2().max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 3 * 4096];
        bytes[..4].copy_from_slice(&MAGIC);
        let numbers: [(usize, u32); 8] =
            [(4, 4096), (8, 1), (12, 1), (16, 5), (40, 4096), (48, 1 << 20), (56, 64), (60, 4)];
        for (at, number) in numbers {
            bytes[at..][..4].copy_from_slice(&number.to_le_bytes());
        }
        bytes[64..68].copy_from_slice(b"base");
        bytes
    }

    #[test]
    fn the_backing_file_is_known_before_opening() {
        let header = Header::read(&MemoryDevice::read_only(image())).unwrap();
        let expected = Backing { name: "base".into(), format: Some("raw") };
        assert_eq!(header.backing, Some(expected));
        assert!(!header.needs_check());
    }

    #[test]
    fn contradictions_are_named_with_their_place() {
        let cases: [(usize, u32, &str); 11] = [
            (0, 0, "does not start"),
            (4, 2048, "cluster size is 2048"),
            (4, 5000, "cluster size is 5000"),
            (8, 3, "table size is 3"),
            (8, 32, "table size is 32"),
            (12, 0, "header size is 0"),
            (16, 8, "unknown features 0x8"),
            (40, 4097, "L1 table of 8 bytes at 0x1001"),
            (40, 1 << 20, "is not a cluster behind the header"),
            (52, 1, "image size is 4296015872 bytes"),
            (60, 5000, "backing file name of 5000 bytes"),
        ];
        for (at, number, text) in cases {
            let mut bytes = image();
            bytes[at..][..4].copy_from_slice(&number.to_le_bytes());
            let error = Header::read(&MemoryDevice::read_only(bytes)).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
        assert!(Header::read(&MemoryDevice::read_only(image()[..50].to_vec())).is_err());
    }
}
