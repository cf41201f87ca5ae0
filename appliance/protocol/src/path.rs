// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Paths inside a guest: bytes, absolute, resolved below the guest's own root.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An absolute path inside a guest.
///
/// A sequence of bytes, as Linux has it: it need not be UTF-8. It is always resolved
/// with the guest's root as `/`, so that neither `..` nor a symbolic link can leave it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GuestPath(Vec<u8>);

impl GuestPath {
    /// The path `path`; a missing leading `/` is added.
    pub fn of(path: impl AsRef<[u8]>) -> Self {
        let path = path.as_ref();
        let mut bytes = Vec::with_capacity(path.len().saturating_add(1));
        if path.first() != Some(&b'/') {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(path);
        Self(bytes)
    }

    /// The path of `name` below this one.
    #[must_use]
    pub fn join(&self, name: impl AsRef<[u8]>) -> Self {
        let name = name.as_ref();
        if name.first() == Some(&b'/') {
            return Self::of(name);
        }
        let mut bytes = self.0.clone();
        if bytes.last() != Some(&b'/') {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        Self(bytes)
    }

    /// Everything before the last name; `/` for names in the root.
    #[must_use]
    pub fn parent(&self) -> Self {
        let trimmed = self.0.trim_suffix_slashes();
        match trimmed.iter().rposition(|byte| *byte == b'/') {
            Some(0) | None => Self(vec![b'/']),
            Some(at) => Self(trimmed.iter().take(at).copied().collect()),
        }
    }

    /// The last name; empty for the root.
    pub fn file_name(&self) -> &[u8] {
        let trimmed = self.0.trim_suffix_slashes();
        trimmed.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
    }

    /// The path's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path as text, with replacement characters where it is not UTF-8.
    pub fn to_text(&self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

trait TrimSuffix {
    fn trim_suffix_slashes(&self) -> &Self;
}

impl TrimSuffix for [u8] {
    fn trim_suffix_slashes(&self) -> &Self {
        let mut rest = self;
        while let [head @ .., b'/'] = rest {
            rest = head;
        }
        rest
    }
}

impl From<&str> for GuestPath {
    fn from(path: &str) -> Self {
        Self::of(path)
    }
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parent_and_name_split_at_the_last_slash() {
        for (path, parent, name) in [
            ("/etc/fstab", "/etc", "fstab"),
            ("/etc/", "/", "etc"),
            ("vmlinuz", "/", "vmlinuz"),
            ("/", "/", ""),
        ] {
            let path = GuestPath::of(path);
            assert_eq!(path.parent(), GuestPath::of(parent), "{path}");
            assert_eq!(path.file_name(), name.as_bytes(), "{path}");
        }
    }

    #[test]
    fn an_absolute_name_replaces_the_path_as_a_link_target_does() {
        let base = GuestPath::of("/a/b");
        assert_eq!(base.join("c"), GuestPath::of("/a/b/c"));
        assert_eq!(base.join("/c"), GuestPath::of("/c"));
    }
}
