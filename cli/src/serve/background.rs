// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--fork`: the program starts itself once more, and ends when the other one is ready.
//!
//! A process with threads cannot be split in two; a second one from the same words can do
//! all the work, and has a session of its own.

use crate::args::ServeArgs;
use crate::failure::Failure;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

/// Tells the second process what it is: the number of the first one.
const PARENT: &str = "TRANSHIP_SERVE_PARENT";

/// What the second process says when clients can connect.
const READY: &str = "ready\n";

fn parent() -> Option<u32> {
    let number = std::env::var(PARENT).ok()?.parse().ok()?;
    // Only of the process that set it: others have inherited the variable.
    (number == std::os::unix::process::parent_id()).then_some(number)
}

/// Whether this is the process that stays.
pub(super) fn is_child() -> bool {
    parent().is_some()
}

/// The number of the process that the caller has started and left sockets to.
pub(super) fn meant() -> u32 {
    parent().unwrap_or_else(std::process::id)
}

/// Starts the process that stays, and waits until clients can connect, or it has failed.
pub(super) fn start(args: &ServeArgs) -> Result<u8, Failure> {
    if args.run.is_some() {
        return Err(Failure::usage("--run waits for its command, and --fork does not"));
    }
    if args.statistics.as_ref().is_some_and(|path| path.as_os_str() == "-") {
        return Err(Failure::usage("--statistics needs a file with --fork"));
    }
    let mut words = std::env::args_os();
    let failed = |error: std::io::Error| Failure::io("starting the server's process", &error);
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    let mut child = command
        .args(words)
        .env(PARENT, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut said = String::new();
    if let Some(out) = child.stdout.take() {
        out.take(64).read_to_string(&mut said).map_err(failed)?;
    }
    if let Some(port) = said.strip_suffix(READY) {
        crate::stdout::print(port)?;
        return Ok(0);
    }
    let status = child.wait().map_err(failed)?;
    // It has said why.
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    Ok(code.and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1))
}

/// Leaves the caller's session and terminal, and tells the process that waits.
pub(super) fn ready() -> Result<(), Failure> {
    let failed = |error: rustix::io::Errno| Failure::io("going to the background", &error.into());
    rustix::process::setsid().map_err(failed)?;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| Failure::io("opening /dev/null", &error))?;
    // The first process may have been killed: nobody has to read this.
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(READY.as_bytes()).and_then(|()| out.flush());
    rustix::stdio::dup2_stdout(&null).map_err(failed)?;
    rustix::stdio::dup2_stderr(&null).map_err(failed)
}
