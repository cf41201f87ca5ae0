// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both phases against damaged copies of what real clients send.
#![allow(clippy::arithmetic_side_effects, reason = "the numbers are the test's own")]

use crate::export::{Export, Exports};
use crate::handshake::{Agreed, negotiate};
use crate::limits::{Budget, Limits};
use crate::transmission::Connection;
use crate::wire::{CHUNK_MAGIC, OPTION_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC};
use std::io::{self, Cursor, Read, Write};
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
    let export = Export {
        name: "vda".to_owned(),
        description: "a disk".to_owned(),
        device: device.clone(),
        read_only: false,
    };
    exports.add(export).unwrap();
    (exports, device)
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let numbers = [number.to_be_bytes(), len.to_be_bytes()].concat();
    [&OPTION_MAGIC.to_be_bytes()[..], &numbers, data].concat()
}

fn request(flags: u16, command: u16, offset: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(offset.wrapping_add(77).to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
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
        option(3, b""),
        option(99, b"whatever"),
        option(9, b"\0\0\0\x03vda\0\0\0\0"),
        option(10, meta),
        option(6, b"\0\0\0\x03vda\0\x02\0\x01\0\x02"),
        option(7, b"\0\0\0\x03vda\0\x01\0\x03"),
    ]
    .concat();
    let mut script = Script(Cursor::new(whole.clone()), Vec::new());
    let agreed = negotiate(&mut script, &exports, &Limits::default()).unwrap().unwrap();
    assert!(agreed.structured && agreed.allocation);
    let mut dice = Dice(0x1234_5678_9abc_def1);
    let mut agreements = 0;
    for _ in 0..ROUNDS {
        let mut bytes = whole.clone();
        dice.damage(&mut bytes);
        let sent = bytes.len();
        let mut script = Script(Cursor::new(bytes), Vec::new());
        if let Ok(Some(_)) = negotiate(&mut script, &exports, &Limits::default()) {
            agreements += 1;
        }
        assert!(script.1.len() <= 18 + 20 * sent, "{} bytes for {sent}", script.1.len());
    }
    assert!(agreements > 0 && agreements < ROUNDS);
}

#[test]
fn damaged_requests_are_answered_with_whole_replies() {
    let (exports, device) = exports();
    let whole: Vec<u8> = [
        request(0, 0, 0, 1 << 20, b""),
        request(4, 0, 299_999, 5, b""),
        request(1, 1, 10, 4, b"data"),
        request(0, 7, 0, 1 << 20, b""),
        request(8, 7, 5, 1 << 19, b""),
        request(3, 6, 4096, 4096, b""),
        request(0, 4, 8192, 4096, b""),
        request(0, 3, 0, 0, b""),
        request(0, 2, 0, 0, b""),
    ]
    .concat();
    let limits = Limits { requests: 2, ..Limits::default() };
    let mut dice = Dice(0xfeed_5678_9abc_def1);
    let mut replies = 0;
    for round in 0..ROUNDS / 12 {
        let mut bytes = whole.clone();
        if round > 0 {
            dice.damage(&mut bytes);
        }
        let output = Output(Arc::default());
        let agreed = Agreed {
            served: exports.find("vda").unwrap(),
            structured: round % 2 == 0,
            allocation: true,
        };
        let budget = Budget::new(64 << 20);
        let streams = (Cursor::new(bytes), output.clone());
        Connection::new(streams, agreed, &limits, &budget).serve();
        let sent = output.0.lock().unwrap();
        replies += if round % 2 == 0 { whole_replies(&sent) } else { 1 };
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
            CHUNK_MAGIC => 20 + u32::from_be_bytes(*bytes[16..].first_chunk().unwrap()),
            _ => panic!("{magic:#x} is no reply"),
        };
        bytes = &bytes[usize::try_from(len).unwrap()..];
        frames += 1;
    }
    frames
}
