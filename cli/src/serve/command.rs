// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--run`: a shell command that finds the server by variables.

use super::listening::Serving;
use crate::failure::Failure;
use crate::stdout;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::fmt::Write;
use std::io::IsTerminal;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};

/// The command while it runs.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) child: Child,
    /// Its whole group can be ended.
    has_group: bool,
}

impl Running {
    /// Starts `text` in a shell.
    pub(super) fn start(text: &str, serving: &Serving) -> Result<Self, Failure> {
        let mut script = String::new();
        for (name, value) in variables(serving) {
            // What is no variable of the environment is not handed on to anybody else.
            let _ = writeln!(script, "{name}={}", quoted(&value));
        }
        script.push_str(text);
        // A group of its own could not read from the terminal, whose ^C reaches it anyway.
        let has_group = !std::io::stdin().is_terminal();
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script);
        if has_group {
            command.process_group(0);
        }
        let child = command
            .spawn()
            .map_err(|error| Failure::io("starting the command of --run", &error))?;
        Ok(Self { child, has_group })
    }

    /// What ends the command from outside.
    pub(super) fn stopper(&self) -> impl Fn() + Send + use<> {
        let (pid, has_group) = (Pid::from_child(&self.child), self.has_group);
        move || {
            // It may have ended just now.
            let _ = if has_group {
                kill_process_group(pid, Signal::TERM)
            } else {
                kill_process(pid, Signal::TERM)
            };
        }
    }
}

/// The exit code that a command's end gives this program.
pub(super) fn code_of(status: ExitStatus) -> u8 {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => {
            stdout::complain(&format!("external command was killed by signal {signal}"));
            128 + signal
        }
        (None, None) => 1,
    };
    u8::try_from(code).unwrap_or(1)
}

fn variables(serving: &Serving) -> [(&'static str, String); 5] {
    let uri = serving.uri();
    let port = serving.port().map(|port| port.to_string()).unwrap_or_default();
    let socket = serving.socket().map(|path| path.display().to_string()).unwrap_or_default();
    [
        ("uri", uri.clone()),
        ("nbd", uri),
        ("unixsocket", socket),
        ("port", port),
        ("exportname", serving.first_export().to_owned()),
    ]
}

/// The text as one word of a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shells_read_back_what_was_quoted() {
        for text in ["", "a b", "it's", "$(x) `y` \"z\"\n\\", "''"] {
            let script = format!("printf %s {}", quoted(text));
            let output = Command::new("/bin/sh").arg("-c").arg(script).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
        }
    }
}
