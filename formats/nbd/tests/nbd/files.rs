// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Raw files, whose bytes go to clients without a copy.

use crate::client::{Client, Place, Reply, header, serve_one};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use tranship_raw::{Access, RawFile};

const SIZE: usize = (5 << 20) + 1536;

/// Noise with a hole from 1 to 2 MiB.
fn disk() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let mut state = 7_u32;
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(SIZE)
    .collect();
    bytes[1 << 20..2 << 20].fill(0);
    fs::write(&path, &bytes).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        1 << 20,
        1 << 20,
    )
    .unwrap();
    (folder, path, bytes)
}

fn serve(path: &std::path::Path) -> Place {
    serve_one(Arc::new(RawFile::open(path, Access::ReadWrite).unwrap()))
}

/// The bytes that a structured read gives, and its error if it has one.
fn gather(client: &mut Client, start: u64, len: usize) -> (Vec<u8>, Option<Vec<u8>>) {
    let mut bytes = vec![0xaa; len];
    loop {
        let Reply::Chunk { done, kind, cookie: 7, payload } = client.reply() else {
            panic!("no chunk");
        };
        let at = |payload: &[u8]| {
            let offset = u64::from_be_bytes(*payload.first_chunk().unwrap());
            usize::try_from(offset - start).unwrap()
        };
        match kind {
            0 => {}
            1 => bytes[at(&payload)..][..payload.len() - 8].copy_from_slice(&payload[8..]),
            2 => {
                let len = u32::from_be_bytes(*payload[8..].first_chunk().unwrap());
                bytes[at(&payload)..][..usize::try_from(len).unwrap()].fill(0);
            }
            _ => return (bytes, Some(payload)),
        }
        if done {
            return (bytes, None);
        }
    }
}

#[test]
fn reads_of_every_length_give_the_bytes_of_the_file() {
    let (_folder, path, bytes) = disk();
    let place = serve(&path);
    for framing in 0..3 {
        let mut client = place.connect();
        match framing {
            0 => client.go(false),
            1 => client.go(true),
            _ => client.go_extended(&[]),
        }
        for (start, len) in [
            (0, 1),
            (5, 4096),
            (1, 32 << 10),
            (0, (32 << 10) + 1),
            (3, 256 << 10),
            ((1 << 20) - 100_000, 300_000),
            ((1 << 20) - 7, (1 << 20) + 14),
            (0, SIZE),
            (SIZE - 1536, 1536),
            (SIZE - 100_000, 100_000),
        ] {
            for flags in [0, 4] {
                if flags == 4 && framing == 0 {
                    continue;
                }
                let offset = u64::try_from(start).unwrap();
                client.request(flags, 0, offset, u32::try_from(len).unwrap());
                let seen = if framing == 0 {
                    assert!(matches!(client.reply(), Reply::Simple { errno: 0, cookie: 7 }));
                    client.take(len)
                } else {
                    gather(&mut client, offset, len).0
                };
                assert!(seen == bytes[start..start + len], "{framing} {start} {len} {flags}");
            }
        }
    }
    let reads = place.running.statistics("vda").unwrap().reads;
    assert_eq!((reads.operations, reads.errors), (50, 0));
}

#[test]
fn many_small_requests_in_one_packet_are_all_answered() {
    let (_folder, path, bytes) = disk();
    let place = serve(&path);
    let mut client = place.connect();
    client.go(true);
    let mut packet = Vec::new();
    for cookie in 0..500_u64 {
        packet.extend(header(0, 1, cookie, cookie * 4096, 4096));
        packet.extend(vec![cookie.to_le_bytes()[0]; 4096]);
        packet.extend(header(0, 0, 1000 + cookie, (2 << 20) + cookie * 4096, 4096));
    }
    let mut writer = client.0.try_clone().unwrap();
    let sending = std::thread::spawn(move || writer.write_all(&packet).unwrap());
    let mut cookies = Vec::new();
    for _ in 0..1000 {
        cookies.push(match client.reply() {
            Reply::Simple { errno: 0, cookie } => cookie,
            Reply::Chunk { done: true, kind: 1, cookie, payload } => {
                let at = usize::try_from(cookie - 1000).unwrap() * 4096 + (2 << 20);
                assert!(at < 2_048_000 || payload[8..] == bytes[at..at + 4096]);
                cookie
            }
            other => panic!("{other:?}"),
        });
    }
    sending.join().unwrap();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..500).chain(1000..1500).collect::<Vec<_>>());
    let written = fs::read(&path).unwrap();
    for (at, page) in written.chunks(4096).take(500).enumerate() {
        assert!(page.iter().all(|byte| usize::from(*byte) == at % 256), "{at}");
    }
}

#[test]
fn a_file_that_loses_its_end_meanwhile_is_an_error_and_not_the_end() {
    let (_folder, path, bytes) = disk();
    let place = serve(&path);
    let file = File::options().write(true).open(&path).unwrap();
    for structured in [true, false] {
        file.set_len(u64::try_from(SIZE).unwrap()).unwrap();
        fs::write(&path, &bytes).unwrap();
        let mut client = place.connect();
        client.go(structured);
        // Much more than a socket holds: the server waits in the middle of the file.
        client.request(4 * u16::from(structured), 0, 2 << 20, 3 << 20);
        let head = client.take(if structured { 28 } else { 16 });
        assert_eq!(
            head[..4],
            if structured { [0x66, 0x8e, 0x33, 0xef] } else { [0x67, 0x44, 0x66, 0x98] }
        );
        let mut data = client.take(100_000);
        file.set_len(3 << 20).unwrap();
        if !structured {
            let mut rest = Vec::new();
            client.0.read_to_end(&mut rest).unwrap();
            assert!(rest.len() <= (3 << 20) - 100_000);
            continue;
        }
        data.extend(client.take((3 << 20) - 100_000));
        assert!(data[..1 << 20] == bytes[2 << 20..3 << 20]);
        assert!(data[2 << 20..].iter().all(|byte| *byte == 0));
        let Reply::Chunk { done: true, kind: 0x8002, payload, .. } = client.reply() else {
            panic!("no error with an offset");
        };
        assert_eq!(payload[..4], 5u32.to_be_bytes());
        assert_eq!(client.errno(0, 0, 0, 1 << 20), 0);
    }
}
