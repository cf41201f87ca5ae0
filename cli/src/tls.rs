// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Credentials for TLS from `--object tls-creds-x509,…`.

use crate::failure::Failure;
use std::path::PathBuf;
use tranship_nbd::{ClientTls, ServerTls};

/// A folder of certificates under an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct X509 {
    pub(crate) id: String,
    /// For a server; otherwise for a client.
    pub(crate) is_server: bool,
    pub(crate) folder: PathBuf,
    verifies_peer: bool,
}

impl X509 {
    /// Reads what follows the object's type.
    pub(crate) fn parse(
        parts: impl Iterator<Item = (String, Option<String>)>,
    ) -> Result<Self, Failure> {
        let (mut id, mut folder, mut is_server, mut verifies_peer) = (None, None, false, true);
        for (name, value) in parts {
            let value = value.unwrap_or_else(|| "on".to_owned());
            match name.as_str() {
                "id" => id = Some(value),
                "dir" => folder = Some(PathBuf::from(value)),
                "endpoint" => is_server = endpoint(&value)?,
                "verify-peer" => verifies_peer = switch(&name, &value)?,
                "priority" => {
                    return Err(Failure::usage(
                        "'priority' is a word of GnuTLS, which is not here",
                    )
                    .hint("TLS 1.2 and 1.3 with good ciphers are all there is"));
                }
                "passwordid" => {
                    return Err(Failure::usage("keys that are encrypted cannot be read")
                        .hint("put the key without a password into a file of its user's"));
                }
                _ => return Err(Failure::usage(format!("Parameter '{name}' is unexpected"))),
            }
        }
        let id = id.ok_or_else(|| Failure::usage("Parameter 'id' is missing"))?;
        let folder = folder.ok_or_else(|| Failure::usage("Missing 'dir' property value"))?;
        Ok(Self { id, is_server, folder, verifies_peer })
    }

    /// What a client encrypts with.
    pub(crate) fn client(&self) -> Result<ClientTls, Failure> {
        if self.is_server {
            return Err(Failure::usage("Expected TLS credentials for a client endpoint"));
        }
        Ok(ClientTls::new(Some(&self.folder), self.verifies_peer)?)
    }

    /// What a server encrypts with.
    pub(crate) fn server(&self) -> Result<ServerTls, Failure> {
        if !self.is_server {
            return Err(Failure::usage("Expected TLS credentials for a server endpoint"));
        }
        Ok(ServerTls::from_folder(&self.folder, self.verifies_peer)?)
    }
}

/// Objects of QEMU's that would be for TLS and are not here.
pub(crate) fn refuse_other(kind: &str) -> Result<(), Failure> {
    if matches!(kind, "tls-creds-psk" | "tls-creds-anon") {
        return Err(Failure::usage(format!("there are no {kind} here, but certificates"))
            .hint("tls-creds-x509,id=ID,endpoint=client|server,dir=DIR"));
    }
    Ok(())
}

fn endpoint(value: &str) -> Result<bool, Failure> {
    match value {
        "client" => Ok(false),
        "server" => Ok(true),
        _ => Err(Failure::usage(format!("Parameter 'endpoint' does not accept value '{value}'"))),
    }
}

fn switch(name: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Failure::usage(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}
