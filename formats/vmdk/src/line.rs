// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One extent line of a descriptor: `RW 4192256 SPARSE "disk-s001.vmdk"`.

use crate::SECTOR;
use tranship_block::{Error, Result};

/// Whether the guest may read or write an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `RW`
    ReadWrite,
    /// `RDONLY`
    ReadOnly,
    /// `NOACCESS`
    None,
}

/// How an extent stores its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentType {
    /// Plain bytes in a file.
    Flat,
    /// A hosted sparse file.
    Sparse,
    /// Nothing stored; reads as zero.
    Zero,
    /// Plain bytes in a file on a VMFS datastore.
    Vmfs,
    /// An ESX snapshot delta (COWD).
    VmfsSparse,
    /// A mapped LUN.
    VmfsRdm,
    /// A raw device below VMFS.
    VmfsRaw,
    /// A space-efficient ESXi snapshot delta.
    SeSparse,
}

impl ExtentType {
    /// The word that descriptors use.
    pub fn word(self) -> &'static str {
        match self {
            Self::Flat => "FLAT",
            Self::Sparse => "SPARSE",
            Self::Zero => "ZERO",
            Self::Vmfs => "VMFS",
            Self::VmfsSparse => "VMFSSPARSE",
            Self::VmfsRdm => "VMFSRDM",
            Self::VmfsRaw => "VMFSRAW",
            Self::SeSparse => "SESPARSE",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        [
            Self::Flat,
            Self::Sparse,
            Self::Zero,
            Self::Vmfs,
            Self::VmfsSparse,
            Self::VmfsRdm,
            Self::VmfsRaw,
            Self::SeSparse,
        ]
        .into_iter()
        .find(|kind| word.eq_ignore_ascii_case(kind.word()))
    }
}

/// An extent as the descriptor lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// Whether it may be read or written.
    pub access: Access,
    /// Its size in bytes; not 0.
    pub len: u64,
    /// How it stores its bytes.
    pub kind: ExtentType,
    /// The file; hostile. Empty for [`ExtentType::Zero`] only.
    pub name: String,
    /// Where in the file its first byte is.
    pub offset: u64,
}

impl ExtentLine {
    /// Parses `line` if its first word makes it an extent line.
    pub(crate) fn parse(line: &str) -> Option<Result<Self>> {
        let (word, rest) = next_word(line);
        let access = match word.to_ascii_uppercase().as_str() {
            "RW" => Access::ReadWrite,
            "RDONLY" => Access::ReadOnly,
            "NOACCESS" => Access::None,
            _ => return None,
        };
        Some(Self::parse_rest(access, rest))
    }

    fn parse_rest(access: Access, line: &str) -> Result<Self> {
        let (sectors, rest) = next_word(line);
        let len = sectors_to_bytes(sectors).filter(|len| *len > 0).ok_or_else(|| {
            Error::corrupt(format!(
                "extent size is {sectors:?}, expected a positive number of sectors"
            ))
        })?;
        let (word, rest) = next_word(rest);
        let kind = ExtentType::from_word(word)
            .ok_or_else(|| Error::unsupported(format!("extent type {word:?} is not known")))?;
        if kind == ExtentType::Zero {
            return Ok(Self { access, len, kind, name: String::new(), offset: 0 });
        }
        let (name, rest) = rest
            .trim_start()
            .strip_prefix('"')
            .and_then(|quoted| quoted.split_once('"'))
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "{} extent has no file name between double quotes",
                    kind.word()
                ))
            })?;
        let (offset, _) = next_word(rest);
        let offset = match offset {
            "" => 0,
            _ if matches!(kind, ExtentType::Flat | ExtentType::Vmfs) => sectors_to_bytes(offset)
                .ok_or_else(|| {
                    Error::corrupt(format!(
                        "offset of extent {name:?} is {offset:?}, expected a number of sectors"
                    ))
                })?,
            _ => 0,
        };
        Ok(Self { access, len, kind, name: name.to_owned(), offset })
    }
}

/// Says which extents share bytes of a file, if any do: a write to one would change the
/// other. Names are compared as they are.
pub(crate) fn check_apart(lines: &[ExtentLine]) -> Result<()> {
    let mut places: Vec<(&str, u64, u64)> = lines
        .iter()
        .filter(|line| line.kind != ExtentType::Zero && line.access != Access::None)
        .map(|line| match line.kind {
            ExtentType::Flat | ExtentType::Vmfs => {
                (line.name.as_str(), line.offset, line.offset.saturating_add(line.len))
            }
            _ => (line.name.as_str(), 0, u64::MAX),
        })
        .collect();
    places.sort_unstable();
    for pair in places.windows(2) {
        if let [(name, _, end), (other, start, _)] = pair
            && name == other
            && start < end
        {
            return Err(Error::corrupt(format!("two extents share bytes of {name:?}")).at(*start));
        }
    }
    Ok(())
}

fn next_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((text, ""))
}

fn sectors_to_bytes(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let sectors: u64 = digits.then(|| text.parse().ok()).flatten()?;
    sectors.checked_mul(SECTOR).filter(|bytes| i64::try_from(*bytes).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extent_lines() {
        let line = ExtentLine::parse("rw  4192256\tSparse  \"a b.vmdk\"").unwrap().unwrap();
        assert_eq!((line.access, line.kind), (Access::ReadWrite, ExtentType::Sparse));
        assert_eq!((line.len, line.name.as_str()), (4_192_256 * 512, "a b.vmdk"));
        let line = ExtentLine::parse("RDONLY 8 FLAT \"x\" 16 uuid").unwrap().unwrap();
        assert_eq!((line.access, line.offset), (Access::ReadOnly, 16 * 512));
        let line = ExtentLine::parse("NOACCESS 8 ZERO").unwrap().unwrap();
        assert_eq!((line.access, line.kind), (Access::None, ExtentType::Zero));
        assert!(ExtentLine::parse("RWX 8 ZERO").is_none());
        assert!(ExtentLine::parse("CID=1").is_none());
    }

    #[test]
    fn bad_extent_lines_say_what_is_wrong() {
        for (line, text) in [
            ("RW -1 FLAT \"x\" 0", "extent size is \"-1\""),
            ("RW +1 FLAT \"x\" 0", "extent size is \"+1\""),
            ("RW 0 FLAT \"x\" 0", "extent size is \"0\""),
            ("RW", "extent size is \"\""),
            ("RW 9223372036854775807 FLAT \"x\" 0", "extent size is"),
            ("RW 8 BLOB \"x\"", "extent type \"BLOB\" is not known"),
            ("RW 8 FLAT \"x 0", "no file name"),
            ("RW 8 FLAT x 0", "no file name"),
            ("RW 8 FLAT \"\" 0", "no file name"),
            ("RW 8 FLAT \"x\" -3", "offset of extent \"x\" is \"-3\""),
        ] {
            let error = ExtentLine::parse(line).unwrap().unwrap_err();
            assert!(error.to_string().contains(text), "{line}: {error}");
        }
    }
}
