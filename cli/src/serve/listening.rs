// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server with its sockets.

use super::disk::Offered;
use super::settings::{Settings, Wanted};
use crate::args::ServeArgs;
use crate::failure::Failure;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tranship_nbd::{Export, Limits, Running, Server};

/// Time between two looks at the clients.
const LOOK: Duration = Duration::from_millis(10);

/// Disks that clients can connect to.
#[derive(Debug)]
pub(super) struct Serving {
    running: Running,
    exports: Vec<String>,
    /// The folder of a private socket.
    _folder: Option<TempDir>,
}

impl Serving {
    /// Starts to listen and to answer.
    pub(super) fn start(
        settings: &Settings,
        inherited: Vec<OwnedFd>,
        disks: Vec<Offered>,
    ) -> Result<Self, Failure> {
        if !inherited.is_empty() {
            return Err(not_there("a socket that another program has opened"));
        }
        let (path, folder) = match settings.places.as_slice() {
            [Wanted::Unix(path)] => (path.clone(), None),
            [Wanted::Private] => {
                let folder = tempfile::Builder::new()
                    .prefix("tranship-serve-")
                    .tempdir()
                    .map_err(|error| Failure::io("making a folder for the socket", &error))?;
                (folder.path().join("socket"), Some(folder))
            }
            _ => return Err(not_there("anything but one Unix socket")),
        };
        let names = disks.iter().map(|disk| disk.name.clone()).collect();
        let exports = disks.into_iter().map(|disk| Export {
            name: disk.name,
            description: disk.description,
            device: disk.device,
            read_only: disk.read_only,
        });
        let limits = Limits {
            handshake: settings.handshake,
            connections: settings.clients.unwrap_or(usize::MAX),
            ..Limits::default()
        };
        let running = Server::bind(&path, exports.collect(), limits)?.start()?;
        Ok(Self { running, exports: names, _folder: folder })
    }

    /// How many clients are connected.
    pub(super) fn connections(&self) -> usize {
        self.running.connections()
    }

    /// How many clients have chosen an export so far.
    pub(super) fn negotiated(&self) -> u64 {
        let counted = self.exports.iter().filter_map(|name| self.running.statistics(name));
        counted.map(|told| told.connections).sum()
    }

    /// Returns when clients may have come or left, after `limit` at the latest.
    pub(super) fn wait(&self, limit: Duration) {
        let begun = Instant::now();
        let before = (self.connections(), self.negotiated());
        while begun.elapsed() < limit && before == (self.connections(), self.negotiated()) {
            thread::sleep(LOOK);
        }
    }

    /// What clients did with each export.
    pub(super) fn statistics(&self) -> serde_json::Value {
        let told = self.exports.iter().filter_map(|name| {
            let told = self.running.statistics(name)?;
            Some(serde_json::json!({
                "name": name,
                "connections": told.connections,
                "reads": { "operations": told.reads, "bytes": told.bytes_read },
                "writes": { "operations": told.writes, "bytes": told.bytes_written },
                "zeroes": { "operations": told.zeroes, "bytes": told.bytes_zeroed },
                "flushes": { "operations": told.flushes },
                "statuses": { "operations": told.statuses },
                "errors": told.errors,
            }))
        });
        told.collect()
    }

    /// Lets what is in flight end, and flushes.
    pub(super) fn stop(self) -> Result<(), Failure> {
        Ok(self.running.stop()?)
    }

    /// Name of the first export.
    pub(super) fn first_export(&self) -> &str {
        self.exports.first().map_or("", String::as_str)
    }

    /// Path of the Unix socket, if there is one.
    pub(super) fn socket(&self) -> Option<&Path> {
        Some(self.running.path())
    }

    /// Number of the TCP port, if there is one.
    pub(super) fn port(&self) -> Option<u16> {
        None
    }

    /// The port that was chosen here and nobody knows.
    pub(super) fn chosen_port(&self) -> Option<u16> {
        None
    }

    /// How clients reach the first export.
    pub(super) fn uri(&self) -> String {
        let export = encoded(self.first_export());
        let path = encoded(&PathBuf::from(self.running.path()).to_string_lossy());
        format!("nbd+unix:///{export}?socket={path}")
    }
}

/// Refuses what the server cannot do yet.
pub(super) fn refuse_absent(args: &ServeArgs) -> Result<(), Failure> {
    let absent = [
        (!args.bitmap.is_empty(), "serving bitmaps (-B)"),
        (args.allocation_depth, "serving the allocation depth (-A)"),
        (args.tls_creds.is_some() || args.tls_authz.is_some(), "TLS"),
    ];
    match absent.iter().find(|(is_given, _)| *is_given) {
        Some((_, what)) => Err(Failure::usage(format!("{what} is not there yet"))),
        None => Ok(()),
    }
}

fn not_there(what: &str) -> Failure {
    Failure::usage(format!("the server cannot listen on {what} yet"))
        .hint("-k PATH and -U PATH listen on a Unix socket")
}

/// The text with every byte encoded that could mean something in a URI.
fn encoded(text: &str) -> String {
    use std::fmt::Write;
    let mut uri = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                uri.push(char::from(byte));
            }
            _ => {
                let _ = write!(uri, "%{byte:02X}");
            }
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_carry_odd_names() {
        assert_eq!(encoded("/a b?&#%ü"), "/a%20b%3F%26%23%25%C3%BC");
    }
}
