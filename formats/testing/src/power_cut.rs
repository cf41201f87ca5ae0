// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What may be left on a disk when the power goes.

use std::sync::Mutex;
use tranship_block::{BlockDevice, Extent, MemoryDevice, Result, Span, Storage, Zeroing};

/// What a block device has where nothing was written: nobody may rely on zeroes.
const STALE: u8 = 0x5b;

#[derive(Clone, Debug)]
enum Event {
    Write(u64, Vec<u8>),
    Zero(Span),
    Length(u64),
    Flush,
    Promise(Vec<u8>),
}

/// A storage that logs what reaches it, to be cut at every point afterwards.
///
/// Writes after the last flush before a cut may have reached the disk or not, in any
/// order: besides all of them, random subsets of them are tried.
#[derive(Debug)]
pub struct PowerCut {
    device: MemoryDevice,
    first: Vec<u8>,
    log: Mutex<Vec<Event>>,
}

impl PowerCut {
    /// A storage that holds `bytes`, safely.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { device: MemoryDevice::new(bytes.clone()), first: bytes, log: Mutex::new(Vec::new()) }
    }

    /// The format's flush has returned: from here on the guest must find `contents`, or
    /// something newer.
    pub fn promise(&self, contents: &[u8]) {
        self.record(Event::Promise(contents.to_vec()));
    }

    /// Calls `inspect` with every disk that a cut could leave, and with what was promised
    /// last; `seed` chooses the subsets. `initially` counts as promised from the start.
    pub fn replay(&self, initially: &[u8], seed: u64, mut inspect: impl FnMut(Vec<u8>, &[u8])) {
        let mut random = seed;
        let mut coin = move || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            random >> 63 == 0
        };
        let log = self.log.lock().unwrap().clone();
        let mut durable = self.first.clone();
        let mut pending: Vec<&Event> = Vec::new();
        let mut promised = initially.to_vec();
        for event in &log {
            match event {
                Event::Flush => pending.drain(..).for_each(|event| redo(&mut durable, event)),
                Event::Promise(state) => promised.clone_from(state),
                other => pending.push(other),
            }
            let mut all = durable.clone();
            for event in &pending {
                redo(&mut all, event);
            }
            inspect(all, &promised);
            // Around a flush little is pending, and what is matters most.
            let tries = if pending.len() < 8 { 6 } else { 1 };
            for _ in 0..tries {
                let mut some = durable.clone();
                for event in &pending {
                    // Lengths are the journalled part of a file system: they keep their order.
                    if matches!(event, Event::Length(_)) || coin() {
                        redo(&mut some, event);
                    }
                }
                inspect(some, &promised);
            }
        }
    }

    fn record(&self, event: Event) {
        self.log.lock().unwrap().push(event);
    }
}

fn redo(disk: &mut Vec<u8>, event: &Event) {
    match event {
        // A write can only be lost together with the growth that made room for it.
        Event::Write(at, bytes) => {
            let end = *at as usize + bytes.len();
            if disk.len() < end {
                disk.resize(end, STALE);
            }
            disk[*at as usize..end].copy_from_slice(bytes);
        }
        Event::Zero(span) => {
            let end = disk.len().min(span.end() as usize);
            disk[(span.start as usize).min(end)..end].fill(0);
        }
        Event::Length(len) => disk.resize(*len as usize, STALE),
        Event::Flush | Event::Promise(_) => {}
    }
}

impl BlockDevice for PowerCut {
    fn size(&self) -> u64 {
        self.device.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.device.write_at(buf, offset)?;
        self.record(Event::Write(offset, buf.to_vec()));
        Ok(())
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.device.write_zeroes(span, mode)?;
        self.record(Event::Zero(span));
        Ok(())
    }
    fn discard(&self, span: Span) -> Result<()> {
        self.device.discard(span)?;
        self.record(Event::Zero(span));
        Ok(())
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.device.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        self.record(Event::Flush);
        Ok(())
    }
}

impl Storage for PowerCut {
    fn set_len(&self, len: u64) -> Result<()> {
        self.device.set_len(len)?;
        self.record(Event::Length(len));
        Ok(())
    }
}
