// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Results on standard output, where the reader may leave at any time.

use crate::failure::Failure;
use std::io::{ErrorKind, Write};

/// Prints `text` as it is.
///
/// A reader that has gone, such as `head`, is no failure: what it wanted it has.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    bytes(text.as_bytes())
}

/// Prints `bytes` as they are.
pub(crate) fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.map_err(|error| Failure::io("writing to standard output", &error)),
    }
}

/// Prints `value` as indented JSON with a newline.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::io("writing JSON", &error.into()))?;
    print(&format!("{text}\n"))
}

/// Prints one line on standard error; that nobody listens is no failure either.
pub(crate) fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
