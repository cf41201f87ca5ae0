// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The data of options, taken apart without trusting any length in it.

use crate::wire::MAX_STRING;
use tranship_block::{BigEndian, Error, Result};

/// Data of INFO and GO.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest<'a> {
    pub(crate) name: &'a str,
    /// Kinds of information that the client asks for, known to us or not.
    pub(crate) kinds: Vec<u16>,
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MetaRequest<'a> {
    pub(crate) name: &'a str,
    /// How many queries the client says there are.
    pub(crate) count: u32,
    /// The queries; empty if there are more than the limit.
    pub(crate) queries: Vec<&'a str>,
}

/// Reads a structure from front to back.
struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn bytes(&mut self, name: &str, len: usize) -> Result<&'a [u8]> {
        let bytes = BigEndian(self.data, "option").bytes(name, self.at, len)?;
        self.at = self.at.saturating_add(len);
        Ok(bytes)
    }

    fn u16(&mut self, name: &str) -> Result<u16> {
        BigEndian(self.bytes(name, 2)?, "option").u16(name, 0)
    }

    fn u32(&mut self, name: &str) -> Result<u32> {
        BigEndian(self.bytes(name, 4)?, "option").u32(name, 0)
    }

    fn string(&mut self, name: &str) -> Result<&'a str> {
        let len = usize::try_from(self.u32(name)?).unwrap_or(usize::MAX);
        if len > MAX_STRING {
            return Err(Error::corrupt(format!(
                "{name} has {len} bytes, expected at most {MAX_STRING}"
            )));
        }
        text(name, self.bytes(name, len)?)
    }

    fn end(&self) -> Result<()> {
        if self.at == self.data.len() {
            Ok(())
        } else {
            Err(Error::corrupt(format!(
                "option of {} bytes goes on after its fields end at byte {}",
                self.data.len(),
                self.at
            )))
        }
    }
}

/// Checks that `raw` is a string as the protocol wants it.
pub(crate) fn text<'a>(name: &str, raw: &'a [u8]) -> Result<&'a str> {
    if raw.len() > MAX_STRING || raw.contains(&0) {
        return Err(Error::corrupt(format!(
            "{name} of {} bytes, expected at most {MAX_STRING} without NUL",
            raw.len()
        )));
    }
    std::str::from_utf8(raw).map_err(|error| {
        Error::corrupt(format!("{name} of {} bytes is not UTF-8", raw.len())).because(error)
    })
}

impl<'a> InfoRequest<'a> {
    pub(crate) fn parse(data: &'a [u8]) -> Result<Self> {
        let mut cursor = Cursor { data, at: 0 };
        let name = cursor.string("export name")?;
        let count = cursor.u16("number of infos")?;
        let kinds = (0..count).map(|_| cursor.u16("info")).collect::<Result<_>>()?;
        cursor.end()?;
        Ok(Self { name, kinds })
    }
}

impl<'a> MetaRequest<'a> {
    pub(crate) fn parse(data: &'a [u8], limit: u32) -> Result<Self> {
        let mut cursor = Cursor { data, at: 0 };
        let name = cursor.string("export name")?;
        let count = cursor.u32("number of queries")?;
        if count > limit {
            return Ok(Self { name, count, queries: Vec::new() });
        }
        let queries = (0..count).map(|_| cursor.string("query")).collect::<Result<_>>()?;
        cursor.end()?;
        Ok(Self { name, count, queries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_name(name: &[u8], rest: &[u8]) -> Vec<u8> {
        let len = u32::try_from(name.len()).unwrap().to_be_bytes();
        [&len[..], name, rest].concat()
    }

    #[test]
    fn an_info_request_has_a_name_and_kinds() {
        let data = with_name(b"vda", &[0, 2, 0, 3, 0, 1]);
        let expected = InfoRequest { name: "vda", kinds: vec![3, 1] };
        assert_eq!(InfoRequest::parse(&data).unwrap(), expected);
    }

    #[test]
    fn lying_lengths_are_refused() {
        let table: [(&[u8], &str); 7] = [
            (&[], "option of 0 bytes ends before the 4 bytes of export name at byte 0"),
            (&[255; 4], "export name has 4294967295 bytes, expected at most 4096"),
            (
                &[0, 0, 0, 4, b'a'],
                "option of 5 bytes ends before the 4 bytes of export name at byte 4",
            ),
            (&[0, 0, 0, 1, 0, 0, 0], "export name of 1 bytes, expected at most 4096 without NUL"),
            (&[0, 0, 0, 1, 255, 0, 0], "export name of 1 bytes is not UTF-8"),
            (&[0, 0, 0, 0, 0, 0, 7], "option of 7 bytes goes on after its fields end at byte 6"),
            (&[0, 0, 0, 0, 0, 1], "option of 6 bytes ends before the 2 bytes of info at byte 6"),
        ];
        for (data, expected) in table {
            assert_eq!(InfoRequest::parse(data).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn queries_are_counted_before_they_are_read() {
        let data = with_name(b"", &[0, 0, 0, 1, 0, 0, 0, 5, b'b', b'a', b's', b'e', b':']);
        assert_eq!(MetaRequest::parse(&data, 64).unwrap().queries, ["base:"]);
        let data = with_name(b"", &[255; 4]);
        let many = MetaRequest::parse(&data, 64).unwrap();
        assert_eq!((many.count, many.queries.len()), (u32::MAX, 0));
    }
}
