// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Encryption: TLS 1.2 and 1.3 with certificates, for both sides.
//!
//! Folders have the names in them that QEMU and libnbd use: `ca-cert.pem`, `ca-crl.pem`,
//! `client-cert.pem` and `client-key.pem` or `server-cert.pem` and `server-key.pem`.
//! There are no pre-shared keys: rustls has none from outside of a session.

mod certificates;
mod halves;
mod keys;
mod shaking;
mod subject;

use certificates::Folder;
pub use halves::{TlsReading, TlsWriting};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, UnbufferedClientConnection, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::{CipherSuite, ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use std::fmt;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use tranship_block::{Error, ErrorKind, Result};

/// Means of a client to encrypt and to know its server.
#[derive(Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    hostname: Option<String>,
    verifies: bool,
}

impl ClientTls {
    /// With the certificates in `folder`, or with those that the system trusts and none of
    /// its own. Only if `verify_peer` is true it matters whom it talks to.
    ///
    /// # Errors
    ///
    /// Files that are missing or unreadable, or that do not fit together.
    pub fn new(folder: Option<&Path>, verify_peer: bool) -> Result<Self> {
        let provider = provider();
        let folder = folder.map(Folder);
        let roots = match &folder {
            Some(folder) if verify_peer || folder.has(certificates::CA) => folder.roots()?,
            None if verify_peer => certificates::system_roots()?,
            _ => rustls::RootCertStore::empty(),
        };
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?;
        let builder = if verify_peer {
            let lists = folder.as_ref().map_or(Ok(Vec::new()), Folder::revoked)?;
            let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
                .with_crls(lists)
                .build()
                .map_err(|error| Error::usage("cannot verify servers").because(error))?;
            builder.dangerous().with_custom_certificate_verifier(verifier)
        } else {
            let anybody = Arc::new(Anybody(provider));
            builder.dangerous().with_custom_certificate_verifier(anybody)
        };
        let own = match &folder {
            Some(folder) => folder.own("client")?,
            None => None,
        };
        let mut config = match own {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(unusable)?,
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        Ok(Self { config: Arc::new(config), hostname: None, verifies: verify_peer })
    }

    /// The server's certificate must be for `hostname`, whatever it is connected at.
    #[must_use]
    pub fn for_host(mut self, hostname: impl Into<String>) -> Self {
        self.hostname = Some(hostname.into());
        self
    }

    /// Shakes hands with the server that is reached at `host`. The two halves may be used by
    /// two threads at a time.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] if the server is not who it should be or speaks no TLS,
    /// [`ErrorKind::Usage`] if `host` is no name, and [`ErrorKind::Busy`] if it went away.
    pub fn connect<R: Read, W: Write>(
        &self,
        host: &str,
        reading: R,
        writing: W,
    ) -> Result<(TlsReading<R>, TlsWriting<W>)> {
        let host = self.hostname.as_deref().unwrap_or(host);
        let name = ServerName::try_from(host.to_owned()).map_err(|error| {
            Error::usage(format!("no certificate can be for the host name {host:?}")).because(error)
        })?;
        let config = Arc::clone(&self.config);
        let side = UnbufferedClientConnection::new(config, name).map_err(unusable)?;
        shaking::shake_hands(side, reading, writing, |_| Ok(()))
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = f.debug_struct("ClientTls");
        text.field("hostname", &self.hostname).field("verifies", &self.verifies);
        text.finish_non_exhaustive()
    }
}

/// Means of a server to encrypt, and to know its clients if it wants to.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    verifies: bool,
    rule: Option<Arc<Rule>>,
}

/// Whether the client with this distinguished name is let in.
type Rule = dyn Fn(&str) -> bool + Send + Sync;

impl ServerTls {
    /// With the certificate in `folder`. If `verify_clients` is true, clients have to have
    /// one that the `ca-cert.pem` there vouches for.
    ///
    /// # Errors
    ///
    /// Files that are missing or unreadable, or that do not fit together.
    pub fn from_folder(folder: &Path, verify_clients: bool) -> Result<Self> {
        let provider = provider();
        let files = Folder(folder);
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?;
        let builder = if verify_clients {
            let roots = Arc::new(files.roots()?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .with_crls(files.revoked()?)
                .build()
                .map_err(|error| Error::usage("cannot verify clients").because(error))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let (chain, key) = files.own("server")?.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "a TLS server needs server-cert.pem").in_file(folder)
        })?;
        let mut config = builder
            .with_single_cert(chain, key)
            .map_err(|error| unusable(error).in_file(folder))?;
        // Ours has the quickest ciphers in front, and all are good.
        config.ignore_client_order = true;
        // Nobody comes back to an NBD server often enough to save a handshake.
        config.send_tls13_tickets = 0;
        // Each direction encrypts by itself once the handshake is over.
        config.enable_secret_extraction = true;
        Ok(Self { config: Arc::new(config), verifies: verify_clients, rule: None })
    }

    /// Of the clients with a good certificate lets only those in for whose distinguished
    /// name `rule` is true. The name is written as GnuTLS does it and QEMU's rules have it:
    /// `C=GB,O=Example,CN=host`, in the order of the certificate.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] if clients are not verified: anybody could have any name.
    pub fn admitting(self, rule: impl Fn(&str) -> bool + Send + Sync + 'static) -> Result<Self> {
        if !self.verifies {
            return Err(Error::usage("clients whose certificates are not verified have no names"));
        }
        Ok(Self { rule: Some(Arc::new(rule)), ..self })
    }

    /// Lets a client in by its certificates.
    fn admit(&self, certificates: &[CertificateDer<'_>]) -> Result<()> {
        let Some(rule) = &self.rule else { return Ok(()) };
        let name = certificates.first().and_then(|first| subject::of(first)).ok_or_else(|| {
            Error::new(ErrorKind::Denied, "the client's certificate has no name that is readable")
        })?;
        if rule(&name) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Denied, format!("no rule lets the client {name:?} in")))
    }

    /// Shakes hands with a client. The two halves may be used by two threads at a time.
    ///
    /// Nothing of the connection may have been read beyond what came in plain text.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Denied`] if the client is not let in or speaks no TLS, and
    /// [`ErrorKind::Busy`] if it went away. The connection has to be closed then.
    pub fn accept<R: Read, W: Write>(
        &self,
        reading: R,
        writing: W,
    ) -> Result<(TlsReading<R>, TlsWriting<W>)> {
        let config = Arc::clone(&self.config);
        let side = UnbufferedServerConnection::new(config).map_err(unusable)?;
        let admit = |certificates: &[CertificateDer<'_>]| self.admit(certificates);
        shaking::shake_hands(side, reading, writing, admit)
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("verifies", &self.verifies).finish_non_exhaustive()
    }
}

/// What a server encrypts with, and whether clients have a choice.
#[derive(Clone, Debug)]
pub(crate) struct Encryption {
    pub(crate) tls: ServerTls,
    /// Clients have to encrypt.
    pub(crate) required: bool,
}

/// What encrypts. AES with 128 bits is first: it is as safe, and a third quicker.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| {
        !matches!(
            suite.suite(),
            CipherSuite::TLS13_AES_128_GCM_SHA256
                | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
                | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
        )
    });
    Arc::new(provider)
}

fn unusable(error: rustls::Error) -> Error {
    Error::usage("these certificates cannot be used for TLS").because(error)
}

/// Takes any certificate, but still wants its owner to sign.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
