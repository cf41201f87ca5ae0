// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves one image, for measurements: `serve raw|qcow2 IMAGE SOCKET|ADDRESS:PORT`.
//!
//! Runs until it is killed.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result};
use tranship_nbd::{Export, Limits, Listener, Server};
use tranship_qcow2::{OpenOptions, Qcow2};
use tranship_raw::{Access, RawFile};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [format, image, place] = arguments.as_slice() else {
        return Err(Error::usage("serve raw|qcow2 IMAGE SOCKET|ADDRESS:PORT"));
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
    let running =
        Server::new(vec![listener], vec![Export::new("", device)], Limits::default())?.start()?;
    loop {
        running.wait(None);
    }
}
