// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks (section 5.2), served by a [`BlockDevice`] from a thread for each queue.

mod request;

use super::worker::{Worker, follow};
use super::{Activation, ActiveQueue, DeviceState, VirtioDevice};
use crate::Result;
use request::Requests;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tranship_block::BlockDevice;

pub(crate) const SECTOR: u64 = 512;

/// Feature bits (section 5.2.3).
pub(crate) mod feature {
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const READ_ONLY: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MULTI_QUEUE: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Offset of the field that says whether writes are cached.
const WRITEBACK: u64 = 32;

/// Requests that a queue holds. No chain is longer (section 2.7.5.3.1), and with 256 a driver
/// would break a read of 1 MiB into scattered pages in two.
pub(crate) const QUEUE_SIZE: u16 = 512;
/// Buffers of one request: the queue's size without header and status.
const MOST_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges of one discard or write-zeroes request.
pub(crate) const MOST_RANGES: u32 = 64;
/// Sectors of one such range: 2 GiB.
pub(crate) const MOST_RANGE_SECTORS: u32 = 4 << 20;

/// How a disk is presented.
#[derive(Clone, Debug)]
pub(crate) struct Presentation {
    /// At most 20 bytes by which the guest knows the disk.
    pub(crate) serial: String,
    pub(crate) read_only: bool,
    /// Whether the guest's flushes reach the disk.
    pub(crate) durable: bool,
    /// Logical sector size in bytes.
    pub(crate) sector_size: u32,
    pub(crate) queues: u16,
}

/// What a snapshot keeps of a disk. All but the last field has to be the same again: the guest
/// knows it and does not ask twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BlkState {
    serial: String,
    config: Vec<u8>,
    features: u64,
    write_through: bool,
}

/// What all queues of a disk share.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) how: Presentation,
    /// A write is done only when it is durable.
    pub(crate) write_through: AtomicBool,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Blk {
    disk: Arc<Disk>,
    sizes: Vec<u16>,
    workers: Vec<Worker<ActiveQueue>>,
}

impl Blk {
    pub(crate) fn new(device: Arc<dyn BlockDevice>, mut how: Presentation) -> Self {
        how.read_only |= device.is_read_only();
        let sizes = vec![QUEUE_SIZE; usize::from(how.queues.max(1))];
        let disk = Arc::new(Disk { device, how, write_through: AtomicBool::new(false) });
        Self { disk, sizes, workers: Vec::new() }
    }

    fn state(&self) -> BlkState {
        BlkState {
            serial: self.disk.how.serial.clone(),
            config: self.config().to_vec(),
            features: self.features(),
            write_through: self.disk.write_through.load(Ordering::Acquire),
        }
    }

    /// `struct virtio_blk_config` (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let device = &self.disk.device;
        let sector = self.disk.how.sector_size.max(512);
        let block = device.preferred_block().clamp(sector, 1 << 20);
        // In units of the logical block, the exponent for a physical block of 4 KiB.
        let physical = 4096_u32.max(sector).checked_div(sector).unwrap_or(1).ilog2();
        let optimal = block.checked_div(sector).unwrap_or(1);
        let alignment = block / 512;
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = config.get_mut(at..at.saturating_add(bytes.len())) {
                place.copy_from_slice(bytes);
            }
        };
        put(0, &(device.size() / SECTOR).to_le_bytes());
        put(12, &MOST_SEGMENTS.to_le_bytes());
        put(20, &sector.to_le_bytes());
        put(24, &[u8::try_from(physical).unwrap_or(0), 0]);
        put(26, &1_u16.to_le_bytes());
        put(28, &optimal.to_le_bytes());
        put(32, &[u8::from(!self.disk.write_through.load(Ordering::Acquire))]);
        put(34, &u16::try_from(self.sizes.len()).unwrap_or(1).to_le_bytes());
        put(36, &MOST_RANGE_SECTORS.to_le_bytes());
        put(40, &MOST_RANGES.to_le_bytes());
        put(44, &alignment.to_le_bytes());
        put(48, &MOST_RANGE_SECTORS.to_le_bytes());
        put(52, &MOST_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> u16 {
        2
    }

    fn class(&self) -> [u8; 3] {
        [0x01, 0x80, 0]
    }

    fn features(&self) -> u64 {
        let mut features = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::DISCARD
            | feature::WRITE_ZEROES;
        if self.disk.how.read_only {
            features &= !(feature::DISCARD | feature::WRITE_ZEROES);
            features |= feature::READ_ONLY;
        }
        if self.sizes.len() > 1 {
            features |= feature::MULTI_QUEUE;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        for (index, byte) in (0_u64..).zip(data) {
            let at = usize::try_from(offset.saturating_add(index)).unwrap_or(usize::MAX);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK, [value @ (0 | 1)]) = (offset, data) {
            self.disk.write_through.store(*value == 0, Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let Activation { ram, features, queues, link, spawner } = activation;
        if features & (feature::FLUSH | feature::CONFIG_WCE) == 0 {
            // A driver that cannot flush expects that writes need none (section 5.2.6.2).
            self.disk.write_through.store(true, Ordering::Release);
        }
        for queue in queues.into_iter().flatten() {
            let (ram, link, disk) = (ram.clone(), Arc::clone(&link), Arc::clone(&self.disk));
            let name = format!("{} {}", self.disk.how.serial, queue.index);
            self.workers.push(spawner.start(name, move |stop| {
                follow(queue, &ram, &link, &mut Requests::new(disk), stop)
            })?);
        }
        Ok(())
    }

    fn pause(&mut self) -> Option<Vec<ActiveQueue>> {
        let ended: Vec<_> =
            std::mem::take(&mut self.workers).into_iter().map(Worker::end).collect();
        ended.into_iter().collect()
    }

    fn stop(&mut self) {
        self.pause();
        self.disk.write_through.store(false, Ordering::Release);
    }

    fn save(&self) -> std::result::Result<DeviceState, String> {
        Ok(DeviceState::Blk(self.state()))
    }

    fn restore(&mut self, saved: &DeviceState) -> std::result::Result<(), String> {
        let DeviceState::Blk(saved) = saved else {
            return Err("it is not one of a disk".into());
        };
        let before = self.disk.write_through.swap(saved.write_through, Ordering::AcqRel);
        let own = self.state();
        if own != *saved {
            self.disk.write_through.store(before, Ordering::Release);
            return Err(format!("{} is another disk than {}", own.serial, saved.serial));
        }
        Ok(())
    }
}
