// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The error type of the appliance builder.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of a step of the build.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it is: decides exit codes and whether trying again helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller gave options that make no sense.
    Usage,
    /// A kernel, package, module or exported appliance contradicts its format.
    Corrupt,
    /// The input is fine, but of a kind that is not implemented.
    Unsupported,
    /// The cache or an input belongs to somebody else or cannot be read.
    Denied,
    /// A file, package, program or module that is needed does not exist.
    NotFound,
    /// The package manager could not be run or reported a failure.
    Download,
    /// No space left where the appliance should go.
    NoSpace,
    /// The operating system reported any other failure.
    Io,
}

/// A failure with the file it is about, what to do about it and the cause, where known.
///
/// [`fmt::Display`] prints path and message; the remedy is separate so that a caller can lay it
/// out on its own line, and the cause is left to [`std::error::Error::source`].
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    remedy: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            path: None,
            remedy: None,
            source: None,
        }))
    }

    /// The bytes of an input contradict its format.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// The input asks for something that is not implemented.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// A failed system call; the kind follows from the operating system's error.
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                ErrorKind::NoSpace
            }
            _ => ErrorKind::Io,
        };
        Self::new(kind, message).because(source)
    }

    /// Adds the file that the error is about; a path that is there already stays.
    #[must_use]
    pub fn in_file(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Adds what the user can do about it; a remedy that is there already stays.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy.get_or_insert_with(|| remedy.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
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

    /// The message alone, without path and cause.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What the user can do about it, as one sentence, if anything is known to help.
    pub fn what_helps(&self) -> Option<&str> {
        self.0.remedy.as_deref()
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
        self.0.source.as_deref().map(|e| {
            let e: &(dyn std::error::Error + 'static) = e;
            e
        })
    }
}

/// Adds a message and a path to a failed system call.
pub(crate) trait Context<T> {
    /// Says that `doing` failed on `path`.
    fn context(self, doing: &str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, doing: &str, path: &Path) -> Result<T> {
        self.map_err(|e| Error::io(format!("{doing} failed"), e).in_file(path))
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn context(self, doing: &str, path: &Path) -> Result<T> {
        self.map_err(|e| Error::io(format!("{doing} failed"), e.into()).in_file(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_file_keeps_path_cause_and_remedy() {
        let refused: std::io::Result<()> = Err(std::io::Error::from_raw_os_error(13));
        let error = refused.context("opening", Path::new("/boot/k")).unwrap_err().remedy("ask");
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert_eq!(error.to_string(), "/boot/k: opening failed");
        assert_eq!(error.what_helps(), Some("ask"));
        assert!(std::error::Error::source(&error).is_some());
    }
}
