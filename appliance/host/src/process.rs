// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A child process that never outlives us.

use crate::console::{Console, Source};
use crate::{Error, ErrorKind, Result};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::io::FdFlags;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A running child, watched by a thread of its own; dropping it ends it.
#[derive(Debug)]
pub struct Process {
    pid: rustix::process::Pid,
    console: Console,
    ended: Arc<(Mutex<Option<ExitStatus>>, Condvar)>,
}

impl Process {
    /// Starts `command`; it inherits `inherited` under the same numbers, and is killed when
    /// this process ends in whatever way. Its input is empty, its output is kept.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Launch`] if it cannot be started.
    pub fn start(command: Command, inherited: Vec<OwnedFd>) -> Result<Self> {
        Self::start_with(command, inherited, Source::Words)
    }

    /// The same with a child of ours that tells events on its standard error, which are told on.
    pub(crate) fn start_traced(command: Command, inherited: Vec<OwnedFd>) -> Result<Self> {
        Self::start_with(command, inherited, Source::Events { begun: tranship_vmm::trace::now() })
    }

    fn start_with(mut command: Command, inherited: Vec<OwnedFd>, errors: Source) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let failed = {
            let name = name.clone();
            move |error| Error::new(ErrorKind::Launch, format!("starting {name}")).because(error)
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let numbers: Vec<i32> = inherited.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
        // SAFETY: between fork and exec the closure only makes system calls on numbers that
        // were collected before; it neither allocates nor takes a lock. The descriptors are
        // owned by `inherited`, which lives until after the spawn.
        unsafe {
            command.pre_exec(move || {
                let hangup = Some(rustix::process::Signal::KILL);
                rustix::process::set_parent_process_death_signal(hangup)?;
                for number in &numbers {
                    let fd = rustix::fd::BorrowedFd::borrow_raw(*number);
                    rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
                }
                Ok(())
            });
        }
        let console = Console::default();
        let ended = Arc::new((Mutex::new(None), Condvar::new()));
        let (sender, receiver) = std::sync::mpsc::channel();
        let watched = Arc::clone(&ended);
        // The death signal follows the *thread* that started the child, so the thread that
        // starts it is the one that waits for it.
        std::thread::Builder::new()
            .name(format!("watch {name}"))
            .spawn(move || {
                let spawned = command.spawn();
                drop(inherited);
                drop(command);
                match spawned {
                    Ok(mut child) => {
                        let pipes = (child.stdout.take(), child.stderr.take());
                        let _ = sender.send(Ok((child.id(), pipes)));
                        wait(&mut child, &watched);
                    }
                    Err(error) => {
                        let _ = sender.send(Err(error));
                    }
                }
            })
            .map_err(failed.clone())?;
        let (pid, (stdout, stderr)) = receiver
            .recv()
            .map_err(|_| Error::new(ErrorKind::Launch, format!("starting {name}: no answer")))?
            .map_err(failed.clone())?;
        if let Some(stdout) = stdout {
            console.follow(stdout, Source::Words).map_err(failed.clone())?;
        }
        if let Some(stderr) = stderr {
            console.follow(stderr, errors).map_err(failed)?;
        }
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.ok_or_else(|| Error::new(ErrorKind::Launch, "process without a number"))?;
        Ok(Self { pid, console, ended })
    }

    /// The end of what it printed, at most 64 KiB.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// How it ended, if it has.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        *self.ended.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for its end, at most `limit`.
    pub fn wait(&self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        let mut status = self.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
        while status.is_none() {
            let left = deadline.checked_duration_since(Instant::now())?;
            status =
                self.ended.1.wait_timeout(status, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *status
    }

    /// Ends it at once.
    pub fn kill(&self) {
        let status = self.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
        // While it has not been waited for, the number cannot belong to anybody else.
        if status.is_none() {
            let _ = rustix::process::kill_process(self.pid, rustix::process::Signal::KILL);
        }
    }
}

fn wait(child: &mut Child, ended: &(Mutex<Option<ExitStatus>>, Condvar)) {
    // WNOWAIT first, so that the number stays ours until the status is stored.
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while waitid(WaitId::Pid(pid), options).is_err_and(|error| error == rustix::io::Errno::INTR)
        {
        }
    }
    let mut status = ended.0.lock().unwrap_or_else(PoisonError::into_inner);
    *status = child.wait().ok();
    ended.1.notify_all();
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        // Its files and sockets are gone once it is.
        self.wait(Duration::from_secs(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_noticed_and_its_output_kept() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo hello; exit 7"]);
        let process = Process::start(command, Vec::new()).unwrap();
        assert_eq!(process.wait(Duration::from_secs(10)).unwrap().code(), Some(7));
        while !process.console().contains("hello") {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_killed_process_is_gone_when_it_is_dropped() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = Process::start(command, Vec::new()).unwrap();
        assert!(process.exit_status().is_none());
        let pid = process.pid;
        drop(process);
        assert!(rustix::process::test_kill_process(pid).is_err());
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Process::start(Command::new("no-such-program"), Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "starting no-such-program");
    }
}
