// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The descriptor: a text that says what a disk is made of.

use crate::{ExtentLine, MAX_EXTENTS};
use encoding_rs::Encoding;
use std::borrow::Cow;
use std::collections::BTreeMap;
use tranship_block::{Error, Result};

/// The `parentCID` of a disk that has no parent.
pub const NO_PARENT: u32 = u32::MAX;
/// Keys beyond this number are an attack on memory.
const MAX_KEYS: usize = 4096;

/// What a descriptor says, without anything having been opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// `createType`; empty if it is not there.
    pub create_type: String,
    /// `CID`, which changes with the contents.
    pub cid: Option<u32>,
    /// `parentCID`, unless the disk stands alone.
    pub parent_cid: Option<u32>,
    /// `parentFileNameHint`; hostile.
    pub parent_hint: Option<String>,
    /// The extents in disk order.
    pub extents: Vec<ExtentLine>,
    /// The `ddb.` entries, keys in lower case without the prefix.
    pub database: BTreeMap<String, String>,
    /// Lines that made no sense and were left out.
    pub warnings: Vec<String>,
}

impl Descriptor {
    /// Parses a descriptor; NUL bytes end it, as they pad embedded ones.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] for values and extent lines that cannot be
    /// read, [`tranship_block::ErrorKind::Unsupported`] for names in an unknown encoding
    /// and for unknown extent types.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let text = up_to_nul(bytes);
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let lines = || text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).enumerate();
        let encoding = lines()
            .find_map(|(_, line)| match key_value(std::str::from_utf8(line).ok()?)? {
                (key, value) if key == "encoding" => Some(value.to_ascii_lowercase()),
                _ => None,
            })
            .unwrap_or_else(|| "utf-8".into());

        let mut keys = BTreeMap::new();
        let mut descriptor = Self::default();
        for (number, line) in lines() {
            let number = number.saturating_add(1);
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let line = decode(line, &encoding, number)?;
            if let Some(extent) = ExtentLine::parse(&line) {
                if descriptor.extents.len() >= MAX_EXTENTS {
                    return Err(Error::corrupt(format!(
                        "descriptor lists more than {MAX_EXTENTS} extents"
                    )));
                }
                descriptor.extents.push(extent?);
            } else if let Some((key, value)) = key_value(&line) {
                if keys.len() >= MAX_KEYS {
                    return Err(Error::corrupt(format!(
                        "descriptor has more than {MAX_KEYS} keys"
                    )));
                }
                keys.entry(key).or_insert_with(|| value.to_owned());
            } else if descriptor.warnings.len() < 16 {
                descriptor.warnings.push(format!("descriptor line {number} is not understood"));
            }
        }
        descriptor.create_type = keys.remove("createtype").unwrap_or_default();
        descriptor.cid = keys.remove("cid").map(|cid| content_id("CID", &cid)).transpose()?;
        descriptor.parent_cid = keys
            .remove("parentcid")
            .map(|cid| content_id("parentCID", &cid))
            .transpose()?
            .filter(|cid| *cid != NO_PARENT);
        descriptor.parent_hint = keys.remove("parentfilenamehint");
        descriptor.database = keys
            .into_iter()
            .filter_map(|(key, value)| Some((key.strip_prefix("ddb.")?.to_owned(), value)))
            .collect();
        Ok(descriptor)
    }
}

/// What a reader takes for the descriptor: behind a NUL byte lies padding, or what is left
/// of a longer one.
fn up_to_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Splits `key = "value"`; the key comes back in lower case.
fn key_value(line: &str) -> Option<(String, &str)> {
    let (key, value) = line.split_once('=')?;
    let value = value.trim();
    let value = value.strip_prefix('"').unwrap_or(value);
    let value = value.strip_suffix('"').unwrap_or(value);
    Some((key.trim().to_ascii_lowercase(), value))
}

/// The descriptor `text` with another content id; none if it has none to begin with.
pub(crate) fn with_cid(text: &[u8], cid: u32) -> Option<Vec<u8>> {
    let text = up_to_nul(text);
    let mut start = 0_usize;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let end = start.checked_add(line.len())?;
        let parts = std::str::from_utf8(line).ok().and_then(|line| line.split_once('='));
        if let Some((key, value)) = parts
            && key.trim().eq_ignore_ascii_case("cid")
        {
            let ending = value.get(value.trim_end().len()..).unwrap_or_default();
            let new = format!("{key}={cid:08x}{ending}");
            return Some([text.get(..start)?, new.as_bytes(), text.get(end..)?].concat());
        }
        start = end;
    }
    None
}

/// The descriptor `text` with other extent lines: `lines` instead of the ones it has.
pub(crate) fn with_extents(text: &[u8], lines: &[String]) -> Vec<u8> {
    let is_extent = |line: &[u8]| {
        let line = String::from_utf8_lossy(line);
        ExtentLine::parse(line.trim()).is_some()
    };
    let mut new: Vec<u8> = Vec::new();
    let mut lines = Some(lines);
    let mut left = up_to_nul(text);
    while !left.is_empty() {
        let end = left.iter().position(|byte| *byte == b'\n').map(|at| at.saturating_add(1));
        let (line, rest) = left.split_at_checked(end.unwrap_or(left.len())).unwrap_or((left, b""));
        left = rest;
        if !is_extent(line) {
            new.extend(line);
            continue;
        }
        for extent in lines.take().unwrap_or_default() {
            new.extend(extent.as_bytes());
            new.push(b'\n');
        }
    }
    new
}

fn content_id(name: &str, text: &str) -> Result<u32> {
    Some(text)
        .filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .and_then(|text| u32::from_str_radix(text, 16).ok())
        .ok_or_else(|| Error::corrupt(format!("{name} is {text:?}, expected 8 hex digits")))
}

/// The text of a line; names in it are in the encoding of the host that wrote them. All
/// encodings that are known agree with ASCII about the bytes that structure a descriptor.
fn decode(line: &[u8], encoding: &str, number: usize) -> Result<String> {
    if line.is_ascii() {
        return Ok(String::from_utf8_lossy(line).into_owned());
    }
    let known =
        Encoding::for_label(encoding.as_bytes()).filter(|known| known.is_ascii_compatible());
    let Some(known) = known else {
        return Err(Error::unsupported(format!(
            "descriptor line {number} has other than ASCII characters in encoding {encoding:?}; \
             save the descriptor as UTF-8 with encoding=\"UTF-8\""
        )));
    };
    known.decode_without_bom_handling_and_without_replacement(line).map(Cow::into_owned).ok_or_else(
        || {
            Error::corrupt(format!(
                "descriptor line {number} is not valid {}, its encoding",
                known.name()
            ))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::ErrorKind;

    #[test]
    fn keys_ignore_case_and_spaces_and_line_ends() {
        let text = b"# Disk DescriptorFile\r\nversion=1\r\n cid = 0172e8A4 \r\nPARENTCID=ffffffff\r\n\
            CreateType = \"vmfs\"\r\nRW 8 VMFS \"a-flat.vmdk\"\r\nddb.adapterType = \"lsilogic\"\r\n\
            DDB.uuid=\"60 00\"\r\nnonsense\r\n\0\0rest";
        let descriptor = Descriptor::parse(text).unwrap();
        assert_eq!(descriptor.create_type, "vmfs");
        assert_eq!(descriptor.cid, Some(0x0172_e8a4));
        assert_eq!(descriptor.parent_cid, None);
        assert_eq!(descriptor.extents.len(), 1);
        assert_eq!(descriptor.database["adaptertype"], "lsilogic");
        assert_eq!(descriptor.database["uuid"], "60 00");
        assert_eq!(descriptor.warnings, ["descriptor line 9 is not understood"]);
    }

    #[test]
    fn the_content_id_is_replaced_where_it_is() {
        let text = b"version=1\r\nparentCID=1\r\nCID=12345678\r\nx=\xff\n\0\0";
        let new = with_cid(text, 0xabc).unwrap();
        assert_eq!(new, b"version=1\r\nparentCID=1\r\nCID=00000abc\r\nx=\xff\n");
        // What an older, longer descriptor has left behind the end does not come back.
        let stale = b"version=1\nCID=1\0\nparentCID=7\nRW 9 ZERO\n";
        assert_eq!(with_cid(stale, 0xabc).unwrap(), b"version=1\nCID=00000abc");
        assert_eq!(with_extents(stale, &[]), b"version=1\nCID=1");
        assert_eq!(with_cid(b"parentCID=1\n", 1), None);
    }

    #[test]
    fn extent_lines_are_replaced_together() {
        let text = b"version=1\nRW 8 FLAT \"a\" 0\n  rw 8 FLAT \"b\" 0\r\n#end";
        let lines = ["RW 1 ZERO".to_owned(), "RW 2 ZERO".to_owned()];
        assert_eq!(with_extents(text, &lines), b"version=1\nRW 1 ZERO\nRW 2 ZERO\n#end");
    }

    #[test]
    fn names_follow_the_encoding() {
        let name = |text: &[u8]| Descriptor::parse(text).map(|d| d.extents[0].name.clone());
        let western = b"encoding=\"windows-1252\"\nRW 8 FLAT \"\x80 gr\xfcn\" 0";
        assert_eq!(name(western).unwrap(), "€ grün");
        let utf8 = "RW 8 FLAT \"grün\" 0\nencoding = UTF-8".as_bytes();
        assert_eq!(name(utf8).unwrap(), "grün");
        let error = name(b"RW 8 FLAT \"gr\xfcn\" 0").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(name(b"encoding=\"Shift_JIS\"\nRW 8 FLAT \"a\" 0").unwrap(), "a");
        let japanese = b"encoding=\"Shift_JIS\"\nRW 8 FLAT \"\x83\x5c.vmdk\" 0";
        assert_eq!(name(japanese).unwrap(), "\u{30bd}.vmdk");
        assert_eq!(name(b"encoding=\"GBK\"\nRW 8 FLAT \"\xd6\xd0\" 0").unwrap(), "\u{4e2d}");
        let error = name(b"encoding=\"Shift_JIS\"\nRW 8 FLAT \"\x83\" 0").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let error = name(b"encoding=\"UTF-16\"\nRW 8 FLAT \"\x83\" 0").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn bad_ids_and_floods_are_refused() {
        for text in ["CID=xyz", "parentCID=123456789", "CID=+1"] {
            assert!(Descriptor::parse(text.as_bytes()).unwrap_err().to_string().contains("hex"));
        }
        let flood = "RW 1 FLAT \"x\" 0\n".repeat(30_000);
        let error = Descriptor::parse(flood.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("more than 4096 extents"), "{error}");
    }
}
