// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How users name images: by a path, a URI, a `json:` text or a list of options.
//!
//! The syntax is QEMU's (`qemu-img(1)`, "block device options"), as far as there is
//! something here to be named with it. Only users name images in this way: a name inside
//! an image is a [`tranship_block::Request`] and never gets here.

mod nested;

use crate::Format;
use nested::Nested;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tranship_block::{Error, Result};
use tranship_nbd::{Address, PORT, Uri};

/// An image as its user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The name as it was given, for messages.
    pub name: String,
    /// Where the bytes of its file are.
    pub place: Place,
    /// Its format; to be guessed if it is not given.
    pub format: Option<Format>,
    /// The member of the tar archive in the file that is the image.
    pub member: Option<Member>,
    /// The part of the file that is the disk; for raw disks only.
    pub slice: Option<SliceOf>,
    /// What the image is based on.
    pub backing: Below,
    /// Id of the secret with its passphrase.
    pub key_secret: Option<String>,
    /// Which of its two sizes a VHD has.
    pub vpc_size: Option<VpcSize>,
}

/// Where the bytes of an image's file are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file or block device.
    File(PathBuf),
    /// An export of an NBD server.
    Nbd(Box<NbdAddress>),
    /// Nowhere: zeroes, and what is written is lost (QEMU's `null-co`).
    Null {
        /// Bytes.
        size: u64,
    },
}

/// Where an NBD export is, and how its server is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdAddress {
    /// The server, the export, and what a URI says about TLS.
    pub uri: Uri,
    /// Id of the credentials for TLS (QEMU's `tls-creds`).
    pub credentials: Option<String>,
    /// For how long a connection that broke is made again (QEMU's `reconnect-delay`).
    pub reconnect: Duration,
}

impl NbdAddress {
    fn new(uri: Uri) -> Self {
        Self { uri, credentials: None, reconnect: Duration::ZERO }
    }

    /// The name that QEMU prints for it: as the URI, but without the slash in front of a
    /// name that is empty.
    pub fn shown(&self) -> String {
        let uri = self.uri.to_string();
        if !self.uri.export.is_empty() {
            return uri;
        }
        match uri.split_once("/?") {
            Some((start, query)) => format!("{start}?{query}"),
            None => uri.strip_suffix('/').unwrap_or(&uri).to_owned(),
        }
    }
}

/// Which member of a tar archive is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Member {
    /// The only disk that is there.
    OnlyDisk,
    /// The one of this name.
    Named(String),
}

/// A part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SliceOf {
    /// First byte.
    pub offset: u64,
    /// Number of bytes; to the end if it is not given.
    pub size: Option<u64>,
}

/// What an image is based on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Below {
    /// What the image itself asks for.
    AsTheImageSays,
    /// Nothing, whatever the image asks for.
    Nothing,
    /// This.
    Given(Box<Spec>),
}

/// Which of its two sizes a VHD has (QEMU's `force_size_calc`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VpcSize {
    /// That of its geometry.
    Chs,
    /// That in the field "current size".
    CurrentSize,
}

impl Spec {
    /// The image in the file or block device at `path`, whatever its name looks like.
    pub fn from_path(path: &Path) -> Self {
        Self::at(path.display().to_string(), Place::File(path.to_owned()))
    }

    /// The disk that `word` means where files are expected: a URI of NBD, or else the file of
    /// this name, whatever it looks like.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] for a URI that cannot be read.
    pub fn from_word(word: &Path) -> Result<Self> {
        match word.to_str() {
            Some(text) if Uri::is_like(text) => Self::from_name(text),
            _ => Ok(Self::from_path(word)),
        }
    }

    fn at(name: String, place: Place) -> Self {
        Self {
            name,
            place,
            format: None,
            member: None,
            slice: None,
            backing: Below::AsTheImageSays,
            key_secret: None,
            vpc_size: None,
        }
    }

    /// The image that `name` means: a path, `json:{…}`, `file:…`, `nbd:…`, a URI of NBD, or
    /// a member of an archive, `tar:PATH[:member=NAME]`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Usage`] for text that is none of these, and
    /// [`tranship_block::ErrorKind::Unsupported`] for other protocols.
    pub fn from_name(name: &str) -> Result<Self> {
        if let Some(text) = name.strip_prefix("json:") {
            let nested = Nested::from_json(text)?;
            return Self::from_nested(nested, name);
        }
        let Some((protocol, rest)) = split_protocol(name) else {
            return Ok(Self::at(name.to_owned(), Place::File(PathBuf::from(name))));
        };
        let place = match protocol {
            "file" => Place::File(PathBuf::from(rest)),
            "tar" => return Ok(tar_member(name, rest)),
            _ if Uri::is_like(name) => Place::Nbd(Box::new(NbdAddress::new(Uri::parse(name)?))),
            "nbd" => Place::Nbd(Box::new(NbdAddress::new(nbd_name(rest)?))),
            other => {
                return Err(Error::unsupported(format!(
                    "unknown protocol '{other}' in {name:?}; a file of this name is reached as \"./{name}\""
                )));
            }
        };
        Ok(Self::at(name.to_owned(), place))
    }

    /// The image that a list of options means: `driver=qcow2,file.filename=disk.img`.
    ///
    /// # Errors
    ///
    /// As [`Self::from_name`].
    pub fn from_options(text: &str) -> Result<Self> {
        Self::from_nested(Nested::from_options(text)?, text)
    }

    /// The same image, taken as `format` unless its name says otherwise already.
    #[must_use]
    pub fn or_format(mut self, format: Option<Format>) -> Self {
        self.format = self.format.or(format);
        self
    }

    /// The path of its file, if it is in a file.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::File(path) => Some(path),
            Place::Nbd(_) | Place::Null { .. } => None,
        }
    }

    fn from_nested(mut options: Nested, name: &str) -> Result<Self> {
        let driver = options.take("driver");
        let spec = match driver.as_deref() {
            Some("file" | "host_device") => {
                options.take("locking");
                options.take("aio");
                let path = options
                    .take("filename")
                    .ok_or_else(|| Error::usage("block driver 'file' needs option 'filename'"))?;
                let path = path.strip_prefix("file:").unwrap_or(&path).to_owned();
                Self::at(name.to_owned(), Place::File(PathBuf::from(path)))
            }
            Some("tar") => {
                let path = options
                    .take("filename")
                    .ok_or_else(|| Error::usage("block driver 'tar' needs option 'filename'"))?;
                let member = options.take("member").map_or(Member::OnlyDisk, Member::Named);
                let place = Place::File(PathBuf::from(path));
                Self { member: Some(member), ..Self::at(name.to_owned(), place) }
            }
            Some("nbd") => {
                Self::at(name.to_owned(), Place::Nbd(Box::new(nbd_options(&mut options)?)))
            }
            Some("null-co" | "null-aio") => {
                let size = number(&mut options, "size")?.unwrap_or(1 << 30);
                options.take("read-zeroes");
                Self::at(name.to_owned(), Place::Null { size })
            }
            Some(format) => Self::formatted(&mut options, format, name)?,
            None => match options.take("file.filename").or_else(|| options.take("filename")) {
                Some(file) => {
                    options.take("file.driver");
                    Self { name: name.to_owned(), ..Self::from_name(&file)? }
                }
                None if options.has_below("file") => {
                    let below = options.take_below("file");
                    Self { name: name.to_owned(), ..Self::from_nested(below, name)? }
                }
                None => return Err(Error::usage(format!("{name:?} names no driver and no file"))),
            },
        };
        options.take("read-only");
        options.take("node-name");
        match options.first_left() {
            None => Ok(spec),
            Some(key) => Err(Error::usage(format!(
                "block driver '{}' does not support the option '{key}'",
                driver.as_deref().unwrap_or("file")
            ))),
        }
    }

    /// An image format over something else.
    fn formatted(options: &mut Nested, format: &str, name: &str) -> Result<Self> {
        let format: Format = format.parse()?;
        let file = match options.take("file") {
            Some(file) => Self::from_name(&file)?,
            None if options.has_below("file") => {
                Self::from_nested(options.take_below("file"), name)?
            }
            None => {
                return Err(Error::usage(format!("block driver '{format}' needs option 'file'")));
            }
        };
        let mut spec = Self::at(name.to_owned(), file.place);
        spec.member = file.member;
        spec.slice = file.slice;
        spec.format = Some(format);
        if format == Format::Raw {
            let (offset, size) = (number(options, "offset")?, number(options, "size")?);
            if offset.is_some() || size.is_some() {
                spec.slice = Some(SliceOf { offset: offset.unwrap_or(0), size });
            }
        }
        if options.take_null("backing") {
            spec.backing = Below::Nothing;
        } else if let Some(backing) = options.take("backing") {
            spec.backing = match backing.as_str() {
                "" => Below::Nothing,
                backing => Below::Given(Box::new(Self::from_name(backing)?)),
            };
        } else if options.has_below("backing") {
            let below = options.take_below("backing");
            spec.backing = Below::Given(Box::new(Self::from_nested(below, name)?));
        }
        spec.key_secret = options.take("key-secret").or_else(|| {
            options.take("encrypt.format");
            options.take("encrypt.key-secret")
        });
        if format == Format::Vpc {
            spec.vpc_size = match options.take("force_size_calc").as_deref() {
                None | Some("none") => None,
                Some("chs") => Some(VpcSize::Chs),
                Some("current_size") => Some(VpcSize::CurrentSize),
                Some(other) => {
                    return Err(Error::usage(format!(
                        "force_size_calc is {other:?}, expected chs, current_size or none"
                    )));
                }
            };
        }
        // Knobs of QEMU's caches: there is nothing here that they could tune.
        for key in ["l2-cache-size", "refcount-cache-size", "cache-size", "cache-clean-interval"] {
            options.take(key);
        }
        Ok(spec)
    }
}

/// What stands before a colon that comes before any slash.
fn split_protocol(name: &str) -> Option<(&str, &str)> {
    let (protocol, rest) = name.split_once(':')?;
    let is_protocol = !protocol.is_empty() && !protocol.contains('/');
    is_protocol.then_some((protocol, rest))
}

fn number(options: &mut Nested, key: &str) -> Result<Option<u64>> {
    let Some(text) = options.take(key) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        Error::usage(format!("option '{key}' is {text:?}, expected a number of bytes"))
    })
}

fn nbd_options(options: &mut Nested) -> Result<NbdAddress> {
    let kind = options.take("server.type");
    let path = options.take("server.path").or_else(|| options.take("path"));
    let host = options.take("server.host").or_else(|| options.take("host"));
    let port = options.take("server.port").or_else(|| options.take("port"));
    let address = match (kind.as_deref(), path, host) {
        (None | Some("unix"), Some(path), None) => Address::Unix(PathBuf::from(path)),
        (None | Some("inet"), None, Some(host)) => {
            Address::Tcp { host, port: port.as_deref().map_or(Ok(PORT), port_of)? }
        }
        (Some("vsock"), None, None) => Address::Vsock {
            cid: vsock_number(options.take("server.cid"), 2, "server.cid")?,
            port: vsock_number(port, u32::from(PORT), "server.port")?,
        },
        (None | Some("unix" | "inet" | "vsock"), _, _) => {
            return Err(Error::usage("NBD needs either 'server.path' or 'server.host'"));
        }
        (Some(other), _, _) => {
            return Err(Error::usage(format!(
                "option 'server.type' is {other:?}, expected inet, unix or vsock"
            )));
        }
    };
    let mut uri = Uri::new(address, options.take("export").unwrap_or_default());
    let credentials = options.take("tls-creds");
    uri.tls = credentials.is_some();
    uri.tls_options.hostname = options.take("tls-hostname");
    if uri.tls_options.hostname.is_some() && !uri.tls {
        return Err(Error::usage("NBD takes 'tls-hostname' with 'tls-creds' only"));
    }
    let seconds = number(options, "reconnect-delay")?.unwrap_or(0);
    Ok(NbdAddress { uri, credentials, reconnect: Duration::from_secs(seconds) })
}

fn vsock_number(text: Option<String>, default: u32, key: &str) -> Result<u32> {
    let Some(text) = text else { return Ok(default) };
    text.parse().map_err(|_| Error::usage(format!("option '{key}' is {text:?}, expected a number")))
}

fn port_of(text: &str) -> Result<u16> {
    let port = text.parse().ok().filter(|port| *port > 0);
    port.ok_or_else(|| Error::usage(format!("port is {text:?}, expected 1 to 65535")))
}

/// `tar:PATH[:member=NAME]`.
fn tar_member(name: &str, rest: &str) -> Spec {
    let (path, member) = match rest.split_once(":member=") {
        Some((path, member)) => (path, Member::Named(member.to_owned())),
        None => (rest, Member::OnlyDisk),
    };
    let place = Place::File(PathBuf::from(path));
    Spec { member: Some(member), ..Spec::at(name.to_owned(), place) }
}

/// QEMU's older names, after `nbd:`: `unix:PATH[:exportname=X]`, `HOST:PORT[:exportname=X]`.
fn nbd_name(rest: &str) -> Result<Uri> {
    let bad = |why: &str| Error::usage(format!("NBD address \"nbd:{rest}\" {why}"));
    let (place, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let address = match place.strip_prefix("unix:") {
        Some("") => return Err(bad("has no path")),
        Some(path) => Address::Unix(PathBuf::from(path)),
        None => {
            let (host, port) = place.rsplit_once(':').ok_or_else(|| bad("has no port"))?;
            let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
            let host = bare.unwrap_or(host);
            if host.is_empty() {
                return Err(bad("has no host"));
            }
            Address::Tcp { host: host.to_owned(), port: port_of(port)? }
        }
    };
    Ok(Uri::new(address, export))
}

#[cfg(test)]
mod tests;
