// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One boot: the running machine and everything that listens to it.

use super::machine::{Ports, Surroundings, arguments};
use super::qmp::Qmp;
use super::signs::{Sign, Wanted, Watcher};
use super::{VerifyOptions, agent, console, disks, firmware, memory_mib, screen};
use crate::event::{Event, Reporter};
use crate::libvirt::Domain;
use crate::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tranship_appliance::{CancelToken, Process, choose, qemu_program};
use tranship_nbd::Running;

/// How often cancellation and the machine's end are looked for.
const TICK: Duration = Duration::from_millis(100);
/// How often the guest agent is asked.
const AGENT_PERIOD: Duration = Duration::from_secs(3);
/// How often the screen is looked at: most guests of other hypervisors say nothing on a
/// serial port, and fail on the screen.
const SCREEN_PERIOD: Duration = Duration::from_secs(3);
/// What the guest may still print after a sign, so that the log does not end in mid-line.
const LINGER: Duration = Duration::from_millis(300);
/// How long QEMU may take to speak, and to end when it is told to.
const PATIENCE: Duration = Duration::from_secs(30);
/// Restarts without a sign of life that are taken for a loop; a first boot may have a few.
const MOST_RESTARTS: u32 = 8;

/// A machine with a guest in it. Dropping it ends the machine.
#[derive(Debug)]
pub(crate) struct Boot {
    // In the order in which they have to go: the machine first, then what it uses.
    process: Process,
    qmp: Qmp,
    _agent: Option<UnixStream>,
    listeners: Vec<JoinHandle<()>>,
    signs: Receiver<Sign>,
    /// Keeps `signs` open whatever the listeners do.
    _sender: Sender<Sign>,
    _disks: Running,
    /// Where QEMU puts what is on the screen.
    folder: PathBuf,
    begun: Instant,
    looked: Instant,
    ended: Option<Instant>,
    backend: &'static str,
}

impl Boot {
    /// Starts the machine; all its files are in `folder`, which has to stay until it ends.
    pub(crate) fn start(
        domain: &Domain,
        options: &VerifyOptions,
        folder: &TempDir,
        log: File,
        reporter: &dyn Reporter,
    ) -> Result<Self> {
        let choice = choose(options.backend, None);
        let (reason, remedy) = (choice.reason.clone(), choice.remedy.clone());
        let blocked = || Error::new(ErrorKind::Blocked, reason.clone()).with_remedy(remedy.clone());
        let backend = choice.backend.as_ref().ok_or_else(blocked)?.name();
        let program = qemu_program().ok_or_else(blocked)?;
        let kvm = backend == "qemu-kvm";
        let uefi = firmware(domain, folder)?;
        let disk_socket = folder.path().join("nbd");
        let served = disks::serve(&domain.disks, folder.path(), &disk_socket)?;

        let pair = || {
            UnixStream::pair()
                .map_err(|error| Error::new(ErrorKind::Transient, "a socket pair").because(error))
        };
        let ((qmp, far_qmp), (serial, far_serial)) = (pair()?, pair()?);
        let ((bios, far_bios), (agent, far_agent)) = (pair()?, pair()?);
        let around = Surroundings {
            kvm,
            memory_mib: memory_mib(options, domain),
            processors: processors(domain, kvm),
            disk_socket: &disk_socket,
            uefi: uefi.as_ref(),
            ports: Ports {
                qmp: far_qmp.as_raw_fd(),
                serial: far_serial.as_raw_fd(),
                firmware: far_bios.as_raw_fd(),
                agent: far_agent.as_raw_fd(),
            },
        };
        let mut command = Command::new(program);
        command.args(arguments(domain, &around)?);
        tracing::debug!(?command, "starting QEMU");

        let (sender, signs) = channel();
        let qmp = Qmp::start(qmp, events_to(sender.clone()))?;
        let wanted = options.expect.clone().map_or(Wanted::Login, Wanted::Text);
        let mut listeners = vec![console::follow(
            "console",
            serial,
            Some(log),
            Watcher::new(wanted),
            sender.clone(),
        )?];
        listeners.push(console::follow(
            "firmware",
            bios,
            None,
            Watcher::new(Wanted::Nothing),
            sender.clone(),
        )?);
        let silent_agent = if options.expect.is_none() {
            agent::follow(agent, AGENT_PERIOD, sender.clone())?;
            None
        } else {
            Some(agent)
        };
        let far = [far_qmp, far_serial, far_bios, far_agent].map(OwnedFd::from);
        let process = Process::start(command, far.into())
            .map_err(|error| Error::new(ErrorKind::Transient, "the test machine").because(error))?;
        let text = format!("Booting {:?} on throw-away layers over its disks", domain.name);
        reporter.report(
            &Event::step("boot.started", text)
                .with("backend", backend)
                .with("memory_mib", around.memory_mib)
                .with("limit_seconds", options.limit.as_secs()),
        );
        reporter.report(&Event::info("boot.backend", reason.clone()));
        let mut boot = Self {
            process,
            qmp,
            _agent: silent_agent,
            listeners,
            signs,
            _sender: sender,
            _disks: served,
            folder: folder.path().to_owned(),
            begun: Instant::now(),
            looked: Instant::now(),
            ended: None,
            backend,
        };
        boot.qmp.negotiate(PATIENCE).map_err(|error| {
            boot.process.kill();
            boot.process.wait(PATIENCE);
            let said = boot.process.console();
            let said = said.trim();
            let said = if said.is_empty() { "nothing" } else { said };
            Error::new(ErrorKind::Conversion, format!("QEMU did not start; it said: {said}"))
                .because(error)
        })?;
        Ok(boot)
    }

    /// Waits for a sign, at most `limit` from the start.
    pub(crate) fn watch(&mut self, limit: Duration, cancel: &CancelToken) -> Result<Sign> {
        let sign = loop {
            if cancel.is_cancelled() {
                self.process.kill();
                return Err(Error::new(ErrorKind::Interrupted, "the boot test was interrupted"));
            }
            match self.signs.recv_timeout(TICK) {
                Ok(sign) => break sign,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if let Some(status) = self.process.exit_status() {
                // What came before its end still counts.
                break self.signs.recv_timeout(TICK).unwrap_or_else(|_| {
                    let said = self.process.console();
                    Sign::Death(format!("QEMU ended with {status}: {}", said.trim()))
                });
            }
            if let Some(sign) = self.death_on_screen() {
                break sign;
            }
            if self.begun.elapsed() >= limit {
                let seconds = limit.as_secs();
                break Sign::Death(format!("no sign of life in {seconds} s"));
            }
        };
        self.ended = Some(Instant::now());
        std::thread::sleep(LINGER);
        Ok(sign)
    }

    /// The sign of death that the screen shows in text mode, if it is time to look.
    fn death_on_screen(&mut self) -> Option<Sign> {
        if self.looked.elapsed() < SCREEN_PERIOD {
            return None;
        }
        let text = screen::read_text(&mut self.qmp, &self.folder);
        self.looked = Instant::now();
        match text {
            Ok(text) => Watcher::new(Wanted::Nothing).take(text.as_bytes()),
            Err(error) => {
                tracing::debug!(%error, "the screen's text");
                None
            }
        }
    }

    /// From the start to the sign.
    pub(crate) fn elapsed(&self) -> Duration {
        self.ended.unwrap_or_else(Instant::now).duration_since(self.begun)
    }

    /// Stores a picture of the screen at `target`.
    pub(crate) fn shoot(&mut self, folder: &Path, target: &Path) -> Result<()> {
        screen::shoot(&mut self.qmp, folder, target)
    }

    /// Ends the machine and waits until all it printed is stored; the backend's name.
    pub(crate) fn stop(mut self) -> String {
        if self.process.exit_status().is_none() {
            // Nothing has to be saved, so QEMU is only asked to be polite.
            let asked = self.qmp.execute("quit", json!({}), Duration::from_secs(5));
            if asked.is_err() || self.process.wait(Duration::from_secs(5)).is_none() {
                self.process.kill();
                self.process.wait(PATIENCE);
            }
        }
        for listener in self.listeners.drain(..) {
            if listener.join().is_err() {
                tracing::warn!("a thread that follows the console panicked");
            }
        }
        self.backend.to_owned()
    }
}

/// Turns what QEMU tells into signs.
fn events_to(signs: Sender<Sign>) -> impl Fn(&str, &Value) + Send + 'static {
    let restarts = AtomicU32::new(0);
    move |name, data| {
        let by_guest = data.get("guest").and_then(Value::as_bool) == Some(true);
        let death = match name {
            "SHUTDOWN" if by_guest => "the guest switched itself off".to_owned(),
            "GUEST_PANICKED" => "the kernel panicked (it told the panic device)".to_owned(),
            "RESET" if by_guest => {
                let count = restarts.fetch_add(1, Ordering::Relaxed) + 1;
                tracing::debug!(count, "the guest restarts");
                if count != MOST_RESTARTS {
                    return;
                }
                format!("the guest restarts again and again ({count} times)")
            }
            _ => return,
        };
        let _ = signs.send(Sign::Death(death));
    }
}

/// Virtual CPUs of the test machine. Emulated ones are slow to boot, and the host's own are
/// all that can run at once.
fn processors(domain: &Domain, kvm: bool) -> u32 {
    let host = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let most = if kvm { u32::try_from(host).unwrap_or(1).min(8) } else { 2 };
    domain.vcpus.min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_end_is_a_sign_and_a_restart_is_not() {
        let (sender, signs) = channel();
        let tell = events_to(sender);
        tell("RESET", &json!({"guest": false}));
        tell("SHUTDOWN", &json!({"guest": false}));
        tell("STOP", &Value::Null);
        for _ in 1..MOST_RESTARTS {
            tell("RESET", &json!({"guest": true}));
        }
        assert!(signs.try_recv().is_err());
        for (name, expected) in
            [("RESET", "again and again"), ("SHUTDOWN", "off"), ("GUEST_PANICKED", "panicked")]
        {
            tell(name, &json!({"guest": true}));
            let Ok(Sign::Death(sign)) = signs.try_recv() else { panic!("{name}") };
            assert!(sign.contains(expected), "{sign}");
        }
    }
}
