// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A folder with disks and sockets, our program under its names, and the real ones.

use crate::support::{self, Finished, Place, Running, SHORT};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The version whose words these are.
const VERSION: &str = "qemu-nbd 10.";

/// A place for one test.
pub(crate) struct Bench {
    pub(crate) place: Place,
}

/// Who runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// `tranship serve`
    Serve,
    /// Our program by the name `qemu-nbd`.
    Link,
    /// The real `qemu-nbd`.
    Real,
}

impl Bench {
    /// A new one, if all programs are there.
    pub(crate) fn new() -> Option<Self> {
        let place = Place::new()?;
        if !["qemu-nbd", "qemu-img", "qemu-io", "nbdcopy", "nbdinfo"]
            .iter()
            .all(|program| support::installed(program))
        {
            return None;
        }
        let version = support::host("qemu-nbd", &["--version"]);
        if !version.starts_with(VERSION) {
            let found = version.lines().next().unwrap_or_default();
            eprintln!("skipped: expected {VERSION}x, found {found}");
            return None;
        }
        let program = support::program()?.canonicalize().unwrap();
        for name in ["qemu-nbd", "nbdinfo"] {
            symlink(&program, place.path(name)).unwrap();
        }
        Some(Self { place })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.path(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.place.text(name)
    }

    /// A server's command with these words; a word `@NAME` is a path in the place.
    pub(crate) fn server(&self, who: Who, words: &str) -> Command {
        let words: Vec<String> = self.words(words);
        let mut command = match who {
            Who::Serve => self.place.tranship(&["serve"]),
            Who::Link => self.place.tranship::<&str>(&[]),
            Who::Real => Command::new("qemu-nbd"),
        };
        if who == Who::Link {
            let link = self.path("qemu-nbd");
            command = with_program(&command, &link);
        }
        command.args(words).current_dir(self.path("")).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// The same command, started by what a shell is told to put in front of it.
    pub(crate) fn behind(&self, script: &str, command: &Command) -> Command {
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(format!("{script} \"$0\" \"$@\"")).arg(command.get_program());
        shell.args(command.get_args()).current_dir(self.path("")).stdin(Stdio::null());
        set_variables(&mut shell, command);
        shell
    }

    /// The words of a command line; quotes are not needed here.
    pub(crate) fn words(&self, words: &str) -> Vec<String> {
        words
            .split_whitespace()
            .map(|word| match word.strip_prefix('@') {
                Some(name) => self.text(name),
                None => word.to_owned(),
            })
            .collect()
    }

    /// Starts a server at the socket `s`, and waits until it greets: `qemu-nbd` listens long before it
    /// heeds signals.
    pub(crate) fn start(&self, who: Who, words: &str) -> Running {
        let socket = self.path("s");
        let command = self.server(who, &format!("-k @s {words}"));
        let mut running = self.place.start(command);
        running.until("a greeting", SHORT, || greets(&socket));
        running
    }

    /// Runs a server's command to its end.
    pub(crate) fn run(&self, who: Who, words: &str) -> Finished {
        self.place.start(self.server(who, words)).wait(SHORT)
    }

    /// The URI of an export at the socket `s`.
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.text("s"))
    }

    /// Makes a disk of this format whose contents are known: 4 MiB with data and holes.
    pub(crate) fn disk(&self, name: &str, format: &str) -> PathBuf {
        let path = self.text(name);
        support::host("qemu-img", &["create", "-q", "-f", format, &path, "4M"]);
        let write = |words: &str| {
            support::host("qemu-io", &["-f", format, "-c", words, &path]);
        };
        write("write -P 0x11 0 64k");
        write("write -P 0x22 1M 1M");
        write("write -P 0x33 3145728 4096");
        self.path(name)
    }

    /// The contents of an image, as a raw file made by the real qemu-img.
    pub(crate) fn raw(&self, image: &Path, format: &str) -> Vec<u8> {
        let raw = self.text("expected.raw");
        let image = image.to_str().unwrap();
        support::host("qemu-img", &["convert", "-f", format, "-O", "raw", image, &raw]);
        support::digest(Path::new(&raw))
    }
}

/// The same command with another program.
fn with_program(command: &Command, program: &Path) -> Command {
    let mut other = Command::new(program);
    other.args(command.get_args());
    set_variables(&mut other, command);
    other
}

fn set_variables(other: &mut Command, command: &Command) {
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => other.env(name, value),
            None => other.env_remove(name),
        };
    }
}

/// Whether an NBD server says hello to somebody who leaves then.
fn greets(socket: &Path) -> bool {
    let mut magic = [0; 8];
    UnixStream::connect(socket).is_ok_and(|mut stream| {
        stream.set_read_timeout(Some(SHORT)).unwrap();
        stream.read_exact(&mut magic).is_ok() && &magic == b"NBDMAGIC"
    })
}
