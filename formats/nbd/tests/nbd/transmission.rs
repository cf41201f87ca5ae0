// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests and their replies.

use crate::client::{Client, Reply, export, header, sample, serve, serve_one};
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use tranship_block::{BlockDevice, Error, Extent, MemoryDevice, Result, Span, Zeroing};
use tranship_nbd::{Export, Limits};

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZERO: u16 = 6;
const STATUS: u16 = 7;

/// A device in memory that fails, waits or counts where a test wants it to.
#[derive(Debug)]
pub(crate) struct Rigged {
    inner: Arc<MemoryDevice>,
    /// Reads of this byte fail.
    bad: Option<u64>,
    /// Reads of byte 0 wait until this is true.
    open: Mutex<bool>,
    opened: Condvar,
    flushed: AtomicBool,
}

pub(crate) fn rigged(bad: Option<u64>, open: bool) -> Arc<Rigged> {
    Arc::new(Rigged {
        inner: sample(),
        bad,
        open: Mutex::new(open),
        opened: Condvar::new(),
        flushed: AtomicBool::new(false),
    })
}

impl Rigged {
    pub(crate) fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    pub(crate) fn was_flushed(&self) -> bool {
        self.flushed.load(Ordering::SeqCst)
    }
}

impl BlockDevice for Rigged {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + u64::try_from(buf.len()).unwrap();
        if let Some(bad) = self.bad.filter(|bad| (offset..end).contains(bad)) {
            return Err(Error::corrupt("bad sector").at(bad));
        }
        if offset == 0 {
            drop(self.opened.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
        }
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.inner.write_at(buf, offset)
    }
    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.inner.write_zeroes(span, mode)
    }
    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.inner.extent_at(offset)
    }
    fn flush(&self) -> Result<()> {
        self.flushed.store(true, Ordering::SeqCst);
        Ok(())
    }
}

fn write(client: &mut Client, flags: u16, offset: u64, bytes: &[u8]) -> u32 {
    let len = u32::try_from(bytes.len()).unwrap();
    client.say(&[header(flags, WRITE, 7, offset, len), bytes.to_vec()].concat());
    match client.reply() {
        Reply::Simple { errno, .. } => errno,
        Reply::Chunk { payload, .. } => u32::from_be_bytes(*payload.first_chunk().unwrap()),
    }
}

#[test]
fn a_structured_read_sends_data_and_names_holes() {
    let device = sample();
    let place = serve_one(device.clone());
    let mut client = place.connect();
    client.go(true);
    client.request(0, READ, 0, 1 << 20);
    let mut seen = Vec::new();
    loop {
        let Reply::Chunk { done, kind, cookie, payload } = client.reply() else {
            panic!("simple reply to a read");
        };
        assert_eq!(cookie, 7);
        let at = u64::from_be_bytes(*payload.first_chunk().unwrap());
        let data = if kind == 1 { payload[8..].to_vec() } else { vec![] };
        seen.push((kind, at, payload.len(), data));
        if done {
            break;
        }
    }
    let data = device.snapshot()[512 << 10..768 << 10].to_vec();
    assert_eq!(
        seen,
        [(2, 0, 12, vec![]), (1, 512 << 10, 8 + (256 << 10), data), (2, 768 << 10, 12, vec![])]
    );
    // With DF there is one chunk, holes written out.
    client.request(4, READ, 0, 1 << 20);
    let expected = [&[0; 8][..], &device.snapshot()].concat();
    assert_eq!(client.reply(), Reply::Chunk { done: true, kind: 1, cookie: 7, payload: expected });
    client.request(0, READ, 0, 0);
    assert_eq!(client.reply(), Reply::Chunk { done: true, kind: 0, cookie: 7, payload: vec![] });
}

#[test]
fn every_command_changes_what_it_says() {
    let device = sample();
    let place = serve_one(device.clone());
    for structured in [false, true] {
        let mut client = place.connect();
        client.go(structured);
        assert_eq!(write(&mut client, 1, 1000, b"hello"), 0);
        assert_eq!(device.snapshot()[1000..1005], *b"hello");
        assert_eq!(client.errno(2, ZERO, 1001, 3), 0);
        assert_eq!(device.snapshot()[1000..1005], *b"h\0\0\0o");
        assert_eq!(client.errno(0, TRIM, 1000, 1), 0);
        assert_eq!(device.snapshot()[1000..1005], *b"\0\0\0\0o");
        assert_eq!(client.errno(0, FLUSH, 0, 0), 0);
        assert_eq!(client.errno(0, READ, 1 << 20, 0), 0);
    }
    let statistics = place.running.statistics("vda").unwrap();
    let numbers = [
        &statistics.writes,
        &statistics.zeroes,
        &statistics.trims,
        &statistics.flushes,
        &statistics.reads,
    ]
    .map(|kind| (kind.operations, kind.bytes));
    assert_eq!(numbers, [(2, 10), (2, 6), (2, 2), (2, 0), (2, 0)]);
    assert_eq!((statistics.connections, statistics.refused, statistics.errors), (2, 0, 0));
    let classes = &statistics.writes.latency;
    assert_eq!(classes.iter().map(|class| class.operations).sum::<u64>(), 2);
    assert_eq!(place.running.statistics("nope"), None);
}

#[test]
fn errors_have_the_specified_numbers_and_keep_the_connection() {
    let read_only = Export { read_only: true, ..export("vda", sample()) };
    // (command, flags, offset, length, errno when writable, errno when read-only)
    let end = 1 << 20;
    let table = [
        (READ, 0, end, 1, 22, 22),
        (READ, 0, u64::MAX, 1, 22, 22),
        (READ, 0x20, 0, 1, 22, 22),
        (ZERO, 0, end, 1, 28, 1),
        (ZERO, 0, 0, 1, 0, 1),
        (ZERO, 0x20, 0, 1, 22, 22),
        (CACHE, 0, 0, 1 << 20, 0, 0),
        (CACHE, 0, end, 1, 22, 22),
        (CACHE, 2, 0, 1, 22, 22),
        (TRIM, 0, end - 1, 2, 22, 1),
        (TRIM, 0, 0, 1, 0, 1),
        (STATUS, 0, 0, 0, 22, 22),
        (STATUS, 0, end, 1, 22, 22),
        (FLUSH, 0, 1, 0, 22, 22),
        (8, 0, 0, 0, 22, 22),
        (999, 0, 0, 0, 22, 22),
    ];
    for (exports, column) in [(export("vda", sample()), 0), (read_only, 1)] {
        let place = serve(vec![exports], Limits::default());
        let mut client = place.connect();
        client.go(true);
        for (command, flags, offset, len, writable, read_only) in table {
            let expected = [writable, read_only][column];
            assert_eq!(
                client.errno(flags, command, offset, len),
                expected,
                "command {command} flags {flags:#x} at {offset} length {len}"
            );
        }
        assert_eq!(write(&mut client, 0, end, b"xy"), [28, 1][column]);
        assert_eq!(write(&mut client, 0, 0, b"xy"), [0, 1][column]);
        assert_eq!(client.errno(0, READ, 0, 4096), 0);
    }
}

#[test]
fn long_writes_are_taken_drained_or_cut_off() {
    let place = serve_one(Arc::new(MemoryDevice::new(vec![0; 40 << 20])));
    let mut client = place.connect();
    client.go(false);
    assert_eq!(write(&mut client, 0, 0, &vec![1; 32 << 20]), 0);
    assert_eq!(write(&mut client, 0, 0, &vec![1; (32 << 20) + 1]), 22);
    assert_eq!(client.errno(0, READ, 0, 33 << 20), 75);
    let _ = client.0.write_all(&header(0, WRITE, 7, 0, 100 << 20));
    assert!(client.is_closed());
}

#[test]
fn a_bad_sector_is_an_error_chunk_with_its_offset() {
    let place = serve_one(rigged(Some(600 << 10), true));
    let mut client = place.connect();
    client.go(true);
    client.request(0, READ, 512 << 10, 256 << 10);
    let Reply::Chunk { done: true, kind: 0x8002, payload, .. } = client.reply() else {
        panic!("expected one error chunk");
    };
    let expected =
        [&[0, 0, 0, 5, 0, 10][..], b"bad sector", &(600u64 << 10).to_be_bytes()].concat();
    assert_eq!(payload, expected);
    assert_eq!(client.errno(0, READ, 512 << 10, 4096), 0);
    assert_eq!(place.running.statistics("vda").unwrap().errors, 1);
    let mut client = place.connect();
    client.go(false);
    assert_eq!(client.errno(0, READ, 600 << 10, 512), 5);
    assert_eq!(client.errno(0, READ, 512 << 10, 512), 0);
}

#[test]
fn status_names_extents_and_stops_at_the_request() {
    let place = serve_one(sample());
    let mut client = place.connect();
    client.go(true);
    let mut status = |flags, offset, len| {
        client.request(flags, STATUS, offset, len);
        let Reply::Chunk { done: true, kind: 5, payload, .. } = client.reply() else {
            panic!("expected one status chunk");
        };
        let numbers: Vec<_> =
            payload.as_chunks().0.iter().map(|raw| u32::from_be_bytes(*raw)).collect();
        assert_eq!(numbers[0], 1);
        numbers[1..].to_vec()
    };
    assert_eq!(status(0, 0, 1 << 20), [512 << 10, 3, 256 << 10, 0, 256 << 10, 3]);
    assert_eq!(status(8, 0, 1 << 20), [512 << 10, 3]);
    assert_eq!(status(0, (512 << 10) - 1, 2), [1, 3, 1, 0]);
    assert_eq!(status(8, 600 << 10, 1), [1, 0]);
}

#[test]
fn a_slow_read_does_not_hold_up_the_next() {
    let device = rigged(None, false);
    let place = serve_one(device.clone());
    let mut client = place.connect();
    client.go(true);
    client.say(&header(0, READ, 1, 0, 512));
    client.say(&header(0, READ, 2, 4096, 512));
    let cookie = |reply| match reply {
        Reply::Chunk { cookie, done: true, .. } => cookie,
        other => panic!("{other:?}"),
    };
    assert_eq!(cookie(client.reply()), 2);
    device.open();
    assert_eq!(cookie(client.reply()), 1);
}

#[test]
fn fua_and_flush_reach_the_device() {
    let device = rigged(None, true);
    let place = serve_one(device.clone());
    let mut client = place.connect();
    client.go(false);
    assert_eq!(write(&mut client, 0, 0, b"x"), 0);
    assert!(!device.was_flushed());
    assert_eq!(write(&mut client, 1, 0, b"x"), 0);
    assert!(device.flushed.swap(false, Ordering::SeqCst));
    assert_eq!(client.errno(0, FLUSH, 0, 0), 0);
    assert!(device.was_flushed());
}

#[test]
fn disconnect_lets_everything_in_flight_finish() {
    let place = serve_one(sample());
    let mut client = place.connect();
    client.go(true);
    let mut bytes = Vec::new();
    for cookie in 0..50 {
        bytes.extend(header(0, READ, cookie, cookie * 512, 512));
    }
    bytes.extend(header(0, DISC, 99, 0, 0));
    client.say(&bytes);
    let cookies: BTreeSet<_> = (0..50)
        .map(|_| match client.reply() {
            Reply::Chunk { cookie, done: true, .. } => cookie,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(cookies, (0..50).collect());
    assert!(client.is_closed());
}

#[test]
fn wrong_magic_closes() {
    let place = serve_one(sample());
    let mut client = place.connect();
    client.go(true);
    client.say(&[0; 28]);
    assert!(client.is_closed());
}
