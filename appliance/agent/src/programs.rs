// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs programs: the appliance's own tools, and on request programs of the guest.

use crate::failure::{Result, io, plain, system};
use crate::tools::GUEST_ROOT;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::thread::UnshareFlags;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Output of a tool that is kept, in bytes.
const KEPT: u64 = 256 << 10;

/// What a tool of the appliance left behind.
pub(crate) struct Output {
    pub(crate) status: i32,
    bytes: Vec<u8>,
}

impl Output {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// Exit status as a shell has it: 128 + N for signal N.
pub(crate) fn shell_status(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn command(arguments: &[&str]) -> Result<Command> {
    let (program, rest) = arguments.split_first().ok_or_else(|| plain("no program was named"))?;
    let mut command = Command::new(program);
    command
        .args(rest)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .env("DM_DISABLE_UDEV", "1")
        .env("MDADM_NO_UDEV", "1")
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        // The tools disk is read-only: LVM keeps no files of its own.
        .env("LVM_SYSTEM_DIR", "")
        .stdin(Stdio::null());
    Ok(command)
}

/// Runs a tool of the appliance and keeps what it prints, both streams together.
pub(crate) fn capture(arguments: &[&str]) -> Result<Output> {
    capture_with_input(arguments, &[])
}

/// The same with bytes for its standard input.
pub(crate) fn capture_with_input(arguments: &[&str], input: &[u8]) -> Result<Output> {
    let mut running = start(arguments, false, !input.is_empty())?;
    if let Some(mut stdin) = running.child.stdin.take() {
        // A tool that ends without reading its input says so by its status.
        let _ = stdin.write_all(input);
    }
    let mut bytes = Vec::new();
    let read = running.output.by_ref().take(KEPT).read_to_end(&mut bytes);
    read.map_err(|error| io(running.name(), &error))?;
    let status = running.child.wait().map_err(|error| io(running.name(), &error))?;
    Ok(Output { status: shell_status(status), bytes })
}

/// A program under way, and the pipe with what it prints.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) output: std::io::PipeReader,
    name: String,
    in_guest: bool,
}

impl Running {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Waits for the program's end, at most `limit`.
    pub(crate) fn wait_for_end(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends the program and everything that it started inside the guest's tree, so that
    /// nothing keeps the guest's filesystems busy.
    pub(crate) fn kill_all(&mut self) {
        let _ = self.child.kill();
        if !self.in_guest {
            return;
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while kill_programs_in_guest() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Kills every process whose root is not the appliance's; returns how many there were.
fn kill_programs_in_guest() -> usize {
    let Ok(entries) = fs::read_dir("/proc") else { return 0 };
    let mut killed = 0;
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let foreign = fs::read_link(entry.path().join("root"))
            .is_ok_and(|root| root != std::path::Path::new("/"));
        if let (true, Some(pid)) = (foreign, rustix::process::Pid::from_raw(pid)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            killed += 1;
        }
    }
    killed
}

/// Starts a program with one pipe for both of its output streams.
pub(crate) fn start(arguments: &[&str], in_guest: bool, input: bool) -> Result<Running> {
    crate::tools::ensure()?;
    let name = arguments.first().copied().unwrap_or_default().to_owned();
    let (output, writer) = std::io::pipe().map_err(|error| io(&name, &error))?;
    let second = writer.try_clone().map_err(|error| io(&name, &error))?;
    let mut command = command(arguments)?;
    command.stdout(writer).stderr(second);
    if input {
        command.stdin(Stdio::piped());
    }
    if in_guest {
        prepare_guest_devices()?;
        // SAFETY: between fork and exec the closure only makes system calls, with paths that
        // are constants: it neither allocates nor takes a lock.
        unsafe {
            command.pre_exec(|| enter_guest().map_err(Into::into));
        }
    }
    // The command keeps its ends of the pipe until it is dropped, right after the start.
    let child = command.spawn().map_err(|error| io(&name, &error))?;
    drop(command);
    Ok(Running { child, output, name, in_guest })
}

const GUEST_DEVICES: &str = "/run/guest-dev";

/// A minimal /dev for programs of the guest: none of the disks is in it.
fn prepare_guest_devices() -> Result<()> {
    for name in ["dev", "proc", "sys"] {
        // A link here would lead the mounts below to a place of the guest's choosing.
        if !crate::files::is_plain_directory(name) {
            return Err(plain(format!("/{name}: the guest has no such directory")));
        }
    }
    if fs::metadata(GUEST_DEVICES).is_ok() {
        return Ok(());
    }
    fs::create_dir_all(GUEST_DEVICES).map_err(|error| io(GUEST_DEVICES, &error))?;
    for (name, minor) in [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)] {
        let path = format!("{GUEST_DEVICES}/{name}");
        mknodat(
            CWD,
            &path,
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            makedev(1, minor),
        )
        .map_err(|error| system(&path, error))?;
    }
    for (name, target) in
        [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let path = format!("{GUEST_DEVICES}/{name}");
        std::os::unix::fs::symlink(target, &path).map_err(|error| io(&path, &error))?;
    }
    Ok(())
}

/// Gives the calling process namespaces of its own and the guest's tree as its root.
fn enter_guest() -> rustix::io::Result<()> {
    let private = UnshareFlags::NEWNS
        .union(UnshareFlags::NEWIPC)
        .union(UnshareFlags::NEWUTS)
        .union(UnshareFlags::NEWNET);
    // SAFETY: the process has just been forked and has one thread; no descriptor table is
    // unshared, so nothing that the parent holds is affected.
    unsafe { rustix::thread::unshare_unsafe(private)? };
    mount_change(c"/", MountPropagationFlags::PRIVATE.union(MountPropagationFlags::REC))?;
    mount_bind(c"/run/guest-dev", c"/run/guest/dev")?;
    mount(c"proc", c"/run/guest/proc", c"proc", MountFlags::empty(), None)?;
    mount(c"sysfs", c"/run/guest/sys", c"sysfs", MountFlags::RDONLY, None)?;
    rustix::process::chdir(c"/run/guest")?;
    rustix::process::chroot(c".")?;
    rustix::process::chdir(c"/")
}

/// Whether a guest is mounted at all.
pub(crate) fn check_guest_is_mounted() -> Result<()> {
    if crate::mounts::is_mounted_root() {
        Ok(())
    } else {
        Err(plain(format!(
            "you must call 'mount' first to mount the root filesystem (nothing is at {GUEST_ROOT})"
        )))
    }
}
