// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one error type of the appliance.

use std::fmt;
use tranship_protocol::Failure;

/// Result of an operation on the appliance.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The handle is in the wrong state for the call, or an argument makes no sense.
    Usage,
    /// No backend can run here.
    NoBackend,
    /// The machine did not come up.
    Launch,
    /// The agent refused or failed a call; [`Error::errno`] may say more.
    Call,
    /// The machine went away or spoke nonsense.
    Lost,
    /// The call was cancelled.
    Cancelled,
    /// The operating system reported a failure on this side.
    Io,
}

/// A failure with its cause and, where there is one, what to do about it.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    errno: i32,
    remedy: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), errno: 0, remedy: None, source: None }
    }

    /// The same with what to do about it.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// The same with the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// A call failed in the agent.
    pub(crate) fn from_failure(call: &str, failure: &Failure) -> Self {
        // EINTR is how the agent ends a cancelled call.
        let kind = if failure.errno == rustix::io::Errno::INTR.raw_os_error() {
            ErrorKind::Cancelled
        } else {
            ErrorKind::Call
        };
        Self {
            kind,
            message: format!("{call}: {}", failure.message),
            errno: failure.errno,
            remedy: None,
            source: None,
        }
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The system's error number that the agent reported, 0 if none.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// What to do about it, if there is an answer.
    pub fn remedy(&self) -> Option<&str> {
        self.remedy.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}
