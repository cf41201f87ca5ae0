// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtio over PCI, modern interface only (section 4.1).

mod state;

pub(crate) use state::FunctionState;

use super::{Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use super::{Link, NO_VECTOR, VirtioDevice, status, worker};
use crate::Result;
use crate::layout::BAR_SIZE;
use crate::memory::Ram;
use crate::pci::Address;
use crate::pci::config::{ConfigSpace, Identity, STATUS, STATUS_INTERRUPT};
use crate::pci::msix::{ENTRY, MessageSink, Msix};
use crate::pci::pin::Pin;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// Lets a write of the guest become an event without a detour through us.
pub(crate) trait Doorbells: Debug + Send + Sync {
    fn connect(&self, address: u64, event: &EventFd) -> Result<()>;
    fn disconnect(&self, address: u64, event: &EventFd) -> Result<()>;
}

/// What leads from a function to the rest of the machine.
#[derive(Debug)]
pub(crate) struct Wires {
    pub(crate) messages: Arc<dyn MessageSink>,
    /// Whether there is MSI-X; without it the driver takes no vectors and uses the pin.
    pub(crate) has_vectors: bool,
    pub(crate) pin: Pin,
    pub(crate) doorbells: Arc<dyn Doorbells>,
}

/// The parts of the BAR.
mod bar {
    pub(super) const COMMON: u64 = 0;
    pub(super) const COMMON_SIZE: u64 = 0x40;
    pub(super) const ISR: u64 = 0x1000;
    pub(super) const DEVICE: u64 = 0x2000;
    pub(super) const DEVICE_SIZE: u64 = 0x1000;
    pub(super) const NOTIFY: u64 = 0x3000;
    pub(super) const NOTIFY_SIZE: u64 = 0x1000;
    pub(super) const TABLE: u64 = 0x8000;
    pub(super) const TABLE_SIZE: u64 = 0x4000;
    pub(super) const PENDING: u64 = 0xc000;
    pub(super) const PENDING_SIZE: u64 = 0x1000;
}

/// Distance of the queues' notification addresses.
const NOTIFY_MULTIPLIER: u32 = 4;

/// Capability types (section 4.1.4).
mod capability {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const WINDOW: u8 = 5;
}

/// PCI's number for a capability of the vendor, and for MSI-X.
const VENDOR: u8 = 0x09;
const MSIX: u8 = 0x11;

/// What the driver has said about a queue, and how far the device has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Setup {
    max: u16,
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    next_available: u16,
    next_used: u16,
}

impl Setup {
    fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// The queue as the driver described it; `None` if it cannot be used.
    fn queue(&self, features: u64, ram: &Ram) -> Option<Queue> {
        let mut queue = Queue::new(self.max).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.device)).ok()?;
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        queue.set_next_avail(self.next_available);
        queue.set_next_used(self.next_used);
        queue.set_ready(true);
        queue.is_valid(ram).then_some(queue)
    }
}

/// A virtio device on the PCI bus.
#[derive(Debug)]
pub(crate) struct Function {
    config: ConfigSpace,
    /// Where the capability for access through configuration space is.
    window: usize,
    /// Where MSI-X is controlled, if there is MSI-X.
    msix_control: Option<usize>,
    msix: Arc<Msix>,
    link: Arc<Link>,
    device: Box<dyn VirtioDevice>,
    ram: Ram,
    doorbells: Arc<dyn Doorbells>,
    spawner: worker::Spawner,
    /// The BAR at which the doorbells are connected.
    connected: Option<u64>,
    kicks: Vec<Arc<EventFd>>,
    queues: Vec<Setup>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    /// The driver has started the device.
    active: bool,
    /// The device works on the queues of the driver.
    working: bool,
}

fn virtio_capability(kind: u8, offset: u64, len: u64, more: &[u8]) -> Vec<u8> {
    let size = u8::try_from(more.len()).unwrap_or(0).saturating_add(16);
    let mut body = vec![size, kind, 0, 0, 0, 0];
    for number in [offset, len] {
        body.extend_from_slice(&u32::try_from(number).unwrap_or(0).to_le_bytes());
    }
    body.extend_from_slice(more);
    body
}

impl Function {
    /// Puts `device` on the bus at `address`.
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        address: Address,
        ram: Ram,
        wires: Wires,
        spawner: worker::Spawner,
    ) -> Result<Self> {
        let sizes = device.queue_sizes().to_vec();
        let mut config = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1040_u16.saturating_add(device.kind()),
            revision: 1,
            class: device.class(),
            subsystem: 0x1040_u16.saturating_add(device.kind()),
            multifunction: true,
        });
        config.set_bar(address.bar(), u32::try_from(BAR_SIZE).unwrap_or(0));
        for (kind, offset, len, more) in [
            (capability::COMMON, bar::COMMON, bar::COMMON_SIZE, &[][..]),
            (capability::ISR, bar::ISR, 1, &[]),
            (capability::DEVICE, bar::DEVICE, bar::DEVICE_SIZE, &[]),
            (
                capability::NOTIFY,
                bar::NOTIFY,
                bar::NOTIFY_SIZE,
                &NOTIFY_MULTIPLIER.to_le_bytes()[..],
            ),
        ] {
            config.add_capability(VENDOR, &virtio_capability(kind, offset, len, more), &[]);
        }
        let window = virtio_capability(capability::WINDOW, 0, 0, &[0; 4]);
        let mut writable = [0; 18];
        writable[2] = 0xff; // the BAR's number
        writable[6..].fill(0xff); // offset, length, data
        let window = config.add_capability(VENDOR, &window, &writable);
        let vectors = if wires.has_vectors {
            u16::try_from(sizes.len()).unwrap_or(0).saturating_add(1)
        } else {
            0
        };
        let msix_control = vectors.checked_sub(1).map(|last| {
            let mut body = last.to_le_bytes().to_vec();
            for offset in [bar::TABLE, bar::PENDING] {
                body.extend_from_slice(&u32::try_from(offset).unwrap_or(0).to_le_bytes());
            }
            config.add_capability(MSIX, &body, &[0, 0xc0]).saturating_add(2)
        });
        let msix = Arc::new(Msix::new(vectors, wires.messages));
        let kicks = sizes.iter().map(|_| worker::event()).collect::<Result<_>>()?;
        Ok(Self {
            config,
            window,
            msix_control,
            link: Arc::new(Link::new(Arc::clone(&msix), wires.pin, sizes.len())),
            msix,
            device,
            ram,
            doorbells: wires.doorbells,
            spawner,
            connected: None,
            kicks,
            queues: sizes.into_iter().map(Setup::new).collect(),
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            active: false,
            working: false,
        })
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC
    }

    /// Where the BAR is, if the function answers there.
    pub(crate) fn bar(&self) -> Option<u64> {
        self.config.bar()
    }

    pub(crate) fn read_config(&mut self, register: usize, data: &mut [u8]) {
        if let Some((offset, len)) = self.window_access(register, data.len()) {
            let mut value = [0; 4];
            let value = value.get_mut(..len).unwrap_or(&mut []);
            self.read_bar(offset, value);
            let at = self.window.saturating_add(16);
            self.config.write(at, value);
        }
        self.config.read(register, data);
        if let Some(byte) = STATUS.checked_sub(register).and_then(|at| data.get_mut(at))
            && !self.msix.is_enabled()
            && self.link.pin.isr() != 0
        {
            *byte |= STATUS_INTERRUPT;
        }
    }

    pub(crate) fn write_config(&mut self, register: usize, data: &[u8]) {
        self.config.write(register, data);
        if let Some(at) = self.msix_control {
            let mut control = [0; 2];
            self.config.read(at, &mut control);
            self.msix.control(u16::from_le_bytes(control));
        }
        self.close_pin();
        if let Some((offset, len)) = self.window_access(register, data.len()) {
            let mut value = [0; 4];
            self.config.read(register, &mut value);
            self.write_bar(offset, value.get(..len).unwrap_or(&[]));
        }
        if self.active && self.connected != self.bar() {
            self.disconnect();
            self.connect();
        }
    }

    /// Lets interrupts out at the pin or not, as configuration space says.
    fn close_pin(&self) {
        self.link.pin.close(self.msix.is_enabled() || !self.config.allows_pin());
    }

    /// Whether an access to configuration space is one to the BAR in disguise: its offset
    /// into the BAR and its length (section 4.1.4.9).
    fn window_access(&self, register: usize, len: usize) -> Option<(u64, usize)> {
        if register != self.window.checked_add(16)? {
            return None;
        }
        let mut fields = [0; 12];
        self.config.read(self.window.checked_add(4)?, &mut fields);
        let [bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3] = fields;
        let offset = u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
        let wanted = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
        let sound = bar == 0
            && matches!(wanted, 1 | 2 | 4)
            && wanted <= len
            && offset.checked_add(4).is_some_and(|end| end <= BAR_SIZE)
            && offset.is_multiple_of(wanted as u64);
        sound.then_some((offset, wanted))
    }

    pub(crate) fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            bar::ISR => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.link.pin.take();
                }
            }
            _ if within(offset, bar::COMMON, bar::COMMON_SIZE) => {
                let value = self.read_common(offset).to_le_bytes();
                for (place, byte) in data.iter_mut().zip(value) {
                    *place = byte;
                }
            }
            _ if within(offset, bar::DEVICE, bar::DEVICE_SIZE) => {
                self.device.read_config(offset.saturating_sub(bar::DEVICE), data);
            }
            _ if within(offset, bar::TABLE, bar::TABLE_SIZE) => {
                self.msix.read_table(offset.saturating_sub(bar::TABLE), data);
            }
            _ if within(offset, bar::PENDING, bar::PENDING_SIZE) => {
                self.msix.read_pending(offset.saturating_sub(bar::PENDING), data);
            }
            _ => {}
        }
    }

    pub(crate) fn write_bar(&mut self, offset: u64, data: &[u8]) {
        if within(offset, bar::NOTIFY, bar::NOTIFY_SIZE) {
            let index = offset.saturating_sub(bar::NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
            if let Some(kick) = usize::try_from(index).ok().and_then(|index| self.kicks.get(index))
            {
                // A counter that is full wakes the worker as well.
                let _ = kick.write(1);
            }
        } else if within(offset, bar::COMMON, bar::COMMON_SIZE) {
            let mut value = [0; 8];
            for (place, byte) in value.iter_mut().zip(data) {
                *place = *byte;
            }
            self.write_common(offset, data.len(), u64::from_le_bytes(value));
        } else if within(offset, bar::DEVICE, bar::DEVICE_SIZE) {
            self.device.write_config(offset.saturating_sub(bar::DEVICE), data);
        } else if within(offset, bar::TABLE, bar::TABLE_SIZE) {
            self.msix.write_table(offset.saturating_sub(bar::TABLE), data);
        }
    }

    fn selected(&self) -> Option<&Setup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// `struct virtio_pci_common_cfg` (section 4.1.4.3).
    fn read_common(&self, offset: u64) -> u64 {
        let half = |number: u64, select: u32| match select {
            0 => number & 0xffff_ffff,
            1 => number >> 32,
            _ => 0,
        };
        let vector = |vector: Option<&std::sync::atomic::AtomicU16>| {
            u64::from(vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire)))
        };
        let queue = self.selected();
        match offset {
            0x00 => self.device_feature_select.into(),
            0x04 => half(self.offered(), self.device_feature_select),
            0x08 => self.driver_feature_select.into(),
            0x0c => half(self.driver_features, self.driver_feature_select),
            0x10 => vector(Some(&self.link.config_vector)),
            0x12 => u64::try_from(self.queues.len()).unwrap_or(0),
            0x14 => self.link.status.load(Ordering::Acquire).into(),
            0x15 => self.link.generation.load(Ordering::Acquire).into(),
            0x16 => self.queue_select.into(),
            0x18 => queue.map_or(0, |queue| queue.size.into()),
            0x1a => vector(self.link.queue_vectors.get(usize::from(self.queue_select))),
            0x1c => queue.map_or(0, |queue| queue.enabled.into()),
            0x1e => queue.map_or(0, |_| self.queue_select.into()),
            0x20 => queue.map_or(0, |queue| queue.descriptors),
            0x24 => queue.map_or(0, |queue| queue.descriptors >> 32),
            0x28 => queue.map_or(0, |queue| queue.driver),
            0x2c => queue.map_or(0, |queue| queue.driver >> 32),
            0x30 => queue.map_or(0, |queue| queue.device),
            0x34 => queue.map_or(0, |queue| queue.device >> 32),
            _ => 0,
        }
    }

    fn write_common(&mut self, offset: u64, len: usize, value: u64) {
        let [b0, b1, b2, b3, ..] = value.to_le_bytes();
        let (word, long) = (u16::from_le_bytes([b0, b1]), u32::from_le_bytes([b0, b1, b2, b3]));
        let vectors = self.msix.vectors();
        let checked = |vector: u16| if vector < vectors { vector } else { NO_VECTOR };
        match (offset, len) {
            (0x00, 4) => self.device_feature_select = long,
            (0x08, 4) => self.driver_feature_select = long,
            // What was agreed on stays.
            (0x0c, 4)
                if self.status() & status::FEATURES_OK == 0 && self.driver_feature_select < 2 =>
            {
                replace_half(&mut self.driver_features, self.driver_feature_select == 1, long);
            }
            (0x10, 2) => self.link.config_vector.store(checked(word), Ordering::Release),
            (0x14, 1) => self.set_status(b0),
            (0x16, 2) => self.queue_select = word,
            (0x1a, 2) => {
                let index = usize::from(self.queue_select);
                if let Some(vector) = self.link.queue_vectors.get(index) {
                    vector.store(checked(word), Ordering::Release);
                }
            }
            _ if !self.active => self.write_queue(offset, len, value),
            _ => {}
        }
    }

    /// Fields of the selected queue, which the driver leaves alone once it has started.
    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        let field = match offset & !7 {
            0x20 => Some(&mut queue.descriptors),
            0x28 => Some(&mut queue.driver),
            0x30 => Some(&mut queue.device),
            _ => None,
        };
        let [b0, b1, b2, b3, ..] = value.to_le_bytes();
        let (word, long) = (u16::from_le_bytes([b0, b1]), u32::from_le_bytes([b0, b1, b2, b3]));
        match (offset, len, field) {
            (0x18, 2, _) => queue.size = word,
            (0x1c, 2, _) if word == 1 => queue.enabled = true,
            (_, 8, Some(field)) if offset.is_multiple_of(8) => *field = value,
            (_, 4, Some(field)) if offset.is_multiple_of(4) => {
                replace_half(field, !offset.is_multiple_of(8), long);
            }
            _ => {}
        }
    }

    fn status(&self) -> u8 {
        self.link.status.load(Ordering::Acquire)
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.status();
        // The driver sets bits, and only a reset clears them; the device alone says that it
        // needs one.
        let mut new = (old | value) & !(status::NEEDS_RESET & !old);
        if new & !old & status::FEATURES_OK != 0 {
            let features = self.driver_features;
            if features & !self.offered() != 0 || features & F_VERSION_1 == 0 {
                new &= !status::FEATURES_OK;
            }
        }
        let start = new & !old & status::DRIVER_OK != 0 && new & status::FEATURES_OK != 0;
        // A device that breaks down meanwhile adds its bit.
        self.link.status.fetch_or(new, Ordering::AcqRel);
        if start {
            self.activate();
        }
    }

    fn activate(&mut self) {
        let Some(queues) = self.active_queues() else {
            self.link.break_down("a queue does not lie in memory as it should");
            return;
        };
        self.active = true;
        self.connect();
        tracing::debug!(
            kind = self.device.kind(),
            bar = format_args!("{:#x}", self.connected.unwrap_or_default()),
            features = format_args!("{:#x}", self.driver_features),
            queues = queues.iter().flatten().count(),
            "device activated"
        );
        self.work(queues);
    }

    /// The queues as the driver set them up; `None` if one cannot be used.
    fn active_queues(&self) -> Option<Vec<Option<ActiveQueue>>> {
        let queue = |((index, setup), kick): ((u16, &Setup), &Arc<EventFd>)| {
            if !setup.enabled {
                return Some(None);
            }
            let queue = setup.queue(self.driver_features, &self.ram)?;
            Some(Some(ActiveQueue { queue, index, kick: Arc::clone(kick) }))
        };
        (0..).zip(&self.queues).zip(&self.kicks).map(queue).collect()
    }

    fn work(&mut self, queues: Vec<Option<ActiveQueue>>) {
        self.working = true;
        let activation = Activation {
            ram: self.ram.clone(),
            features: self.driver_features,
            queues,
            link: Arc::clone(&self.link),
            spawner: self.spawner.clone(),
        };
        if let Err(error) = self.device.activate(activation) {
            tracing::error!(%error, kind = self.device.kind(), "a device cannot start");
            self.link.break_down("the device cannot start");
        }
    }

    fn connect(&mut self) {
        self.connected = self.bar();
        let Some(bar) = self.connected else { return };
        for (address, kick) in doorbells(bar).zip(&self.kicks) {
            // Without it a write takes the long way through `write_bar`.
            if let Err(error) = self.doorbells.connect(address, kick) {
                tracing::debug!(%error, "a doorbell is not connected");
            }
        }
    }

    fn disconnect(&mut self) {
        let Some(bar) = self.connected.take() else { return };
        for (address, kick) in doorbells(bar).zip(&self.kicks) {
            if let Err(error) = self.doorbells.disconnect(address, kick) {
                tracing::debug!(%error, "a doorbell stays connected");
            }
        }
    }

    fn stop(&mut self) {
        self.disconnect();
        self.device.stop();
        self.working = false;
    }

    /// Back to the beginning (section 2.4).
    pub(crate) fn reset(&mut self) {
        self.stop();
        if std::mem::take(&mut self.active) {
            tracing::debug!(
                kind = self.device.kind(),
                broken = self.link.is_broken(),
                "device reset"
            );
        }
        for queue in &mut self.queues {
            *queue = Setup::new(queue.max);
        }
        for kick in &self.kicks {
            let _ = kick.read();
        }
        self.driver_features = 0;
        self.queue_select = 0;
        self.link.pin.take();
        self.link.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.link.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.link.broken.store(false, Ordering::Release);
        self.link.status.store(0, Ordering::Release);
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        self.stop();
    }
}

fn within(offset: u64, start: u64, size: u64) -> bool {
    offset.checked_sub(start).is_some_and(|offset| offset < size)
}

fn doorbells(bar: u64) -> impl Iterator<Item = u64> {
    (0_u64..).map(move |index| {
        let distance = index.saturating_mul(u64::from(NOTIFY_MULTIPLIER));
        bar.saturating_add(bar::NOTIFY).saturating_add(distance)
    })
}

fn replace_half(number: &mut u64, upper: bool, half: u32) {
    let half = u64::from(half);
    *number =
        if upper { *number & 0xffff_ffff | half << 32 } else { *number & !0xffff_ffff | half };
}

const _: () = assert!(ENTRY * 256 <= bar::TABLE_SIZE);
