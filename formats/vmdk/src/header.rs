// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The 512-byte header of a hosted sparse extent, and its copy at the end of streams.

use crate::layout::{Entries, Layout};
use crate::line::ExtentType;
use crate::{SECTOR, footer};
use std::num::NonZeroU64;
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span};

/// First bytes of a hosted sparse extent.
pub(crate) const MAGIC: &[u8; 4] = b"KDMV";
/// Size of the header in bytes, as a length of a buffer.
pub(crate) const HEADER_LEN: usize = 512;

/// The newline test at byte 73 is filled in.
pub(crate) const FLAG_NEWLINE_TEST: u32 = 1;
/// There is a second copy of directory and tables.
pub(crate) const FLAG_REDUNDANT_DIRECTORY: u32 = 1 << 1;
/// Table entries of 1 stand for grains of zeroes.
pub(crate) const FLAG_ZEROED_GRAIN: u32 = 1 << 2;
/// Grains are compressed.
pub(crate) const FLAG_COMPRESSED: u32 = 1 << 16;
/// Grains and metadata are preceded by markers.
pub(crate) const FLAG_MARKERS: u32 = 1 << 17;
/// The `gdOffset` of streams, whose footer has the real one.
pub(crate) const DIRECTORY_AT_END: u64 = u64::MAX;
/// What the newline test has to read.
pub(crate) const NEWLINES: &[u8; 4] = b"\n \r\n";

/// Largest grain in bytes.
pub(crate) const MAX_GRAIN: u64 = 1 << 30;
/// Compressed grains are inflated whole, so their size is memory that an image can demand.
const MAX_COMPRESSED_GRAIN: u64 = 16 << 20;
const MAX_TABLE_ENTRIES: u32 = 512;
/// Entries of one grain directory, and of all directories of a disk together.
pub(crate) const MAX_DIRECTORY_ENTRIES: u64 = 32 << 20;
const MAX_DESCRIPTOR: u64 = 64 << 10;

/// Checks the 512 bytes of a header.
pub(crate) fn parse(bytes: &[u8]) -> Result<Layout> {
    let fields = LittleEndian(bytes, "VMDK sparse header");
    let magic = fields.bytes("magicNumber", 0, 4)?;
    if magic != MAGIC {
        return Err(Error::corrupt(format!("magicNumber is {magic:02x?}, expected KDMV")));
    }
    let version = fields.u32("version", 4)?;
    if !(1..=3).contains(&version) {
        return Err(Error::unsupported(format!("VMDK version is {version}, expected 1 to 3")));
    }
    let flags = fields.u32("flags", 8)?;
    if flags & FLAG_NEWLINE_TEST != 0 && fields.bytes("newline test", 73, 4)? != NEWLINES {
        return Err(Error::corrupt(
            "newline test of the VMDK header failed: the file was transferred in text mode",
        ));
    }
    let compression = fields.u16("compressAlgorithm", 77)?;
    if compression > 1 {
        return Err(Error::unsupported(format!(
            "compressAlgorithm is {compression}, expected 0 (none) or 1 (deflate)"
        )));
    }
    let compressed = compression == 1;
    if compressed && flags & FLAG_MARKERS == 0 {
        return Err(Error::unsupported("compressed grains without markers"));
    }
    let capacity = bytes_of("capacity", fields.u64("capacity", 12)?)?;
    let grain = grain_size(fields.u64("grainSize", 20)?, compressed)?;
    let table_entries = fields.u32("numGTEsPerGT", 44)?;
    let table_entries = Some(table_entries)
        .filter(|count| *count <= MAX_TABLE_ENTRIES)
        .and_then(|count| NonZeroU64::new(u64::from(count)))
        .ok_or_else(|| {
            Error::corrupt(format!("numGTEsPerGT is {table_entries}, expected 1 to 512"))
        })?;
    let covered = grain.get().saturating_mul(table_entries.get());
    let directory_entries = capacity.div_ceil(covered);
    if directory_entries > MAX_DIRECTORY_ENTRIES {
        return Err(Error::corrupt(format!(
            "capacity of {capacity} bytes needs {directory_entries} grain directory entries, \
             expected at most {MAX_DIRECTORY_ENTRIES}"
        )));
    }
    let redundant = fields.u64("rgdOffset", 48)?;
    let directory = fields.u64("gdOffset", 56)?;
    Ok(Layout {
        kind: ExtentType::Sparse,
        capacity,
        grain,
        table_entries,
        directory_entries,
        entries: Entries::Sectors { zeroed: flags & FLAG_ZEROED_GRAIN != 0 },
        descriptor: descriptor_span(fields)?,
        directory: match directory {
            DIRECTORY_AT_END => None,
            sectors => Some(bytes_of("gdOffset", sectors)?),
        },
        has_footer: directory == DIRECTORY_AT_END,
        redundant: if flags & FLAG_REDUNDANT_DIRECTORY != 0 && redundant != 0 {
            Some(bytes_of("rgdOffset", redundant)?)
        } else {
            None
        },
        // Only a hint for scans, not worth refusing a disk.
        overhead: fields.u64("overHead", 64)?.saturating_mul(SECTOR),
        compressed,
        unclean: fields.u8("uncleanShutdown", 72)? != 0,
    })
}

/// Reads the header at the front of `file` alone.
pub(crate) fn read_front(file: &dyn BlockDevice) -> Result<Layout> {
    let mut bytes = [0; HEADER_LEN];
    if file.size() < SECTOR {
        return Err(Error::corrupt(format!(
            "file of {} bytes ends inside the VMDK sparse header",
            file.size()
        )));
    }
    file.read_at(&mut bytes, 0)?;
    parse(&bytes)
}

/// Reads the header at the front of `file`, and its footer where that is needed. A stream
/// without a footer comes back without a directory.
pub(crate) fn read(file: &dyn BlockDevice) -> Result<Layout> {
    let header = read_front(file)?;
    if header.directory.is_some() {
        return Ok(header);
    }
    match footer::find(file, &header)? {
        Some(footer) => merge(&header, &footer),
        None => Ok(header),
    }
}

/// The header of a stream with the places that its footer knows.
pub(crate) fn merge(header: &Layout, footer: &Layout) -> Result<Layout> {
    if (footer.capacity, footer.grain, footer.table_entries, footer.compressed)
        != (header.capacity, header.grain, header.table_entries, header.compressed)
    {
        return Err(Error::corrupt(
            "the footer of the VMDK stream contradicts its header in capacity, grain size, \
             table size or compression",
        ));
    }
    Ok(Layout {
        descriptor: header.descriptor,
        overhead: header.overhead,
        has_footer: true,
        ..footer.clone()
    })
}

pub(crate) fn bytes_of(name: &str, sectors: u64) -> Result<u64> {
    sectors
        .checked_mul(SECTOR)
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or_else(|| Error::corrupt(format!("{name} is {sectors} sectors, more than 2^63 bytes")))
}

pub(crate) fn grain_size(sectors: u64, compressed: bool) -> Result<NonZeroU64> {
    let grain = sectors.saturating_mul(SECTOR);
    if !sectors.is_power_of_two() || sectors < 8 || grain > MAX_GRAIN {
        return Err(Error::corrupt(format!(
            "grainSize is {sectors} sectors, expected a power of two from 8 to {}",
            MAX_GRAIN / SECTOR
        )));
    }
    if compressed && grain > MAX_COMPRESSED_GRAIN {
        return Err(Error::unsupported(format!(
            "compressed grains of {grain} bytes, expected at most {MAX_COMPRESSED_GRAIN}"
        )));
    }
    Ok(NonZeroU64::new(grain).expect("at least 8 sectors"))
}

fn descriptor_span(fields: LittleEndian<'_>) -> Result<Option<Span>> {
    let start = bytes_of("descriptorOffset", fields.u64("descriptorOffset", 28)?)?;
    let len = bytes_of("descriptorSize", fields.u64("descriptorSize", 36)?)?;
    if start == 0 || len == 0 {
        return Ok(None);
    }
    if len > MAX_DESCRIPTOR {
        return Err(Error::corrupt(format!(
            "embedded descriptor is {len} bytes, expected at most {MAX_DESCRIPTOR}"
        ))
        .at(start));
    }
    Ok(Some(Span::new(start, len)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tranship_block::{ErrorKind, MemoryDevice};

    /// A header of one table's worth of 4 KiB grains; sectors as given.
    pub(crate) fn header(capacity: u64, flags: u32, redundant: u64, directory: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..8].copy_from_slice(&1_u32.to_le_bytes());
        bytes[8..12].copy_from_slice(&(flags | 1).to_le_bytes());
        bytes[12..20].copy_from_slice(&capacity.to_le_bytes());
        bytes[20..28].copy_from_slice(&8_u64.to_le_bytes());
        bytes[44..48].copy_from_slice(&512_u32.to_le_bytes());
        bytes[48..56].copy_from_slice(&redundant.to_le_bytes());
        bytes[56..64].copy_from_slice(&directory.to_le_bytes());
        bytes[73..77].copy_from_slice(b"\n \r\n");
        if flags & FLAG_MARKERS != 0 {
            bytes[77] = 1;
        }
        bytes
    }

    #[test]
    fn every_limit_is_named() {
        let cases: &[(usize, &[u8], ErrorKind, &str)] = &[
            (0, b"COWD", ErrorKind::Corrupt, "magicNumber"),
            (4, &[4], ErrorKind::Unsupported, "VMDK version is 4"),
            (4, &[0], ErrorKind::Unsupported, "VMDK version is 0"),
            (73, b"\n \n\n", ErrorKind::Corrupt, "text mode"),
            (77, &[2], ErrorKind::Unsupported, "compressAlgorithm is 2"),
            (77, &[1], ErrorKind::Unsupported, "without markers"),
            (12, &[0xff; 8], ErrorKind::Corrupt, "capacity is 18446744073709551615 sectors"),
            (17, &[0x10], ErrorKind::Corrupt, "grain directory entries"),
            (20, &[3], ErrorKind::Corrupt, "grainSize is 3 sectors"),
            (20, &[0], ErrorKind::Corrupt, "grainSize is 0 sectors"),
            (20, &[4], ErrorKind::Corrupt, "grainSize is 4 sectors"),
            (20, &[0, 0, 0x40], ErrorKind::Corrupt, "grainSize is 4194304 sectors"),
            (44, &[0, 0], ErrorKind::Corrupt, "numGTEsPerGT is 0"),
            (44, &[1, 2], ErrorKind::Corrupt, "numGTEsPerGT is 513"),
            (56, &[0xfe; 8], ErrorKind::Corrupt, "gdOffset is"),
            (28, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff], ErrorKind::Corrupt, "embedded descriptor is"),
        ];
        for (at, patch, kind, text) in cases {
            let mut bytes = header(2048, 0, 0, 1);
            bytes[*at..at + patch.len()].copy_from_slice(patch);
            let error = parse(&bytes).unwrap_err();
            assert_eq!(error.kind(), *kind, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        assert!(parse(&header(2048, 0, 0, 1)[..70]).is_err());
    }

    #[test]
    fn a_footer_is_found_behind_padding() {
        let mut stream = header(2048, 1 << 17, 0, u64::MAX);
        stream[64] = 8;
        stream.resize(4096, 0);
        let mut marker = vec![0; 512];
        marker[0] = 1;
        marker[12] = 3;
        stream.extend(marker);
        stream.extend(header(2048, 1 << 17, 0, 5));
        stream.resize(stream.len() + 512, 0);
        for padding in [0, 1, 511, 512, 10_240, 1 << 20, 5 << 20] {
            let mut padded = stream.clone();
            padded.resize(stream.len() + padding, 0x55);
            let header = read(&MemoryDevice::new(padded)).unwrap();
            assert_eq!(header.directory, Some(5 * 512), "padding of {padding}");
        }
        stream.truncate(4096);
        assert_eq!(read(&MemoryDevice::new(stream)).unwrap().directory, None);
    }

    #[test]
    fn a_footer_of_another_disk_is_refused() {
        let mut stream = header(2048, 1 << 17, 0, u64::MAX);
        let mut marker = vec![0; 512];
        marker[12] = 3;
        stream.extend(marker);
        stream.extend(header(4096, 1 << 17, 0, 5));
        stream.resize(stream.len() + 512, 0);
        let error = read(&MemoryDevice::new(stream)).unwrap_err();
        assert!(error.to_string().contains("contradicts"), "{error}");
    }
}
