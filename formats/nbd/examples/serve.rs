// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves one image, for measurements: `serve raw|qcow2 IMAGE SOCKET|ADDRESS:PORT
//! [CERTIFICATES]`. With a folder of certificates clients have to encrypt.
//!
//! Runs until it is killed.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result};
use tranship_nbd::{Export, Limits, Listener, Server, ServerTls};
use tranship_qcow2::{OpenOptions, Qcow2};
use tranship_raw::{Access, RawFile};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (format, image, place, certificates) = match arguments.as_slice() {
        [format, image, place] => (format, image, place, None),
        [format, image, place, folder] => (format, image, place, Some(Path::new(folder))),
        _ => {
            let usage = "serve raw|qcow2 IMAGE SOCKET|ADDRESS:PORT [CERTIFICATES]";
            return Err(Error::usage(usage));
        }
    };
    let file = Arc::new(RawFile::open(Path::new(image), Access::ReadWrite)?);
    let device: Arc<dyn BlockDevice> = match format.as_str() {
        "raw" => file,
        "qcow2" => Arc::new(Qcow2::open(file, OpenOptions::default())?),
        other => return Err(Error::usage(format!("format is {other}, expected raw or qcow2"))),
    };
    let listener = match place.parse::<SocketAddr>() {
        Ok(address) => Listener::tcp(address)?,
        Err(_) => Listener::unix(place)?,
    };
    let exports = vec![Export::new("", device)];
    let mut server = Server::new(vec![listener], exports, Limits::default())?;
    if let Some(folder) = certificates {
        server = server.with_tls(ServerTls::from_folder(folder, false)?, true);
    }
    let running = server.start()?;
    loop {
        running.wait(None);
    }
}
