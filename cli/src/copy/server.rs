// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connecting to NBD servers.

use super::how::How;
use crate::failure::Failure;
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error};
use tranship_formats::{Format, NbdAddress, NbdServer, OpenOptions, Place, Spec};
use tranship_nbd::{Address, ClientOptions, Remote};

/// An export as a disk.
#[derive(Debug)]
pub(super) struct Export {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) connections: usize,
}

/// The default export of the server whose socket is at `path`.
pub(super) fn at(path: &Path) -> Spec {
    let server = NbdServer::Unix(path.to_owned());
    let address = NbdAddress { server, export: String::new(), tls: false };
    Spec { place: Place::Nbd(address), ..Spec::from_path(path) }
}

/// Connects to the export that `spec` names; what is in it is an image if `options` name a
/// format.
pub(super) fn open(spec: &Spec, how: &How, options: &OpenOptions) -> Result<Export, Failure> {
    if !how.retry.is_zero() {
        return Err(Failure::usage(
            "--retry is not there yet: a connection that breaks ends the copy",
        ));
    }
    let is_image = options.format.is_some_and(|format| format != Format::Raw);
    match &spec.place {
        Place::Nbd(address) if !is_image && !address.tls => {
            let remote = connect(address, how, options.read_only)?;
            let connections = remote.connections();
            let device = options.meter.device(Arc::new(remote));
            Ok(Export { device, connections })
        }
        // The registry knows how to reach it, and that it is an image.
        _ => {
            let format = options.format.or(Some(Format::Raw));
            let options = OpenOptions { format, ..options.clone() };
            let opened = tranship_formats::open_spec(spec, &options)?;
            Ok(Export { device: opened.device, connections: 1 })
        }
    }
}

fn connect(address: &NbdAddress, how: &How, read_only: bool) -> Result<Remote, Error> {
    let server = match &address.server {
        NbdServer::Unix(path) => Address::Unix(path.clone()),
        NbdServer::Tcp { host, port } => Address::Tcp { host: host.clone(), port: *port },
    };
    let options = ClientOptions {
        export: address.export.clone(),
        read_only,
        connections: how.connections,
        ..ClientOptions::default()
    };
    Remote::connect(&server, &options)
}
