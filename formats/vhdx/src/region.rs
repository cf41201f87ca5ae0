// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The two region tables (MS-VHDX 2.2.3).

use crate::Guid;
use crate::bytes::{MIB, SECTOR, SECTOR_BYTES, checksum, mib_up, put, read, seal};
use crate::header::guid;
use crate::log::Sector;
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span};

/// Where the two copies lie.
pub(crate) const COPIES: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a table.
const LEN: usize = 64 << 10;
/// Entries that fit.
const MOST: u32 = 2047;

const BAT: Guid =
    Guid::known(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
const METADATA: Guid =
    Guid::known(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);

/// Where the regions are, as far as it matters.
#[derive(Clone, Debug)]
pub(crate) struct Regions {
    pub(crate) bat: Span,
    pub(crate) metadata: Span,
    /// Regions of an unknown kind that may be ignored, but not overwritten.
    pub(crate) others: Vec<Span>,
    /// What is wrong with the copies that cannot be used.
    pub(crate) damage: Vec<String>,
    /// The bytes of the copy that is used.
    table: Vec<u8>,
    /// Where the BAT's entry is in them.
    bat_entry: usize,
}

impl Regions {
    /// The first table, or the second one if the first is damaged.
    pub(crate) fn read(file: &dyn BlockDevice) -> Result<Self> {
        let copy = |offset| {
            read(file, "region table", offset, LEN)
                .and_then(|bytes| Self::parse(bytes, file.size()))
                .map_err(|error| error.at(offset))
        };
        let [first, second] = COPIES.map(copy);
        let damage = [&first, &second]
            .iter()
            .zip(1..)
            .filter_map(|(copy, number)| {
                copy.as_ref()
                    .err()
                    .map(|error| format!("region table {number} is unusable: {error}"))
            })
            .collect();
        match (first, second) {
            // A whole table that asks for what is not known is not damaged.
            (Err(error), _) if error.kind() == tranship_block::ErrorKind::Unsupported => Err(error),
            (Ok(regions), _) | (Err(_), Ok(regions)) => Ok(Self { damage, ..regions }),
            (Err(error), Err(_)) => Err(error),
        }
    }

    fn parse(table: Vec<u8>, file_len: u64) -> Result<Self> {
        let fields = LittleEndian(&table, "region table");
        if fields.bytes("signature", 0, 4)? != b"regi" {
            return Err(Error::corrupt("signature of the region table is not \"regi\""));
        }
        let (found, expected) = (fields.u32("checksum", 4)?, checksum(&table));
        if found != expected {
            return Err(Error::corrupt(format!(
                "checksum of the region table is {found:#010x}, expected {expected:#010x}"
            )));
        }
        let count = fields.u32("entry count", 8)?;
        if count > MOST {
            return Err(Error::corrupt(format!(
                "region table has {count} entries, expected at most {MOST}"
            )));
        }
        let (mut bat, mut metadata, mut others, mut bat_entry) = (None, None, Vec::new(), 0);
        for at in (16..).step_by(32).take(usize::try_from(count).unwrap_or(0)) {
            let kind = guid(&fields, "region GUID", at)?;
            let offset = fields.u64("region offset", at.saturating_add(16))?;
            let length = fields.u32("region length", at.saturating_add(24))?;
            let required = fields.u32("required", at.saturating_add(28))? & 1 == 1;
            let span = Span::new(offset, u64::from(length));
            let known = match kind {
                BAT => Some(&mut bat),
                METADATA => Some(&mut metadata),
                _ if required => {
                    return Err(Error::unsupported(format!("region {kind} is not known")));
                }
                _ => None,
            };
            if kind == BAT {
                bat_entry = at;
            }
            if offset < MIB || offset.checked_rem(MIB) != Some(0) || length == 0 {
                return Err(Error::corrupt(format!(
                    "region {kind} of {length} bytes starts at {offset:#x}, expected a multiple \
                     of 1 MiB behind the header"
                )));
            }
            if span.end() > file_len {
                return Err(Error::corrupt(format!(
                    "region {kind} at {offset:#x} ends past the file's {file_len} bytes"
                )));
            }
            match known {
                Some(place) if place.is_some() => {
                    return Err(Error::corrupt(format!("region {kind} occurs twice")));
                }
                Some(place) => *place = Some(span),
                None => others.push(span),
            }
        }
        let missing = |name| Error::corrupt(format!("region table has no {name} region"));
        Ok(Self {
            bat: bat.ok_or_else(|| missing("BAT"))?,
            metadata: metadata.ok_or_else(|| missing("metadata"))?,
            others,
            damage: Vec::new(),
            table,
            bat_entry,
        })
    }

    /// All regions.
    pub(crate) fn spans(&self) -> impl Iterator<Item = Span> + '_ {
        [self.bat, self.metadata].into_iter().chain(self.others.iter().copied())
    }

    /// Moves the BAT in the table; the caller writes [`Self::sectors`].
    pub(crate) fn move_bat(&mut self, bat: Span) {
        let length = u32::try_from(bat.len).unwrap_or(u32::MAX);
        put(&mut self.table, self.bat_entry.saturating_add(16), &bat.start.to_le_bytes());
        put(&mut self.table, self.bat_entry.saturating_add(24), &length.to_le_bytes());
        seal(&mut self.table);
        self.bat = bat;
    }

    /// The sectors of both copies that differ from what the file has.
    pub(crate) fn sectors(&self, file: &dyn BlockDevice) -> Result<Vec<Sector>> {
        let mut changed = Vec::new();
        for copy in COPIES {
            let now = read(file, "region table", copy, LEN)?;
            let pairs = self.table.as_chunks::<SECTOR>().0.iter().zip(now.chunks(SECTOR));
            for (number, (new, old)) in (0_u64..).zip(pairs) {
                if new != old {
                    let at = copy.saturating_add(number.saturating_mul(SECTOR_BYTES));
                    changed.push(Sector { at, bytes: Box::new(*new) });
                }
            }
        }
        Ok(changed)
    }
}

/// The table of a new image.
pub(crate) fn new_table(bat: Span, metadata: Span) -> Vec<u8> {
    let mut table = vec![0; LEN];
    put(&mut table, 0, b"regi");
    put(&mut table, 8, &2_u32.to_le_bytes());
    for (at, kind, span) in [(16, BAT, bat), (48, METADATA, metadata)] {
        put(&mut table, at, &kind.to_bytes());
        put(&mut table, at.saturating_add(16), &span.start.to_le_bytes());
        let length = u32::try_from(span.len).unwrap_or(u32::MAX);
        put(&mut table, at.saturating_add(24), &length.to_le_bytes());
        put(&mut table, at.saturating_add(28), &1_u32.to_le_bytes());
    }
    seal(&mut table);
    table
}

/// Checks that nothing of `spans` shares a byte; each is rounded up to whole MiB.
pub(crate) fn check_apart(spans: impl Iterator<Item = Span>) -> Result<()> {
    let mut sorted: Vec<Span> = spans.map(|span| Span::new(span.start, mib_up(span.len))).collect();
    sorted.sort_by_key(|span| span.start);
    for (before, after) in sorted.iter().zip(sorted.iter().skip(1)) {
        if before.end() > after.start {
            return Err(Error::corrupt(format!(
                "header, log or regions overlap: one is at {:#x} with {} bytes",
                before.start, before.len
            ))
            .at(after.start));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use crate::bytes::to_u64;
    use tranship_block::MemoryDevice;

    fn device() -> MemoryDevice {
        let device = MemoryDevice::new(vec![0; 8 << 20]);
        let table = new_table(Span::new(3 << 20, 1 << 20), Span::new(2 << 20, 1 << 20));
        for copy in COPIES {
            device.write_at(&table, copy).unwrap();
        }
        device
    }

    #[test]
    fn the_second_table_stands_in_for_the_first() {
        let device = device();
        assert!(Regions::read(&device).unwrap().damage.is_empty());
        device.write_at(&[1], COPIES[0] + to_u64(LEN) - 1).unwrap();
        let regions = Regions::read(&device).unwrap();
        assert_eq!(regions.bat, Span::new(3 << 20, 1 << 20));
        assert!(regions.damage[0].starts_with("region table 1 is unusable: checksum"));
        assert_eq!(regions.sectors(&device).unwrap().len(), 1);
        device.write_at(&[1], COPIES[1]).unwrap();
        let error = Regions::read(&device).unwrap_err();
        assert!(error.message().starts_with("checksum of the region table is"), "{error}");
    }

    #[test]
    fn entries_that_lie_are_refused() {
        let cases: [(usize, &[u8], &str); 6] = [
            (8, &3000_u32.to_le_bytes(), "has 3000 entries"),
            (8, &1_u32.to_le_bytes(), "no metadata region"),
            (16, &METADATA.to_bytes(), "occurs twice"),
            (16, &[7; 16], "is not known"),
            (32, &0x30_1000_u64.to_le_bytes(), "starts at 0x301000"),
            (40, &(7_u32 << 20).to_le_bytes(), "ends past the file's 8388608 bytes"),
        ];
        for (at, bytes, text) in cases {
            let device = device();
            let mut table = new_table(Span::new(3 << 20, 1 << 20), Span::new(2 << 20, 1 << 20));
            put(&mut table, at, bytes);
            seal(&mut table);
            for copy in COPIES {
                device.write_at(&table, copy).unwrap();
            }
            let error = Regions::read(&device).unwrap_err();
            assert!(error.message().contains(text), "{error}");
        }
    }
}
