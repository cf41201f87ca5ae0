// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reading numbers out of on-disk structures without ever indexing past their end.

use crate::{Error, Result};

macro_rules! reader {
    ($name:ident, $convert:ident, $doc:literal) => {
        #[doc = $doc]
        ///
        /// The second field names the structure in errors, for example `"qcow2 header"`.
        #[derive(Clone, Copy, Debug)]
        pub struct $name<'a>(pub &'a [u8], pub &'a str);

        impl<'a> $name<'a> {
            fn chunk<const N: usize>(&self, name: &str, at: usize) -> Result<[u8; N]> {
                self.0.get(at..).and_then(|tail| tail.first_chunk()).copied().ok_or_else(|| {
                    Error::corrupt(format!(
                        "{} of {} bytes ends before field {name} at byte {at}",
                        self.1,
                        self.0.len()
                    ))
                })
            }

            /// The byte called `name` at byte `at`.
            pub fn u8(&self, name: &str, at: usize) -> Result<u8> {
                self.chunk::<1>(name, at).map(|[byte]| byte)
            }

            /// The 16-bit number called `name` at byte `at`.
            pub fn u16(&self, name: &str, at: usize) -> Result<u16> {
                self.chunk(name, at).map(u16::$convert)
            }

            /// The 32-bit number called `name` at byte `at`.
            pub fn u32(&self, name: &str, at: usize) -> Result<u32> {
                self.chunk(name, at).map(u32::$convert)
            }

            /// The 64-bit number called `name` at byte `at`.
            pub fn u64(&self, name: &str, at: usize) -> Result<u64> {
                self.chunk(name, at).map(u64::$convert)
            }

            /// The `len` bytes called `name` at byte `at`.
            pub fn bytes(&self, name: &str, at: usize, len: usize) -> Result<&'a [u8]> {
                self.0.get(at..).and_then(|tail| tail.get(..len)).ok_or_else(|| {
                    Error::corrupt(format!(
                        "{} of {} bytes ends before the {len} bytes of {name} at byte {at}",
                        self.1,
                        self.0.len()
                    ))
                })
            }
        }
    };
}
reader!(BigEndian, from_be_bytes, "Big-endian fields at fixed offsets of a structure.");
reader!(LittleEndian, from_le_bytes, "Little-endian fields at fixed offsets of a structure.");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_field_is_named() {
        let error = BigEndian(&[0; 6], "qcow2 header").u32("version", 4).unwrap_err();
        assert_eq!(
            error.to_string(),
            "qcow2 header of 6 bytes ends before field version at byte 4"
        );
    }

    #[test]
    fn byte_order_is_kept() {
        assert_eq!(BigEndian(&[1, 2], "x").u16("f", 0).unwrap(), 0x0102);
        assert_eq!(LittleEndian(&[1, 2], "x").u16("f", 0).unwrap(), 0x0201);
        assert!(LittleEndian(&[1, 2], "x").bytes("f", usize::MAX, 2).is_err());
    }
}
