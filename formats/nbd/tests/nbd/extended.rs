// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Extended headers and metadata contexts.

use crate::client::{
    ACK, Client, INVALID, Place, Reply, extended, header, info, meta, sample, serve,
};
use std::sync::Arc;
use tranship_block::{BlockDevice, Result};
use tranship_nbd::{DirtyBitmap, Export, ExportedBitmap, Limits};

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const CACHE: u16 = 5;
const ZERO: u16 = 6;
const STATUS: u16 = 7;
const PAYLOAD_LEN: u16 = 0x20;

/// Dirty from 4096 to 8192.
#[derive(Debug)]
struct Page;

impl DirtyBitmap for Page {
    fn dirty_at(&self, offset: u64) -> Result<(bool, u64)> {
        Ok(match offset {
            0..4096 => (false, 4096 - offset),
            4096..8192 => (true, 8192 - offset),
            _ => (false, 1 << 40),
        })
    }
}

const CONTEXTS: [&str; 3] =
    ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:monday"];

fn export(device: Arc<dyn BlockDevice>) -> Export {
    let bitmap = ExportedBitmap { name: "monday".to_owned(), bitmap: Arc::new(Page) };
    Export { depth: true, bitmaps: vec![bitmap], ..Export::new("vda", device) }
}

fn place() -> Place {
    serve(vec![export(sample())], Limits::default())
}

fn chunk(client: &mut Client) -> (bool, u16, Vec<u8>) {
    match client.reply() {
        Reply::Chunk { done, kind, cookie: 7, payload } => (done, kind, payload),
        other => panic!("{other:?}"),
    }
}

/// What each context of a reply tells, by its number.
fn statuses(client: &mut Client) -> Vec<(u32, Vec<(u64, u64)>)> {
    let mut seen = Vec::new();
    loop {
        let (done, kind, payload) = chunk(client);
        assert_eq!(kind, 6);
        let (head, rest) = payload.split_at(8);
        let id = u32::from_be_bytes(head[..4].try_into().unwrap());
        let count = u32::from_be_bytes(head[4..].try_into().unwrap());
        let numbers: Vec<u64> =
            rest.as_chunks().0.iter().map(|raw| u64::from_be_bytes(*raw)).collect();
        assert_eq!(numbers.len(), usize::try_from(count).unwrap() * 2);
        seen.push((id, numbers.as_chunks().0.iter().map(|[len, flags]| (*len, *flags)).collect()));
        if done {
            seen.sort_by_key(|(id, _)| *id);
            return seen;
        }
    }
}

#[test]
fn every_reply_is_an_extended_chunk_with_the_offset_of_its_request() {
    let device = sample();
    let place = serve(vec![export(device.clone())], Limits::default());
    let mut client = place.connect();
    client.go_extended(&[]);
    let raw = |client: &mut Client, request: Vec<u8>, offset: u64, kind: u16| {
        client.say(&request);
        assert_eq!(client.u32(), 0x6e8a_278c);
        assert_eq!((client.u16(), client.u16(), client.u64()), (1, kind, 7));
        assert_eq!(client.u64(), offset);
        let len = client.u64();
        client.take(usize::try_from(len).unwrap())
    };
    let write = [extended(PAYLOAD_LEN, WRITE, 7, 4096, 4), b"data".to_vec()].concat();
    assert!(raw(&mut client, write, 4096, 0).is_empty());
    assert_eq!(device.snapshot()[4096..4100], *b"data");
    let read = raw(&mut client, extended(0, READ, 7, 4096, 4), 4096, 1);
    assert_eq!(read, [&4096u64.to_be_bytes()[..], b"data"].concat());
    assert!(raw(&mut client, extended(0, CACHE, 7, 9, 99), 9, 0).is_empty());
    assert!(raw(&mut client, extended(0, FLUSH, 7, 0, 0), 0, 0).is_empty());
    assert!(raw(&mut client, extended(0, ZERO, 7, 4096, 1 << 19), 4096, 0).is_empty());
    assert_eq!(device.snapshot()[4096..4100], [0; 4]);
    let error = raw(&mut client, extended(0, 99, 7, 5, u64::MAX), 5, 0x8001);
    assert_eq!(error[..4], 22u32.to_be_bytes());
}

#[test]
fn payloads_that_should_not_be_there_are_drained() {
    let place = place();
    let mut client = place.connect();
    client.go_extended(&["base:allocation"]);
    // QEMU's client has payloads without the flag.
    client.say(&[extended(0, WRITE, 7, 0, 1000), vec![1; 1000]].concat());
    assert_eq!(chunk(&mut client), (true, 0, vec![]));
    for command in [READ, FLUSH, CACHE, ZERO, 2000] {
        let offset = 0;
        client.say(&[extended(PAYLOAD_LEN, command, 7, offset, 1000), vec![0; 1000]].concat());
        let (done, kind, payload) = chunk(&mut client);
        assert_eq!((done, kind, &payload[..4]), (true, 0x8001, &[0, 0, 0, 22][..]), "{command}");
    }
    assert_eq!(client.errno(0, READ, 0, 4096), 0);
    // Nobody drains this much.
    client.say(&extended(PAYLOAD_LEN, WRITE, 7, 0, 1 << 40));
    assert!(client.is_closed());
}

#[test]
fn compact_requests_end_an_extended_connection() {
    let place = place();
    let mut client = place.connect();
    client.go_extended(&[]);
    client.say(&[header(0, READ, 7, 0, 4096), vec![0; 4]].concat());
    assert!(client.is_closed());
}

#[test]
fn each_context_answers_in_a_chunk_of_its_own() {
    let place = place();
    let mut client = place.connect();
    client.go_extended(&CONTEXTS);
    client.request(0, STATUS, 0, 1 << 20);
    let (third, quarter) = (512 << 10, 256 << 10);
    let whole: Vec<(u32, Vec<(u64, u64)>)> = vec![
        (1, vec![(third, 3), (quarter, 0), (quarter, 3)]),
        (2, vec![(third, 0), (quarter, 1), (quarter, 0)]),
        (3, vec![(4096, 0), (4096, 1), ((1 << 20) - 8192, 0)]),
    ];
    assert_eq!(statuses(&mut client), whole);
    client.request(8, STATUS, 4097, 10);
    let expected = vec![(1, vec![(10, 3)]), (2, vec![(10, 0)]), (3, vec![(10, 1)])];
    assert_eq!(statuses(&mut client), expected);
    let filtered = |client: &mut Client, len: u64, ids: &[u32]| {
        let mut payload = len.to_be_bytes().to_vec();
        payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
        let bytes = u64::try_from(payload.len()).unwrap();
        client.say(&[extended(PAYLOAD_LEN, STATUS, 7, 0, bytes), payload].concat());
    };
    filtered(&mut client, 1 << 20, &[3, 1]);
    assert_eq!(statuses(&mut client), [whole[0].clone(), whole[2].clone()]);
    for ids in [&[][..], &[4], &[0], &[1, 1], &[1, 2, 3, 1], &[1; 1000]] {
        filtered(&mut client, 4096, ids);
        let (_, kind, payload) = chunk(&mut client);
        assert_eq!((kind, &payload[..4]), (0x8001, &[0, 0, 0, 22][..]), "{ids:?}");
    }
    assert_eq!(client.errno(0, READ, 0, 4096), 0);
}

#[test]
fn structured_clients_get_every_context_too() {
    let place = place();
    let mut client = place.connect();
    client.say(&3u32.to_be_bytes());
    assert_eq!(client.option(8, b"").0, ACK);
    // Numbers follow the order of the list, not that of the queries.
    let (_, selected) = client.option(10, &meta("vda", &[CONTEXTS[2], CONTEXTS[0], "x:y"]));
    let names: Vec<_> = selected.iter().map(|raw| (raw[3], raw[4..].to_vec())).collect();
    assert_eq!(names, [(1, CONTEXTS[0].into()), (2, CONTEXTS[2].into())]);
    assert_eq!(client.option(7, &info("vda", &[])).0, ACK);
    client.request(0, STATUS, 4096, 4096);
    let numbers = |payload: &[u8]| -> Vec<u32> {
        payload.as_chunks().0.iter().map(|raw| u32::from_be_bytes(*raw)).collect()
    };
    let (first, second) = (chunk(&mut client), chunk(&mut client));
    assert_eq!((first.0, first.1, numbers(&first.2)), (false, 5, vec![1, 4096, 3]));
    assert_eq!((second.0, second.1, numbers(&second.2)), (true, 5, vec![2, 4096, 1]));
}

#[test]
fn extended_headers_are_for_good_and_need_go() {
    let place = place();
    let mut client = place.connect();
    client.say(&3u32.to_be_bytes());
    assert_eq!(client.option(10, &meta("vda", &[CONTEXTS[0]])).0, INVALID);
    assert_eq!(client.option(11, b"data").0, INVALID);
    assert_eq!(client.option(8, b"").0, ACK);
    assert_eq!(client.option(11, b"").0, ACK);
    assert_eq!(client.option(8, b"").0, 0x8000_000a);
    let (_, infos) = client.option(6, &info("vda", &[]));
    assert_eq!(infos[0][10..], [0x1d, 0xed]);
    client.send_option(1, b"vda");
    assert!(client.is_closed());
}

#[test]
fn fast_zero_is_refused_where_it_would_be_slow() {
    // Memory gives no promise; a file on a file system with holes does.
    let memory = sample();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, memory.snapshot()).unwrap();
    let file =
        Arc::new(tranship_raw::RawFile::open(&path, tranship_raw::Access::ReadWrite).unwrap());
    let devices: [(Arc<dyn BlockDevice>, u32); 2] = [(memory.clone(), 95), (file, 0)];
    for (device, expected) in devices {
        let place = serve(vec![export(device.clone())], Limits::default());
        let mut client = place.connect();
        client.go_extended(&[]);
        assert_eq!(client.errno(0x10, ZERO, 600 << 10, 4096), expected);
        let mut page = vec![0; 4096];
        device.read_at(&mut page, 600 << 10).unwrap();
        assert_eq!(page.iter().all(|byte| *byte == 0), expected == 0);
        assert_eq!(client.errno(0, ZERO, 600 << 10, 4096), 0);
    }
}
