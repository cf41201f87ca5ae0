// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers of others, for one test each.

use crate::support::Place;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A server at a Unix socket; it ends with this.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts the server of these words, in which `SOCKET` stands for the socket. They are
    /// separated by spaces.
    pub(crate) fn start(place: &Place, name: &str, words: &str) -> Self {
        let socket = place.path(&format!("{name}.sock"));
        // nbdkit leaves it behind.
        let _ = std::fs::remove_file(&socket);
        let text = socket.to_str().unwrap();
        let mut words = words.split_whitespace().map(|word| word.replace("SOCKET", text));
        let mut child = Command::new(words.next().unwrap())
            .args(words)
            .current_dir(place.path("."))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the server {name} has ended: {status}");
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{name} does not listen");
            sleep(Duration::from_millis(5));
        }
        Self { child, socket }
    }

    /// Its default export.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
