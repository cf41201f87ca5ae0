// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Questions to a server.

use crate::failure::Failure;
use std::path::Path;
use tranship_block::BlockDevice;
use tranship_nbd::{
    Address, ClientOptions, ClientTls, Facts, ListedExport, Remote, Uri, describe_export,
    list_exports,
};

/// How client and server speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Protocol {
    pub(crate) tls: bool,
    pub(crate) structured: bool,
    pub(crate) extended: bool,
}

/// What a server says about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) size: u64,
    /// Transmission flags.
    pub(crate) flags: u16,
    /// Smallest, preferred and largest block, if the server tells them.
    pub(crate) blocks: Option<[u32; 3]>,
    /// Metadata contexts.
    pub(crate) contexts: Vec<String>,
}

/// A server, and the name of one of its exports.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    uri: Uri,
    /// What is used instead of what the URI says about it.
    tls: Option<ClientTls>,
}

/// A connection to an export.
#[derive(Debug)]
pub(super) struct Connected {
    remote: Remote,
    pub(super) protocol: Protocol,
    pub(super) export: Export,
}

impl From<&Facts> for Protocol {
    fn from(facts: &Facts) -> Self {
        Self { tls: facts.tls, structured: facts.structured, extended: facts.extended }
    }
}

impl Export {
    fn new(name: &str, description: &str, facts: &Facts, contexts: Vec<String>) -> Self {
        let blocks = [facts.min_block, facts.preferred_block, facts.max_payload];
        Self {
            name: name.to_owned(),
            description: description.to_owned(),
            size: facts.size,
            flags: facts.flags,
            blocks: facts.has_block_sizes.then_some(blocks),
            contexts,
        }
    }

    /// What is in a list; nothing if the server says nothing about it.
    fn listed(listed: ListedExport) -> Option<Self> {
        let ListedExport { name, description, facts, contexts } = listed;
        Some(Self::new(&name, &description, &facts?, contexts))
    }
}

impl Server {
    /// The server and export of a URI.
    pub(super) fn named(text: &str) -> Result<Self, Failure> {
        Ok(Self { uri: Uri::parse(text)?, tls: None })
    }

    /// The server at a Unix socket.
    pub(crate) fn at_socket(path: &Path) -> Self {
        Self { uri: Uri::new(Address::Unix(path.to_owned()), ""), tls: None }
    }

    /// The server at a port of TCP.
    pub(crate) fn at_port(host: &str, port: u16) -> Self {
        Self { uri: Uri::new(Address::Tcp { host: host.to_owned(), port }, ""), tls: None }
    }

    /// The same, encrypted with these credentials if there are any.
    pub(crate) fn encrypted_with(self, tls: Option<ClientTls>) -> Self {
        Self { tls, ..self }
    }

    /// Another export of the same server.
    pub(super) fn with_export(&self, name: &str) -> Self {
        Self { uri: Uri { export: name.to_owned(), ..self.uri.clone() }, tls: self.tls.clone() }
    }

    /// How the export is named.
    pub(super) fn uri(&self) -> String {
        self.uri.to_string()
    }

    /// Nobody waits for a server that is not there, when all that is wanted is to know.
    fn options(&self) -> Result<ClientOptions, Failure> {
        Ok(ClientOptions {
            export: self.uri.export.clone(),
            read_only: true,
            connections: 1,
            tls: match &self.tls {
                Some(tls) => Some(tls.clone()),
                None => self.uri.client_tls()?,
            },
            ..ClientOptions::default()
        })
    }

    /// What the server says about the export, without using it.
    pub(super) fn describe(&self) -> Result<(Protocol, Export), Failure> {
        let listed = describe_export(&self.uri.address, &self.options()?)?;
        let protocol = listed.facts.as_ref().map(Protocol::from).unwrap_or_default();
        let name = listed.name.clone();
        let export = Export::listed(listed).ok_or_else(|| {
            Failure::usage(format!("the server says nothing about the export {name:?}"))
        })?;
        Ok((protocol, export))
    }

    /// Connects to the export, with `context` besides `base:allocation`.
    pub(super) fn connect(&self, context: Option<&str>) -> Result<Connected, Failure> {
        let options = ClientOptions {
            contexts: context.map(ToOwned::to_owned).into_iter().collect(),
            ..self.options()?
        };
        let remote = Remote::connect(&self.uri.address, &options)?;
        let facts = remote.facts();
        let name = facts.name.as_deref().unwrap_or(&self.uri.export);
        let description = facts.description.as_deref().unwrap_or_default();
        let export = Export::new(name, description, facts, facts.contexts.clone());
        Ok(Connected { protocol: Protocol::from(facts), export, remote })
    }

    /// All exports of the server.
    pub(crate) fn list(&self) -> Result<(Protocol, Vec<Export>), Failure> {
        let listing = list_exports(&self.uri.address, &self.options()?)?;
        let protocol = Protocol {
            tls: listing.tls,
            structured: listing.structured,
            extended: listing.extended,
        };
        Ok((protocol, listing.exports.into_iter().filter_map(Export::listed).collect()))
    }
}

impl Connected {
    /// The disk.
    pub(super) fn device(&self) -> &dyn BlockDevice {
        &self.remote
    }

    /// Lengths and flags that `context` has from `offset` on.
    pub(super) fn status(
        &self,
        context: &str,
        offset: u64,
        len: u64,
    ) -> Result<Vec<(u64, u64)>, Failure> {
        Ok(self.remote.status(context, offset, len)?)
    }
}
