// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Certificates and keys in files.

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem};
use std::path::{Path, PathBuf};
use tranship_block::{Error, ErrorKind, Result};

/// Those who vouch for the other side.
pub(super) const CA: &str = "ca-cert.pem";
/// Certificates that count no more.
const REVOKED: &str = "ca-crl.pem";

/// Where distributions keep the certificates that they trust: Debian, Fedora, SUSE, Alpine.
const SYSTEM: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A folder with files of QEMU's names.
pub(super) struct Folder<'a>(pub(super) &'a Path);

impl Folder<'_> {
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.join(name).exists()
    }

    /// Those who vouch for the other side.
    pub(super) fn roots(&self) -> Result<RootCertStore> {
        roots(&self.0.join(CA))
    }

    /// Lists of certificates that count no more, if there are any.
    pub(super) fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        if self.has(REVOKED) { all(&self.0.join(REVOKED)) } else { Ok(Vec::new()) }
    }

    /// The certificate of a `side` and its key; `None` if there is no certificate.
    pub(super) fn own(
        &self,
        side: &str,
    ) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>> {
        let name = format!("{side}-cert.pem");
        if !self.has(&name) {
            return Ok(None);
        }
        let chain = all(&self.0.join(name))?;
        let file = self.0.join(format!("{side}-key.pem"));
        let key = PrivateKeyDer::from_pem_file(&file)
            .map_err(|error| unreadable(error, &file, "a private key"))?;
        Ok(Some((chain, key)))
    }
}

/// Those whom the system trusts.
pub(super) fn system_roots() -> Result<RootCertStore> {
    let file = SYSTEM.iter().map(PathBuf::from).find(|file| file.exists()).ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            "this system has no list of trusted certificates: say where yours are with \
             tls-certificates=DIR",
        )
    })?;
    roots(&file)
}

fn roots(file: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let certificates = all::<CertificateDer<'static>>(file)?;
    // A system's list has some that are too old to be understood.
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(Error::corrupt("no certificate is in it that can be used").in_file(file));
    }
    Ok(roots)
}

/// Everything of one kind in a file; at least one.
fn all<T: PemObject>(file: &Path) -> Result<Vec<T>> {
    let objects = T::pem_file_iter(file)
        .and_then(Iterator::collect::<std::result::Result<Vec<T>, _>>)
        .map_err(|error| unreadable(error, file, "certificates"))?;
    if objects.is_empty() {
        return Err(Error::corrupt("nothing of its kind is in this PEM file").in_file(file));
    }
    Ok(objects)
}

fn unreadable(error: pem::Error, file: &Path, what: &str) -> Error {
    let error = match error {
        pem::Error::Io(error) => Error::io(format!("cannot read {what}"), error),
        error => Error::corrupt(format!("cannot find {what} in this PEM file")).because(error),
    };
    error.in_file(file)
}
