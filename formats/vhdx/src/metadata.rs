// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The metadata region: what the disk is (MS-VHDX 2.6).

use crate::Guid;
use crate::bytes::{put, read, to_u64, to_usize};
use crate::header::guid;
use crate::locator::ParentLocator;
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span};

/// Bytes of the table at the start of the region; items lie behind it.
const TABLE_LEN: usize = 64 << 10;
/// Largest item.
const LARGEST_ITEM: u32 = 1 << 20;
/// Entries that fit.
const MOST: u16 = 2047;
/// Largest disk: 64 TiB.
pub(crate) const LARGEST_DISK: u64 = 64 << 40;
/// Smallest and largest block.
pub(crate) const BLOCKS: std::ops::RangeInclusive<u32> = 1 << 20..=256 << 20;

const FILE_PARAMETERS: Guid =
    Guid::known(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
const SIZE: Guid =
    Guid::known(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
const DISK_ID: Guid =
    Guid::known(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);
const LOGICAL_SECTOR: Guid =
    Guid::known(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
const PHYSICAL_SECTOR: Guid =
    Guid::known(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);
const PARENT_LOCATOR: Guid =
    Guid::known(0xa8d3_5f2d, 0xb30b, 0x454d, [0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c]);

/// What the disk is.
#[derive(Clone, Debug)]
pub(crate) struct Metadata {
    pub(crate) block_size: u32,
    /// Blocks stay allocated: a fixed disk.
    pub(crate) leave_allocated: bool,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    /// Where that number lies in the file.
    pub(crate) size_at: u64,
    pub(crate) disk_id: Guid,
    pub(crate) logical_sector: u32,
    pub(crate) physical_sector: u32,
    /// What a differencing disk says about its parent.
    pub(crate) parent: Option<ParentLocator>,
}

/// The items that are known, where they are.
#[derive(Default)]
struct Items {
    parameters: Option<Span>,
    size: Option<Span>,
    disk_id: Option<Span>,
    logical: Option<Span>,
    physical: Option<Span>,
    locator: Option<Span>,
}

impl Items {
    fn place(&mut self, id: Guid) -> Option<&mut Option<Span>> {
        Some(match id {
            FILE_PARAMETERS => &mut self.parameters,
            SIZE => &mut self.size,
            DISK_ID => &mut self.disk_id,
            LOGICAL_SECTOR => &mut self.logical,
            PHYSICAL_SECTOR => &mut self.physical,
            PARENT_LOCATOR => &mut self.locator,
            _ => return None,
        })
    }
}

impl Metadata {
    pub(crate) fn read(file: &dyn BlockDevice, region: Span) -> Result<Self> {
        let items = read_table(file, region)?;
        let item = |name: &str, place: Option<Span>| -> Result<Vec<u8>> {
            let place =
                place.ok_or_else(|| Error::corrupt(format!("metadata item {name} is missing")))?;
            read(file, "metadata item", place.start, to_usize(place.len)?)
        };
        let parameters = item("file parameters", items.parameters)?;
        let parameters = LittleEndian(&parameters, "metadata item");
        let block_size = parameters.u32("block size", 0)?;
        let flags = parameters.u32("flags", 4)?;
        if !BLOCKS.contains(&block_size) || !block_size.is_power_of_two() {
            return Err(Error::corrupt(format!(
                "block size is {block_size} bytes, expected a power of two from 1 to 256 MiB"
            )));
        }
        let sector = |name: &str, place: Option<Span>| -> Result<u32> {
            let bytes = item(name, place)?;
            match LittleEndian(&bytes, "metadata item").u32(name, 0)? {
                size @ (512 | 4096) => Ok(size),
                other => {
                    Err(Error::corrupt(format!("{name} is {other} bytes, expected 512 or 4096")))
                }
            }
        };
        let logical_sector = sector("logical sector size", items.logical)?;
        let physical_sector = sector("physical sector size", items.physical)?;
        let size = item("virtual disk size", items.size)?;
        let size = LittleEndian(&size, "metadata item").u64("virtual disk size", 0)?;
        check_size(size, logical_sector).map_err(Error::corrupt)?;
        let disk_id = item("virtual disk id", items.disk_id)?;
        let disk_id = guid(&LittleEndian(&disk_id, "metadata item"), "virtual disk id", 0)?;
        let parent = if flags & 2 == 0 {
            None
        } else {
            Some(ParentLocator::parse(&item("parent locator", items.locator)?)?)
        };
        Ok(Self {
            block_size,
            leave_allocated: flags & 1 == 1,
            size,
            size_at: items.size.map_or(0, |place| place.start),
            disk_id,
            logical_sector,
            physical_sector,
            parent,
        })
    }
}

/// Whether a disk can have this size; if not, why.
pub(crate) fn check_size(size: u64, logical_sector: u32) -> std::result::Result<(), String> {
    if size > LARGEST_DISK {
        return Err(format!("virtual disk size is {size} bytes, expected at most 64 TiB"));
    }
    if size.checked_rem(u64::from(logical_sector)) != Some(0) {
        return Err(format!(
            "virtual disk size is {size} bytes, expected a multiple of the logical sector of \
             {logical_sector}"
        ));
    }
    Ok(())
}

fn read_table(file: &dyn BlockDevice, region: Span) -> Result<Items> {
    if region.len < to_u64(TABLE_LEN) {
        return Err(Error::corrupt(format!(
            "metadata region has {} bytes, expected at least 64 KiB",
            region.len
        ))
        .at(region.start));
    }
    let table = read(file, "metadata table", region.start, TABLE_LEN)?;
    let fields = LittleEndian(&table, "metadata table");
    if fields.bytes("signature", 0, 8)? != b"metadata" {
        return Err(
            Error::corrupt("signature of the metadata table is not \"metadata\"").at(region.start)
        );
    }
    let count = fields.u16("entry count", 10)?;
    if count > MOST {
        return Err(Error::corrupt(format!(
            "metadata table has {count} entries, expected at most {MOST}"
        ))
        .at(region.start));
    }
    let mut items = Items::default();
    for at in (32..).step_by(32).take(usize::from(count)) {
        let id = guid(&fields, "item GUID", at)?;
        let offset = fields.u32("item offset", at.saturating_add(16))?;
        let length = fields.u32("item length", at.saturating_add(20))?;
        let flags = fields.u32("item flags", at.saturating_add(24))?;
        let entry_at = region.start.saturating_add(to_u64(at));
        // Users have a name space of their own.
        let is_user = flags & 1 == 1;
        let Some(place) = items.place(id).filter(|_| !is_user) else {
            if flags & 4 != 0 {
                return Err(
                    Error::unsupported(format!("metadata item {id} is not known")).at(entry_at)
                );
            }
            continue;
        };
        let end = u64::from(offset).saturating_add(u64::from(length));
        if to_u64(TABLE_LEN) > u64::from(offset) || length > LARGEST_ITEM || end > region.len {
            return Err(Error::corrupt(format!(
                "metadata item {id} has {length} bytes at {offset:#x} of a region of {} bytes",
                region.len
            ))
            .at(entry_at));
        }
        let start = region.start.saturating_add(u64::from(offset));
        if place.replace(Span::new(start, u64::from(length))).is_some() {
            return Err(Error::corrupt(format!("metadata item {id} occurs twice")).at(entry_at));
        }
    }
    Ok(items)
}

/// The start of the metadata region of a new image: table and items.
pub(crate) fn new_region(metadata: &Metadata) -> Vec<u8> {
    let flags = u32::from(metadata.leave_allocated) | if metadata.parent.is_some() { 2 } else { 0 };
    let mut parameters = metadata.block_size.to_le_bytes().to_vec();
    parameters.extend(flags.to_le_bytes());
    // Bit 1: about the virtual disk. Bit 2: required.
    let mut items = vec![
        (FILE_PARAMETERS, 4_u32, parameters),
        (SIZE, 6, metadata.size.to_le_bytes().to_vec()),
        (DISK_ID, 6, metadata.disk_id.to_bytes().to_vec()),
        (LOGICAL_SECTOR, 6, metadata.logical_sector.to_le_bytes().to_vec()),
        (PHYSICAL_SECTOR, 6, metadata.physical_sector.to_le_bytes().to_vec()),
    ];
    if let Some(parent) = &metadata.parent {
        items.push((PARENT_LOCATOR, 4, parent.to_bytes()));
    }
    let mut region = vec![0; TABLE_LEN];
    put(&mut region, 0, b"metadata");
    let count = u16::try_from(items.len()).unwrap_or(MOST);
    put(&mut region, 10, &count.to_le_bytes());
    for (at, (id, flags, bytes)) in (32..).step_by(32).zip(items) {
        let narrow = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
        put(&mut region, at, &id.to_bytes());
        let start = region.len();
        put(&mut region, at.saturating_add(16), &narrow(start));
        put(&mut region, at.saturating_add(20), &narrow(bytes.len()));
        put(&mut region, at.saturating_add(24), &flags.to_le_bytes());
        region.extend(bytes);
    }
    region
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    fn example() -> Metadata {
        Metadata {
            block_size: 2 << 20,
            leave_allocated: true,
            size: 12_345 * 4096,
            size_at: 0,
            disk_id: Guid::from_bytes([3; 16]),
            logical_sector: 4096,
            physical_sector: 512,
            parent: None,
        }
    }

    fn parse(change: impl Fn(&mut Vec<u8>)) -> Result<Metadata> {
        let mut region = new_region(&example());
        change(&mut region);
        region.resize(1 << 20, 0);
        Metadata::read(&MemoryDevice::read_only(region), Span::new(0, 1 << 20))
    }

    #[test]
    fn what_was_written_reads_back() {
        let found = parse(|_| {}).unwrap();
        assert_eq!(found.size_at, 0x10008);
        assert_eq!(format!("{:?}", Metadata { size_at: 0, ..found }), format!("{:?}", example()));
    }

    #[test]
    fn items_that_lie_are_refused() {
        let cases: [(usize, &[u8], &str); 13] = [
            (0, b"x", "signature of the metadata table"),
            (10, &[0xff, 0xff], "has 65535 entries"),
            (10, &[4, 0], "item physical sector size is missing"),
            (32, &[1; 16], "is not known"),
            (48, &8_u32.to_le_bytes(), "has 8 bytes at 0x8"),
            (52, &u32::MAX.to_le_bytes(), "has 4294967295 bytes"),
            (52, &4_u32.to_le_bytes(), "ends before field flags"),
            (64, &FILE_PARAMETERS.to_bytes(), "occurs twice"),
            (0x10000, &[0; 4], "block size is 0 bytes"),
            (0x10002, &[0x30], "block size is 3145728 bytes"),
            (0x10004, &[2], "item parent locator is missing"),
            (0x1000f, &[1], "expected at most 64 TiB"),
            (0x10008, &[1], "expected a multiple of the logical sector"),
        ];
        for (at, bytes, text) in cases {
            let error = parse(|region| put(region, at, bytes)).unwrap_err();
            assert!(error.message().contains(text), "{at:#x}: {error}");
        }
        let error = parse(|region| put(region, 0x10020, &520_u32.to_le_bytes())).unwrap_err();
        assert_eq!(error.message(), "logical sector size is 520 bytes, expected 512 or 4096");
    }

    #[test]
    fn unknown_items_that_are_not_required_are_ignored() {
        let user = |region: &mut Vec<u8>| {
            put(region, 10, &[6, 0]);
            put(region, 32 + 5 * 32, &SIZE.to_bytes());
            put(region, 32 + 5 * 32 + 24, &[1]);
        };
        assert!(parse(user).is_ok());
    }
}
