// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that is started for a copy and ends with it.
//!
//! It gets a socket that listens already, in the way of systemd's socket activation
//! (`sd_listen_fds(3)`): descriptor 3, with `LISTEN_FDS` and `LISTEN_PID` set. So nobody
//! has to wait until it listens, and if it never does, the connection breaks.

use crate::failure::Failure;
use rustix::process::{Pid, Signal, kill_process_group};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Time that a server has to end after it was asked to: an image may have much to write.
const ENDING: Duration = Duration::from_secs(30);

/// Time after a broken connection in which a server that is ending has ended.
const DYING: Duration = Duration::from_millis(500);

const TICK: Duration = Duration::from_millis(5);

/// Gives the server its socket and becomes it. The shell is what knows the process's number
/// between its start and the server's. The words of the command are never parsed again.
/// What the server prints is none of our results.
const BECOME: &str = "exec 3<&0 </dev/null >&2; export LISTEN_FDS=1 LISTEN_PID=$$; exec \"$@\"";

/// A server that runs. Dropping it ends it and all that it has started.
#[derive(Debug)]
pub(super) struct Program {
    name: String,
    child: Child,
    socket: PathBuf,
    _folder: TempDir,
}

impl Program {
    /// Starts the server. It is asked to end when the thread that starts it has ended, even
    /// if that was killed: call this on the main thread.
    pub(super) fn start(words: &[OsString]) -> Result<Self, Failure> {
        let name = words.first().map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        let failed = |doing: &str, error: &std::io::Error| Failure::io(doing, error).about(&name);
        let folder = tempfile::Builder::new()
            .prefix("tranship-copy-")
            .tempdir()
            .map_err(|error| failed("making a folder for a socket", &error))?;
        let socket = folder.path().join("nbd");
        let listener =
            UnixListener::bind(&socket).map_err(|error| failed("making a socket", &error))?;
        // Our end is closed with the command below: then only the server can answer.
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", BECOME, "sh"])
            .args(words)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            // A signal from the terminal is for us: the server has to live until we leave.
            .process_group(0);
        let parent = rustix::process::getpid();
        let ends_with_us = move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
            match rustix::process::getppid() {
                Some(pid) if pid == parent => Ok(()),
                _ => Err(std::io::ErrorKind::Interrupted.into()),
            }
        };
        // SAFETY: between fork and exec the closure makes two system calls; it neither
        // allocates nor takes a lock.
        unsafe { command.pre_exec(ends_with_us) };
        let child = command.spawn().map_err(|error| failed("starting the server", &error))?;
        tracing::debug!(name, pid = child.id(), "started a server");
        Ok(Self { name, child, socket, _folder: folder })
    }

    /// Where it listens.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The same failure, with what became of the server if it has ended.
    pub(super) fn explain(&mut self, failure: Failure) -> Failure {
        match self.ended_within(DYING) {
            Some(status) => failure.hint(format!("the server {} has ended: {status}", self.name)),
            None => failure,
        }
    }

    fn ended_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let begun = Instant::now();
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            if begun.elapsed() >= limit {
                return None;
            }
            sleep(TICK);
        }
    }

    fn signal(&self, signal: Signal) {
        // That nobody is left of the group is what is wanted.
        let _ = kill_process_group(Pid::from_child(&self.child), signal);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.ended_within(Duration::ZERO).is_none() {
            self.signal(Signal::TERM);
            if self.ended_within(ENDING).is_none() {
                self.signal(Signal::KILL);
            }
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn the_server_gets_the_socket_and_its_words_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let seen = folder.path().join("seen");
        let script = "printf '%s|' \"$LISTEN_FDS\" \"$((LISTEN_PID - $$))\" \"$@\" >\"$0\"; \
                      exec sleep 60";
        let path = seen.to_str().unwrap();
        let program =
            Program::start(&words(&["sh", "-c", script, path, "a b", "$HOME", ""])).unwrap();
        // It has the listening end: connecting works, and nobody has accepted.
        let mut stream = UnixStream::connect(program.socket()).unwrap();
        let begun = Instant::now();
        while !std::fs::read_to_string(&seen).is_ok_and(|text| text.ends_with("||")) {
            assert!(begun.elapsed() < Duration::from_secs(10));
            sleep(TICK);
        }
        assert_eq!(std::fs::read_to_string(&seen).unwrap(), "1|0|a b|$HOME||");
        let socket = program.socket().to_owned();
        drop(program);
        assert!(!socket.exists());
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    }

    #[test]
    fn a_server_that_cannot_be_started_breaks_the_connection() {
        let mut program = Program::start(&words(&["/nowhere/nbdkit"])).unwrap();
        if let Ok(mut stream) = UnixStream::connect(program.socket()) {
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
        }
        let text = program.explain(Failure::usage("cannot connect")).render("p");
        assert!(text.contains("the server /nowhere/nbdkit has ended"), "{text}");
    }
}
