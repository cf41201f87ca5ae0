// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Passphrases and credentials that the user gave, by their ids.

use crate::spec::NbdAddress;
use std::collections::BTreeMap;
use std::fmt;
use tranship_block::{Error, Result};
use tranship_nbd::ClientTls;

/// Passphrases (QEMU's `--object secret,id=…`) and credentials for TLS (`--object
/// tls-creds-x509,id=…`) by their ids. They are never printed.
#[derive(Clone, Default)]
pub struct Secrets {
    passphrases: BTreeMap<String, Vec<u8>>,
    credentials: BTreeMap<String, ClientTls>,
}

impl Secrets {
    /// Keeps `passphrase` as `id`; an older one of this id is lost.
    pub fn insert(&mut self, id: impl Into<String>, passphrase: Vec<u8>) {
        self.passphrases.insert(id.into(), passphrase);
    }

    /// Keeps `credentials` as `id`; older ones of this id are lost.
    pub fn insert_tls(&mut self, id: impl Into<String>, credentials: ClientTls) {
        self.credentials.insert(id.into(), credentials);
    }

    /// The credentials `id` for TLS.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] if there are none.
    pub fn tls(&self, id: &str) -> Result<&ClientTls> {
        self.credentials
            .get(id)
            .ok_or_else(|| Error::usage(format!("no TLS credentials with id '{id}'")))
    }

    /// What a client of this server encrypts with, if it does.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] if there are no credentials of the id that the
    /// address names, and what is wrong with the certificates that it names.
    pub fn tls_for(&self, address: &NbdAddress) -> Result<Option<ClientTls>> {
        let Some(id) = &address.credentials else { return address.uri.client_tls() };
        let tls = self.tls(id)?.clone();
        Ok(Some(match &address.uri.tls_options.hostname {
            Some(hostname) => tls.for_host(hostname),
            None => tls,
        }))
    }

    /// The passphrase `id`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] if there is none.
    pub fn get(&self, id: &str) -> Result<&[u8]> {
        self.passphrases
            .get(id)
            .map(Vec::as_slice)
            .ok_or_else(|| Error::usage(format!("no secret with id '{id}'")))
    }

    /// The only passphrase that was given, for an image whose name says no id.
    pub fn only(&self) -> Option<&[u8]> {
        match self.passphrases.len() {
            1 => self.passphrases.values().next().map(Vec::as_slice),
            _ => None,
        }
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.passphrases.keys()).entries(self.credentials.keys()).finish()
    }
}
