// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one error type of the disk layers.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of an operation on a disk.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it is: decides retries and exit codes, never grows per format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller asked for something that makes no sense here: out of range, read-only.
    Usage,
    /// The bytes contradict the format's specification or themselves.
    Corrupt,
    /// The bytes are fine, but ask for something that is not implemented.
    Unsupported,
    /// An image wanted to open a name that the [`crate::Gate`] does not allow.
    Denied,
    /// A file or export that was named does not exist.
    NotFound,
    /// Somebody else holds the image, or a network peer went away: may succeed later.
    Busy,
    /// No space left where the bytes should go.
    NoSpace,
    /// What was written since the last flush may be gone, and has to be written again; the
    /// disk itself works.
    Lost,
    /// The caller cancelled the operation.
    Cancelled,
    /// The operating system or a peer reported any other failure.
    Io,
}

/// A failure with the file, the offset and the cause as far as they are known.
///
/// The text names the value and what was expected, in lower case, without a full stop.
/// [`fmt::Display`] prints path, message and offset; the cause is left to
/// [`std::error::Error::source`], so that a chain of causes repeats nothing.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            path: None,
            offset: None,
            source: None,
        }))
    }

    /// The bytes of a disk contradict its format.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// The disk asks for something that is not implemented.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// The caller asked for something impossible.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// A failed system call; the kind follows from the operating system's error.
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::StorageFull
            | std::io::ErrorKind::QuotaExceeded
            | std::io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
            std::io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Usage,
            std::io::ErrorKind::WouldBlock
            | std::io::ErrorKind::ResourceBusy
            | std::io::ErrorKind::ConnectionReset
            | std::io::ErrorKind::ConnectionRefused
            | std::io::ErrorKind::BrokenPipe
            | std::io::ErrorKind::TimedOut => ErrorKind::Busy,
            _ => ErrorKind::Io,
        };
        Self::new(kind, message).because(source)
    }

    /// Adds the byte offset that the error is about; an offset that is there already stays.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Adds the file that the error is about; a path that is there already stays.
    #[must_use]
    pub fn in_file(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
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

    /// The byte offset that it is about, if known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The file that it is about, if known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The message alone, without path, offset and cause.
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&self.0.message)?;
        if let Some(offset) = self.0.offset {
            write!(f, " (at offset {offset:#x})")?;
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn display_has_path_message_and_offset_but_not_the_cause() {
        let error = Error::corrupt("l1_size is 9, expected at least 16")
            .at(36)
            .in_file("/a/b.qcow2")
            .because(std::io::Error::other("cause"));
        assert_eq!(
            error.to_string(),
            "/a/b.qcow2: l1_size is 9, expected at least 16 (at offset 0x24)"
        );
        assert_eq!(error.source().unwrap().to_string(), "cause");
    }

    #[test]
    fn the_first_offset_and_path_win() {
        let error = Error::usage("x").at(1).at(2).in_file("a").in_file("b");
        assert_eq!(error.offset(), Some(1));
        assert_eq!(error.path(), Some(Path::new("a")));
    }

    #[test]
    fn a_full_disk_is_no_space() {
        let full = std::io::Error::from_raw_os_error(28);
        assert_eq!(Error::io("writing", full).kind(), ErrorKind::NoSpace);
    }
}
