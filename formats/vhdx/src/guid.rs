// SPDX-License-Identifier: Apache-2.0 OR MIT
//! GUIDs in the byte order that Windows stores them in.

use std::fmt;
use tranship_block::{Error, Result};

/// A GUID: the first three groups are little-endian on disk, the others are bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Guid([u8; 16]);

/// Where each printed byte is stored.
const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Guid {
    /// All bits zero: "none" in most fields.
    pub const NIL: Self = Self([0; 16]);

    /// The GUID that is stored as `bytes`.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes as they are stored.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// Whether all bits are zero.
    pub fn is_nil(self) -> bool {
        self == Self::NIL
    }

    /// A new random GUID (version 4).
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Io`] if the operating system has no random numbers.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| Error::io("cannot get random bytes", errno.into()))?;
        if got < bytes.len() {
            return Err(Error::new(
                tranship_block::ErrorKind::Io,
                format!("the system gave {got} random bytes, expected 16"),
            ));
        }
        let [.., seven, eight, _, _, _, _, _, _, _] = &mut bytes;
        *seven = *seven & 0x0f | 0x40;
        *eight = *eight & 0x3f | 0x80;
        Ok(Self(bytes))
    }

    /// Reads the printed form, with or without braces.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(text);
        let groups: Vec<&str> = text.split('-').collect();
        if !groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) {
            return None;
        }
        let digits = groups.concat().into_bytes();
        let mut bytes = [0; 16];
        for (pair, place) in digits.chunks(2).zip(ORDER) {
            let pair = std::str::from_utf8(pair).ok()?;
            if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return None;
            }
            *bytes.get_mut(place)? = u8::from_str_radix(pair, 16).ok()?;
        }
        Some(Self(bytes))
    }

    /// The GUID that prints as `text`, for the constants of the specification.
    pub(crate) const fn known(first: u32, second: u16, third: u16, rest: [u8; 8]) -> Self {
        let (one, two, three) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes());
        Self([
            one[0], one[1], one[2], one[3], two[0], two[1], three[0], three[1], rest[0], rest[1],
            rest[2], rest[3], rest[4], rest[5], rest[6], rest[7],
        ])
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (printed, place) in ORDER.iter().enumerate() {
            if matches!(printed, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0.get(*place).copied().unwrap_or_default())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_form_reads_back() {
        let text = "2dc27766-f623-4200-9d64-115e9bfd4a08";
        let guid = Guid::parse(text).unwrap();
        assert_eq!(guid.to_bytes()[..8], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42]);
        assert_eq!(guid.to_string(), text);
        assert_eq!(Guid::parse(&format!("{{{}}}", text.to_uppercase())), Some(guid));
        for wrong in ["", "{}", &text[1..], &text.replace('d', "g"), &format!("{text}0")] {
            assert_eq!(Guid::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn random_ones_differ_and_say_that_they_are_random() {
        let (one, other) = (Guid::random().unwrap(), Guid::random().unwrap());
        assert_ne!(one, other);
        assert_eq!(&one.to_string()[14..15], "4");
    }
}
