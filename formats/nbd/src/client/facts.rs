// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a server says about an export.

use crate::wire::{MAX_STRING, export_flag, info};
use serde::{Deserialize, Serialize};
use tranship_block::{BigEndian, Error, Result};

/// What a server says about an export, and what both sides agreed upon.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Bytes.
    pub size: u64,
    /// The export's transmission flags, as in the protocol.
    pub flags: u16,
    /// Replies come in chunks.
    pub structured: bool,
    /// Requests and replies have 64-bit lengths.
    pub extended: bool,
    /// The connection is encrypted.
    pub tls: bool,
    /// Whether the server told its block sizes; the three below are the protocol's own
    /// otherwise.
    pub has_block_sizes: bool,
    /// Offsets and lengths are multiples of this.
    pub min_block: u32,
    /// Size of requests that the server likes best.
    pub preferred_block: u32,
    /// Most bytes of data in one request.
    pub max_payload: u32,
    /// A text for people.
    pub description: Option<String>,
    /// The name that the server itself has for the export.
    pub name: Option<String>,
    /// Metadata contexts that may be asked for.
    pub contexts: Vec<String>,
}

impl Facts {
    pub(super) fn new(size: u64, flags: u16) -> Result<Self> {
        if flags & export_flag::HAS_FLAGS == 0 {
            return Err(Error::corrupt(format!(
                "the export's flags are {flags:#x}, without HAS_FLAGS"
            )));
        }
        if i64::try_from(size).is_err() {
            return Err(Error::corrupt(format!(
                "the export has {size} bytes, expected at most {}",
                i64::MAX
            )));
        }
        Ok(Self {
            size,
            flags,
            structured: false,
            extended: false,
            tls: false,
            has_block_sizes: false,
            min_block: 1,
            preferred_block: 4096,
            max_payload: 32 << 20,
            description: None,
            name: None,
            contexts: Vec::new(),
        })
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.has(export_flag::READ_ONLY)
    }

    /// The disk turns: neighbours are best read together.
    pub fn is_rotational(&self) -> bool {
        self.has(export_flag::ROTATIONAL)
    }

    /// Writes can be made stable.
    pub fn can_flush(&self) -> bool {
        self.has(export_flag::SEND_FLUSH)
    }

    /// A single request can be made stable.
    pub fn can_fua(&self) -> bool {
        self.has(export_flag::SEND_FUA)
    }

    /// Ranges can be given back.
    pub fn can_trim(&self) -> bool {
        self.has(export_flag::SEND_TRIM)
    }

    /// Zeroes can be written without sending them.
    pub fn can_zero(&self) -> bool {
        self.has(export_flag::SEND_WRITE_ZEROES)
    }

    /// The server can say at once that zeroing would be slow.
    pub fn can_fast_zero(&self) -> bool {
        self.has(export_flag::SEND_FAST_ZERO) && self.can_zero()
    }

    /// A read can be asked for in one piece.
    pub fn can_df(&self) -> bool {
        self.has(export_flag::SEND_DF) && self.structured
    }

    /// Several connections see the same disk.
    pub fn can_multi_conn(&self) -> bool {
        self.has(export_flag::CAN_MULTI_CONN)
    }

    /// Ranges can be read ahead into the server's cache.
    pub fn can_cache(&self) -> bool {
        self.has(export_flag::SEND_CACHE)
    }

    /// Block status can be asked for some of the contexts alone.
    pub fn can_block_status_payload(&self) -> bool {
        self.has(export_flag::BLOCK_STATUS_PAYLOAD) && self.extended
    }
}

/// The pieces of information about an export, in any order and number.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    export: Option<(u64, u16)>,
    block_sizes: Option<(u32, u32, u32)>,
    description: Option<String>,
    name: Option<String>,
}

impl Pieces {
    pub(super) fn add(&mut self, data: &[u8]) -> Result<()> {
        let fields = BigEndian(data, "information about the export");
        match fields.u16("kind", 0)? {
            info::EXPORT => {
                self.export = Some((fields.u64("size", 2)?, fields.u16("flags", 10)?));
            }
            info::BLOCK_SIZE => {
                self.block_sizes = Some((
                    fields.u32("minimum block size", 2)?,
                    fields.u32("preferred block size", 6)?,
                    fields.u32("maximum payload", 10)?,
                ));
            }
            info::DESCRIPTION => self.description = Some(text(data)?),
            info::NAME => self.name = Some(text(data)?),
            // "A client ignores what it does not know."
            _ => {}
        }
        Ok(())
    }

    pub(super) fn facts(self) -> Result<Facts> {
        let (size, flags) = self
            .export
            .ok_or_else(|| Error::corrupt("the server did not tell the export's size"))?;
        let mut facts = Facts::new(size, flags)?;
        if let Some(sizes) = self.block_sizes {
            (facts.min_block, facts.preferred_block, facts.max_payload) = checked_sizes(sizes)?;
            facts.has_block_sizes = true;
        }
        facts.description = self.description;
        facts.name = self.name;
        Ok(facts)
    }
}

/// What follows the kind.
fn text(data: &[u8]) -> Result<String> {
    let text = data.get(2..).unwrap_or_default();
    if text.len() > MAX_STRING {
        return Err(Error::corrupt(format!(
            "a text about the export has {} bytes, expected at most {MAX_STRING}",
            text.len()
        )));
    }
    Ok(String::from_utf8_lossy(text).into_owned())
}

fn checked_sizes((min, preferred, max): (u32, u32, u32)) -> Result<(u32, u32, u32)> {
    let is_good = min.is_power_of_two()
        && min <= 64 << 10
        && preferred.is_power_of_two()
        && preferred >= min
        && max >= min;
    if !is_good {
        return Err(Error::corrupt(format!(
            "the export's block sizes are {min}, {preferred} and {max}, expected a power of two \
             up to 65536, one that is no smaller, and a maximum above the first"
        )));
    }
    Ok((min, preferred, max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_exports_are_refused() {
        for (size, flags, part) in [
            (1 << 63, 1, "expected at most 9223372036854775807"),
            (u64::MAX, 1, "expected at most"),
            (0, 0, "HAS_FLAGS"),
            (0, 2, "HAS_FLAGS"),
        ] {
            let error = Facts::new(size, flags).unwrap_err();
            assert!(error.message().contains(part), "{error}");
        }
        for sizes in [
            (0, 4096, 1 << 20),
            (3, 4096, 1 << 20),
            (1 << 31, 1 << 31, u32::MAX),
            (4096, 512, 1 << 20),
            (1, 4097, 1 << 20),
            (4096, 4096, 512),
        ] {
            assert!(checked_sizes(sizes).unwrap_err().message().contains("block sizes"));
        }
        checked_sizes((65_536, 65_536, u32::MAX)).unwrap();
        checked_sizes((1, 4096, 32 << 20)).unwrap();
    }

    #[test]
    fn flags_of_later_versions_count_only_with_what_they_need() {
        let mut facts = Facts::new(0, 0xffff).unwrap();
        assert!(!facts.can_df() && !facts.can_block_status_payload() && facts.can_fast_zero());
        (facts.structured, facts.extended) = (true, true);
        assert!(facts.can_df() && facts.can_block_status_payload());
    }
}
