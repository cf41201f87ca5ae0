// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a differencing disk says about its parent (MS-VHDX 2.6.2.6).

use crate::Guid;
use crate::bytes::{put, to_u64};
use crate::header::{guid, to_utf16};
use tranship_block::{Error, LittleEndian, Result};

const VHDX: Guid =
    Guid::known(0xb04a_efb7, 0xd19e, 0x4a81, [0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13]);
/// Bytes of the longest key that means anything.
const LONGEST_KEY: u16 = 64;
/// Bytes before the entries, and of an entry.
const HEADER: usize = 20;
const ENTRY: usize = 12;

/// How a parent's name is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameKind {
    /// Relative to the folder of the child.
    Relative,
    /// A Windows volume and a path on it.
    Volume,
    /// An absolute path.
    Absolute,
}

/// A name under which the parent may be found: a request, to be resolved by a gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentName {
    /// How it is meant.
    pub kind: NameKind,
    /// The name as the image has it, usually with backslashes.
    pub name: String,
}

impl ParentName {
    /// The name with slashes, without the leading `./`.
    pub fn path(&self) -> String {
        let path = self.name.replace('\\', "/");
        path.strip_prefix("./").map(str::to_owned).unwrap_or(path)
    }
}

/// The parent that a differencing disk needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentLocator {
    /// The parent's data-write GUID has to be one of these.
    pub linkage: Vec<Guid>,
    /// Where it may be, in the order to try: relative, volume, absolute.
    pub names: Vec<ParentName>,
}

impl ParentLocator {
    /// The locator of a child of the image whose data-write GUID is `linkage`.
    ///
    /// `relative` is the parent's path from the child's folder; slashes become
    /// backslashes.
    pub fn new(linkage: Guid, relative: Option<&str>, absolute: Option<&str>) -> Self {
        let windows = |name: &str| name.replace('/', "\\");
        let relative = relative.map(|name| {
            let name = windows(name);
            let name = if name.starts_with('.') { name } else { format!(".\\{name}") };
            ParentName { kind: NameKind::Relative, name }
        });
        let absolute =
            absolute.map(|name| ParentName { kind: NameKind::Absolute, name: windows(name) });
        Self { linkage: vec![linkage], names: relative.into_iter().chain(absolute).collect() }
    }

    /// Whether `data_write`, a parent's data-write GUID, is the one that is wanted.
    pub fn accepts(&self, data_write: Guid) -> bool {
        self.linkage.contains(&data_write)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let fields = LittleEndian(bytes, "parent locator");
        let kind = guid(&fields, "type", 0)?;
        if kind != VHDX {
            return Err(Error::unsupported(format!(
                "parent locator is of type {kind}, expected {VHDX}"
            )));
        }
        let count = fields.u16("key count", 18)?;
        let mut linkage = [None, None];
        let mut names: [Option<String>; 3] = [None, None, None];
        for at in (HEADER..).step_by(ENTRY).take(usize::from(count)) {
            let key_len = fields.u16("key length", at.saturating_add(8))?;
            let key_at = fields.u32("key offset", at)?;
            let value_len = fields.u16("value length", at.saturating_add(10))?;
            let value_at = fields.u32("value offset", at.saturating_add(4))?;
            if key_len > LONGEST_KEY {
                continue;
            }
            // The keys that matter are decoded once, so that overlapping values cost nothing.
            let text = |name, at: u32, len: u16| -> Result<String> {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                let bytes = fields.bytes(name, at, usize::from(len))?;
                let units = bytes.as_chunks::<2>().0.iter();
                let text: Vec<u16> = units.map(|pair| u16::from_le_bytes(*pair)).collect();
                Ok(String::from_utf16_lossy(&text).trim_end_matches('\0').to_owned())
            };
            let key = text("key", key_at, key_len)?;
            let place = match key.as_str() {
                "parent_linkage" | "parent_linkage2" => {
                    let place = if key.ends_with('2') { &mut linkage[1] } else { &mut linkage[0] };
                    if place.is_none() {
                        let value = text("value", value_at, value_len)?;
                        let guid = Guid::parse(&value).ok_or_else(|| {
                            Error::corrupt(format!("{key} is {value:?}, expected a GUID"))
                        })?;
                        *place = Some(guid);
                    }
                    continue;
                }
                "relative_path" => &mut names[0],
                "volume_path" => &mut names[1],
                "absolute_win32_path" => &mut names[2],
                _ => continue,
            };
            if place.is_none() {
                *place = Some(text("value", value_at, value_len)?);
            }
        }
        let [first, second] = linkage;
        let first = first.ok_or_else(|| Error::corrupt("parent locator has no parent_linkage"))?;
        let second = second.filter(|second| !second.is_nil() && *second != first);
        let kinds = [NameKind::Relative, NameKind::Volume, NameKind::Absolute];
        let names = kinds.into_iter().zip(names).filter_map(|(kind, name)| {
            name.filter(|name| !name.is_empty()).map(|name| ParentName { kind, name })
        });
        Ok(Self { linkage: [first].into_iter().chain(second).collect(), names: names.collect() })
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let linkage = |number: usize| {
            let guid = self.linkage.get(number).copied().unwrap_or_default();
            format!("{{{guid}}}")
        };
        let mut pairs = vec![("parent_linkage", linkage(0)), ("parent_linkage2", linkage(1))];
        for name in &self.names {
            let key = match name.kind {
                NameKind::Relative => "relative_path",
                NameKind::Volume => "volume_path",
                NameKind::Absolute => "absolute_win32_path",
            };
            pairs.push((key, name.name.clone()));
        }
        let mut bytes = vec![0; HEADER.saturating_add(pairs.len().saturating_mul(ENTRY))];
        put(&mut bytes, 0, &VHDX.to_bytes());
        put(&mut bytes, 18, &u16::try_from(pairs.len()).unwrap_or(0).to_le_bytes());
        for (at, (key, value)) in (HEADER..).step_by(ENTRY).zip(pairs) {
            let (key, value) = (to_utf16(key), to_utf16(&value));
            let key_at = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let value_at = key_at.saturating_add(u32::try_from(key.len()).unwrap_or(u32::MAX));
            put(&mut bytes, at, &key_at.to_le_bytes());
            put(&mut bytes, at.saturating_add(4), &value_at.to_le_bytes());
            let narrow = |len: usize| u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes();
            put(&mut bytes, at.saturating_add(8), &narrow(key.len()));
            put(&mut bytes, at.saturating_add(10), &narrow(value.len()));
            bytes.extend(key);
            bytes.extend(value);
        }
        bytes
    }

    /// Whether a locator can hold these names.
    pub(crate) fn check(&self) -> Result<()> {
        for name in &self.names {
            let len = name.name.encode_utf16().count().saturating_mul(2);
            if len == 0 || u16::try_from(len).is_err() || name.name.contains('\0') {
                return Err(Error::usage(format!(
                    "name of the parent has {} bytes, expected 1 to 32767 characters without NUL",
                    to_u64(name.name.len())
                )));
            }
        }
        if self.linkage.is_empty() || self.linkage.len() > 2 {
            return Err(Error::usage(format!(
                "parent has {} linkages, expected one or two",
                self.linkage.len()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    fn example() -> ParentLocator {
        ParentLocator::new(Guid::from_bytes([9; 16]), Some("../a/b.vhdx"), Some("/x/b.vhdx"))
    }

    #[test]
    fn what_was_written_reads_back() {
        let found = ParentLocator::parse(&example().to_bytes()).unwrap();
        assert_eq!(found, example());
        assert_eq!(found.names[0].name, "..\\a\\b.vhdx");
        assert_eq!(found.names[0].path(), "../a/b.vhdx");
        assert_eq!(found.names[1].path(), "/x/b.vhdx");
        let plain = ParentLocator::new(Guid::NIL, Some("b.vhdx"), None);
        assert_eq!(
            (plain.names[0].name.as_str(), plain.names[0].path().as_str()),
            (".\\b.vhdx", "b.vhdx")
        );
    }

    #[test]
    fn locators_that_lie_are_refused() {
        let cases: [(usize, &[u8], &str); 5] = [
            (0, &[1], "parent locator is of type"),
            (18, &[0, 0], "no parent_linkage"),
            (18, &[0xff, 0xff], "ends before"),
            (20, &[0xff, 0xff, 0xff, 0xff], "ends before the 28 bytes of key"),
            (30, &[10, 0], "expected a GUID"),
        ];
        for (at, bytes, text) in cases {
            let mut locator = example().to_bytes();
            put(&mut locator, at, bytes);
            let error = ParentLocator::parse(&locator).unwrap_err();
            assert!(error.message().contains(text), "{error}");
        }
    }
}
