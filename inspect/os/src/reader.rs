// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bounded reading of a guest's configuration: what is absent is no failure.

use crate::{DirEntry, ErrorKind, FileKind, GuestTree, Result};
use std::cell::RefCell;
use tranship_protocol::GuestPath;

/// Largest configuration file that is looked at.
pub(crate) const SMALL: u64 = 1 << 20;
/// Most names of a directory that are looked at.
const MAX_NAMES: usize = 20_000;

/// A guest's tree with limits, which remembers what could not be read.
pub(crate) struct Reader<'a> {
    tree: &'a dyn GuestTree,
    notes: RefCell<Vec<String>>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(tree: &'a dyn GuestTree) -> Self {
        Self { tree, notes: RefCell::default() }
    }

    pub(crate) fn tree(&self) -> &'a dyn GuestTree {
        self.tree
    }

    pub(crate) fn note(&self, note: String) {
        self.notes.borrow_mut().push(note);
    }

    pub(crate) fn into_notes(self) -> Vec<String> {
        self.notes.into_inner()
    }

    /// The file's bytes; `None` if it is not there. A strange file is noted and skipped:
    /// only the failure of the guest's filesystem or of the appliance ends an inspection.
    pub(crate) fn bytes(&self, path: &GuestPath, limit: u64) -> Result<Option<Vec<u8>>> {
        match self.tree.stat(path)? {
            Some(stat) if stat.kind == FileKind::File && stat.size <= limit => {}
            Some(stat) if stat.kind == FileKind::File => {
                self.note(format!("{path} is not read: it holds {} bytes", stat.size));
                return Ok(None);
            }
            _ => return Ok(None),
        }
        match self.tree.read(path, limit) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == ErrorKind::Appliance => Err(error),
            Err(error) => {
                self.note(format!("{error}"));
                Ok(None)
            }
        }
    }

    /// A small text file, with replacement characters where it is not UTF-8.
    pub(crate) fn text(&self, path: impl Into<GuestPath>) -> Result<Option<String>> {
        let content = self.bytes(&path.into(), SMALL)?;
        Ok(content.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The names in a directory; none if it is not there.
    pub(crate) fn entries(&self, path: impl Into<GuestPath>) -> Result<Vec<DirEntry>> {
        let path = path.into();
        if !self.is(&path, FileKind::Directory)? {
            return Ok(Vec::new());
        }
        let mut entries = self.tree.read_dir(&path)?;
        if entries.len() > MAX_NAMES {
            self.note(format!("only the first {MAX_NAMES} names of {path} are looked at"));
            entries.truncate(MAX_NAMES);
        }
        Ok(entries)
    }

    /// The names in a directory that are text; none if it is not there.
    pub(crate) fn names(&self, path: impl Into<GuestPath>) -> Result<Vec<String>> {
        let entries = self.entries(path)?;
        Ok(entries.into_iter().filter_map(|entry| String::from_utf8(entry.name).ok()).collect())
    }

    /// Whether the path leads to something of this kind.
    pub(crate) fn is(&self, path: &GuestPath, kind: FileKind) -> Result<bool> {
        Ok(self.tree.stat(path)?.is_some_and(|stat| stat.kind == kind))
    }

    /// Whether the path leads to a regular file.
    pub(crate) fn has_file(&self, path: impl Into<GuestPath>) -> Result<bool> {
        self.is(&path.into(), FileKind::File)
    }

    /// Whether the path leads to a directory.
    pub(crate) fn has_directory(&self, path: impl Into<GuestPath>) -> Result<bool> {
        self.is(&path.into(), FileKind::Directory)
    }

    /// Where a symbolic link points, as text; `None` if it is no link.
    pub(crate) fn link(&self, path: impl Into<GuestPath>) -> Result<Option<String>> {
        let path = path.into();
        match self.tree.lstat(&path)? {
            Some(stat) if stat.kind == FileKind::Link => {
                let target = self.tree.read_link(&path)?;
                Ok(Some(String::from_utf8_lossy(&target).into_owned()))
            }
            _ => Ok(None),
        }
    }
}

/// The value of `KEY=value` in a file of shell assignments, without its quotes.
pub(crate) fn assignment<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().rev().find_map(|line| {
        let value = line.trim().strip_prefix(key)?.strip_prefix('=')?.trim();
        let quoted = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
        Some(quoted('"').or_else(|| quoted('\'')).unwrap_or(value))
    })
}

/// The `[section]` and `key = value` pairs of an ini file, in order.
pub(crate) fn ini(text: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    let mut section = "";
    text.lines().filter_map(move |line| {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name;
            return None;
        }
        if line.starts_with(['#', ';']) {
            return None;
        }
        let (key, value) = line.split_once('=')?;
        Some((section, key.trim(), value.trim()))
    })
}
