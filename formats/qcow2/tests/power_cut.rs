// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whenever the power goes, the image stays valid and keeps what was flushed.
//!
//! A storage double logs what reaches it. The log is then cut at every point. Writes
//! after the last flush before the cut may have reached the disk or not, in any order:
//! besides all of them, random subsets of them are tried.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::sync::{Arc, Mutex};
use support::{contents, in_memory, open, pattern};
use tranship_block::{BlockDevice, Extent, MemoryDevice, Result, Span, Storage, Zeroing};
use tranship_qcow2::{Qcow2, check_read_only};

/// What a block device has where nothing was written: nobody may rely on zeroes.
const STALE: u8 = 0x5b;

#[derive(Clone, Debug)]
enum Event {
    Write(u64, Vec<u8>),
    Zero(Span),
    Length(u64),
    Flush,
    /// The caller's flush has returned: from here on this must be readable.
    Promise(Vec<u8>),
}

#[derive(Debug)]
struct Recorder {
    device: MemoryDevice,
    log: Mutex<Vec<Event>>,
}

impl Recorder {
    fn record(&self, event: Event) {
        self.log.lock().unwrap().push(event);
    }
}

impl BlockDevice for Recorder {
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
        self.record(Event::Write(offset, buf.to_vec()));
        self.device.write_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.record(Event::Zero(span));
        self.device.write_zeroes(span, mode)
    }
    fn discard(&self, span: Span) -> Result<()> {
        self.record(Event::Zero(span));
        self.device.discard(span)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.device.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        self.record(Event::Flush);
        Ok(())
    }
}

impl Storage for Recorder {
    fn set_len(&self, len: u64) -> Result<()> {
        self.record(Event::Length(len));
        self.device.set_len(len)
    }
}

fn replay(disk: &mut Vec<u8>, event: &Event) {
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

/// Opens what is left of the disk; every guest byte is from the last promise or newer.
fn inspect(
    disk: Vec<u8>,
    backing: Option<&Arc<dyn BlockDevice>>,
    promised: &[u8],
    now: &[Vec<u8>],
) {
    let device = Arc::new(MemoryDevice::read_only(disk));
    let report = check_read_only(&device).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.details);
    let image = Qcow2::open_read_only(device, backing.cloned()).unwrap();
    let found = contents(&image);
    for (at, byte) in found.iter().enumerate().filter(|(at, byte)| **byte != promised[*at]) {
        let known = now.iter().any(|state| *byte == state[at]);
        assert!(known, "byte {at:#x} is {byte}, promised {}", promised[at]);
    }
}

fn run(bits: u32, size: u64, base: Option<Vec<u8>>, seed: u64) {
    let backing =
        base.map(|base| -> Arc<dyn BlockDevice> { Arc::new(MemoryDevice::read_only(base)) });
    let fresh = in_memory(size, bits);
    let recorder = Arc::new(Recorder {
        device: MemoryDevice::new(fresh.snapshot()),
        log: Mutex::new(Vec::new()),
    });
    let storage: Arc<dyn Storage> = recorder.clone();
    let image = open(&storage, backing.clone());
    let mut model = contents(&image);
    let first = model.clone();
    let mut states = vec![model.clone()];
    let mut random = seed;
    let mut next = |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % limit
    };
    for step in 0..14 {
        let at = next(size);
        let len = (next(3 << bits) + 1).min(size - at);
        let cluster = 1 << bits;
        let op = match next(6) {
            0 => support::Op::Discard(at, len),
            1 => support::Op::Zero(at, len, Zeroing::MayUnmap),
            2 => support::Op::Flush,
            _ => support::Op::Write(at, len as usize, step),
        };
        support::apply(&image, &mut model, cluster, &op);
        states.push(model.clone());
        if matches!(op, support::Op::Flush) {
            recorder.record(Event::Promise(model.clone()));
        }
    }
    drop(image);

    let log = recorder.log.lock().unwrap().clone();
    let mut durable = fresh.snapshot();
    let mut pending: Vec<&Event> = Vec::new();
    let mut promised = first;
    for event in &log {
        match event {
            Event::Flush => {
                for event in pending.drain(..) {
                    replay(&mut durable, event);
                }
            }
            Event::Promise(state) => promised.clone_from(state),
            other => pending.push(other),
        }
        let mut all = durable.clone();
        for event in &pending {
            replay(&mut all, event);
        }
        inspect(all, backing.as_ref(), &promised, &states);
        // Around a flush little is pending, and what is matters most.
        let tries = if pending.len() < 8 { 6 } else { 1 };
        for _ in 0..tries {
            let mut some = durable.clone();
            for event in &pending {
                // Lengths are the journalled part of a file system: they keep their order.
                if matches!(event, Event::Length(_)) || next(2) == 0 {
                    replay(&mut some, event);
                }
            }
            inspect(some, backing.as_ref(), &promised, &states);
        }
    }
}

#[test]
fn a_standalone_image_survives_every_cut() {
    run(9, 36_864, None, 1);
}

#[test]
fn an_overlay_survives_every_cut() {
    run(9, 35_328, Some(pattern(20_000, 8)), 2);
}
