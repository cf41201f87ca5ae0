// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both phases against damaged copies of what real clients send.
#![allow(clippy::arithmetic_side_effects, reason = "the numbers are the test's own")]

use crate::context::Context;
use crate::export::{Export, Exports};
use crate::handshake::{Agreed, Offer, Outcome, negotiate};
use crate::limits::{Limits, Pool};
use crate::reply::Framing;
use crate::socket::Plain;
use crate::transmission::{Connection, Surroundings};
use crate::wire::{
    CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, EXTENDED_REQUEST_MAGIC, OPTION_MAGIC, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
};
use std::io::{self, Cursor, Read, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use tranship_block::{BlockDevice, MemoryDevice};

const ROUNDS: u32 = 4000;

/// A small generator of the same numbers every time (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap().checked_rem(limit).unwrap_or(0)
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len().max(1));
            match self.below(5) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at.min(bytes.len()), u8::try_from(self.below(256)).unwrap()),
                2 => {
                    let again = bytes[at.min(bytes.len())..].to_vec();
                    bytes.extend(again);
                }
                3 => bytes[at..].iter_mut().take(4).for_each(|byte| *byte = 255),
                _ => bytes[at..].iter_mut().take(1).for_each(|byte| *byte ^= 1 << (self.0 % 8)),
            }
        }
    }
}

/// Input from a slice, output to a vector.
struct Script(Cursor<Vec<u8>>, Vec<u8>);

impl Read for Script {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn exports() -> (Exports, Arc<MemoryDevice>) {
    let mut bytes = vec![0; 1 << 20];
    bytes[300_000..400_000].fill(7);
    let device = Arc::new(MemoryDevice::new(bytes));
    let exports = Exports::default();
    let mut export = Export::new("vda", device.clone());
    export.description = "a disk".to_owned();
    export.depth = true;
    exports.add(export).unwrap();
    (exports, device)
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let numbers = [number.to_be_bytes(), len.to_be_bytes()].concat();
    [&OPTION_MAGIC.to_be_bytes()[..], &numbers, data].concat()
}

fn request(
    framing: Framing,
    flags: u16,
    command: u16,
    offset: u64,
    len: u32,
    payload: &[u8],
) -> Vec<u8> {
    let extended = framing == Framing::Extended;
    let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    let carries = extended && !payload.is_empty();
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend((flags | if carries { 0x20 } else { 0 }).to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(offset.wrapping_add(77).to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    if extended {
        bytes.extend(u64::from(len).to_be_bytes());
    } else {
        bytes.extend(len.to_be_bytes());
    }
    bytes.extend(payload);
    bytes
}

#[test]
fn a_damaged_handshake_ends_in_an_agreement_or_an_error() {
    let (exports, _) = exports();
    let meta = b"\0\0\0\x03vda\0\0\0\x01\0\0\0\x0fbase:allocation";
    let whole: Vec<u8> = [
        vec![0, 0, 0, 3],
        option(8, b""),
        option(11, b""),
        option(3, b""),
        option(99, b"whatever"),
        option(9, b"\0\0\0\x03vda\0\0\0\0"),
        option(10, meta),
        option(6, b"\0\0\0\x03vda\0\x02\0\x01\0\x02"),
        option(7, b"\0\0\0\x03vda\0\x01\0\x03"),
    ]
    .concat();
    let (limits, stopping) = (Limits::default(), AtomicBool::new(false));
    let offer = Offer { exports: &exports, limits: &limits, stopping: &stopping, encryption: None };
    let mut script = Script(Cursor::new(whole.clone()), Vec::new());
    let Outcome::Agreed(agreed) = negotiate(&mut script, offer).unwrap() else {
        panic!("it chooses an export");
    };
    assert_eq!(agreed.framing, Framing::Extended);
    assert_eq!(agreed.contexts, [Context::Allocation]);
    let mut dice = Dice(0x1234_5678_9abc_def1);
    let mut agreements = 0;
    for _ in 0..ROUNDS {
        let mut bytes = whole.clone();
        dice.damage(&mut bytes);
        let sent = bytes.len();
        let mut script = Script(Cursor::new(bytes), Vec::new());
        if let Ok(Outcome::Agreed(_)) = negotiate(&mut script, offer) {
            agreements += 1;
        }
        assert!(script.1.len() <= 18 + 20 * sent, "{} bytes for {sent}", script.1.len());
    }
    assert!(agreements > 0 && agreements < ROUNDS);
}

#[test]
fn damaged_requests_are_answered_with_whole_replies() {
    let (exports, device) = exports();
    let whole = |framing| {
        let mut filter = (1_u64 << 19).to_be_bytes().to_vec();
        filter.extend([0, 0, 0, 2]);
        let filter = if framing == Framing::Extended { filter.as_slice() } else { b"" };
        [
            request(framing, 0, 0, 0, 1 << 20, b""),
            request(framing, 4, 0, 299_999, 5, b""),
            request(framing, 1, 1, 10, 4, b"data"),
            request(framing, 0, 7, 0, 1 << 20, b""),
            request(framing, 8, 7, 5, if filter.is_empty() { 1 << 19 } else { 12 }, filter),
            request(framing, 3, 6, 4096, 4096, b""),
            request(framing, 0, 5, 8192, 4096, b""),
            request(framing, 0, 4, 8192, 4096, b""),
            request(framing, 0, 3, 0, 0, b""),
            request(framing, 0, 2, 0, 0, b""),
        ]
        .concat()
    };
    let limits = Limits { requests: 2, ..Limits::default() };
    let (pool, stopping) = (Pool::new(&limits), AtomicBool::new(false));
    let mut dice = Dice(0xfeed_5678_9abc_def1);
    let mut replies = 0;
    for round in 0..ROUNDS / 12 {
        let framing = match round % 3 {
            0 => Framing::Structured,
            1 => Framing::Extended,
            _ => Framing::Simple,
        };
        let mut bytes = whole(framing);
        if round > 2 {
            dice.damage(&mut bytes);
        }
        let output = Output(Arc::default());
        let contexts = vec![Context::Allocation, Context::Depth];
        let agreed = Agreed { served: exports.find("vda").unwrap(), framing, contexts };
        let streams = (Cursor::new(bytes), Plain(output.clone()));
        let surroundings = Surroundings { limits: &limits, pool: &pool, stopping: &stopping };
        Connection::new(streams, None, agreed, surroundings).serve();
        let sent = output.0.lock().unwrap();
        replies += if framing == Framing::Simple { 1 } else { whole_replies(&sent) };
    }
    assert!(replies > 500, "{replies} replies");
    assert_eq!(device.size(), 1 << 20);
}

/// Counts the frames and fails if anything else lies between them.
fn whole_replies(mut bytes: &[u8]) -> usize {
    let mut frames = 0;
    while !bytes.is_empty() {
        let magic = u32::from_be_bytes(*bytes.first_chunk().unwrap());
        let len = match magic {
            SIMPLE_REPLY_MAGIC => 16,
            CHUNK_MAGIC => 20 + u64::from(u32::from_be_bytes(*bytes[16..].first_chunk().unwrap())),
            EXTENDED_CHUNK_MAGIC => 32 + u64::from_be_bytes(*bytes[24..].first_chunk().unwrap()),
            _ => panic!("{magic:#x} is no reply"),
        };
        bytes = &bytes[usize::try_from(len).unwrap()..];
        frames += 1;
    }
    frames
}
