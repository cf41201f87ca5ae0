// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtio devices (Virtual I/O Device Version 1.2): what all of them have in common.

pub(crate) mod blk;
pub(crate) mod chain;
pub(crate) mod console;
pub(crate) mod rng;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod transport;
pub(crate) mod worker;

use crate::memory::Ram;
use crate::pci::msix::Msix;
use crate::pci::pin::{self, Pin};
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

/// Feature bits that belong to no kind of device (section 6).
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// Stands for "no vector" (section 4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// Device status bits (section 2.1).
pub(crate) mod status {
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const NEEDS_RESET: u8 = 64;
}

/// A queue in the driver's hands.
#[derive(Debug)]
pub(crate) struct ActiveQueue {
    pub(crate) queue: Queue,
    /// Its number among the device's queues.
    pub(crate) index: u16,
    /// Becomes readable when the driver has something.
    pub(crate) kick: Arc<EventFd>,
}

/// What a device gets when the driver is ready.
#[derive(Debug)]
pub(crate) struct Activation {
    pub(crate) ram: Ram,
    /// Features both sides agreed on.
    pub(crate) features: u64,
    /// By the queue's number; `None` where the driver uses none.
    pub(crate) queues: Vec<Option<ActiveQueue>>,
    pub(crate) link: Arc<Link>,
    pub(crate) spawner: worker::Spawner,
}

/// One kind of device behind the transport.
pub(crate) trait VirtioDevice: Debug + Send {
    /// Device type (section 5).
    fn kind(&self) -> u16;

    /// Class, subclass and programming interface that PCI tells.
    fn class(&self) -> [u8; 3];

    /// Features on offer, without those of the transport.
    fn features(&self) -> u64;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device's own configuration; what does not exist is zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts to work on the queues.
    fn activate(&mut self, activation: Activation) -> crate::Result<()>;

    /// Pauses: nothing touches guest memory until the next activation, which goes on from
    /// here with the queues that are given back. `None` if a thread of the device has died.
    fn pause(&mut self) -> Option<Vec<ActiveQueue>>;

    /// Stops. Nothing touches guest memory afterwards, and the next driver finds the device as
    /// the first one did.
    fn stop(&mut self) {
        self.pause();
    }

    /// What a snapshot keeps of a device that pauses, besides its queues.
    ///
    /// # Errors
    ///
    /// What has to be finished before the device can be saved.
    fn save(&self) -> std::result::Result<DeviceState, String>;

    /// Takes over a saved state. The device has not been activated yet.
    ///
    /// # Errors
    ///
    /// How the state is one of another device.
    fn restore(&mut self, saved: &DeviceState) -> std::result::Result<(), String>;
}

/// What a snapshot keeps of a device besides what all of them have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DeviceState {
    Rng,
    Blk(blk::BlkState),
    Console(Vec<console::SavedPort>),
}

/// What a device tells the driver: interrupts and that it has given up.
#[derive(Debug)]
pub(crate) struct Link {
    msix: Arc<Msix>,
    status: AtomicU8,
    /// With the ISR status.
    pin: Pin,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    broken: AtomicBool,
}

impl Link {
    pub(crate) fn new(msix: Arc<Msix>, pin: Pin, queues: usize) -> Self {
        Self {
            msix,
            status: AtomicU8::new(0),
            pin,
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            broken: AtomicBool::new(false),
        }
    }

    /// Something of the queue was used.
    pub(crate) fn queue_used(&self, index: u16) {
        let vector = self.queue_vectors.get(usize::from(index));
        if !self.msix.raise(vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))) {
            self.pin.raise(pin::QUEUE);
        }
    }

    fn tell_config(&self) {
        // With messages, too (section 4.1.4.5.1); the pin is closed then.
        self.pin.raise(pin::CONFIGURATION);
        self.msix.raise(self.config_vector.load(Ordering::Acquire));
    }

    /// The driver broke the rules: the device does nothing more until it is reset
    /// (section 2.1.2).
    pub(crate) fn break_down(&self, why: &str) {
        if !self.broken.swap(true, Ordering::AcqRel) {
            tracing::warn!(why, "the driver broke the rules, the device waits for a reset");
            let old = self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
            if old & status::DRIVER_OK != 0 {
                self.tell_config();
            }
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }
}
