// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a command's result goes: standard output, or a command of the host's shell.

use crate::failure::Failure;
use crate::stdout;
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::process::{Child, ChildStdin, Command, Stdio};

/// The place for results.
#[derive(Debug)]
pub(super) enum Output {
    /// Standard output.
    Stdout,
    /// A command of the host's shell; `None` once it has stopped reading.
    Pipe(Child, Option<ChildStdin>),
}

impl Output {
    /// Starts `command` and makes it the reader.
    pub(super) fn pipe(command: &[u8]) -> Result<Self, Failure> {
        let mut child = host_shell(command)
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|error| Failure::io("starting the command after |", &error))?;
        let input = child.stdin.take();
        Ok(Self::Pipe(child, input))
    }

    /// Passes `bytes` on. A reader that has left does not want them.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        match self {
            Self::Stdout => return stdout::bytes(bytes),
            Self::Pipe(_, input) => {
                if input.as_mut().is_some_and(|pipe| pipe.write_all(bytes).is_err()) {
                    *input = None;
                }
            }
        }
        Ok(())
    }

    /// Waits for the reader; its exit status does not matter.
    pub(super) fn end(self) -> Result<(), Failure> {
        if let Self::Pipe(mut child, input) = self {
            drop(input);
            child.wait().map_err(|error| Failure::io("waiting for the command after |", &error))?;
        }
        Ok(())
    }
}

/// A command of the host's shell.
pub(super) fn host_shell(command: &[u8]) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(OsString::from_vec(command.to_vec()));
    shell
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_leaves_early_is_no_failure() {
        let mut output = Output::pipe(b"exit 1").unwrap();
        for _ in 0..512 {
            output.write(&[b'x'; 8192]).unwrap();
        }
        output.end().unwrap();
    }

    #[test]
    fn the_reader_gets_everything() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy");
        let mut output = Output::pipe(format!("cat > {}", path.display()).as_bytes()).unwrap();
        output.write(b"one ").unwrap();
        output.write(b"two").unwrap();
        output.end().unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"one two");
    }
}
