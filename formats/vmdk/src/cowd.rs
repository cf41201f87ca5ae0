// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header of COWD extents (`vmfsSparse`): snapshot deltas of ESX up to 6.0.

use crate::SECTOR;
use crate::create::invalidate;
use crate::header::MAX_GRAIN;
use crate::layout::{Entries, Layout};
use crate::line::ExtentType;
use std::num::NonZeroU64;
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span, Storage, Zeroing};

/// First bytes of a COWD extent.
pub(crate) const MAGIC: &[u8; 4] = b"COWD";
const TABLE_ENTRIES: NonZeroU64 = NonZeroU64::new(4096).expect("it is not zero");
pub(crate) const HEADER_LEN: u64 = 2048;
/// Where `freeSector` is, from which on ESX puts what is new.
pub(crate) const FREE_SECTOR: u64 = 28;
/// Where `uncleanShutdown` is.
const UNCLEAN: usize = 1648;

/// Reads the header at the front of `file`.
pub(crate) fn read(file: &dyn BlockDevice) -> Result<Layout> {
    let len = file.size().min(HEADER_LEN);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_at(&mut bytes, 0)?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Result<Layout> {
    let fields = LittleEndian(bytes, "COWD header");
    let magic = fields.bytes("magicNumber", 0, 4)?;
    if magic != MAGIC {
        return Err(Error::corrupt(format!("magicNumber is {magic:02x?}, expected COWD")));
    }
    let version = fields.u32("version", 4)?;
    if version != 1 {
        return Err(Error::unsupported(format!("COWD version is {version}, expected 1")));
    }
    let capacity = u64::from(fields.u32("numSectors", 12)?).saturating_mul(SECTOR);
    let sectors = u64::from(fields.u32("grainSize", 16)?);
    let grain = sectors.saturating_mul(SECTOR);
    let grain = NonZeroU64::new(grain)
        .filter(|grain| grain.is_power_of_two() && grain.get() <= MAX_GRAIN)
        .ok_or_else(|| {
            Error::corrupt(format!(
                "grainSize is {sectors} sectors, expected a power of two up to {}",
                MAX_GRAIN / SECTOR
            ))
        })?;
    let directory = u64::from(fields.u32("gdOffset", 20)?).saturating_mul(SECTOR);
    let listed = u64::from(fields.u32("numGDEntries", 24)?);
    let directory_entries = capacity.div_ceil(grain.get().saturating_mul(TABLE_ENTRIES.get()));
    if listed < directory_entries {
        return Err(Error::corrupt(format!(
            "numGDEntries is {listed}, but {capacity} bytes need {directory_entries}"
        )));
    }
    Ok(Layout {
        kind: ExtentType::VmfsSparse,
        capacity,
        grain,
        table_entries: TABLE_ENTRIES,
        directory_entries,
        entries: Entries::Sectors { zeroed: false },
        descriptor: None,
        directory: Some(directory),
        has_footer: false,
        redundant: None,
        overhead: directory,
        compressed: false,
        unclean: fields.u32("uncleanShutdown", UNCLEAN).is_ok_and(|unclean| unclean != 0),
    })
}

/// The tables of a new extent of `capacity` bytes with grains of one sector, which ESX
/// uses.
pub(crate) fn tables(capacity: u64) -> Result<u32> {
    if u32::try_from(capacity / SECTOR).is_err() {
        return Err(Error::unsupported(format!(
            "{capacity} bytes are too many for a COWD extent: it has less than 2 TiB"
        )));
    }
    let tables = capacity.div_ceil(SECTOR.saturating_mul(TABLE_ENTRIES.get()));
    Ok(u32::try_from(tables).unwrap_or(u32::MAX))
}

/// Makes `storage` an empty extent of `capacity` bytes: a header and a directory without
/// tables.
pub(crate) fn create(storage: &dyn Storage, capacity: u64) -> Result<()> {
    let tables = tables(capacity)?;
    let directory_len = u64::from(tables).saturating_mul(4).next_multiple_of(SECTOR);
    let end = HEADER_LEN.saturating_add(directory_len);
    invalidate(storage)?;
    storage.set_len(end)?;
    storage.write_zeroes(Span::new(0, end), Zeroing::MayUnmap)?;
    storage.flush()?;
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
    let fields = [
        1,
        // What ESX sets.
        3,
        sectors(capacity),
        1,
        sectors(HEADER_LEN),
        tables,
        sectors(end),
    ];
    let mut header = MAGIC.to_vec();
    header.extend(fields.into_iter().flat_map(u32::to_le_bytes));
    storage.write_at(&header, 0)?;
    storage.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_is_named() {
        let mut good = vec![0; 2048];
        for (at, value) in [(4, 1), (8, 3), (12, 4097), (16, 1), (20, 4), (24, 2)] {
            good[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        }
        good[..4].copy_from_slice(MAGIC);
        let layout = parse(&good).unwrap();
        assert_eq!((layout.capacity, layout.directory_entries), (4097 * 512, 2));
        for (at, value, text) in [
            (0, 0, "magicNumber"),
            (4, 2, "COWD version is 2"),
            (16, 0, "grainSize is 0 sectors"),
            (16, 3, "grainSize is 3 sectors"),
            (16, 1 << 22, "grainSize is 4194304 sectors"),
            (24, 1, "numGDEntries is 1, but 2097664 bytes need 2"),
        ] {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
            let error = parse(&bytes).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
        assert!(parse(&good[..20]).is_err());
    }
}
