// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Headers (POSIX.1-1988 ustar, GNU) and extension headers (POSIX.1-2001 pax).

use tranship_block::{Error, Result};

/// Bytes of a header, and the unit in which data is padded.
pub(crate) const SIZE: usize = 512;

/// What extension headers say about the member that follows them.
#[derive(Debug, Default)]
pub(crate) struct Extension {
    pub(crate) name: Option<String>,
    pub(crate) size: Option<u64>,
}

/// A member's header.
pub(crate) struct Header<'a>(pub(crate) &'a [u8; SIZE]);

impl Header<'_> {
    fn field(&self, at: usize, len: usize) -> &[u8] {
        self.0.get(at..).and_then(|tail| tail.get(..len)).unwrap_or_default()
    }

    /// The type flag.
    pub(crate) fn kind(&self) -> u8 {
        self.field(156, 1).first().copied().unwrap_or(0)
    }

    /// Bytes of the member.
    pub(crate) fn size(&self) -> Option<u64> {
        number(self.field(124, 12))
    }

    /// Whether POSIX's or GNU's magic number is there; the oldest writers had none.
    pub(crate) fn has_magic(&self) -> bool {
        self.field(257, 5) == b"ustar"
    }

    /// Whether the checksum is right: the sum of the header's bytes, the checksum itself
    /// taken as spaces.
    pub(crate) fn checksum_fits(&self) -> bool {
        let sum: u64 = self.0.iter().map(|byte| u64::from(*byte)).sum();
        let own: u64 = self.field(148, 8).iter().map(|byte| u64::from(*byte)).sum();
        let expected = sum.saturating_sub(own).saturating_add(8 * 32);
        number(self.field(148, 8)) == Some(expected)
    }

    /// The name, if no extension header gives a longer one.
    pub(crate) fn name(&self) -> String {
        let name = text(self.field(0, 100));
        let prefix = text(self.field(345, 155));
        if self.field(257, 6) == b"ustar\0" && !prefix.is_empty() {
            return format!("{prefix}/{name}");
        }
        name
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// A number in octal, or in base 256 if the highest bit of its first byte says so.
fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if *first == 0x80 {
        return rest
            .iter()
            .try_fold(0_u64, |all, byte| Some(all.checked_mul(256)? | u64::from(*byte)));
    }
    let digits = text(field);
    let digits = digits.trim();
    if digits.is_empty() {
        return Some(0);
    }
    let octal = digits.bytes().all(|byte| byte.is_ascii_digit());
    octal.then(|| u64::from_str_radix(digits, 8).ok()).flatten()
}

/// Pax records are `LENGTH KEY=VALUE\n`, the length being that of the whole record.
pub(crate) fn pax(data: &[u8]) -> Result<Extension> {
    let bad = || Error::corrupt("pax records are damaged");
    let mut extension = Extension::default();
    let mut rest = data;
    while !rest.is_empty() {
        let space = rest.iter().position(|byte| *byte == b' ').ok_or_else(bad)?;
        let digits = rest.get(..space).and_then(|digits| std::str::from_utf8(digits).ok());
        let len: usize = digits.and_then(|digits| digits.parse().ok()).ok_or_else(bad)?;
        let record = rest.get(space.saturating_add(1)..len).ok_or_else(bad)?;
        rest = rest.get(len..).ok_or_else(bad)?;
        let record = record.strip_suffix(b"\n").ok_or_else(bad)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        let (key, value) = record.split_at(equals);
        let value = text(value.get(1..).unwrap_or_default());
        match key {
            b"path" => extension.name = Some(value),
            b"size" => extension.size = Some(value.parse().map_err(|_| bad())?),
            _ if key.starts_with(b"GNU.sparse") => {
                return Err(Error::unsupported(
                    "the archive has members stored sparse: unpack it first",
                ));
            }
            _ => {}
        }
    }
    Ok(extension)
}
