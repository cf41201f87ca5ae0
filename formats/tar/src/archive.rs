// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Archives and where their members are.

use crate::header::{Extension, Header, SIZE, pax, text};
use std::collections::BTreeMap;
use std::path::{Component, Path};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Slice, Span, is_zero};

const MAX_MEMBERS: usize = 10_000;
/// Longest name or set of pax records.
const MAX_EXTENSION: u64 = 64 << 10;

/// An archive and where its members are.
#[derive(Debug)]
pub struct Archive {
    file: Arc<dyn BlockDevice>,
    members: BTreeMap<String, Span>,
}

impl Archive {
    /// Reads all headers of the archive in `file`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] for what is no archive, is cut off or contradicts itself,
    /// [`ErrorKind::Unsupported`] for compressed archives and sparse members,
    /// [`ErrorKind::Denied`] for names that lead out of a folder or are there twice.
    pub fn open(file: Arc<dyn BlockDevice>) -> Result<Self> {
        let members = members(&*file)?;
        Ok(Self { file, members })
    }

    /// The names of all regular files in order, without a leading `./`.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// The data of the member called `name`, read-only.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is none of this name.
    pub fn member(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        Ok(Arc::new(Slice::new(Arc::clone(&self.file), self.span(name)?)?))
    }

    /// Where in the archive the data of the member called `name` is.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is none of this name.
    pub fn span(&self, name: &str) -> Result<Span> {
        let name = plain(name);
        self.members.get(name).copied().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the archive has no member {name:?}"))
        })
    }
}

/// Whether `device` begins with a tar header: its magic number and checksum.
///
/// # Errors
///
/// I/O errors.
pub fn is_tar(device: &dyn BlockDevice) -> Result<bool> {
    let mut header = [0; SIZE];
    if device.size() < header_len() {
        return Ok(false);
    }
    device.read_at(&mut header, 0)?;
    let header = Header(&header);
    Ok(header.has_magic() && header.checksum_fits())
}

fn header_len() -> u64 {
    u64::try_from(SIZE).unwrap_or(u64::MAX)
}

fn members(file: &dyn BlockDevice) -> Result<BTreeMap<String, Span>> {
    let size = file.size();
    let mut members = BTreeMap::new();
    let mut extension = Extension::default();
    let mut at = 0_u64;
    while at < size {
        let mut block = [0; SIZE];
        let left = size.saturating_sub(at).min(header_len());
        let there = block.get_mut(..usize::try_from(left).unwrap_or(0)).unwrap_or_default();
        file.read_at(there, at)?;
        if is_zero(&block) {
            break;
        }
        if at == 0 {
            refuse_compressed(&block)?;
        }
        if left < header_len() {
            return Err(Error::corrupt(format!(
                "the archive is cut off inside a header: {} bytes are missing",
                header_len().saturating_sub(left)
            ))
            .at(at));
        }
        let header = Header(&block);
        if !header.checksum_fits() {
            let what = if at == 0 { "not a tar archive" } else { "the archive is damaged" };
            return Err(Error::corrupt(format!("{what}: a header has a wrong checksum")).at(at));
        }
        let header_size =
            header.size().ok_or_else(|| Error::corrupt("tar header has a bad size").at(at))?;
        let kind = header.kind();
        let name = extension.name.take().unwrap_or_else(|| header.name());
        let len = extension.size.take().unwrap_or(header_size);
        let start = at.saturating_add(header_len());
        let span = Span::new(start, if matches!(kind, b'1'..=b'6') { 0 } else { len });
        if span.check_within(size).is_err() {
            let missing = span.end().saturating_sub(size);
            return Err(Error::corrupt(format!(
                "member {name:?} of {len} bytes is cut off: {missing} bytes are missing"
            ))
            .at(at));
        }
        match kind {
            b'L' => extension.name = Some(text(&extension_data(file, span)?)),
            b'x' => extension = pax(&extension_data(file, span)?).map_err(|e| e.at(at))?,
            b'S' => {
                return Err(Error::unsupported(format!(
                    "member {name:?} is stored sparse: unpack the archive first"
                ))
                .at(at));
            }
            0 | b'0' | b'7' => {
                let name = plain(&name);
                check_name(name).map_err(|error| error.at(at))?;
                if members.len() >= MAX_MEMBERS {
                    return Err(Error::corrupt(format!("more than {MAX_MEMBERS} members")).at(at));
                }
                if members.insert(name.to_owned(), span).is_some() {
                    let message = format!("member {name:?} is there twice");
                    return Err(Error::new(ErrorKind::Denied, message).at(at));
                }
            }
            // Folders, links and global records hold nothing that a guest is made of.
            _ => {}
        }
        at = start.saturating_add(span.len.div_ceil(header_len()).saturating_mul(header_len()));
    }
    Ok(members)
}

/// The name without what means the folder itself, however often it is there.
fn plain(mut name: &str) -> &str {
    while let Some(rest) = name.strip_prefix("./") {
        name = rest;
    }
    name
}

/// Refuses names that would lead out of the folder into which the archive is unpacked:
/// whoever made them did not make a package.
fn check_name(name: &str) -> Result<()> {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    let hostile = name.is_empty()
        || name.contains(['\0', '\\'])
        || name.contains("://")
        || !Path::new(name).components().all(plain);
    if hostile {
        let message = format!("name {name:?} is not allowed in an archive of disks");
        return Err(Error::new(ErrorKind::Denied, message));
    }
    Ok(())
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

fn extension_data(file: &dyn BlockDevice, span: Span) -> Result<Vec<u8>> {
    if span.len > MAX_EXTENSION {
        return Err(Error::corrupt(format!(
            "extension header is {} bytes, expected at most {MAX_EXTENSION}",
            span.len
        ))
        .at(span.start));
    }
    let mut data = vec![0; usize::try_from(span.len).unwrap_or(0)];
    file.read_at(&mut data, span.start)?;
    Ok(data)
}
