// SPDX-License-Identifier: Apache-2.0 OR MIT
//! URIs of exports, as in the NBD project's `doc/uri.md` and libnbd.
//!
//! What others let pass in silence is refused here: a misspelt option of TLS, a port that
//! does not exist, a fragment. Text is split before it is decoded, and names are never
//! normalised: an export may be called `.` or `/a//b`.

use crate::Address;
use crate::tls::ClientTls;
use crate::wire::MAX_STRING;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tranship_block::{Error, Result};

/// The port of NBD.
pub const PORT: u16 = 10_809;
/// The context id of the machine that virtual machines run on.
const VSOCK_HOST: u32 = 2;

/// Where an export is, and how its server is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// The server.
    pub address: Address,
    /// Name of the export; the empty one is the server's default.
    pub export: String,
    /// Whether the connection must be encrypted (`nbds`).
    pub tls: bool,
    /// Who we are (PSK identity).
    pub user: Option<String>,
    /// How it is encrypted.
    pub tls_options: TlsOptions,
}

/// What a URI says about TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsOptions {
    /// `tls-type`: how the two sides prove who they are.
    pub kind: Option<TlsKind>,
    /// `tls-certificates`: folder of the certificates.
    pub certificates: Option<PathBuf>,
    /// `tls-hostname`: the name that the server's certificate must have.
    pub hostname: Option<String>,
    /// `tls-verify-peer`: whether the server's certificate is looked at.
    pub verify_peer: bool,
    /// `tls-psk-file`: file of the pre-shared keys.
    pub psk_file: Option<PathBuf>,
}

impl Default for TlsOptions {
    fn default() -> Self {
        Self { kind: None, certificates: None, hostname: None, verify_peer: true, psk_file: None }
    }
}

/// How the two sides of an encrypted connection prove who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsKind {
    /// Not at all.
    Anonymous,
    /// With certificates.
    X509,
    /// With a key that both know.
    Psk,
}

impl Uri {
    /// The export `export` of the server at `address`, not encrypted.
    pub fn new(address: Address, export: impl Into<String>) -> Self {
        let export = export.into();
        Self { address, export, tls: false, user: None, tls_options: TlsOptions::default() }
    }

    /// Whether `text` begins as a URI of NBD does.
    pub fn is_like(text: &str) -> bool {
        text.split_once("://").is_some_and(|(scheme, _)| Scheme::parse(scheme).is_some())
    }

    /// Takes a URI apart.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] for what is no URI of NBD, and
    /// [`tranship_block::ErrorKind::Unsupported`] for transports that are not there.
    pub fn parse(text: &str) -> Result<Self> {
        parsed(text).map_err(|why| match why {
            Refusal::Wrong(why) => Error::usage(format!("NBD URI {text:?} {why}")),
            Refusal::Unsupported(why) => Error::unsupported(format!("NBD URI {text:?} {why}")),
        })
    }

    /// The means to encrypt, read from their files; `None` for `nbd`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Unsupported`] for keys that are not certificates, and
    /// what reading the files gives.
    pub fn client_tls(&self) -> Result<Option<ClientTls>> {
        if !self.tls {
            return Ok(None);
        }
        let options = &self.tls_options;
        let is_psk = options.kind == Some(TlsKind::Psk) || options.psk_file.is_some();
        if is_psk {
            return Err(Error::unsupported(
                "TLS with a pre-shared key is not supported: use certificates (x509) on both \
                 sides, tls-certificates=DIR here",
            ));
        }
        if options.kind == Some(TlsKind::Anonymous) {
            return Err(Error::unsupported(
                "anonymous TLS is not supported, since anybody could be in the middle: use \
                 certificates (x509), or tls-verify-peer=0 to look at none",
            ));
        }
        let tls = ClientTls::new(options.certificates.as_deref(), options.verify_peer)?;
        Ok(Some(match &options.hostname {
            Some(hostname) => tls.for_host(hostname),
            None => tls,
        }))
    }
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

enum Refusal {
    Wrong(String),
    Unsupported(String),
}

impl From<&str> for Refusal {
    fn from(why: &str) -> Self {
        Self::Wrong(why.to_owned())
    }
}

impl From<String> for Refusal {
    fn from(why: String) -> Self {
        Self::Wrong(why)
    }
}

enum Transport {
    Tcp,
    Unix,
    Vsock,
    Ssh,
}

struct Scheme {
    tls: bool,
    transport: Transport,
}

impl Scheme {
    fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        let (name, transport) = text.split_once('+').unwrap_or((&text, "tcp"));
        let tls = match name {
            "nbd" => false,
            "nbds" => true,
            _ => return None,
        };
        let transport = match transport {
            "tcp" => Transport::Tcp,
            "unix" => Transport::Unix,
            "vsock" => Transport::Vsock,
            "ssh" => Transport::Ssh,
            _ => return None,
        };
        Some(Self { tls, transport })
    }
}

fn parsed(text: &str) -> std::result::Result<Uri, Refusal> {
    let scheme = text.split_once("://").and_then(|(name, rest)| Some((Scheme::parse(name)?, rest)));
    let Some((scheme, rest)) = scheme else {
        return Err("does not begin with nbd://, nbds://, nbd+unix:// or nbd+vsock://".into());
    };
    if let Some(bad) = text.chars().find(|c| c.is_control() || *c == ' ') {
        return Err(format!("has the character {bad:?}, which is written with % in a URI").into());
    }
    if rest.contains('#') {
        return Err("has a fragment (#), which means nothing here; in a name it is %23".into());
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user_of(user)?), host),
        None => (None, authority),
    };
    let mut query = Query::parse(query)?;
    let address = match scheme.transport {
        // An authority means nothing for a socket of this machine; libnbd lets it pass too.
        Transport::Unix => Address::Unix(query.socket()?),
        Transport::Tcp => tcp(host)?,
        Transport::Vsock => vsock(host)?,
        Transport::Ssh => {
            return Err(Refusal::Unsupported(
                "goes through ssh, which is not there: forward the socket with ssh -L".to_owned(),
            ));
        }
    };
    let export = decoded_text(path, "export name")?;
    if export.len() > MAX_STRING {
        return Err(format!("has an export name of more than {MAX_STRING} bytes").into());
    }
    if !scheme.tls
        && let Some((key, _)) = query.0.iter().find(|(key, _)| key.starts_with("tls-"))
    {
        return Err(format!("has {key} without encryption: the scheme is nbds then").into());
    }
    let (tls_options, named) = query.tls()?;
    let user = match (user, named) {
        (Some(_), Some(_)) => return Err("names its user twice".into()),
        (user, named) => user.or(named),
    };
    if let Some((key, _)) = query.0.first() {
        return Err(format!("has the option {key:?}, which is unknown").into());
    }
    Ok(Uri { address, export, tls: scheme.tls, user, tls_options })
}

fn user_of(text: &str) -> std::result::Result<String, Refusal> {
    if text.contains([':', '@']) {
        return Err("has more than a name before its @".into());
    }
    decoded_text(text, "user name")
}

fn tcp(authority: &str) -> std::result::Result<Address, Refusal> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) =
                rest.split_once(']').ok_or("has a bracket that is not closed in its host")?;
            let port = match rest {
                "" => "",
                rest => rest.strip_prefix(':').ok_or("has something between host and port")?,
            };
            if !host.contains(':') {
                return Err("has brackets around what is no IPv6 address".into());
            }
            (host, port)
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    let port = match port {
        "" => PORT,
        port => number::<u16>(port)
            .filter(|port| *port > 0)
            .ok_or_else(|| format!("has port {port:?}, expected 1 to 65535"))?,
    };
    let is_bracketed = authority.starts_with('[');
    let host = match decoded_text(host, "host")? {
        host if host.is_empty() => "localhost".to_owned(),
        host => host,
    };
    let is_bad = |c: char| c.is_control() || c.is_whitespace() || "/[]@?#".contains(c);
    if host.starts_with('-') || host.contains(is_bad) || (!is_bracketed && host.contains(':')) {
        return Err(format!("has the host {host:?}, expected a name or an address").into());
    }
    Ok(Address::Tcp { host, port })
}

fn vsock(authority: &str) -> std::result::Result<Address, Refusal> {
    let (cid, port) = authority.split_once(':').unwrap_or((authority, ""));
    let parsed = |text: &str, default: u32, what: &str| match text {
        "" => Ok(default),
        text => number(text).ok_or_else(|| format!("has the {what} {text:?}, expected a number")),
    };
    Ok(Address::Vsock {
        cid: parsed(cid, VSOCK_HOST, "context id")?,
        port: parsed(port, u32::from(PORT), "port")?,
    })
}

/// Decimal digits alone: Rust takes a sign as well.
fn number<N: FromStr>(text: &str) -> Option<N> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The options that are left, decoded.
struct Query(Vec<(String, Vec<u8>)>);

impl Query {
    fn parse(text: &str) -> std::result::Result<Self, Refusal> {
        let mut pairs: Vec<(String, Vec<u8>)> = Vec::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let key = decoded_text(key, "option")?.to_ascii_lowercase();
            if key.starts_with("x-") {
                continue;
            }
            if pairs.iter().any(|(before, _)| *before == key) {
                return Err(format!("has {key} twice").into());
            }
            let value = decoded(value).ok_or_else(|| format!("has a broken % in its {key}"))?;
            pairs.push((key, value));
        }
        Ok(Self(pairs))
    }

    fn take(&mut self, key: &str) -> Option<Vec<u8>> {
        let at = self.0.iter().position(|(name, _)| name == key)?;
        Some(self.0.remove(at).1)
    }

    fn take_text(&mut self, key: &str) -> std::result::Result<Option<String>, Refusal> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match String::from_utf8(value) {
            Ok(text) if !text.is_empty() && !text.contains('\0') => Ok(Some(text)),
            _ => Err(format!("has a {key} that is empty or no text").into()),
        }
    }

    fn take_path(&mut self, key: &str) -> std::result::Result<Option<PathBuf>, Refusal> {
        let Some(value) = self.take(key) else { return Ok(None) };
        if value.is_empty() || value.contains(&0) {
            return Err(format!("has a {key} that is no path").into());
        }
        Ok(Some(PathBuf::from(std::ffi::OsString::from_vec(value))))
    }

    fn socket(&mut self) -> std::result::Result<PathBuf, Refusal> {
        let path = self.take("socket").ok_or("has no socket=PATH")?;
        // A zero in front is Linux's sign for a name outside of the file system.
        let name = path.strip_prefix(b"\0").unwrap_or(&path);
        if name.is_empty() || name.contains(&0) {
            return Err("has a socket that is no path".into());
        }
        Ok(PathBuf::from(std::ffi::OsString::from_vec(path)))
    }

    /// What is said about TLS, and the user name there.
    fn tls(&mut self) -> std::result::Result<(TlsOptions, Option<String>), Refusal> {
        let kind = match self.take_text("tls-type")?.as_deref() {
            None => None,
            Some("anon") => Some(TlsKind::Anonymous),
            Some("x509") => Some(TlsKind::X509),
            Some("psk") => Some(TlsKind::Psk),
            Some(other) => {
                return Err(format!("has tls-type {other:?}, expected x509, psk or anon").into());
            }
        };
        let verify_peer = match self.take_text("tls-verify-peer")?.as_deref() {
            None | Some("1" | "true") => true,
            Some("0" | "false") => false,
            Some(other) => {
                return Err(format!("has tls-verify-peer {other:?}, expected 0 or 1").into());
            }
        };
        let options = TlsOptions {
            kind,
            verify_peer,
            certificates: self.take_path("tls-certificates")?,
            hostname: self.take_text("tls-hostname")?,
            psk_file: self.take_path("tls-psk-file")?,
        };
        Ok((options, self.take_text("tls-username")?))
    }
}

/// `%2F` becomes `/`; `None` for what is no hexadecimal number.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                (high << 4) | low
            }
            byte => byte,
        });
    }
    Some(bytes)
}

fn decoded_text(text: &str, what: &str) -> std::result::Result<String, Refusal> {
    let bytes = decoded(text).ok_or_else(|| format!("has a broken % in its {what}"))?;
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(format!("has a {what} that is no UTF-8 or has a zero in it").into()),
    }
}

/// Everything but "unreserved" characters and slashes as `%XX`.
struct Encoded<'a>(&'a [u8]);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                    f.write_char(char::from(*byte))?;
                }
                byte => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

fn path(path: &Path) -> Encoded<'_> {
    Encoded(path.as_os_str().as_bytes())
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        f.write_str(match self.address {
            Address::Tcp { .. } => "://",
            Address::Unix(_) => "+unix://",
            Address::Vsock { .. } => "+vsock://",
        })?;
        if let Some(user) = &self.user {
            write!(f, "{}@", Encoded(user.as_bytes()).to_string().replace('/', "%2F"))?;
        }
        match &self.address {
            Address::Tcp { host, port } if host.contains(':') => {
                write!(f, "[{}]:{port}", host.replace('%', "%25"))?;
            }
            Address::Tcp { host, port } => write!(f, "{}:{port}", Encoded(host.as_bytes()))?,
            Address::Vsock { cid, port } => write!(f, "{cid}:{port}")?,
            Address::Unix(_) => {}
        }
        write!(f, "/{}", Encoded(self.export.as_bytes()))?;
        let mut sign = '?';
        let mut option = |key: &str, value: &dyn fmt::Display| {
            let result = write!(f, "{sign}{key}={value}");
            sign = '&';
            result
        };
        if let Address::Unix(socket) = &self.address {
            option("socket", &path(socket))?;
        }
        let tls = &self.tls_options;
        if let Some(kind) = tls.kind {
            let name = match kind {
                TlsKind::Anonymous => "anon",
                TlsKind::X509 => "x509",
                TlsKind::Psk => "psk",
            };
            option("tls-type", &name)?;
        }
        if let Some(folder) = &tls.certificates {
            option("tls-certificates", &path(folder))?;
        }
        if let Some(hostname) = &tls.hostname {
            option("tls-hostname", &Encoded(hostname.as_bytes()))?;
        }
        if !tls.verify_peer {
            option("tls-verify-peer", &0)?;
        }
        if let Some(file) = &tls.psk_file {
            option("tls-psk-file", &path(file))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
