// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a conversion ended, and what that means for whoever started it.

use std::fmt;
use tranship_linux::Blocker;

/// Result of a conversion.
pub type Result<T> = std::result::Result<T, Error>;

/// What an orchestrator has to know of a failure. Each kind has one exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The guest could not be converted (exit code 1); trying again does not help.
    Conversion,
    /// The command line or the configuration is wrong (2).
    Usage,
    /// Something has to be remedied first; nothing was written (3).
    Blocked,
    /// The input is corrupt or of a kind that is not supported (4).
    Input,
    /// Contents differ from a checksum (5).
    Mismatch,
    /// The source, the network, the space or a lock: may succeed later (75).
    Transient,
    /// Interrupted; state is kept and a second run resumes (130 or 143, by the signal).
    Interrupted,
}

impl ErrorKind {
    /// The exit code; [`Self::Interrupted`] is 130 here, 143 where the signal was SIGTERM.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Conversion => 1,
            Self::Usage => 2,
            Self::Blocked => 3,
            Self::Input => 4,
            Self::Mismatch => 5,
            Self::Transient => 75,
            Self::Interrupted => 130,
        }
    }
}

/// A failure, with everything that has to be remedied and the cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    remedy: Option<String>,
    blockers: Vec<Blocker>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), remedy: None, blockers: Vec::new(), source: None }
    }

    /// Everything that keeps a guest from being converted.
    pub fn blocked(blockers: Vec<Blocker>) -> Self {
        let message = match blockers.as_slice() {
            [only] => format!("the guest cannot be converted as it is: {}", only.what),
            many => format!("the guest cannot be converted as it is, for {} reasons", many.len()),
        };
        Self { blockers, ..Self::new(ErrorKind::Blocked, message) }
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

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What to do about it, if there is an answer.
    pub fn remedy(&self) -> Option<&str> {
        self.remedy.as_deref()
    }

    /// Everything that has to be remedied first; empty unless the kind is
    /// [`ErrorKind::Blocked`].
    pub fn blockers(&self) -> &[Blocker] {
        &self.blockers
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
