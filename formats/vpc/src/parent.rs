// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which parent a differencing image asks for.

use crate::footer::{Kind, find};
use crate::header::{Header, Locator};
use std::fmt::Write;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result, Span};

/// Longest stored name in bytes; Windows paths end at 32767 units.
pub(crate) const LONGEST_NAME: u32 = 65_536;

/// The disk below a differencing one.
#[derive(Clone, Debug)]
pub struct Parent {
    /// Its bytes.
    pub device: Arc<dyn BlockDevice>,
    /// The unique id in its footer, which has to be the one that the child names.
    pub unique_id: [u8; 16],
}

/// What a name of a parent is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NameKind {
    /// The child's folder; may lead out of it.
    Relative,
    /// The child's folder, without any folder of its own.
    FileName,
    /// The root of the file system, or a drive of Windows.
    Absolute,
}

/// A name under which the parent may be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentName {
    /// What it is relative to.
    pub kind: NameKind,
    /// The name, with slashes between folders.
    pub name: String,
}

/// The parent that a differencing image asks for. All of it comes from the image: names
/// are requests that a [`tranship_block::Gate`] decides about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentRequest {
    /// The unique id that the parent's footer must have.
    pub unique_id: [u8; 16],
    /// When the parent was last changed, in seconds since 2000; programs disagree about
    /// the time zone, so that it is good for information only.
    pub timestamp: u32,
    /// Names to try, in this order, without repetitions.
    pub names: Vec<ParentName>,
}

impl ParentRequest {
    /// Reads what parent the image in `file` asks for; none if it stands alone.
    ///
    /// The relative name comes first, then file URLs (`MacX`), then the bare file names,
    /// which cannot lead out of the child's folder, and absolute names last. Names that
    /// cannot be read are left out.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] for headers that are not those of a VHD,
    /// and I/O errors.
    pub fn read(file: &dyn BlockDevice) -> Result<Option<Self>> {
        let footer = find(file, true)?.footer;
        if footer.kind != Kind::Differencing {
            return Ok(None);
        }
        let header = Header::read(file, &footer, true)?;
        Ok(Some(Self {
            unique_id: header.parent_id,
            timestamp: header.parent_timestamp,
            names: names(file, &header),
        }))
    }
}

/// Checks that `parent` is what the child's `header` asks for. In words what is wrong, if
/// that is to be only a warning.
pub(crate) fn check(
    header: &Header,
    parent: Option<&Parent>,
    salvage: bool,
) -> Result<Option<String>> {
    let text = match parent {
        None => "the disk is differencing and its parent is missing".to_owned(),
        Some(parent) if parent.unique_id != header.parent_id => format!(
            "parent has unique id {}, expected {}",
            format_id(&parent.unique_id),
            format_id(&header.parent_id)
        ),
        Some(_) => return Ok(None),
    };
    match (salvage, parent) {
        (true, None) => Ok(Some(format!("{text}: its part reads as zero"))),
        (true, Some(_)) => Ok(Some(text)),
        (false, None) => Err(Error::usage(text)),
        (false, Some(_)) => Err(Error::corrupt(text)),
    }
}

/// An id in the usual groups.
pub fn format_id(id: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in id.iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        // Writing into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn names(file: &dyn BlockDevice, header: &Header) -> Vec<ParentName> {
    let stored = |code: &[u8; 4]| {
        let all = header.locators.iter().filter(move |locator| locator.code == *code);
        all.filter_map(|locator| bytes_of(file, *locator)).collect::<Vec<_>>()
    };
    let relative: Vec<_> = stored(b"W2ru").iter().filter_map(|bytes| utf16_le(bytes)).collect();
    let urls: Vec<_> = stored(b"MacX").iter().filter_map(|bytes| url(bytes)).collect();
    let absolute: Vec<_> = stored(b"W2ku").iter().filter_map(|bytes| utf16_le(bytes)).collect();
    let field = String::from_utf16(&header.parent_name).ok().map(|name| slashes(&name));

    let mut found: Vec<ParentName> = Vec::new();
    let mut add = |kind, name: &str| {
        let repeated = found.iter().any(|other| other.name == name);
        if !name.is_empty() && name != "." && name != ".." && !repeated {
            found.push(ParentName { kind, name: name.to_owned() });
        }
    };
    let in_order = || relative.iter().chain(&urls).chain(&absolute).chain(&field);
    // A field that is called relative may hold anything: what a name is decides.
    for name in in_order().filter(|name| !is_absolute(name) && name.contains('/')) {
        add(NameKind::Relative, name);
    }
    for name in in_order() {
        add(NameKind::FileName, name.rsplit(['/', ':']).next().unwrap_or_default());
    }
    for name in in_order().filter(|name| is_absolute(name)) {
        add(NameKind::Absolute, name);
    }
    found
}

fn is_absolute(name: &str) -> bool {
    name.starts_with('/') || name.as_bytes().get(1) == Some(&b':')
}

/// The stored bytes of a name; none if they are not in the file.
fn bytes_of(file: &dyn BlockDevice, locator: Locator) -> Option<Vec<u8>> {
    let len = u64::from(locator.len);
    let is_outside = Span::new(locator.offset, len).check_within(file.size()).is_err();
    if locator.len == 0 || locator.len > LONGEST_NAME || is_outside {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    file.read_at(&mut bytes, locator.offset).ok()?;
    Some(bytes)
}

fn utf16_le(bytes: &[u8]) -> Option<String> {
    let units = bytes.as_chunks().0.iter().map(|unit| u16::from_le_bytes(*unit));
    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    String::from_utf16(&units).ok().map(|name| slashes(&name))
}

/// With slashes between folders, and without the `./` that stands for the child's folder.
fn slashes(name: &str) -> String {
    let name = name.replace('\\', "/");
    let mut rest = name.as_str();
    while let Some(tail) = rest.strip_prefix("./") {
        rest = tail.trim_start_matches('/');
    }
    rest.to_owned()
}

/// The path of a `file://` URL; XenServer writes `file://./parent.vhd`.
fn url(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
    let path = text.strip_prefix("file://").unwrap_or(text);
    let path = path.strip_prefix("localhost").unwrap_or(path);
    let mut plain = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        let digits = tail.get(..2).filter(|_| *first == b'%').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 16).ok()
        });
        match digits {
            Some(byte) => {
                plain.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => plain.push(*first),
        }
    }
    let path = String::from_utf8(plain).ok().filter(|path| !path.contains('\0'))?;
    Some(slashes(&path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::LOCATORS;
    use tranship_block::MemoryDevice;

    fn header(stored: &[([u8; 4], Vec<u8>)], name: &str) -> (MemoryDevice, Header) {
        let mut bytes = vec![0; 100];
        let mut locators = [Locator::default(); LOCATORS];
        for (locator, (code, name)) in locators.iter_mut().zip(stored) {
            let len = u32::try_from(name.len()).unwrap();
            let offset = u64::try_from(bytes.len()).unwrap();
            *locator = Locator { code: *code, space: 512, len, offset };
            bytes.extend(name);
        }
        let header = Header {
            table_offset: 0,
            max_entries: 0,
            block_size: 512,
            parent_id: [0; 16],
            parent_timestamp: 0,
            parent_name: name.encode_utf16().collect(),
            locators,
            reserved: Vec::new(),
            warnings: Vec::new(),
        };
        (MemoryDevice::read_only(bytes), header)
    }

    fn wide(name: &str) -> Vec<u8> {
        name.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    fn tried(stored: &[([u8; 4], Vec<u8>)], name: &str) -> Vec<(NameKind, String)> {
        let (file, header) = header(stored, name);
        names(&file, &header).into_iter().map(|name| (name.kind, name.name)).collect()
    }

    #[test]
    fn names_are_tried_from_the_nearest_to_the_furthest() {
        use NameKind::{Absolute, FileName, Relative};
        let windows =
            [(*b"W2ku", wide(r"C:\disks\base.vhd")), (*b"W2ru", wide(r".\..\disks\base.vhd"))];
        let expected = [
            (Relative, "../disks/base.vhd".to_owned()),
            (FileName, "base.vhd".to_owned()),
            (Absolute, "C:/disks/base.vhd".to_owned()),
        ];
        assert_eq!(tried(&windows, r"C:\disks\base.vhd"), expected);

        let xen = [(*b"MacX", b"file://./a%20b.vhd\0".to_vec())];
        assert_eq!(tried(&xen, ""), [(FileName, "a b.vhd".to_owned())]);

        // An absolute name in the relative field stays what it is.
        let lying = [(*b"W2ru", wide("/etc/shadow"))];
        let expected = [(FileName, "shadow".to_owned()), (Absolute, "/etc/shadow".to_owned())];
        assert_eq!(tried(&lying, ""), expected);
        assert_eq!(tried(&[], r".\x"), [(FileName, "x".to_owned())]);
    }

    #[test]
    fn names_that_cannot_be_read_are_left_out() {
        let lone_surrogate = vec![0, 0xd8, b'a', 0];
        let cases = [(*b"W2ru", lone_surrogate), (*b"MacX", vec![0xff]), (*b"W2ku", wide(".."))];
        assert_eq!(tried(&cases, ""), []);
        let (file, mut header) = header(&cases, "");
        header.locators[2].offset = u64::MAX;
        assert_eq!(names(&file, &header), []);
        header.locators[2] = Locator { code: *b"W2ku", space: 0, len: u32::MAX, offset: 0 };
        assert_eq!(names(&file, &header), []);
    }
}
