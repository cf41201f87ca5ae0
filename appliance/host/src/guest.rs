// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest API: a handle with disks that is launched once and then answers calls.

use crate::backend::{Preference, choose};
use crate::drive::{Drive, Slot};
use crate::launch::{Launch, LaunchTimes, Live};
use crate::session::{CancelToken, Observer, Patience, Session, Silent};
use crate::{Error, ErrorKind, Result};
use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tranship_protocol::{
    Attributes, Call, FilesystemCheck, GuestPath, Name, NewFile, ProgramOutput, Reply, Space,
    Volume,
};

/// The files that the appliance boots from.
#[derive(Clone, Debug)]
pub struct Boot {
    /// The uncompressed kernel.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// The read-only image with tools.
    pub tools: PathBuf,
}

/// How the appliance is started.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which backend.
    pub backend: Preference,
    /// The program that can be our own monitor (see [`choose`]).
    pub monitor: Option<PathBuf>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors; one starts fastest under emulation.
    pub processors: u32,
    /// More words for the kernel's command line.
    pub append: String,
    /// Folder for sockets; short, since a socket's path has at most 107 bytes.
    pub runtime_dir: PathBuf,
    /// Time after which a machine that has not come up is given up.
    pub launch_limit: Duration,
    /// Whether the memory is to be pages of hugetlbfs, which the host has set aside. Such a
    /// machine is booted each time: a saved one's memory is pages of a file.
    pub huge_pages: bool,
    /// Folder of saved machines, which start in a blink; `None` to boot each time.
    pub snapshots: Option<PathBuf>,
    /// How long a silent agent is waited for.
    pub patience: Patience,
    /// Folder where the memory of an appliance is kept that hung or ended by itself; `None` to
    /// keep none.
    pub dumps: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            backend: Preference::Auto,
            monitor: None,
            memory_mib: 768,
            processors: 1,
            append: String::new(),
            runtime_dir: std::env::temp_dir(),
            launch_limit: Duration::from_mins(2),
            huge_pages: false,
            snapshots: None,
            patience: Patience::default(),
            dumps: None,
        }
    }
}

/// A guest: its disks, and the appliance that reads and changes them.
#[derive(Debug)]
pub struct Guest {
    settings: Settings,
    /// By their numbers; none where a disk was taken away again.
    drives: Vec<Option<Slot>>,
    cancel: CancelToken,
    live: Option<Live>,
    launched: bool,
}

impl Guest {
    /// A guest without disks.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            drives: Vec::new(),
            cancel: CancelToken::default(),
            live: None,
            launched: false,
        }
    }

    /// Uses `token` to cancel calls.
    #[must_use]
    pub fn with_cancel(mut self, token: CancelToken) -> Self {
        self.cancel = token;
        self
    }

    /// Adds the next disk; to a running appliance it is plugged in.
    ///
    /// # Errors
    ///
    /// After the launch, [`ErrorKind::Launch`] if the machine does not take it, and the agent's.
    pub fn add_drive(&mut self, drive: Drive) -> Result<()> {
        let mut slot = Slot::new(self.drives.len(), drive);
        if self.launched {
            self.live("add_drive")?.plug(&mut slot)?;
        }
        self.drives.push(Some(slot));
        Ok(())
    }

    /// Takes the disk number `index` away: before the launch it is as if it had not been added,
    /// from a running appliance it is unplugged. Other disks keep their numbers and names.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] if there is no such disk, and the agent's if it is in use.
    pub fn remove_drive(&mut self, index: usize) -> Result<()> {
        if self.drives.get(index).is_none_or(Option::is_none) {
            return Err(usage(&format!("remove_drive: there is no disk number {index}")));
        }
        if self.launched {
            self.live("remove_drive")?.unplug(index)?;
        }
        if let Some(slot) = self.drives.get_mut(index) {
            *slot = None;
        }
        Ok(())
    }

    /// Starts the appliance.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] the second time, [`ErrorKind::NoBackend`] and
    /// [`ErrorKind::Launch`] if it does not come up.
    pub fn launch(&mut self, boot: &Boot) -> Result<()> {
        if self.launched {
            return Err(usage("launch: this function can only be called in the config state"));
        }
        self.launched = true;
        let begun = Instant::now();
        let choice = choose(self.settings.backend, self.settings.monitor.as_deref());
        let choosing = begun.elapsed();
        let launch = Launch { settings: &self.settings, cancel: &self.cancel, boot };
        let slots = self.drives.iter_mut().flatten();
        self.live = Some(launch.run(choice, choosing, slots)?);
        Ok(())
    }

    fn live(&self, call: &str) -> Result<&Live> {
        self.live.as_ref().ok_or_else(|| {
            usage(&format!(
                "{call}: call launch before using this function\n(in the shell, don't forget to \
                 use the 'run' command)"
            ))
        })
    }

    /// The session with the agent.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] before the launch.
    pub fn session(&self) -> Result<&Session> {
        self.live("call").map(|live| &*live.session)
    }

    /// Name of the backend, why it was chosen, and where the launch's time went.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] before the launch.
    pub fn launch_report(&self) -> Result<(&'static str, &str, &LaunchTimes)> {
        self.live("launch_report").map(|live| (live.backend, live.reason.as_str(), &live.times))
    }

    /// What the machine's console printed last: for reports of failures.
    pub fn console(&self) -> String {
        self.live.as_ref().map(|live| live.machine.console()).unwrap_or_default()
    }

    /// Writes everything out, unmounts and ends the appliance. Repeats are ignored.
    ///
    /// # Errors
    ///
    /// What was not written out; the appliance is gone all the same.
    pub fn shutdown(&mut self) -> Result<()> {
        self.live.take().map_or(Ok(()), Live::shutdown)
    }

    fn call(&self, name: &str, call: &Call) -> Result<Reply> {
        self.live(name)?.session.call(call)
    }

    fn done(&self, name: &str, call: &Call) -> Result<()> {
        match self.call(name, call)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(name, &other)),
        }
    }

    /// Number of disks that were added, those that were taken away again included.
    pub fn drives(&self) -> usize {
        self.drives.len()
    }

    /// The guest's disks in the order in which they were added.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn list_devices(&self) -> Result<Vec<String>> {
        match self.call("list_devices", &Call::Disks)? {
            Reply::Volumes(disks) => Ok(disks.into_iter().map(|disk| disk.device).collect()),
            other => Err(unexpected("list_devices", &other)),
        }
    }

    /// Every block device that may hold a filesystem, with what is known about it.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn volumes(&self) -> Result<Vec<Volume>> {
        match self.call("volumes", &Call::Volumes)? {
            Reply::Volumes(volumes) => Ok(volumes),
            other => Err(unexpected("volumes", &other)),
        }
    }

    /// Opens an encrypted volume as `/dev/mapper/name`.
    ///
    /// # Errors
    ///
    /// The agent's; a wrong key is one of them.
    pub fn open_encrypted(&self, device: &str, name: &str, key: &[u8]) -> Result<()> {
        let call = Call::OpenEncrypted { device: device.into(), name: name.into() };
        let mut key = key;
        self.live("open_encrypted")?.session.upload(&call, &mut key, &Silent).map(|_| ())
    }

    /// Mounts a device; `options` as for mount(8).
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn mount(
        &self,
        device: &str,
        mountpoint: &GuestPath,
        options: &str,
        fstype: Option<&str>,
    ) -> Result<()> {
        let call = Call::Mount {
            device: device.into(),
            mountpoint: mountpoint.clone(),
            options: options.into(),
            fstype: fstype.map(Into::into),
        };
        self.done("mount", &call)
    }

    /// Unmounts what is mounted at `mountpoint`.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn unmount(&self, mountpoint: &GuestPath) -> Result<()> {
        self.done("umount", &Call::Unmount { mountpoint: mountpoint.clone() })
    }

    /// Unmounts everything.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn unmount_all(&self) -> Result<()> {
        self.done("umount_all", &Call::UnmountAll)
    }

    /// Devices and where they are mounted.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn mounts(&self) -> Result<Vec<(String, GuestPath)>> {
        match self.call("mounts", &Call::Mounts)? {
            Reply::Mounts(mounts) => Ok(mounts),
            other => Err(unexpected("mounts", &other)),
        }
    }

    /// Writes everything out to the disks.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn sync(&self) -> Result<()> {
        self.done("sync", &Call::Sync)
    }

    /// Checks an unmounted filesystem without changing it.
    ///
    /// # Errors
    ///
    /// The agent's; damage that was found is not an error.
    pub fn check_filesystem(&self, device: &str, fstype: &str) -> Result<FilesystemCheck> {
        match self.call("check", &Call::Check { device: device.into(), fstype: fstype.into() })? {
            Reply::Checked(check) => Ok(check),
            other => Err(unexpected("check", &other)),
        }
    }

    /// Discards what a mounted filesystem does not use; returns the bytes discarded.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn trim(&self, mountpoint: &GuestPath) -> Result<u64> {
        self.bytes("fstrim", &Call::Trim { mountpoint: mountpoint.clone() })
    }

    fn bytes(&self, name: &str, call: &Call) -> Result<u64> {
        match self.call(name, call)? {
            Reply::Bytes(bytes) => Ok(bytes),
            other => Err(unexpected(name, &other)),
        }
    }

    /// Attributes of a name, `None` if it is not there.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn attributes(&self, path: &GuestPath, follow: bool) -> Result<Option<Attributes>> {
        let path = path.clone();
        let (name, call) =
            if follow { ("stat", Call::Stat { path }) } else { ("lstat", Call::Lstat { path }) };
        match self.call(name, &call)? {
            Reply::Attributes(attributes) => Ok(attributes),
            other => Err(unexpected(name, &other)),
        }
    }

    /// What a symbolic link says.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn read_link(&self, path: &GuestPath) -> Result<Vec<u8>> {
        match self.call("readlink", &Call::ReadLink { path: path.clone() })? {
            Reply::Target(target) => Ok(target),
            other => Err(unexpected("readlink", &other)),
        }
    }

    /// The names in a directory, sorted; at most `limit`.
    ///
    /// # Errors
    ///
    /// The agent's, and more names than `limit`.
    pub fn read_dir(&self, path: &GuestPath, limit: usize) -> Result<Vec<Name>> {
        let mut names: Vec<Name> = Vec::new();
        let call = Call::ReadDir { path: path.clone() };
        let mut take = |bytes: &[u8]| {
            let frame = tranship_protocol::Frame {
                kind: tranship_protocol::FrameKind::Data,
                id: 0,
                body: bytes.to_vec(),
            };
            let more: Vec<Name> = frame.decode().map_err(|error| {
                Error::new(ErrorKind::Lost, "ls: the answer does not decode").because(error)
            })?;
            names.extend(more);
            if names.len() > limit {
                return Err(usage(&format!("ls: {path}: more than {limit} names")));
            }
            Ok(())
        };
        self.live("ls")?.session.download(&call, &mut take, &Silent)?;
        Ok(names)
    }

    /// Free space where `path` lies.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn space(&self, path: &GuestPath) -> Result<Space> {
        match self.call("statvfs", &Call::Space { path: path.clone() })? {
            Reply::Space(space) => Ok(space),
            other => Err(unexpected("statvfs", &other)),
        }
    }

    /// Passes a file's contents to `take`, in order.
    ///
    /// # Errors
    ///
    /// The agent's, and what `take` returns.
    pub fn download(
        &self,
        path: &GuestPath,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
        observer: &dyn Observer,
    ) -> Result<()> {
        let call = Call::Download { path: path.clone() };
        self.live("download")?.session.download(&call, take, observer).map(|_| ())
    }

    /// A file's contents, at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// The agent's, and a file that is larger.
    pub fn read_file(&self, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut contents = Vec::new();
        let mut take = |bytes: &[u8]| {
            if contents.len().saturating_add(bytes.len()) > limit {
                return Err(usage(&format!("download: {path}: more than {limit} bytes")));
            }
            contents.extend_from_slice(bytes);
            Ok(())
        };
        self.download(path, &mut take, &Silent)?;
        Ok(contents)
    }

    /// Gives a file new contents, atomically; an existing one keeps its attributes.
    ///
    /// # Errors
    ///
    /// The agent's, and a failure of `from`.
    pub fn upload(
        &self,
        path: &GuestPath,
        from: &mut dyn Read,
        new: NewFile,
        parents: bool,
        observer: &dyn Observer,
    ) -> Result<()> {
        let call = Call::Upload { path: path.clone(), new, parents };
        self.live("upload")?.session.upload(&call, from, observer).map(|_| ())
    }

    /// Appends to a file; see [`Call::Append`]. Returns the offset where `data` begins.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn append(
        &self,
        path: &GuestPath,
        data: &[u8],
        align: u64,
        backup: Option<&GuestPath>,
    ) -> Result<u64> {
        let call = Call::Append { path: path.clone(), align, backup: backup.cloned() };
        let mut data = data;
        match self.live("append")?.session.upload(&call, &mut data, &Silent)? {
            Reply::Bytes(offset) => Ok(offset),
            other => Err(unexpected("append", &other)),
        }
    }

    /// Makes a directory and its parents.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn make_dir(&self, path: &GuestPath, mode: u32) -> Result<()> {
        self.done("mkdir_p", &Call::MakeDir { path: path.clone(), mode })
    }

    /// Makes a symbolic link, replacing a file or link of that name.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn symlink(&self, path: &GuestPath, target: &[u8]) -> Result<()> {
        self.done("ln_sf", &Call::Symlink { path: path.clone(), target: target.to_vec() })
    }

    /// Copies a regular file with its attributes.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn copy(&self, from: &GuestPath, to: &GuestPath) -> Result<()> {
        self.done("cp_a", &Call::Copy { from: from.clone(), to: to.clone() })
    }

    /// Removes a file or link; does nothing if it is not there.
    ///
    /// # Errors
    ///
    /// The agent's.
    pub fn remove(&self, path: &GuestPath) -> Result<()> {
        self.done("rm_f", &Call::Remove { path: path.clone() })
    }

    /// Runs a program and passes what it prints to `take`.
    ///
    /// `in_guest` runs a program of the guest with the guest's tree as its root, else one of
    /// the appliance's. `input` becomes its standard input. After `limit` it is killed.
    ///
    /// # Errors
    ///
    /// The agent's; an exit status other than 0 is not an error.
    pub fn run(
        &self,
        arguments: &[&str],
        in_guest: bool,
        input: Option<&mut dyn Read>,
        limit: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<ProgramOutput> {
        let seconds = limit.map_or(0, |limit| limit.as_secs().clamp(1, u64::from(u32::MAX)));
        let call = Call::Run {
            arguments: arguments.iter().map(ToString::to_string).collect(),
            in_guest,
            input: input.is_some(),
            timeout: u32::try_from(seconds).unwrap_or(u32::MAX),
        };
        match self.live("run")?.session.exchange(&call, input, take, &Silent)? {
            Reply::Finished(output) => Ok(output),
            other => Err(unexpected("run", &other)),
        }
    }
}

fn usage(message: &str) -> Error {
    Error::new(ErrorKind::Usage, message)
}

fn unexpected(name: &str, reply: &Reply) -> Error {
    tracing::debug!(?reply, "unexpected reply");
    Error::new(ErrorKind::Lost, format!("{name}: the agent's answer does not fit the call"))
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Who cares about errors calls `shutdown`.
        let _ = self.shutdown();
    }
}
