// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connecting to NBD servers.

use super::how::How;
use crate::failure::Failure;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tranship_block::{BlockDevice, Error};
use tranship_formats::{Format, NbdAddress, OpenOptions, Place, Spec};
use tranship_nbd::{Address, ClientOptions, Remote, Retry, Uri};

/// An export as a disk.
#[derive(Debug)]
pub(super) struct Export {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) connections: usize,
}

/// The default export of the server whose socket is at `path`.
pub(super) fn at(path: &Path) -> Spec {
    let uri = Uri::new(Address::Unix(path.to_owned()), "");
    let address = NbdAddress { uri, credentials: None, reconnect: Duration::ZERO };
    Spec { place: Place::Nbd(Box::new(address)), ..Spec::from_path(path) }
}

/// Connects to the export that `spec` names; what is in it is an image if `options` name a
/// format.
pub(super) fn open(spec: &Spec, how: &How, options: &OpenOptions) -> Result<Export, Failure> {
    let is_image = options.format.is_some_and(|format| format != Format::Raw);
    let mut spec = spec.clone();
    if let Place::Nbd(address) = &mut spec.place {
        address.reconnect = address.reconnect.max(how.retry);
        if !is_image {
            let remote = connect(address, how, options.read_only)
                .map_err(|error| error.in_file(&spec.name))?;
            let connections = remote.connections();
            let device = options.meter.device(Arc::new(remote));
            return Ok(Export { device, connections });
        }
    }
    // The registry knows that it is an image.
    let format = options.format.or(Some(Format::Raw));
    let options = OpenOptions { format, ..options.clone() };
    let opened = tranship_formats::open_spec(&spec, &options)?;
    Ok(Export { device: opened.device, connections: 1 })
}

fn connect(address: &NbdAddress, how: &How, read_only: bool) -> Result<Remote, Error> {
    let options = ClientOptions {
        export: address.uri.export.clone(),
        read_only,
        connections: how.connections,
        tls: how.secrets.tls_for(address)?,
        retry: Retry { budget: address.reconnect },
        ..ClientOptions::default()
    };
    Remote::connect(&address.uri.address, &options)
}
