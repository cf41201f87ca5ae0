// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The archive format inside an initramfs: "newc" cpio.
//!
//! See the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::io::{self, Read};
use tranship_inspect::{Error, ErrorKind, Result};

/// Bytes of a header: a magic number and 13 fields of eight hexadecimal digits.
const HEADER: u64 = 110;
/// Longest name that Linux accepts.
const MAX_NAME: u64 = 4096;
/// Name of the entry that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";
/// Bits of the mode that say what kind of file it is.
pub(crate) const KIND: u32 = 0o170_000;
/// A directory, in these bits.
pub(crate) const DIRECTORY: u32 = 0o040_000;
/// A symbolic link, in these bits.
pub(crate) const LINK: u32 = 0o120_000;
/// A regular file, in these bits.
const FILE: u32 = 0o100_000;

/// One entry of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Path without a leading slash or `./`.
    pub(crate) name: Vec<u8>,
    /// Kind and permissions.
    pub(crate) mode: u32,
    /// The contents, if the reader was asked to keep them.
    pub(crate) content: Option<Vec<u8>>,
}

/// Reads the entries of one archive from a stream.
pub(crate) struct Reader<'a> {
    source: &'a mut dyn Read,
    /// Bytes of this archive read so far; entries are aligned to four of them.
    position: u64,
    limit: u64,
}

impl<'a> Reader<'a> {
    /// Reads from `source`, of which no more than `limit` bytes are taken.
    pub(crate) fn new(source: &'a mut dyn Read, limit: u64) -> Self {
        Self { source, position: 0, limit }
    }

    /// Bytes of the stream that were read so far.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The next entry; `None` at the end of the archive or of the stream.
    ///
    /// Archives may follow one another with zero bytes between them. Contents of at most
    /// `keep(name, mode)` bytes are kept.
    pub(crate) fn next(&mut self, keep: &dyn Fn(&[u8], u32) -> u64) -> Result<Option<Entry>> {
        let Some(header) = self.header()? else { return Ok(None) };
        let name_len = u64::from(field(&header, 11)?);
        if name_len == 0 || name_len > MAX_NAME {
            return Err(
                self.corrupt(&format!("name of {name_len} bytes, expected 1 to {MAX_NAME}"))
            );
        }
        let mut name = self.take(name_len)?;
        self.align()?;
        name.pop();
        if name == TRAILER {
            return Ok(None);
        }
        let mode = field(&header, 1)?;
        let size = u64::from(field(&header, 6)?);
        let name = plain_name(&name).to_vec();
        let content =
            if size <= keep(&name, mode) { Some(self.take(size)?) } else { self.skip(size)? };
        self.align()?;
        Ok(Some(Entry { name, mode, content }))
    }

    /// The next header, after any zero bytes; `None` at the end of the stream.
    fn header(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let mut first = [0];
            match self.source.read(&mut first) {
                Ok(0) => return Ok(None),
                Ok(_) => self.count(1)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.failed(error)),
            }
            if first == [0] {
                continue;
            }
            let mut header = first.to_vec();
            header.extend(self.take(HEADER.saturating_sub(1))?);
            if !header.starts_with(b"070701") && !header.starts_with(b"070702") {
                return Err(self.corrupt("no magic number 070701 before an entry"));
            }
            return Ok(Some(header));
        }
    }

    fn take(&mut self, len: u64) -> Result<Vec<u8>> {
        self.count(len)?;
        let mut bytes = Vec::new();
        let read = Read::take(&mut *self.source, len).read_to_end(&mut bytes);
        match read {
            Ok(read) if u64::try_from(read).is_ok_and(|read| read == len) => Ok(bytes),
            Ok(_) => Err(self.corrupt("ends inside an entry")),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn skip(&mut self, len: u64) -> Result<Option<Vec<u8>>> {
        self.count(len)?;
        match io::copy(&mut Read::take(&mut *self.source, len), &mut io::sink()) {
            Ok(read) if read == len => Ok(None),
            Ok(_) => Err(self.corrupt("ends inside an entry")),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn align(&mut self) -> Result<()> {
        let padding = self.position.wrapping_neg() & 3;
        // The last padding of a stream may be missing.
        let read = io::copy(&mut Read::take(&mut *self.source, padding), &mut io::sink());
        self.count(read.map_err(|error| self.failed(error))?)
    }

    fn count(&mut self, len: u64) -> Result<()> {
        self.position = self.position.saturating_add(len);
        if self.position > self.limit {
            let limit = self.limit;
            return Err(self.corrupt(&format!("unpacks to more than {limit} bytes")));
        }
        Ok(())
    }

    fn corrupt(&self, what: &str) -> Error {
        let at = self.position;
        Error::new(ErrorKind::Corrupt, format!("cpio archive: {what}, at byte {at} of the archive"))
    }

    fn failed(&self, source: io::Error) -> Error {
        let at = self.position;
        Error::new(ErrorKind::Corrupt, format!("cpio archive: cannot be unpacked at byte {at}"))
            .because(source)
    }
}

/// The field with this number (from 0, after the magic number): eight hexadecimal digits.
fn field(header: &[u8], number: usize) -> Result<u32> {
    let start = number.saturating_mul(8).saturating_add(6);
    header
        .get(start..start.saturating_add(8))
        .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .ok_or_else(|| {
            let message =
                format!("cpio archive: field {number} of a header is no hexadecimal number");
            Error::new(ErrorKind::Corrupt, message)
        })
}

fn plain_name(name: &[u8]) -> &[u8] {
    let name = name.strip_prefix(b"./").unwrap_or(name);
    name.strip_prefix(b"/").unwrap_or(name)
}

/// Writes an archive in memory.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    inode: u32,
}

impl Writer {
    /// Adds a directory with mode 0755.
    pub(crate) fn directory(&mut self, name: &[u8]) -> Result<()> {
        self.entry(name, DIRECTORY | 0o755, 2, 0, b"")
    }

    /// Adds a file with mode 0644, last changed `modified` seconds after 1970.
    pub(crate) fn file(&mut self, name: &[u8], modified: i64, content: &[u8]) -> Result<()> {
        self.entry(name, FILE | 0o644, 1, u32::try_from(modified).unwrap_or(0), content)
    }

    /// Adds a symbolic link.
    #[cfg(test)]
    pub(crate) fn link(&mut self, name: &[u8], target: &[u8]) -> Result<()> {
        self.entry(name, LINK | 0o777, 1, 0, target)
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.inode = u32::MAX;
        self.entry(TRAILER, 0, 1, 0, b"")?;
        Ok(self.bytes)
    }

    fn entry(
        &mut self,
        name: &[u8],
        mode: u32,
        links: u32,
        mtime: u32,
        content: &[u8],
    ) -> Result<()> {
        let too_long = || {
            let name = String::from_utf8_lossy(name);
            Error::new(ErrorKind::Unsupported, format!("{name} is too long for a cpio archive"))
        };
        self.inode = self.inode.wrapping_add(1);
        let size = u32::try_from(content.len()).map_err(|_| too_long())?;
        let name_len = u32::try_from(name.len()).ok().and_then(|len| len.checked_add(1));
        let name_len = name_len.filter(|len| u64::from(*len) <= MAX_NAME).ok_or_else(too_long)?;
        // Inode, mode, owner, group, links, mtime, size, device twice, name, checksum.
        let fields = [self.inode, mode, 0, 0, links, mtime, size, 0, 0, 0, 0, name_len, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut writer = Writer::default();
        writer.directory(b"etc").unwrap();
        writer.file(b"etc/x", 7, b"hello").unwrap();
        writer.link(b"lib", b"usr/lib").unwrap();
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8], limit: u64) -> Result<Vec<Entry>> {
        let mut source = bytes;
        let mut reader = Reader::new(&mut source, limit);
        let mut entries = Vec::new();
        while let Some(entry) = reader.next(&|_, _| 100)? {
            entries.push(entry);
        }
        Ok(entries)
    }

    #[test]
    fn what_is_written_reads_back() {
        let entries = read(&sample(), 10_000).unwrap();
        assert_eq!(entries.len(), 3);
        assert_eq!(entries[1].content.as_deref(), Some(&b"hello"[..]));
        assert_eq!((entries[2].mode & KIND, entries[0].mode & KIND), (LINK, DIRECTORY));
    }

    #[test]
    fn every_truncation_is_an_error_or_an_early_end() {
        let bytes = sample();
        for len in 1..bytes.len() - 4 {
            let result = read(&bytes[..len], 10_000);
            assert!(result.is_err() || result.unwrap().len() <= 3, "{len}");
        }
    }

    #[test]
    fn hostile_headers_are_refused_with_a_reason() {
        let with = |at: usize, text: &[u8]| {
            let mut bytes = sample();
            bytes[at..at + text.len()].copy_from_slice(text);
            read(&bytes, 10_000).unwrap_err().to_string()
        };
        for (at, text, want) in [
            (0, &b"070707"[..], "no magic number 070701"),
            (94, b"ffffffff", "name of 4294967295 bytes"),
            (94, b"00000000", "name of 0 bytes"),
            (94, b"zzzzzzzz", "field 11 of a header"),
            (54, b"+0000001", "field 6 of a header"),
            (54, b"fffffff0", "unpacks to more than 10000 bytes"),
        ] {
            let error = with(at, text);
            assert!(error.contains(want), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn random_changes_never_panic(at in 0_usize..400, byte: u8) {
            let mut bytes = sample();
            let at = at.checked_rem(bytes.len()).unwrap();
            bytes[at] = byte;
            let _ = read(&bytes, 10_000);
        }
    }
}
