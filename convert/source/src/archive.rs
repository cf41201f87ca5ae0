// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tar archives (POSIX.1-2001 pax, ustar, GNU), read in place.
//!
//! Only the headers are read. A parser of its own, because every length is hostile: long
//! names are bounded, and a member that is cut off is told by name.

use crate::files::check_name;
use crate::{Error, ErrorKind, Location, Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, Slice, Span, is_zero};
use tranship_raw::{Access, RawFile};

const BLOCK: u64 = 512;
const MAX_MEMBERS: usize = 10_000;
/// Longest name or set of pax records.
const MAX_EXTENSION: u64 = 64 << 10;

/// An archive and where its members are.
#[derive(Debug)]
pub(crate) struct Archive {
    path: PathBuf,
    file: Arc<dyn BlockDevice>,
    members: HashMap<String, Span>,
}

/// What extension headers say about the member that follows them.
#[derive(Debug, Default)]
struct Extension {
    name: Option<String>,
    size: Option<u64>,
}

impl Archive {
    /// Reads all headers of the archive at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = RawFile::open(path, Access::ReadOnly)
            .map_err(|error| Error::disk("cannot open the archive", error))?;
        let members = members(&file).map_err(|error| error.in_file(path))?;
        Ok(Self { path: path.to_owned(), file: Arc::new(file), members })
    }

    /// The names of all regular files.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// The data of the member called `name`.
    pub(crate) fn open_member(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        let slice = Slice::new(Arc::clone(&self.file), self.span(name)?)
            .map_err(|error| Error::disk(format!("cannot open member {name:?}"), error))?;
        Ok(Arc::new(slice))
    }

    /// Where the member called `name` is.
    pub(crate) fn locate(&self, name: &str) -> Result<Location> {
        let span = self.span(name)?;
        Ok(Location::Member { archive: self.path.clone(), offset: span.start, len: span.len })
    }

    fn span(&self, name: &str) -> Result<Span> {
        let name = name.strip_prefix("./").unwrap_or(name);
        self.members.get(name).copied().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the archive has no member {name:?}"))
        })
    }
}

fn members(file: &RawFile) -> Result<HashMap<String, Span>> {
    let size = file.size();
    let mut members = HashMap::new();
    let mut extension = Extension::default();
    let mut at = 0_u64;
    while at < size {
        let mut header = [0; 512];
        let left = size.saturating_sub(at).min(BLOCK);
        let there = header.get_mut(..usize::try_from(left).unwrap_or(0)).unwrap_or_default();
        read(file, there, at)?;
        if is_zero(&header) {
            break;
        }
        if at == 0 {
            refuse_compressed(&header)?;
        }
        if left < BLOCK {
            return Err(Error::corrupt(format!(
                "the archive is cut off inside a header at offset {at:#x}: {} bytes are missing",
                BLOCK.saturating_sub(left)
            )));
        }
        check_sum(&header, at)?;
        let kind = field(&header, 156, 1).first().copied().unwrap_or(0);
        let header_size = number(field(&header, 124, 12))
            .ok_or_else(|| Error::corrupt(format!("tar header at {at:#x} has a bad size")))?;
        let name = extension.name.take().unwrap_or_else(|| header_name(&header));
        let len = extension.size.take().unwrap_or(header_size);
        let start = at.saturating_add(BLOCK);
        let span = Span::new(start, if matches!(kind, b'1'..=b'6') { 0 } else { len });
        if let Err(error) = span.check_within(size) {
            let missing = span.end().saturating_sub(size);
            return Err(Error::disk(
                format!("member {name:?} of {len} bytes is cut off: {missing} bytes are missing"),
                tranship_block::Error::corrupt("the archive is truncated").because(error),
            ));
        }
        match kind {
            b'L' => extension.name = Some(text(&extension_data(file, span)?)),
            b'x' => extension = pax(&extension_data(file, span)?, at)?,
            b'S' => {
                return Err(Error::unsupported(format!(
                    "member {name:?} is stored sparse: unpack the archive first"
                )));
            }
            0 | b'0' | b'7' => {
                let name = name.strip_prefix("./").unwrap_or(&name);
                check_name(name)?;
                if members.len() >= MAX_MEMBERS {
                    return Err(Error::corrupt(format!("more than {MAX_MEMBERS} members")));
                }
                if members.insert(name.to_owned(), span).is_some() {
                    return Err(Error::denied(format!("member {name:?} is there twice")));
                }
            }
            // Folders, links and global records hold nothing that a guest is made of.
            _ => {}
        }
        at = start.saturating_add(span.len.div_ceil(BLOCK).saturating_mul(BLOCK));
    }
    Ok(members)
}

fn refuse_compressed(header: &[u8]) -> Result<()> {
    let compressors: [(&[u8], &str); 5] = [
        (&[0x1f, 0x8b], "gzip"),
        (b"\xfd7zXZ", "xz"),
        (b"PK\x03\x04", "zip"),
        (b"BZh", "bzip2"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
    ];
    match compressors.iter().find(|(magic, _)| header.starts_with(magic)) {
        Some((_, name)) => Err(Error::unsupported(format!(
            "the archive is compressed with {name}: unpack it first, and name the folder"
        ))),
        None => Ok(()),
    }
}

fn read(file: &RawFile, buf: &mut [u8], at: u64) -> Result<()> {
    file.read_at(buf, at).map_err(|error| Error::disk("cannot read the archive", error))
}

fn field(header: &[u8], at: usize, len: usize) -> &[u8] {
    header.get(at..).and_then(|tail| tail.get(..len)).unwrap_or_default()
}

fn text(bytes: &[u8]) -> String {
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

/// Compares the header's checksum: the sum of its bytes, the checksum itself as spaces.
fn check_sum(header: &[u8; 512], at: u64) -> Result<()> {
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    let own: u64 = field(header, 148, 8).iter().map(|byte| u64::from(*byte)).sum();
    let expected = sum.saturating_sub(own).saturating_add(8 * 32);
    if number(field(header, 148, 8)) != Some(expected) {
        let what = if at == 0 { "not a tar archive" } else { "the archive is damaged" };
        return Err(Error::corrupt(format!(
            "{what}: the header at offset {at:#x} has a wrong checksum"
        )));
    }
    Ok(())
}

fn header_name(header: &[u8]) -> String {
    let name = text(field(header, 0, 100));
    let prefix = text(field(header, 345, 155));
    if field(header, 257, 6) == b"ustar\0" && !prefix.is_empty() {
        return format!("{prefix}/{name}");
    }
    name
}

fn extension_data(file: &RawFile, span: Span) -> Result<Vec<u8>> {
    if span.len > MAX_EXTENSION {
        return Err(Error::corrupt(format!(
            "extension header is {} bytes, expected at most {MAX_EXTENSION}",
            span.len
        )));
    }
    let mut data = vec![0; usize::try_from(span.len).unwrap_or(0)];
    read(file, &mut data, span.start)?;
    Ok(data)
}

/// Pax records are `LENGTH KEY=VALUE\n`, the length being that of the whole record.
fn pax(data: &[u8], at: u64) -> Result<Extension> {
    let bad = || Error::corrupt(format!("pax records at offset {at:#x} are damaged"));
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
