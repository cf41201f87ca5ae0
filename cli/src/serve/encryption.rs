// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether and how the server encrypts, and who may connect then.

use super::authorization::{self, Authorization};
use crate::args::ServeArgs;
use crate::failure::Failure;
use crate::image::secrets;
use crate::tls::{X509, refuse_other};
use std::path::PathBuf;
use tranship_nbd::{ClientTls, ServerTls};

/// How the server encrypts.
#[derive(Debug)]
pub(super) struct Encryption {
    pub(super) tls: ServerTls,
    /// Clients have to.
    pub(super) required: bool,
    /// Where the certificates are.
    pub(super) folder: PathBuf,
}

/// Objects that are for the server itself, and those for its disks.
#[derive(Debug, Default)]
struct Objects {
    credentials: Vec<X509>,
    rules: Vec<(String, Authorization)>,
    /// Ids of everything else, and the objects.
    others: Vec<(Option<String>, String)>,
}

impl Encryption {
    /// What the options say; nothing if clients cannot encrypt.
    pub(super) fn of(args: &ServeArgs) -> Result<Option<Self>, Failure> {
        let objects = Objects::of(&args.object)?;
        for (word, name) in [(&args.tls_authz, "authz"), (&args.tls_hostname, "hostname")] {
            if word.is_some() && args.tls_creds.is_none() {
                let text = format!("--tls-{name} is not permitted without --tls-creds");
                return Err(Failure::usage(text));
            }
        }
        if args.tls_hostname.is_some() {
            return Err(Failure::usage("TLS hostname is only supported with export list"));
        }
        let required = match args.tls.as_deref() {
            None | Some("require") => true,
            Some("on") => false,
            Some("off") => return Ok(None),
            Some(other) => {
                return Err(Failure::usage(format!("Invalid TLS mode '{other}'"))
                    .hint("expected off, on or require"));
            }
        };
        let (tls, folder) = match (&args.tls_creds, &args.tls_certificates) {
            (Some(_), Some(_)) => {
                let text = "--tls-creds and --tls-certificates are mutually exclusive";
                return Err(Failure::usage(text));
            }
            (Some(id), None) => {
                let x509 = objects.credentials(id).map_err(not_got)?;
                let of = |failure| if x509.is_server { failure } else { not_got(failure) };
                let tls = x509.server().map_err(of)?;
                (tls, x509.folder.clone())
            }
            (None, Some(folder)) => {
                (ServerTls::from_folder(folder, args.tls_verify_peer)?, folder.clone())
            }
            (None, None) if args.tls.is_some() || args.tls_verify_peer => {
                return Err(Failure::usage("without certificates there is no TLS")
                    .hint("say where they are: --tls-certificates DIR"));
            }
            (None, None) => return Ok(None),
        };
        let tls = match &args.tls_authz {
            Some(id) => {
                let rules = objects.rules(id)?.clone();
                tls.admitting(move |name| rules.allows(name))?
            }
            None => tls,
        };
        Ok(Some(Self { tls, required, folder }))
    }
}

/// What `-L` encrypts with, if it does.
pub(super) fn of_client(args: &ServeArgs) -> Result<Option<ClientTls>, Failure> {
    if args.tls_authz.is_some() {
        return Err(Failure::usage("TLS authorization is incompatible with export list"));
    }
    let Some(id) = &args.tls_creds else {
        if args.tls_hostname.is_some() {
            return Err(Failure::usage("--tls-hostname is not permitted without --tls-creds"));
        }
        return Ok(None);
    };
    let objects = Objects::of(&args.object)?;
    let x509 = objects.credentials(id).map_err(not_got)?;
    let of = |failure| if x509.is_server { not_got(failure) } else { failure };
    let tls = x509.client().map_err(of)?;
    Ok(Some(match &args.tls_hostname {
        Some(hostname) => tls.for_host(hostname),
        None => tls,
    }))
}

/// The objects that are for disks.
pub(super) fn without_servers(objects: &[String]) -> Result<Vec<String>, Failure> {
    Ok(Objects::of(objects)?.others.into_iter().map(|(_, object)| object).collect())
}

fn not_got(failure: Failure) -> Failure {
    failure.within("Failed to get TLS creds".to_owned())
}

impl Objects {
    fn of(objects: &[String]) -> Result<Self, Failure> {
        let mut sorted = Self::default();
        for object in objects {
            let (kind, parts) = secrets::kind_of(object)?;
            refuse_other(&kind)?;
            if authorization::is_meant(&kind) {
                sorted.rules.push(Authorization::parse(&kind, parts)?);
                continue;
            }
            if kind == "tls-creds-x509" {
                let x509 = X509::parse(parts)?;
                let is_server = x509.is_server;
                sorted.credentials.push(x509);
                if is_server {
                    continue;
                }
                sorted.others.push((None, object.clone()));
                continue;
            }
            let id = parts.into_iter().find(|(name, _)| name == "id").and_then(|(_, id)| id);
            sorted.others.push((id, object.clone()));
        }
        Ok(sorted)
    }

    fn credentials(&self, id: &str) -> Result<&X509, Failure> {
        if let Some(x509) = self.credentials.iter().find(|x509| x509.id == id) {
            return Ok(x509);
        }
        let is_known = self.rules.iter().any(|(known, _)| known == id)
            || self.others.iter().any(|(known, _)| known.as_deref() == Some(id));
        Err(Failure::usage(if is_known {
            format!("Object with id '{id}' is not TLS credentials")
        } else {
            format!("No TLS credentials with id '{id}'")
        }))
    }

    fn rules(&self, id: &str) -> Result<&Authorization, Failure> {
        let found = self.rules.iter().find(|(known, _)| known == id);
        found.map(|(_, rules)| rules).ok_or_else(|| {
            Failure::usage(format!("no authorization with id '{id}'"))
                .hint("--object authz-simple,id=ID,identity=NAME is one")
        })
    }
}
