// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Failures with the system's error number and the words that users know.

use rustix::io::Errno;
use std::fmt::Display;
use tranship_protocol::Failure;

pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// `what: No such file or directory`, as the C library would say it.
pub(crate) fn system(what: impl Display, error: Errno) -> Failure {
    let text = std::io::Error::from(error).to_string();
    // The standard library appends " (os error N)", which scripts do not expect.
    let text = text.split(" (os error").next().unwrap_or_default();
    Failure { errno: error.raw_os_error(), message: format!("{what}: {text}") }
}

/// The same for an error of the standard library.
pub(crate) fn io(what: impl Display, error: &std::io::Error) -> Failure {
    match Errno::from_io_error(error) {
        Some(errno) => system(what, errno),
        None => Failure { errno: 0, message: format!("{what}: {error}") },
    }
}

/// A failure without an error number.
pub(crate) fn plain(message: impl Into<String>) -> Failure {
    Failure { errno: 0, message: message.into() }
}
