// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Entropy for the guest (section 5.4).

use super::chain::{self, Broken, Chain};
use super::worker::{Serve, Worker, follow};
use super::{Activation, ActiveQueue, DeviceState, VirtioDevice};
use crate::Result;
use crate::memory::Ram;
use rustix::rand::{GetRandomFlags, getrandom};

/// The most that one request gets: the driver asks again.
const MOST: usize = 64 << 10;

/// The device.
#[derive(Debug, Default)]
pub(crate) struct Rng {
    worker: Option<Worker<ActiveQueue>>,
}

struct Source;

impl Serve for Source {
    fn serve(&mut self, chain: Chain, ram: &Ram) -> std::result::Result<u32, Broken> {
        let wanted = usize::try_from(chain::total(&chain.writable)).unwrap_or(MOST).min(MOST);
        let mut bytes = vec![0; wanted];
        let got = getrandom(&mut bytes[..], GetRandomFlags::empty()).unwrap_or(0);
        bytes.truncate(got);
        let filled = chain::fill(&chain.writable, ram, &bytes);
        Ok(u32::try_from(filled).unwrap_or(0))
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> u16 {
        4
    }

    fn class(&self) -> [u8; 3] {
        [0xff, 0, 0]
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let Activation { ram, queues, link, spawner, .. } = activation;
        if let Some(queue) = queues.into_iter().flatten().next() {
            self.worker =
                Some(spawner.start("rng".into(), move |stop| {
                    follow(queue, &ram, &link, &mut Source, stop)
                })?);
        }
        Ok(())
    }

    fn pause(&mut self) -> Option<Vec<ActiveQueue>> {
        self.worker.take().into_iter().map(Worker::end).collect()
    }

    fn save(&self) -> std::result::Result<DeviceState, String> {
        Ok(DeviceState::Rng)
    }

    fn restore(&mut self, saved: &DeviceState) -> std::result::Result<(), String> {
        match saved {
            DeviceState::Rng => Ok(()),
            _ => Err("it is not one of a source of entropy".into()),
        }
    }
}
