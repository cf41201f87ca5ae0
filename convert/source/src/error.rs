// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The error type of sources.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of an operation on a source.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it is; decides exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller asked for something that makes no sense.
    Usage,
    /// A file that was named does not exist.
    NotFound,
    /// The source contradicts its format or itself.
    Corrupt,
    /// The source is fine, but asks for something that is not implemented.
    Unsupported,
    /// A name inside the source leads out of it.
    Denied,
    /// Contents are not what the source's own manifest says.
    Mismatch,
    /// The operating system reported a failure.
    Io,
    /// The caller cancelled the operation.
    Cancelled,
}

/// A failure with the file and the cause as far as they are known.
///
/// The text names the value and what was expected, in lower case, without a full stop;
/// the cause is left to [`std::error::Error::source`].
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    source: Option<tranship_block::Error>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), path: None, source: None }))
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    pub(crate) fn denied(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Denied, message)
    }

    /// A failure of the disk layers, of the same kind.
    pub(crate) fn disk(message: impl Into<String>, source: tranship_block::Error) -> Self {
        let kind = match source.kind() {
            tranship_block::ErrorKind::Usage => ErrorKind::Usage,
            tranship_block::ErrorKind::Corrupt => ErrorKind::Corrupt,
            tranship_block::ErrorKind::Unsupported => ErrorKind::Unsupported,
            tranship_block::ErrorKind::Denied => ErrorKind::Denied,
            tranship_block::ErrorKind::NotFound => ErrorKind::NotFound,
            tranship_block::ErrorKind::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Io,
        };
        let mut error = Self::new(kind, message);
        error.0.source = Some(source);
        error
    }

    /// Adds the file that the error is about; a path that is there already stays.
    #[must_use]
    pub fn in_file(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file that it is about, if known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.0.source.as_ref()?;
        Some(source)
    }
}
