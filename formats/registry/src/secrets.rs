// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Passphrases that the user gave, by their ids.

use std::collections::BTreeMap;
use std::fmt;
use tranship_block::{Error, Result};

/// Passphrases by their ids (QEMU's `--object secret,id=…`). They are never printed.
#[derive(Clone, Default)]
pub struct Secrets(BTreeMap<String, Vec<u8>>);

impl Secrets {
    /// Keeps `passphrase` as `id`; an older one of this id is lost.
    pub fn insert(&mut self, id: impl Into<String>, passphrase: Vec<u8>) {
        self.0.insert(id.into(), passphrase);
    }

    /// The passphrase `id`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] if there is none.
    pub fn get(&self, id: &str) -> Result<&[u8]> {
        self.0
            .get(id)
            .map(Vec::as_slice)
            .ok_or_else(|| Error::usage(format!("no secret with id '{id}'")))
    }

    /// The only passphrase that was given, for an image whose name says no id.
    pub fn only(&self) -> Option<&[u8]> {
        match self.0.len() {
            1 => self.0.values().next().map(Vec::as_slice),
            _ => None,
        }
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}
