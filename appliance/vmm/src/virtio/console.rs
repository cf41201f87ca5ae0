// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Byte streams between the host and the guest under names (section 5.3, several ports).
//!
//! No port is a console, so that the first stream has port 0, which always exists. One thread
//! moves all bytes: the guest's drivers wait for each other less than two threads would.

mod pump;

use super::worker::Worker;
use super::{Activation, ActiveQueue, DeviceState, VirtioDevice};
use crate::{Error, Result};
use pump::{Pump, Unsent, hang_up};
use rustix::net::RecvFlags;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
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
    /// Bytes of the guest that the stream has not taken yet.
    unsent: Option<Unsent>,
}

impl PortState {
    fn new(port: Port) -> Self {
        Self { port, open: false, ended: false, unsent: None }
    }

    /// Bytes that are neither here nor there could be in no snapshot, or in two conversations.
    fn check_idle(&self) -> std::result::Result<(), String> {
        let name = &self.port.name;
        if self.unsent.is_some() {
            return Err(format!("port {name} has bytes of the guest that nobody has read yet"));
        }
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.port.stream, &mut [0_u8; 1][..], flags) {
            Ok((1.., _)) => Err(format!("port {name} has bytes that the guest has not taken yet")),
            _ => Ok(()),
        }
    }
}

/// What a snapshot keeps of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedPort {
    name: String,
    /// The guest has opened its end.
    open: bool,
    /// The guest knows that our end has hung up.
    ended: bool,
}

/// All that the device's thread works on besides the queues.
#[derive(Debug, Default)]
struct Streams {
    ports: Vec<PortState>,
    /// Control messages that wait for the guest.
    messages: VecDeque<Vec<u8>>,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Console {
    sizes: Vec<u16>,
    /// Empty while the thread has them.
    streams: Streams,
    worker: Option<Worker<(Vec<ActiveQueue>, Streams)>>,
}

impl Console {
    pub(crate) fn new(ports: Vec<Port>) -> Result<Self> {
        for port in &ports {
            port.stream
                .set_nonblocking(true)
                .map_err(Error::system(format!("the stream of port {}", port.name)))?;
        }
        // Two queues for each port, of which there is one at least, two for control messages.
        let queues = ports.len().max(1).saturating_mul(2).saturating_add(2);
        let ports = ports.into_iter().map(PortState::new).collect();
        let streams = Streams { ports, messages: VecDeque::new() };
        Ok(Self { sizes: vec![QUEUE_SIZE; queues], streams, worker: None })
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
        if features & MULTIPORT == 0 {
            // Without it there is only port 0, and nobody says whether that is open.
            return Ok(());
        }
        let streams = std::mem::take(&mut self.streams);
        let pump = Pump::new(ram, Arc::clone(&link), queues, streams);
        self.worker = Some(spawner.start("console".into(), move |stop| pump.run(stop))?);
        Ok(())
    }

    fn pause(&mut self) -> Option<Vec<ActiveQueue>> {
        let Some(worker) = self.worker.take() else { return Some(Vec::new()) };
        let (queues, streams) = worker.end()?;
        self.streams = streams;
        Some(queues)
    }

    fn stop(&mut self) {
        self.pause();
        self.streams.messages.clear();
        for state in &mut self.streams.ports {
            // Whoever drives the device next opens its ends itself.
            state.open = false;
            state.unsent = None;
        }
    }

    fn save(&self) -> std::result::Result<DeviceState, String> {
        if !self.streams.messages.is_empty() {
            return Err("the guest has not been told everything about its ports yet".into());
        }
        let saved = |state: &PortState| {
            state.check_idle()?;
            let name = state.port.name.clone();
            Ok(SavedPort { name, open: state.open, ended: state.ended })
        };
        self.streams
            .ports
            .iter()
            .map(saved)
            .collect::<std::result::Result<_, _>>()
            .map(DeviceState::Console)
    }

    fn restore(&mut self, saved: &DeviceState) -> std::result::Result<(), String> {
        let DeviceState::Console(saved) = saved else {
            return Err("it is not one of a console".into());
        };
        let names = |names: Vec<&str>| names.join(" ");
        let own = names(self.streams.ports.iter().map(|state| state.port.name.as_str()).collect());
        let other = names(saved.iter().map(|port| port.name.as_str()).collect());
        if own != other {
            return Err(format!("ports {other}, expected {own}"));
        }
        for ((number, state), port) in (0..).zip(&mut self.streams.ports).zip(saved) {
            state.open = port.open;
            if port.ended {
                // There is somebody again.
                self.streams.messages.push_back(hang_up(number, false));
            }
        }
        Ok(())
    }
}
