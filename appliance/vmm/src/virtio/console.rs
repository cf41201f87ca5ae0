// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Byte streams between the host and the guest under names (section 5.3, several ports).
//!
//! Port 0 exists for a console that nobody uses; ports from 1 on are the streams. One thread
//! moves all bytes: the guest's drivers wait for each other less than two threads would.

mod pump;

use super::worker::Worker;
use super::{Activation, VirtioDevice};
use crate::{Error, Result};
use pump::Pump;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// Feature: several ports.
const MULTIPORT: u64 = 1 << 1;

/// Requests that a queue holds.
const QUEUE_SIZE: u16 = 128;

/// A stream with the name that the guest knows it by.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) stream: UnixStream,
}

/// What is known of a port beyond its queues.
#[derive(Debug)]
pub(crate) struct PortState {
    pub(crate) port: Port,
    /// The guest has opened its end.
    pub(crate) open: bool,
    /// Our end has hung up.
    pub(crate) ended: bool,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Console {
    sizes: Vec<u16>,
    /// `None` while the thread has them.
    ports: Option<Vec<PortState>>,
    worker: Option<Worker<Vec<PortState>>>,
}

impl Console {
    pub(crate) fn new(ports: Vec<Port>) -> Result<Self> {
        for port in &ports {
            port.stream
                .set_nonblocking(true)
                .map_err(Error::system(format!("the stream of port {}", port.name)))?;
        }
        // Two queues for each port, two for control messages; port 0 has its own.
        let queues = ports.len().saturating_mul(2).saturating_add(4);
        let ports = ports.into_iter().map(|port| PortState { port, open: false, ended: false });
        Ok(Self { sizes: vec![QUEUE_SIZE; queues], ports: Some(ports.collect()), worker: None })
    }
}

/// First queue of a port: port 0, then control, then the others (section 5.3.2).
pub(crate) fn receive_queue(port: usize) -> usize {
    if port == 0 { 0 } else { port.saturating_mul(2).saturating_add(2) }
}

impl VirtioDevice for Console {
    fn kind(&self) -> u16 {
        3
    }

    fn class(&self) -> [u8; 3] {
        [0x07, 0x80, 0]
    }

    fn features(&self) -> u64 {
        MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    /// Columns, rows, then the number of ports (section 5.3.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let ports = u32::try_from(self.sizes.len() / 2).unwrap_or(2).saturating_sub(1);
        let [p0, p1, p2, p3] = ports.to_le_bytes();
        let config = [0, 0, 0, 0, p0, p1, p2, p3];
        for (index, byte) in (0_u64..).zip(data) {
            let at = usize::try_from(offset.saturating_add(index)).unwrap_or(usize::MAX);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let Activation { ram, features, queues, link, spawner } = activation;
        let ports = self.ports.take().unwrap_or_default();
        if features & MULTIPORT == 0 {
            // Without it there is only port 0, which leads nowhere.
            self.ports = Some(ports);
            return Ok(());
        }
        let pump = Pump::new(ram, Arc::clone(&link), queues, ports);
        self.worker = Some(spawner.start("console".into(), move |stop| pump.run(stop))?);
        Ok(())
    }

    fn stop(&mut self) {
        if let Some(ports) = self.worker.take().and_then(Worker::end) {
            self.ports = Some(ports);
        }
    }
}
