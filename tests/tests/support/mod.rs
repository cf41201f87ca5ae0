// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs the built program with time limits, and finds the fixtures.
//!
//! `make test` builds the program and the fixtures and names them in the environment;
//! without that the tests say that they were skipped.
#![allow(dead_code, reason = "every test program uses a part of it")]

use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longest time of a command that starts the appliance once. Emulated on a busy machine it
/// takes several times as long as it does alone.
pub(crate) const APPLIANCE: Duration = Duration::from_mins(3);

/// Longest time of a command that starts nothing.
pub(crate) const SHORT: Duration = Duration::from_secs(20);

/// Time between two looks at something that is waited for.
const TICK: Duration = Duration::from_millis(5);

/// Variable that marks the program's processes, so that those of one test can be found.
const MARK: &str = "TRANSHIP_TEST_MARK";

/// A path that an environment variable names; without it the test says that it is skipped.
fn named(variable: &str) -> Option<PathBuf> {
    let Some(path) = std::env::var_os(variable).map(PathBuf::from) else {
        eprintln!("skipped: {variable} is not set (`make test` sets it)");
        return None;
    };
    assert!(path.exists(), "{variable}: {} does not exist", path.display());
    Some(path)
}

/// The program that was built.
pub(crate) fn program() -> Option<PathBuf> {
    named("TRANSHIP_BIN")
}

/// Folder of the Debian guest: `guest.ova`, `guest.raw`, `vmx/`, `split/`, `flat/`.
pub(crate) fn guest() -> Option<PathBuf> {
    named("TRANSHIP_TEST_FIXTURES")
}

/// Folder of the disk without an operating system: `noos.raw`, `noos.vmdk`.
pub(crate) fn no_system() -> Option<PathBuf> {
    named("TRANSHIP_TEST_NOOS")
}

/// Whether a program is installed; if not the test says what it leaves out.
pub(crate) fn installed(program: &str) -> bool {
    let found = ["/usr/sbin", "/sbin"]
        .map(PathBuf::from)
        .into_iter()
        .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()))
        .any(|folder| folder.join(program).is_file());
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

/// Runs a program of the host, which has to succeed; its standard output.
pub(crate) fn host(program: &str, words: &[&str]) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(program)
        .args(words)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {words:?}: {}\n{said}{complained}", output.status);
    said
}

/// SHA-256 of a file.
pub(crate) fn digest(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).unwrap();
        if count == 0 {
            return hash.finalize().to_vec();
        }
        hash.update(&buffer[..count]);
    }
}

/// Names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A folder for one test, and the program that runs in it.
pub(crate) struct Place {
    folder: TempDir,
    program: PathBuf,
    mark: String,
}

impl Place {
    /// A new place with an empty `out` folder, if the program has been built.
    pub(crate) fn new() -> Option<Self> {
        let program = program()?;
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("out")).unwrap();
        fs::create_dir(folder.path().join("tmp")).unwrap();
        let mark = folder.path().display().to_string();
        Some(Self { folder, program, mark })
    }

    /// A path in the place.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The same as text.
    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    /// The program with these arguments; its temporary files are in the place.
    pub(crate) fn tranship<T: AsRef<OsStr>>(&self, words: &[T]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(words)
            .env(MARK, &self.mark)
            .env("TMPDIR", self.path("tmp"))
            .env_remove("TRANSHIP_LOG")
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        command
    }

    /// Starts a command; what it prints goes to files.
    pub(crate) fn start(&self, mut command: Command) -> Running {
        let output = |kind: &str| {
            let name = format!("{kind}.{}", names(self.folder.path()).len());
            let path = self.path(&name);
            (File::create(&path).unwrap(), path)
        };
        let (out, stdout) = output("stdout");
        let (err, stderr) = output("stderr");
        let child = command.stdout(out).stderr(err).spawn().unwrap();
        Running { child, begun: Instant::now(), stdout, stderr }
    }

    /// Runs the program to its end.
    pub(crate) fn run<T: AsRef<OsStr>>(&self, words: &[T], limit: Duration) -> Finished {
        self.start(self.tranship(words)).wait(limit)
    }

    /// Names of this test's processes that still run.
    pub(crate) fn processes(&self) -> Vec<String> {
        let wanted = format!("{MARK}={}", self.mark);
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| {
                let folder = entry.ok()?.path();
                let environment = fs::read(folder.join("environ")).ok()?;
                let ours = environment.split(|byte| *byte == 0).any(|v| v == wanted.as_bytes());
                let name = fs::read_to_string(folder.join("comm")).ok()?;
                ours.then(|| name.trim().to_owned())
            })
            .collect()
    }

    /// Names that the program left in the folder for temporary files.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        names(&self.path("tmp"))
    }
}

/// The program while it runs. Dropping it kills it.
pub(crate) struct Running {
    child: Child,
    begun: Instant,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Running {
    /// Waits until `holds`; the program has to be running still.
    pub(crate) fn until(&mut self, what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("ended before {what}: {status}\n{}", self.printed());
            }
            assert!(begun.elapsed() < limit, "no {what} in {limit:?}\n{}", self.printed());
            sleep(TICK);
        }
    }

    /// Waits until `holds`; whether that came before the program's end.
    pub(crate) fn reaches(&mut self, limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
        let begun = Instant::now();
        while !holds() {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(begun.elapsed() < limit, "not in {limit:?}\n{}", self.printed());
            std::thread::yield_now();
        }
        self.child.try_wait().unwrap().is_none()
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The file that its standard output goes to.
    pub(crate) fn stdout(&self) -> &Path {
        &self.stdout
    }

    /// What it has printed so far on standard output.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    /// Waits for the end.
    pub(crate) fn wait(mut self, limit: Duration) -> Finished {
        let status = self.end_within(limit);
        Finished {
            code: status.code(),
            signal: status.signal(),
            stdout: fs::read_to_string(&self.stdout).unwrap(),
            stderr: fs::read_to_string(&self.stderr).unwrap(),
            elapsed: self.begun.elapsed(),
        }
    }

    fn end_within(&mut self, limit: Duration) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < limit, "still running after {limit:?}\n{}", self.printed());
            sleep(TICK);
        }
    }

    fn printed(&self) -> String {
        [&self.stdout, &self.stderr].map(|path| fs::read_to_string(path).unwrap()).concat()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) elapsed: Duration,
}

impl Finished {
    /// The same, if it ended with this code.
    #[track_caller]
    pub(crate) fn ended_with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// The same, if this text is on standard error.
    #[track_caller]
    pub(crate) fn saying(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "{text:?} is missing:\n{}", self.stderr);
        self
    }
}

/// Whether the file of machine-readable events has an event of this name by now.
pub(crate) fn has_event(path: &Path, name: &str) -> bool {
    let wanted = format!("\"event\":\"{name}\"");
    fs::read_to_string(path).is_ok_and(|text| text.contains(&wanted))
}

/// Whether somebody listens at the Unix socket: there is a moment in which it is there alone. Nobody
/// is connected to for it.
pub(crate) fn listens(path: &Path) -> bool {
    const ACCEPTS: u32 = 1 << 16;
    let Some(path) = path.to_str() else { return false };
    let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    sockets.lines().filter(|line| line.ends_with(path)).any(|line| {
        let flags =
            line.split_whitespace().nth(3).and_then(|word| u32::from_str_radix(word, 16).ok());
        flags.is_some_and(|flags| flags & ACCEPTS != 0)
    })
}

/// Reads a journal of a conversion; there is a moment in which there is none.
pub(crate) fn journal(path: &Path) -> Option<serde_json::Value> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}
