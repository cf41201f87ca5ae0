// SPDX-License-Identifier: Apache-2.0 OR MIT
//! File identifier and the two headers (MS-VHDX 2.2.1 and 2.2.2).

use crate::Guid;
use crate::bytes::{MIB, SECTOR, checksum, put, read, seal, to_u64};
use tranship_block::{BlockDevice, Error, LittleEndian, Result, Span, Storage};

/// The first bytes of the file.
pub(crate) const MAGIC: &[u8; 8] = b"vhdxfile";
/// Bytes of the creator field that follows.
pub(crate) const CREATOR_LEN: usize = 512;
/// Where the two copies lie.
const COPIES: [u64; 2] = [64 << 10, 128 << 10];

/// What is in a header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    pub(crate) file_write: Guid,
    pub(crate) data_write: Guid,
    /// Nil if the log holds nothing that the file lacks.
    pub(crate) log_guid: Guid,
    pub(crate) log: Log,
}

/// Where the log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Log {
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Log {
    pub(crate) fn span(self) -> Span {
        Span::new(self.offset, u64::from(self.length))
    }
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let fields = LittleEndian(bytes, "VHDX header");
        let signature = fields.bytes("signature", 0, 4)?;
        if signature != b"head" {
            return Err(Error::corrupt("signature of the header is not \"head\""));
        }
        let (found, expected) = (fields.u32("checksum", 4)?, checksum(bytes));
        if found != expected {
            return Err(Error::corrupt(format!(
                "checksum of the header is {found:#010x}, expected {expected:#010x}"
            )));
        }
        let version = fields.u16("version", 66)?;
        if version != 1 {
            return Err(Error::unsupported(format!("VHDX version is {version}, expected 1")));
        }
        let header = Self {
            sequence: fields.u64("sequence number", 8)?,
            file_write: guid(&fields, "file write GUID", 16)?,
            data_write: guid(&fields, "data write GUID", 32)?,
            log_guid: guid(&fields, "log GUID", 48)?,
            log: Log {
                offset: fields.u64("log offset", 72)?,
                length: fields.u32("log length", 68)?,
            },
        };
        let log_version = fields.u16("log version", 64)?;
        if log_version != 0 && !header.log_guid.is_nil() {
            return Err(Error::unsupported(format!("log version is {log_version}, expected 0")));
        }
        Ok(header)
    }

    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR];
        put(&mut bytes, 0, b"head");
        put(&mut bytes, 8, &self.sequence.to_le_bytes());
        put(&mut bytes, 16, &self.file_write.to_bytes());
        put(&mut bytes, 32, &self.data_write.to_bytes());
        put(&mut bytes, 48, &self.log_guid.to_bytes());
        put(&mut bytes, 66, &1_u16.to_le_bytes());
        put(&mut bytes, 68, &self.log.length.to_le_bytes());
        put(&mut bytes, 72, &self.log.offset.to_le_bytes());
        seal(&mut bytes);
        bytes
    }
}

/// The GUID called `name` at byte `at`.
pub(crate) fn guid(fields: &LittleEndian<'_>, name: &str, at: usize) -> Result<Guid> {
    let bytes = fields.bytes(name, at, 16)?;
    Ok(Guid::from_bytes(bytes.first_chunk().copied().unwrap_or_default()))
}

/// Both headers.
#[derive(Clone, Debug)]
pub(crate) struct Headers {
    /// The valid one with the higher sequence number.
    pub(crate) current: Header,
    /// Which of the two copies that is.
    slot: usize,
    /// What is wrong with the copies that cannot be used.
    pub(crate) damage: Vec<String>,
}

impl Headers {
    pub(crate) fn read(file: &dyn BlockDevice) -> Result<Self> {
        let copy = |offset| {
            read(file, "header", offset, SECTOR)
                .and_then(|bytes| Header::parse(&bytes))
                .map_err(|error| error.at(offset))
        };
        let [first, second] = COPIES.map(copy);
        let damage = [&first, &second]
            .iter()
            .zip(1..)
            .filter_map(|(copy, number)| {
                copy.as_ref().err().map(|error| format!("header {number} is unusable: {error}"))
            })
            .collect();
        let (current, slot) = match (first, second) {
            (Ok(first), Ok(second)) if first.sequence == second.sequence && first != second => {
                return Err(Error::corrupt(format!(
                    "both headers have sequence number {}, but differ",
                    first.sequence
                ))
                .at(64 << 10));
            }
            (Ok(first), Ok(second)) if second.sequence > first.sequence => (second, 1),
            (Ok(first), _) => (first, 0),
            (Err(_), Ok(second)) => (second, 1),
            (Err(error), Err(_)) if error.kind() == tranship_block::ErrorKind::Unsupported => {
                return Err(error);
            }
            (Err(error), Err(_)) => {
                return Err(Error::corrupt("both headers are unusable")
                    .at(64 << 10)
                    .because(error));
            }
        };
        Ok(Self { current, slot, damage })
    }

    /// What salvage goes on with when both headers are lost: no log.
    pub(crate) fn lost(damage: String) -> Self {
        Self { current: Header::default(), slot: 0, damage: vec![damage] }
    }

    /// Two equal headers for a new image.
    pub(crate) fn new(current: Header) -> Self {
        Self { current, slot: 0, damage: Vec::new() }
    }

    /// Writes what `change` makes of the current header, twice: the copy that is not
    /// current first, so that there is a valid one at any time (2.2.2.1).
    pub(crate) fn update(
        &mut self,
        storage: &dyn Storage,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut new = self.current;
        change(&mut new);
        for _ in COPIES {
            new.sequence = new.sequence.checked_add(1).ok_or_else(|| {
                Error::corrupt("sequence number of the header has reached its limit")
            })?;
            let slot = usize::from(self.slot == 0);
            let offset = COPIES.get(slot).copied().unwrap_or(MIB);
            storage.write_at(&new.to_bytes(), offset)?;
            storage.flush()?;
            self.current = new;
            self.slot = slot;
        }
        self.damage.clear();
        Ok(())
    }
}

/// Checks the first bytes, and returns who made the file.
pub(crate) fn read_creator(file: &dyn BlockDevice) -> Result<String> {
    let start = read(file, "file identifier", 0, MAGIC.len())?;
    if start != MAGIC {
        return Err(Error::corrupt("file does not begin with \"vhdxfile\"").at(0));
    }
    let bytes = read(file, "file identifier", to_u64(MAGIC.len()), CREATOR_LEN)?;
    Ok(utf16(&bytes))
}

/// UTF-16LE text up to its end or a NUL, for people: no control characters.
pub(crate) fn utf16(bytes: &[u8]) -> String {
    let units = bytes.as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair));
    char::decode_utf16(units.take_while(|unit| *unit != 0))
        .map(|c| c.ok().filter(|c| !c.is_control()).unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

/// `text` as UTF-16LE.
pub(crate) fn to_utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    fn headers(first: Option<u64>, second: Option<u64>) -> MemoryDevice {
        let device = MemoryDevice::new(vec![0; 1 << 20]);
        for (sequence, offset) in [first, second].into_iter().zip(COPIES) {
            let data_write = Guid::from_bytes([u8::try_from(offset >> 16).unwrap(); 16]);
            if let Some(sequence) = sequence {
                let header = Header { sequence, data_write, ..Header::default() };
                device.write_at(&header.to_bytes(), offset).unwrap();
            }
        }
        device
    }

    #[test]
    fn the_valid_header_with_the_higher_number_is_current() {
        for (first, second, slot) in
            [(Some(7), Some(8), 1), (Some(9), Some(8), 0), (Some(7), None, 0), (None, Some(3), 1)]
        {
            let found = Headers::read(&headers(first, second)).unwrap();
            assert_eq!(found.slot, slot, "{first:?} {second:?}");
            assert_eq!(found.damage.len(), usize::from(first.is_none() || second.is_none()));
        }
        let error = Headers::read(&headers(None, None)).unwrap_err();
        assert_eq!(error.message(), "both headers are unusable");
        let error = Headers::read(&headers(Some(4), Some(4))).unwrap_err();
        assert_eq!(error.message(), "both headers have sequence number 4, but differ");
    }

    #[test]
    fn an_update_reaches_both_copies_and_mends_a_bad_one() {
        let device = headers(Some(5), None);
        let mut found = Headers::read(&device).unwrap();
        found.update(&device, |header| header.log_guid = Guid::from_bytes([1; 16])).unwrap();
        let again = Headers::read(&device).unwrap();
        assert_eq!((again.current.sequence, again.slot, again.damage.len()), (7, 0, 0));
        assert_eq!(again.current, found.current);
        device.write_at(&[0xff], COPIES[0] + 4000).unwrap();
        let other = Headers::read(&device).unwrap().current;
        assert_eq!(Header { sequence: 7, ..other }, found.current);
    }

    #[test]
    fn creators_are_printable() {
        assert_eq!(utf16(&to_utf16("QEMU \u{1b}x\0rest")), "QEMU \u{fffd}x");
        assert_eq!(utf16(&[0x00, 0xd8, 0x41, 0]), "\u{fffd}A");
    }
}
