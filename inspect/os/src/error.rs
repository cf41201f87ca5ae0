// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one error type of inspection and of the files of a guest.

use std::fmt;
use tranship_protocol::GuestPath;

/// Result of looking at a guest.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file is not there.
    NotFound,
    /// The guest's filesystem is full or read-only.
    NoSpace,
    /// The guest holds something that cannot be understood.
    Corrupt,
    /// The guest holds something that is understood but not supported.
    Unsupported,
    /// A file operation failed in any other way.
    Io,
    /// The appliance itself failed or went away.
    Appliance,
}

/// A failure, with the path it is about and its cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    path: Option<GuestPath>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), path: None, source: None }
    }

    /// Adds the guest's file that the error is about.
    #[must_use]
    pub fn on(mut self, path: &GuestPath) -> Self {
        self.path.get_or_insert_with(|| path.clone());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The guest's file that it is about, if any.
    pub fn path(&self) -> Option<&GuestPath> {
        self.path.as_ref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "guest file {path}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|cause| -> &(dyn std::error::Error + 'static) { cause })
    }
}
