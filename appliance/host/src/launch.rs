// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a choice of backend to an agent that answers: by a boot, or from a saved machine.

use crate::backend::{Backend, Choice, Machine, MachineSpec, SpecDisk};
use crate::control::{Control, Status};
use crate::drive::{Slot, export_name};
use crate::guest::{Boot, Settings};
use crate::postmortem::{Postmortem, last_lines};
use crate::session::{CancelToken, Session};
use crate::snapshots::{Key, Snapshots};
use crate::{Error, ErrorKind, Result};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tranship_nbd::{Limits, Running, Server};
use tranship_protocol::{Call, Entropy, Hello, MOST_ENTROPY, disk_serial};

/// Bytes from this host's random pool that a restored machine gets.
const ENTROPY: usize = 64;
const _: () = assert!(ENTROPY <= MOST_ENTROPY);

/// Time that a restored machine gets to answer: far more than it needs, far less than a boot
/// that it is to save.
const WAKE_LIMIT: Duration = Duration::from_secs(10);

/// How a machine came up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It booted.
    Cold,
    /// It booted and was saved for the next time.
    Saved,
    /// It was restored.
    Warm,
}

impl Start {
    /// One word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Saved => "cold, saved",
            Self::Warm => "warm",
        }
    }
}

/// Where the time of a launch went.
#[derive(Clone, Debug)]
pub struct LaunchTimes {
    /// How the machine came up.
    pub start: Start,
    /// Choosing the backend, with the probe of KVM.
    pub choose: Duration,
    /// From the start of the machine to the agent's first message, or to its first answer if it
    /// was restored.
    pub boot: Duration,
    /// Saving the machine.
    pub save: Duration,
    /// Plugging the disks into a machine that was saved.
    pub plug: Duration,
    /// When each stage inside the machine ended, counted from the kernel's first moment.
    pub stages: Vec<(String, Duration)>,
}

/// A machine whose agent answers.
#[derive(Debug)]
pub(crate) struct Live {
    // Fields are dropped in this order: nobody asks for anything any more, the session hangs
    // up, the machine ends, then its disks go away.
    _control: Option<Control>,
    pub(crate) session: Arc<Session>,
    pub(crate) machine: Arc<dyn Machine>,
    disks: Running,
    _folder: tempfile::TempDir,
    pub(crate) backend: &'static str,
    opens_images: bool,
    pub(crate) reason: String,
    pub(crate) times: LaunchTimes,
}

/// What is to be launched.
pub(crate) struct Launch<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) cancel: &'a CancelToken,
    pub(crate) boot: &'a Boot,
}

/// A machine with its agent on the line.
struct Up {
    session: Arc<Session>,
    machine: Arc<dyn Machine>,
    took: Duration,
}

impl Launch<'_> {
    /// Starts the machine and waits for its agent.
    pub(crate) fn run<'s>(
        &self,
        choice: Choice,
        choosing: Duration,
        slots: impl Iterator<Item = &'s mut Slot>,
    ) -> Result<Live> {
        let reason = choice.reason.clone();
        let backend = choice.into_backend()?;
        let folder = tempfile::Builder::new()
            .prefix("tranship-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .tempdir_in(&self.settings.runtime_dir)
            .map_err(|error| io("a folder for sockets", error))?;
        let socket = folder.path().join("nbd");
        let opens_images = backend.opens_images();
        let (mut disks, mut exports, mut named) = (Vec::new(), Vec::new(), Vec::new());
        for slot in slots {
            let (disk, export) = slot.hand_over(opens_images);
            named.push((slot.name(), disk.read_only));
            disks.push(disk);
            exports.extend(export);
        }
        if disks.len() > FEW_DISKS {
            tranship_vmm::child::allow_more_descriptors();
        }
        let limits = Limits::default();
        // Each disk is a connection, more may be plugged in, and one may be on its way out.
        let connections = limits.connections.max(exports.len().saturating_mul(2));
        let server = Server::bind(&socket, exports, Limits { connections, ..limits })
            .and_then(Server::start)
            .map_err(|error| Error::new(ErrorKind::Io, "serving the disks").because(error))?;
        let (up, start, save, plug) =
            self.up(&*backend, &socket, &disks).map_err(|error| self.with_huge_pages(error))?;
        let stages = stages(up.session.hello());
        let times = LaunchTimes { start, choose: choosing, boot: up.took, save, plug, stages };
        tracing::debug!(backend = backend.name(), ?times, "appliance is up");
        let about = Status::of_this_process(backend.name(), named);
        let control = Control::start(folder.path(), about, &up.machine, &up.session);
        Ok(Live {
            // Who cannot be asked can be used all the same.
            _control: control
                .inspect_err(|error| {
                    tracing::debug!(error = %chain(error), "the appliance cannot be asked");
                })
                .ok(),
            session: up.session,
            machine: up.machine,
            disks: server,
            _folder: folder,
            backend: backend.name(),
            opens_images,
            reason,
            times,
        })
    }

    /// What is missing if the memory was to be huge pages, most likely.
    fn with_huge_pages(&self, error: Error) -> Error {
        if !self.settings.huge_pages || error.kind() != ErrorKind::Launch {
            return error;
        }
        let pages = self.settings.memory_mib.div_ceil(2);
        error.with_remedy(format!(
            "the host has to have {pages} huge pages of 2 MiB set aside and free (sysctl \
             vm.nr_hugepages, HugePages_Free in /proc/meminfo)"
        ))
    }

    /// The machine with all its disks, in the quickest way that works.
    fn up(
        &self,
        backend: &dyn Backend,
        socket: &Path,
        disks: &[SpecDisk],
    ) -> Result<(Up, Start, Duration, Duration)> {
        let none = Duration::ZERO;
        let cold =
            || self.boot(backend, socket, disks.to_vec()).map(|up| (up, Start::Cold, none, none));
        let Some((snapshots, key)) = self.snapshot(backend, socket, disks.len()) else {
            return cold();
        };
        match self.restored(backend, socket, &snapshots, &key) {
            Ok(Some(up)) => {
                let begun = Instant::now();
                let Err(error) = plug(&*up.machine, &up.session, disks) else {
                    return Ok((up, Start::Warm, none, begun.elapsed()));
                };
                if error.kind() == ErrorKind::Cancelled {
                    return Err(error);
                }
                tracing::debug!(error = %chain(&error), "a disk was not plugged in: booting");
                drop(up);
                // If they can be had this way, it was not for the disks.
                let booted = cold()?;
                snapshots.forget(&key);
                return Ok(booted);
            }
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::Cancelled => return Err(error),
            Err(error) => {
                tracing::debug!(error = %chain(&error), "the saved machine does not work: booting");
                snapshots.forget(&key);
            }
        }
        let up = self.boot(backend, socket, Vec::new())?;
        let begun = Instant::now();
        let saved = up
            .session
            .call(&Call::Prepare)
            .and_then(|_| snapshots.keep(&key, up.session.hello(), |files| up.machine.save(files)));
        let start = match saved {
            Ok(()) => Start::Saved,
            Err(error) => {
                tracing::debug!(error = %chain(&error), "the machine was not saved");
                Start::Cold
            }
        };
        let save = begun.elapsed();
        let begun = Instant::now();
        plug(&*up.machine, &up.session, disks)?;
        Ok((up, start, save, begun.elapsed()))
    }

    /// Where a saved machine would be, if this one can come from there.
    fn snapshot(
        &self,
        backend: &dyn Backend,
        socket: &Path,
        disks: usize,
    ) -> Option<(Snapshots, Key)> {
        let folder = self.settings.snapshots.as_deref().filter(|_| !self.settings.huge_pages)?;
        if disks > backend.most_plugged() {
            tracing::debug!(disks, "too many disks to be plugged in: booting with them");
            return None;
        }
        // The far ends go nowhere: nothing is started with this one.
        let (spec, _, _) = self.spec(socket, Vec::new()).ok()?;
        let key = Key::of(&spec, &backend.identity(&spec)?)?;
        match Snapshots::open(folder) {
            Ok(snapshots) => Some((snapshots, key)),
            Err(error) => {
                tracing::debug!(error = %chain(&error), "saved machines are not used");
                None
            }
        }
    }

    /// What the backend is to start, and our ends of its ports.
    fn spec(
        &self,
        socket: &Path,
        disks: Vec<SpecDisk>,
    ) -> Result<(MachineSpec, UnixStream, UnixStream)> {
        let pair = || UnixStream::pair().map_err(|error| io("a socket pair", error));
        let ((control, far_control), (bulk, far_bulk)) = (pair()?, pair()?);
        let spec = MachineSpec {
            kernel: self.boot.kernel.clone(),
            initramfs: self.boot.initramfs.clone(),
            tools: self.boot.tools.clone(),
            memory_mib: self.settings.memory_mib,
            huge_pages: self.settings.huge_pages,
            processors: self.settings.processors,
            append: self.settings.append.clone(),
            disk_socket: socket.to_owned(),
            disks,
            control: far_control,
            bulk: far_bulk,
        };
        Ok((spec, control, bulk))
    }

    /// Boots a machine and waits for its agent.
    fn boot(&self, backend: &dyn Backend, socket: &Path, disks: Vec<SpecDisk>) -> Result<Up> {
        let (spec, control, bulk) = self.spec(socket, disks)?;
        let begun = Instant::now();
        tracing::debug!(backend = backend.name(), "starting the machine");
        let machine: Arc<dyn Machine> = backend.start(spec, None)?.into();
        let limit = self.settings.launch_limit;
        let give_up = || {
            if self.cancel.is_cancelled() {
                return Some(Error::new(ErrorKind::Cancelled, "launch: cancelled"));
            }
            let why = machine
                .ended()
                .or_else(|| (begun.elapsed() > limit).then(|| format!("no answer in {limit:?}")))?;
            Some(launch_error(backend.name(), &why, &machine.console()))
        };
        let session =
            Session::open(control, bulk, self.cancel.clone(), &give_up).map_err(|error| {
                // A machine that hangs up is about to end, and says why on its console.
                let hung_up = error.kind() != ErrorKind::Launch
                    && error.kind() != ErrorKind::Cancelled
                    && machine.wait(Duration::from_secs(1));
                match machine.ended() {
                    Some(why) if hung_up => launch_error(backend.name(), &why, &machine.console()),
                    _ => error,
                }
            })?;
        let up = self.watched(session, machine, begun)?;
        tracing::debug!(at = ?begun.elapsed(), "the agent has introduced itself");
        Ok(up)
    }

    /// A machine whose end does not go unnoticed from now on.
    fn watched(&self, session: Session, machine: Arc<dyn Machine>, begun: Instant) -> Result<Up> {
        let postmortem = Postmortem {
            machine: Arc::downgrade(&machine),
            vmcoreinfo: session.hello().vmcoreinfo,
            dumps: self.settings.dumps.clone(),
        };
        session.watch(self.settings.patience, Arc::new(postmortem))?;
        Ok(Up { session: Arc::new(session), machine, took: begun.elapsed() })
    }

    /// The saved machine without disks, awake; `None` if there is none.
    fn restored(
        &self,
        backend: &dyn Backend,
        socket: &Path,
        snapshots: &Snapshots,
        key: &Key,
    ) -> Result<Option<Up>> {
        let Some(saved) = snapshots.find(key)? else { return Ok(None) };
        let (spec, control, bulk) = self.spec(socket, Vec::new())?;
        let begun = Instant::now();
        tracing::debug!(backend = backend.name(), "restoring the machine");
        let machine: Arc<dyn Machine> = backend.start(spec, Some(saved.files))?.into();
        let session = Session::resume(control, bulk, self.cancel.clone(), saved.hello)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut entropy = vec![0; ENTROPY];
        fill(&mut entropy)?;
        let wake = Call::Wake {
            seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            nanoseconds: now.subsec_nanos(),
            entropy: Entropy(entropy),
        };
        session.call_within(&wake, WAKE_LIMIT)?;
        let up = self.watched(session, machine, begun)?;
        tracing::debug!(at = ?begun.elapsed(), "the agent is awake");
        Ok(Some(up))
    }
}

impl Live {
    /// Plugs a disk in.
    pub(crate) fn plug(&self, slot: &mut Slot) -> Result<()> {
        let (disk, export) = slot.hand_over(self.opens_images);
        if let Some(export) = export {
            self.disks
                .add_export(export)
                .map_err(|error| Error::new(ErrorKind::Io, "serving the disk").because(error))?;
        }
        let plugged = plug(&*self.machine, &self.session, std::slice::from_ref(&disk));
        if plugged.is_err() {
            // What did not get there leaves nothing behind.
            let _ = self.machine.remove_disk(&disk.serial);
            let _ = self.disks.remove_export(&disk.export);
        }
        plugged
    }

    /// Unplugs the disk with this number.
    pub(crate) fn unplug(&self, index: usize) -> Result<()> {
        let serial = disk_serial(index);
        self.session.call(&Call::Unplug { serial: serial.clone() })?;
        self.machine.remove_disk(&serial)?;
        tracing::debug!(serial, "disk unplugged");
        match self.disks.remove_export(&export_name(index)) {
            // The machine had opened the image itself.
            Err(error) if error.kind() == tranship_block::ErrorKind::NotFound => Ok(()),
            other => other
                .map_err(|error| Error::new(ErrorKind::Io, "writing the disk out").because(error)),
        }
    }

    /// Writes everything out and ends the machine.
    pub(crate) fn shutdown(self) -> Result<()> {
        let begun = Instant::now();
        let before = self.machine.ended();
        let outcome = self.session.call(&Call::Shutdown);
        let ended = outcome.is_ok() && self.machine.wait(Duration::from_secs(10));
        self.machine.collect();
        let how = self.machine.ended();
        let killed = !ended && how.is_none();
        tracing::debug!(
            took = ?begun.elapsed(),
            killed,
            how = how.as_deref().unwrap_or("it still ran"),
            "the appliance stopped: {}",
            if before.is_some() { "nobody had asked it to" } else { "its user asked it to" }
        );
        if !ended {
            self.machine.kill();
        }
        let stopped = self.disks.stop();
        outcome?;
        stopped.map_err(|error| Error::new(ErrorKind::Io, "writing the disks out").because(error))
    }
}

/// Plugs disks into a running machine and waits until the agent has them.
fn plug(machine: &dyn Machine, session: &Session, disks: &[SpecDisk]) -> Result<()> {
    if disks.is_empty() {
        return Ok(());
    }
    for disk in disks {
        machine.add_disk(disk)?;
        tracing::debug!(serial = disk.serial, export = disk.export, "disk plugged in");
    }
    let serials = disks.iter().map(|disk| disk.serial.clone()).collect();
    session.call(&Call::Plugged { serials }).map(drop)
}

fn fill(mut rest: &mut [u8]) -> Result<()> {
    while !rest.is_empty() {
        let count = rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| io("random bytes", error.into()))?;
        rest = rest.get_mut(count..).unwrap_or_default();
    }
    Ok(())
}

/// Disks for which the usual 1024 descriptors are plenty.
const FEW_DISKS: usize = 64;

fn stages(hello: &Hello) -> Vec<(String, Duration)> {
    let stages = hello.stages.iter().take(64);
    stages.map(|(name, micros)| (name.clone(), Duration::from_micros(*micros))).collect()
}

fn io(what: &str, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, what.to_owned()).because(error)
}

/// An error with its causes, on one line.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn launch_error(backend: &str, why: &str, console: &str) -> Error {
    let error =
        Error::new(ErrorKind::Launch, format!("the appliance did not start ({backend}): {why}"))
            .with_remedy(
                "see why with `tranship appliance probe` and `tranship appliance bench -v`, or \
                 try another backend: --backend qemu-kvm or tcg",
            );
    match last_lines(console) {
        Some(last) => error.because(last),
        None => error,
    }
}
