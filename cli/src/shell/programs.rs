// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Commands that run programs of the guest.

use super::session::Shell;
use super::table::Arguments;
use super::{Flow, Outcome};
use crate::failure::Failure;
use tranship_appliance::{Error, ErrorKind};

/// Output of a program that is kept, in bytes.
const KEPT: usize = 64 << 20;

fn run(shell: &mut Shell, call: &str, words: &[&str]) -> Outcome {
    if words.is_empty() {
        return Err(Failure::usage(format!("{call}: passed an empty list")));
    }
    let mut output = Vec::new();
    let mut take = |bytes: &[u8]| {
        if output.len() + bytes.len() > KEPT {
            return Err(Error::new(
                ErrorKind::Call,
                format!("{call}: the program printed more than {KEPT} bytes"),
            ));
        }
        output.extend_from_slice(bytes);
        Ok(())
    };
    let ended = shell.guest.run(words, true, None, None, &mut take)?;
    if ended.status != 0 {
        let said = String::from_utf8_lossy(&output);
        let said = said.trim_end();
        let colon = if said.is_empty() { "" } else { ": " };
        let message = format!("{call}: exited with status {}{colon}{said}", ended.status);
        return Err(Error::new(ErrorKind::Call, message).into());
    }
    output.push(b'\n');
    shell.print_bytes(&output)?;
    Ok(Flow::Continue)
}

pub(super) fn command(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    let words: Vec<&str> = arguments.list(0).iter().map(String::as_str).collect();
    run(shell, "command", &words)
}

pub(super) fn sh(shell: &mut Shell, arguments: &Arguments) -> Outcome {
    run(shell, "sh", &["/bin/sh", "-c", arguments.text(0)])
}
