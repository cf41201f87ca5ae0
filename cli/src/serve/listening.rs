// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server with its sockets.

use super::disk::Offered;
use super::encryption::Encryption;
use super::settings::{Settings, Wanted};
use crate::failure::Failure;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tranship_nbd::{Address, Export, Limits, Listener, Place, Running, Server, Uri};

/// Disks that clients can connect to.
#[derive(Debug)]
pub(super) struct Serving {
    running: Running,
    exports: Vec<String>,
    places: Vec<Place>,
    /// The port was left to the system.
    is_port_chosen: bool,
    /// Where the certificates are, if clients have to encrypt.
    certificates: Option<PathBuf>,
    /// The folder of a private socket.
    _folder: Option<TempDir>,
}

impl Serving {
    /// Starts to listen and to answer.
    pub(super) fn start(
        settings: &Settings,
        encryption: Option<Encryption>,
        inherited: Vec<OwnedFd>,
        disks: Vec<Offered>,
    ) -> Result<Self, Failure> {
        let mut listeners =
            inherited.into_iter().map(Listener::inherited).collect::<Result<Vec<_>, _>>()?;
        let mut private = None;
        let mut is_port_chosen = false;
        for wanted in &settings.places {
            match wanted {
                Wanted::Unix(path) => listeners.push(Listener::unix(path)?),
                Wanted::Private => {
                    let folder = tempfile::Builder::new()
                        .prefix("tranship-serve-")
                        .tempdir()
                        .map_err(|error| Failure::io("making a folder for the socket", &error))?;
                    listeners.push(Listener::unix(folder.path().join("socket"))?);
                    private = Some(folder);
                }
                Wanted::Tcp { host, port } => {
                    is_port_chosen = *port == 0;
                    listeners.extend(tcp(host, *port)?);
                }
                Wanted::Vsock { port } => listeners.push(Listener::vsock(*port)?),
            }
        }
        let places = listeners.iter().map(Listener::place).collect();
        let exports = disks.iter().map(|disk| disk.name.clone()).collect();
        let offered = disks.into_iter().map(|disk| Export {
            description: disk.description,
            read_only: disk.read_only,
            // One client at a time is no promise to several.
            shared: settings.clients != Some(1),
            depth: settings.depth,
            whole_layers: disk.whole_layers,
            bitmaps: disk.bitmaps,
            ..Export::new(disk.name, disk.device)
        });
        let limits = Limits {
            handshake: settings.handshake,
            connections: settings.clients.unwrap_or(usize::MAX),
            ..Limits::default()
        };
        let mut server = Server::new(listeners, offered.collect(), limits)?;
        let mut certificates = None;
        if let Some(Encryption { tls, required, folder }) = encryption {
            server = server.with_tls(tls, required);
            certificates = required.then_some(folder);
        }
        let running = server.start()?;
        Ok(Self { running, exports, places, is_port_chosen, certificates, _folder: private })
    }

    /// How many clients are connected.
    pub(super) fn connections(&self) -> usize {
        self.running.connections()
    }

    /// How many clients have chosen an export so far.
    pub(super) fn negotiated(&self) -> u64 {
        self.running.negotiated()
    }

    /// Returns when clients may have come or left, after `limit` at the latest.
    pub(super) fn wait(&self, limit: Duration) {
        self.running.wait(Some(limit));
    }

    /// What clients did with each export.
    pub(super) fn statistics(&self) -> serde_json::Value {
        let told = self.exports.iter().filter_map(|name| {
            let mut told = serde_json::to_value(self.running.statistics(name)?).ok()?;
            told.as_object_mut()?.insert("name".to_owned(), name.as_str().into());
            Some(told)
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
        self.places.iter().find_map(|place| match place {
            Place::Unix(path) => Some(path.as_path()),
            _ => None,
        })
    }

    fn address(&self) -> Option<SocketAddr> {
        self.places.iter().find_map(|place| match place {
            Place::Tcp(address) => Some(*address),
            _ => None,
        })
    }

    /// Number of the TCP port, if there is one.
    pub(super) fn port(&self) -> Option<u16> {
        self.address().map(|address| address.port())
    }

    /// The port that was chosen here and nobody knows.
    pub(super) fn chosen_port(&self) -> Option<u16> {
        self.port().filter(|_| self.is_port_chosen)
    }

    /// How clients reach the first export; nothing if the socket has no name.
    pub(super) fn uri(&self) -> String {
        let address = match (self.socket(), self.address()) {
            (Some(path), _) => Some(Address::Unix(path.to_owned())),
            (None, Some(address)) => {
                Some(Address::Tcp { host: host_of(address), port: address.port() })
            }
            (None, None) => self.places.iter().find_map(|place| match place {
                Place::Vsock { cid, port } => Some(Address::Vsock { cid: *cid, port: *port }),
                _ => None,
            }),
        };
        let named = |address| {
            let mut uri = Uri::new(address, self.first_export());
            uri.tls = self.certificates.is_some();
            uri.tls_options.certificates.clone_from(&self.certificates);
            uri.to_string()
        };
        address.map(named).unwrap_or_default()
    }
}

/// Listens on every address that `host` has.
fn tcp(host: &str, port: u16) -> Result<Vec<Listener>, Failure> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let addresses = (bare, port).to_socket_addrs().map_err(|error| {
        Failure::usage(format!("address resolution failed for {host}:{port}")).because(&error)
    })?;
    let mut addresses: Vec<SocketAddr> = addresses.collect();
    addresses.dedup();
    if port == 0 {
        // Each would get a port of its own.
        addresses.truncate(1);
    }
    addresses.into_iter().map(|address| Ok(Listener::tcp(address)?)).collect()
}

/// The host as clients on this machine can name it.
fn host_of(address: SocketAddr) -> String {
    match address.ip() {
        ip if ip.is_unspecified() => "localhost".to_owned(),
        ip => ip.to_string(),
    }
}
