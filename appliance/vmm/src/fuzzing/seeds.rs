// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the fuzzer starts from: drivers that do everything right, and a few that do not.

use super::{QUEUE_AREA, rings};

/// Where a seed keeps buffers: behind the rings of all queues.
const BUFFERS: u64 = 0x6000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Memory as a driver prepares it.
#[derive(Default)]
struct Image {
    how: u8,
    bytes: Vec<u8>,
    /// Of each queue, the descriptors that are taken, and the heads that are available.
    taken: Vec<(u16, Vec<u16>)>,
    steps: Vec<u8>,
}

impl Image {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap();
        let end = at.checked_add(bytes.len()).unwrap();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[at..end].copy_from_slice(bytes);
    }

    fn describe(&mut self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Makes a chain of buffers available (address, length, whether the device writes).
    fn send(&mut self, queue: u64, buffers: &[(u64, u32, bool)]) {
        let index = usize::try_from(queue).unwrap();
        self.taken.resize(self.taken.len().max(index + 1), (0, Vec::new()));
        let head = self.taken[index].0;
        let [table, ..] = rings(queue, self.how >> 4);
        for (number, (address, len, write)) in (head..).zip(buffers) {
            let more = usize::from(number - head) + 1 < buffers.len();
            let flags = if *write { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.describe(table + u64::from(number) * 16, *address, *len, flags, number + 1);
            self.taken[index].0 += 1;
        }
        self.offer(queue, head);
    }

    fn offer(&mut self, queue: u64, head: u16) {
        let index = usize::try_from(queue).unwrap();
        self.taken.resize(self.taken.len().max(index + 1), (0, Vec::new()));
        self.taken[index].1.push(head);
        let heads = self.taken[index].1.clone();
        let [_, available, _] = rings(queue, self.how >> 4);
        self.put(available + 2, &u16::try_from(heads.len()).unwrap().to_le_bytes());
        for (at, head) in (0..).zip(heads) {
            self.put(available + 4 + at * 2, &head.to_le_bytes());
        }
    }

    fn step(&mut self, what: u8, len: u8, at: u16, value: u64) {
        self.steps.extend([what, len]);
        self.steps.extend(at.to_le_bytes());
        self.steps.extend(value.to_le_bytes());
    }

    fn done(self, with_how: bool) -> Vec<u8> {
        let mut input = if with_how { vec![self.how] } else { Vec::new() };
        input.extend(u16::try_from(self.bytes.len()).unwrap().to_le_bytes());
        input.extend(self.bytes);
        input.extend(self.steps);
        input
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn disk(how: u8) -> Vec<u8> {
    let mut image = Image { how, ..Image::default() };
    let range = [&8_u64.to_le_bytes()[..], &2_u32.to_le_bytes(), &1_u32.to_le_bytes()].concat();
    image.put(BUFFERS + 0x800, &range);
    // Read, write, flush, the name, zeroing: header, data, status.
    for (at, (kind, data, write)) in
        (0..).zip([(0, 1024, true), (1, 512, false), (4, 0, false), (8, 20, true), (13, 16, false)])
    {
        image.put(BUFFERS + at * 16, &header(kind, 3));
        let mut buffers = vec![(BUFFERS + at * 16, 16, false)];
        if data > 0 {
            let at = if kind == 13 { 0x800 } else { 0x400 };
            buffers.push((BUFFERS + at, data, write));
        }
        buffers.push((BUFFERS + 0x200 + at, 1, true));
        image.send(0, &buffers);
    }
    image.step(5, 0, 0, 0);
    image.step(0, 0, 0x14, 0);
    image.done(true)
}

fn indirect() -> Vec<u8> {
    let mut image = Image::default();
    image.put(BUFFERS, &header(0, 0));
    let table = BUFFERS + 0x100;
    image.describe(table, BUFFERS, 16, NEXT, 1);
    image.describe(table + 16, BUFFERS + 0x400, 513, WRITE, 0);
    image.describe(0, table, 32, INDIRECT, 0);
    image.offer(0, 0);
    image.done(true)
}

/// Rings over each other: the answer changes what is available.
fn overlaid() -> Vec<u8> {
    let mut image = Image { how: 0x10, ..Image::default() };
    image.put(BUFFERS, &header(4, 0));
    image.send(0, &[(BUFFERS, 16, false), (BUFFERS + 0x200, 1, true)]);
    image.done(true)
}

fn console(how: u8) -> Vec<u8> {
    let mut image = Image { how, ..Image::default() };
    // Room for the device's messages and for what the ports receive.
    for queue in [0, 2, 4] {
        for at in 0..4 {
            image.send(queue, &[(BUFFERS + queue * 0x200 + at * 0x40, 0x40, true)]);
        }
    }
    // The device is ready, and both ports are ready and open.
    for (at, (port, event)) in (0..).zip([(0_u32, 0_u16), (0, 3), (0, 6), (1, 3), (1, 6)]) {
        let message =
            [&port.to_le_bytes()[..], &event.to_le_bytes(), &1_u16.to_le_bytes()].concat();
        image.put(BUFFERS + at * 8, &message);
        image.send(3, &[(BUFFERS + at * 8, 8, false)]);
    }
    image.send(5, &[(BUFFERS, 100, false), (BUFFERS + 0x100, 28, false)]);
    image.step(5, 0, 0, 0);
    image.step(5, 0, 5, 0);
    image.done(true)
}

/// The steps from a reset to a running disk, on a board with all devices.
fn board() -> Vec<u8> {
    let mut image = Image::default();
    // The third device's registers; its page of them is in the value's last byte.
    let register = |offset: u16| 2 << 14 | offset;
    // It answers there as soon as it may.
    image.step(2, 1, 2 << 12 | 0x04, 2);
    for (offset, len, value) in [
        (0x14, 0, 3),
        (0x08, 2, 1),
        (0x0c, 2, 1),
        (0x14, 0, 11),
        (0x16, 1, 0),
        (0x18, 1, 16),
        (0x20, 3, 0),
        (0x28, 3, QUEUE_AREA),
        (0x30, 3, QUEUE_AREA * 2),
        (0x1c, 1, 1),
        (0x14, 0, 15),
        (0x14, 0, 0),
    ] {
        image.step(0, len, register(offset), value);
    }
    image.step(1, 2, register(0), 0x30 << 56);
    image.step(0, 2, register(0), 0x80 << 56 | 0xfee0_0000);
    // The command register, the BAR, and both ways to configuration space.
    for at in [0x04, 0x10, 0x84, 0x98] {
        image.step(2, 2, 1 << 12 | at, 0xffff_ffff);
        image.step(3, 2, 1 << 12 | at, 0);
    }
    image.step(4, 2, 0, 0x8000_0810);
    image.step(4, 2, 1, 0xffff_ffff);
    image.step(5, 2, 1, 0);
    image.done(false)
}

/// The seeds of each function, by its name.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("vmm_disk", disk(0)),
        ("vmm_disk", disk(3)),
        ("vmm_disk", disk(8)),
        ("vmm_disk", indirect()),
        ("vmm_disk", overlaid()),
        ("vmm_console", console(0)),
        ("vmm_console", console(1)),
        ("vmm_console", console(0x10)),
        ("vmm_board", board()),
    ]
}
