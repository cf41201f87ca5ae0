// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The directory of persistent bitmaps: which there are and where their tables lie.

use crate::first_cluster::{FirstCluster, field};
use crate::geometry::{Geometry, to_u64, to_usize};
use tranship_block::{BigEndian, BlockDevice, Error, Result};

/// Type of the header extension that points to the directory.
pub(crate) const EXTENSION: u32 = 0x2385_2875;
/// Autoclear bit 0: what the extension says is up to date.
pub(crate) const UP_TO_DATE: u64 = 1;

/// The last writer died, or is still at work: the bits say nothing.
pub(crate) const IN_USE: u32 = 1;
/// Every write to the disk has to set bits.
pub(crate) const AUTO: u32 = 1 << 1;
const KNOWN_FLAGS: u32 = 7;

pub(crate) const MOST_BITMAPS: u32 = 65_535;
const LARGEST_DIRECTORY: u64 = 64 << 20;
/// 128 Mi entries of 8 bytes.
const LARGEST_TABLE: u64 = 1 << 30;
pub(crate) const LONGEST_NAME: usize = 1023;
/// Bytes of an entry before its extra data.
const FIXED: usize = 24;
/// Bits 9 to 55 of a table entry.
pub(crate) const ENTRY_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An entry of the directory.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) table_offset: u64,
    /// Entries of the table.
    pub(crate) table_size: u32,
    pub(crate) flags: u32,
    pub(crate) granularity_bits: u8,
    extra: Vec<u8>,
}

impl Entry {
    pub(crate) fn new(name: &str, granularity_bits: u8, flags: u32) -> Self {
        Self {
            name: name.to_owned(),
            table_offset: 0,
            table_size: 0,
            flags,
            granularity_bits,
            extra: Vec::new(),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.table_offset.to_be_bytes().to_vec();
        bytes.extend(self.table_size.to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        // Type 1: bits that say what has been written to.
        bytes.extend([1, self.granularity_bits]);
        bytes.extend(u16::try_from(self.name.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend(u32::try_from(self.extra.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(&self.extra);
        bytes.extend(self.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

/// Bytes of the directory with these entries.
pub(crate) fn encode(entries: &[Entry]) -> Vec<u8> {
    entries.iter().flat_map(Entry::encode).collect()
}

/// The directory and where it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Directory {
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) size: u64,
    pub(crate) entries: Vec<Entry>,
}

/// What the extension says: number of bitmaps, size and offset of the directory.
pub(crate) fn extension(first: &FirstCluster) -> Result<Option<(u32, u64, u64)>> {
    let Some(content) = first.extension(EXTENSION) else { return Ok(None) };
    if first.u64(field::AUTOCLEAR) & UP_TO_DATE == 0 {
        return Ok(None);
    }
    let fields = BigEndian(content, "bitmaps header extension");
    Ok(Some((
        fields.u32("nb_bitmaps", 0)?,
        fields.u64("bitmap_directory_size", 8)?,
        fields.u64("bitmap_directory_offset", 16)?,
    )))
}

/// The content of the extension for a directory.
pub(crate) fn extension_content(number: usize, size: u64, offset: u64) -> Vec<u8> {
    let mut content = u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    content.extend([0; 4]);
    content.extend(size.to_be_bytes());
    content.extend(offset.to_be_bytes());
    content
}

impl Directory {
    /// Reads the directory; `None` without bitmaps, or where they are out of date.
    pub(crate) fn read(
        file: &dyn BlockDevice,
        first: &FirstCluster,
        geometry: Geometry,
    ) -> Result<Option<Self>> {
        let Some((number, size, offset)) = extension(first)? else { return Ok(None) };
        if number == 0 {
            return Ok(None);
        }
        let fits = offset.checked_add(size).is_some_and(|end| end <= file.size());
        if number > MOST_BITMAPS
            || size > LARGEST_DIRECTORY
            || geometry.within(offset) != 0
            || offset == 0
            || !fits
        {
            return Err(Error::corrupt(format!(
                "bitmap directory of {number} bitmaps and {size} bytes at {offset:#x} is past \
                 its limits, unaligned or outside of the file"
            ))
            .at(offset));
        }
        let mut bytes = vec![0; to_usize(size)?];
        file.read_at(&mut bytes, offset)?;
        let mut entries = Vec::new();
        let mut at = 0_usize;
        for index in 0..number {
            let (entry, len) = parse(bytes.get(at..).unwrap_or_default(), geometry)
                .map_err(|error| Error::corrupt(format!("bitmap {index}: {}", error.message())))
                .map_err(|error| error.at(offset.saturating_add(to_u64(at))))?;
            entries.push(entry);
            at = at.saturating_add(len);
        }
        if at != bytes.len() {
            return Err(Error::corrupt(format!(
                "bitmap directory has {size} bytes, but its {number} bitmaps take {at}"
            ))
            .at(offset));
        }
        Ok(Some(Self { offset, size, entries }))
    }
}

fn parse(bytes: &[u8], geometry: Geometry) -> Result<(Entry, usize)> {
    let fields = BigEndian(bytes, "bitmap directory");
    let table_offset = fields.u64("bitmap_table_offset", 0)?;
    let table_size = fields.u32("bitmap_table_size", 8)?;
    let flags = fields.u32("flags", 12)?;
    let kind = fields.u8("type", 16)?;
    let granularity_bits = fields.u8("granularity_bits", 17)?;
    let name_len = usize::from(fields.u16("name_size", 18)?);
    let extra_len = to_usize(u64::from(fields.u32("extra_data_size", 20)?))?;
    if kind != 1 || flags & !KNOWN_FLAGS != 0 || !(9..=31).contains(&granularity_bits) {
        return Err(Error::corrupt(format!(
            "has type {kind}, flags {flags:#x} and granularity_bits {granularity_bits}, expected \
             1, at most {KNOWN_FLAGS:#x} and 9 to 31"
        )));
    }
    if geometry.within(table_offset) != 0
        || u64::from(table_size).saturating_mul(8) > LARGEST_TABLE
        || name_len == 0
        || name_len > LONGEST_NAME
    {
        return Err(Error::corrupt(format!(
            "has a table of {table_size} entries at {table_offset:#x} and a name of {name_len} \
             bytes, past their limits"
        )));
    }
    let extra = fields.bytes("extra data", FIXED, extra_len)?.to_vec();
    let name = fields.bytes("name", FIXED.saturating_add(extra_len), name_len)?;
    let name = crate::extensions::text(name, "bitmap")?;
    let len = FIXED.saturating_add(extra_len).saturating_add(name_len).next_multiple_of(8);
    let entry = Entry { name, table_offset, table_size, flags, granularity_bits, extra };
    Ok((entry, len))
}
