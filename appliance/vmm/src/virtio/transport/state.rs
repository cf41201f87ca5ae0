// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A function that pauses, goes on, and is taken into another process.

use super::{Function, Setup, status};
use crate::pci::msix::MsixState;
use crate::virtio::{DeviceState, F_VERSION_1, NO_VECTOR};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU16, Ordering};
use virtio_queue::QueueT;

/// A function's whole state, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FunctionState {
    kind: u16,
    config: Vec<u8>,
    msix: MsixState,
    status: u8,
    isr: u8,
    generation: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<Setup>,
    active: bool,
    device: DeviceState,
}

impl Function {
    /// Makes the device stand still, until [`Self::resume`].
    pub(crate) fn pause(&mut self) {
        if !std::mem::take(&mut self.working) {
            return;
        }
        let Some(paused) = self.device.pause() else {
            // How far it has come is not known.
            self.link.break_down("a thread of the device has died");
            return;
        };
        for active in paused {
            if let Some(setup) = self.queues.get_mut(usize::from(active.index)) {
                setup.next_available = active.queue.next_avail();
                setup.next_used = active.queue.next_used();
            }
        }
    }

    /// Lets a device go on that pauses or was restored. One that the driver has not started
    /// stays as it is.
    pub(crate) fn resume(&mut self) {
        if !self.active || self.working || self.link.is_broken() {
            return;
        }
        if self.connected.is_none() {
            self.connect();
        }
        match self.active_queues() {
            Some(queues) => self.work(queues),
            None => self.link.break_down("a queue does not lie in memory as it did"),
        }
    }

    /// The state of a function that pauses.
    ///
    /// # Errors
    ///
    /// Why the device cannot be saved now.
    pub(crate) fn save(&self) -> Result<FunctionState, String> {
        if self.link.is_broken() {
            return Err("the device waits for a reset".into());
        }
        let load = |vector: &AtomicU16| vector.load(Ordering::Acquire);
        Ok(FunctionState {
            kind: self.device.kind(),
            config: self.config.save(),
            msix: self.msix.save(),
            status: self.status(),
            isr: self.link.pin.isr(),
            generation: self.link.generation.load(Ordering::Acquire),
            config_vector: load(&self.link.config_vector),
            queue_vectors: self.link.queue_vectors.iter().map(load).collect(),
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.clone(),
            active: self.active,
            device: self.device.save()?,
        })
    }

    /// Takes over a saved state; the device does not work before [`Self::resume`].
    ///
    /// # Errors
    ///
    /// How the state is not one of this function.
    pub(crate) fn restore(&mut self, saved: FunctionState) -> Result<(), String> {
        self.check(&saved)?;
        self.device.restore(&saved.device)?;
        self.config.restore(&saved.config);
        self.msix.restore(saved.msix);
        self.close_pin();
        self.link.pin.set_isr(saved.isr);
        self.link.generation.store(saved.generation, Ordering::Release);
        self.link.config_vector.store(saved.config_vector, Ordering::Release);
        for (vector, saved) in self.link.queue_vectors.iter().zip(saved.queue_vectors) {
            vector.store(saved, Ordering::Release);
        }
        self.link.status.store(saved.status, Ordering::Release);
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.driver_features = saved.driver_features;
        self.queue_select = saved.queue_select;
        self.queues = saved.queues;
        self.active = saved.active;
        Ok(())
    }

    fn check(&self, saved: &FunctionState) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("{what} cannot be those of this device"));
        if saved.kind != self.device.kind() {
            return Err(format!("device type {}, expected {}", saved.kind, self.device.kind()));
        }
        if self.active || self.working {
            return Err("the device is in use already".into());
        }
        if !self.config.fits(&saved.config) {
            return wrong("the registers of the configuration space");
        }
        let control = self.msix_control.and_then(|at| saved.config.get(at..)?.first_chunk());
        let control = control.copied().map_or(0, u16::from_le_bytes);
        if !self.msix.fits(&saved.msix, control) {
            return wrong("the interrupts");
        }
        let vectors = self.msix.vectors();
        let mut asked = saved.queue_vectors.iter().chain([&saved.config_vector]);
        if saved.queue_vectors.len() != self.queues.len()
            || !asked.all(|vector| *vector < vectors || *vector == NO_VECTOR)
        {
            return wrong("the vectors");
        }
        let agreed = saved.status & status::FEATURES_OK != 0;
        if agreed
            && (saved.driver_features & !self.offered() != 0
                || saved.driver_features & F_VERSION_1 == 0)
        {
            return wrong("the features");
        }
        let started = agreed && saved.status & status::DRIVER_OK != 0;
        if saved.active && !started || saved.status & status::NEEDS_RESET != 0 {
            return wrong("the bits of the status");
        }
        let same_size = |(new, old): (&Setup, &Setup)| new.max == old.max;
        let usable = |setup: &Setup| {
            !setup.enabled || setup.queue(saved.driver_features, &self.ram).is_some()
        };
        if saved.queues.len() != self.queues.len()
            || !saved.queues.iter().zip(&self.queues).all(same_size)
            || saved.active && !saved.queues.iter().all(usable)
        {
            return wrong("the queues");
        }
        Ok(())
    }
}
