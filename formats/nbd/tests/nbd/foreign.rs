// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers of others, which end with the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tranship_block::ErrorKind;
use tranship_nbd::{Address, ClientOptions, Remote};

/// Bytes of their disk, unless a test makes another.
pub(crate) const SIZE: usize = 3 << 20;

/// A server of somebody else's with a raw disk.
pub(crate) struct Foreign {
    child: Child,
    command: Command,
    pub(crate) socket: PathBuf,
    pub(crate) folder: tempfile::TempDir,
}

impl Foreign {
    /// `None`, with a visible line, if the program is not there.
    pub(crate) fn start(
        program: &str,
        arguments: impl Fn(&Path, &Path) -> Vec<String>,
    ) -> Option<Self> {
        Self::start_with(program, &[], arguments)
    }

    /// The same with `start` on the disk, and zeroes up to [`SIZE`].
    pub(crate) fn start_with(
        program: &str,
        start: &[u8],
        arguments: impl Fn(&Path, &Path) -> Vec<String>,
    ) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let (socket, disk) = (folder.path().join("socket"), folder.path().join("disk"));
        std::fs::write(&disk, start).unwrap();
        let file = std::fs::File::options().write(true).open(&disk).unwrap();
        file.set_len(start.len().max(SIZE) as u64).unwrap();
        let mut command = Command::new(program);
        command.args(arguments(&socket, &disk)).stdin(Stdio::null()).stdout(Stdio::null());
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: {program} is not installed");
                return None;
            }
            Err(error) => panic!("{program}: {error}"),
        };
        let mut server = Self { child, command, socket, folder };
        server.wait();
        Some(server)
    }

    fn wait(&mut self) {
        let start = Instant::now();
        while !self.socket.exists() {
            assert!(self.child.try_wait().unwrap().is_none(), "the server ended at once");
            assert!(start.elapsed() < Duration::from_secs(20), "the server does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    pub(crate) fn address(&self) -> Address {
        Address::Unix(self.socket.clone())
    }

    /// Ends it as a crash does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn start_again(&mut self) {
        self.child = self.command.spawn().unwrap();
    }

    pub(crate) fn connect(&self, options: &ClientOptions) -> Remote {
        let start = Instant::now();
        loop {
            match Remote::connect(&self.address(), options) {
                // The socket is bound a moment before somebody listens.
                Err(error) if error.kind() == ErrorKind::Busy && start.elapsed().as_secs() < 10 => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return other.unwrap(),
            }
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Words for qemu-nbd that serve a raw disk to any number of clients.
pub(crate) fn qemu_nbd(socket: &Path, disk: &Path, more: &[&str]) -> Vec<String> {
    let mut words: Vec<String> =
        ["--persistent", "--shared=8", "--format=raw"].map(ToOwned::to_owned).to_vec();
    words.extend(more.iter().map(|word| (*word).to_owned()));
    words.extend([format!("--socket={}", text(socket)), text(disk)]);
    words
}
