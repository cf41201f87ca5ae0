// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks whose bytes lie in files that change meanwhile: images whose clusters move, and
//! files that somebody makes longer or shorter.

use crate::client::{ACK, Client, Place, Reply, info, serve_one};
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, Storage};
use tranship_nbd::Statistics;
use tranship_qcow2::{CreateOptions, OpenOptions, Qcow2};
use tranship_raw::{Access, RawFile};

const MIB: u32 = 1 << 20;
const SIZE: u32 = 16 * MIB;

/// The guest's byte at `at`; no two clusters of 64 KiB begin with the same ones.
fn byte(at: usize) -> u8 {
    ((at >> 16) * 7 + at % 251 + 1).to_le_bytes()[0] | 1
}

fn open(path: &Path, access: Access, backing: Option<Arc<dyn BlockDevice>>) -> Arc<Qcow2> {
    let file: Arc<dyn Storage> = Arc::new(RawFile::open(path, access).unwrap());
    let read_only = access == Access::ReadOnly;
    let options = OpenOptions { read_only, backing, ..OpenOptions::default() };
    Arc::new(Qcow2::open(file, options).unwrap())
}

/// A new image with data in its first `filled` bytes.
fn create(path: &Path, filled: u32) {
    let file: Arc<dyn Storage> = Arc::new(RawFile::create(path, 0).unwrap());
    let options = CreateOptions::new(SIZE.into());
    tranship_qcow2::create(&*file, &options).unwrap();
    let image = Qcow2::open(file, OpenOptions::default()).unwrap();
    let bytes: Vec<u8> = (0..usize::try_from(filled).unwrap()).map(byte).collect();
    image.write_at(&bytes, 0).unwrap();
    image.finish().unwrap();
}

/// The bytes of the reply to a structured read, or the number of its error.
fn gather(client: &mut Client, start: u32, len: u32) -> Result<Vec<u8>, u32> {
    let mut bytes = vec![0xaa; usize::try_from(len).unwrap()];
    loop {
        let Reply::Chunk { done, kind, payload, .. } = client.reply() else { panic!("no chunk") };
        if kind & 0x8000 != 0 {
            return Err(u32::from_be_bytes(*payload.first_chunk().unwrap()));
        }
        if kind != 0 {
            let offset = u64::from_be_bytes(*payload.first_chunk().unwrap()) - u64::from(start);
            let part = &mut bytes[usize::try_from(offset).unwrap()..];
            if kind == 1 {
                part[..payload.len() - 8].copy_from_slice(&payload[8..]);
            } else {
                let hole = u32::from_be_bytes(*payload[8..].first_chunk().unwrap());
                part[..usize::try_from(hole).unwrap()].fill(0);
            }
        }
        if done {
            return Ok(bytes);
        }
    }
}

fn read(client: &mut Client, start: u32, len: u32) -> Result<Vec<u8>, u32> {
    client.request(0, 0, start.into(), len);
    gather(client, start, len)
}

fn statistics(place: &Place) -> Statistics {
    place.running.statistics("vda").unwrap()
}

#[test]
fn reads_of_an_image_give_its_bytes_whatever_layer_has_them() {
    let folder = tempfile::tempdir().unwrap();
    let (base, top) = (folder.path().join("base"), folder.path().join("top"));
    create(&base, 8 * MIB);
    let file: Arc<dyn Storage> = Arc::new(RawFile::create(&top, 0).unwrap());
    let options = CreateOptions::new(SIZE.into());
    tranship_qcow2::create(&*file, &options).unwrap();
    drop(file);
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let below: Arc<dyn BlockDevice> = open(&base, Access::ReadOnly, None);
        let place = serve_one(open(&top, access, Some(below)));
        let mut client = place.connect();
        client.go(true);
        if access == Access::ReadWrite {
            client.request(0, 1, 3 << 20, 2 * MIB);
            client.say(&vec![0xee; 2 << 20]);
            assert!(matches!(client.reply(), Reply::Simple { errno: 0, .. }));
        }
        let expected = |at: usize| match at >> 20 {
            3 | 4 => 0xee,
            0..8 => byte(at),
            _ => 0,
        };
        // Often enough that the server knows how quick the device is.
        for round in 0..20_u32 {
            for (start, len) in
                [(0, MIB), (2 * MIB + 5, 2 * MIB), (7 * MIB, 2 * MIB), (round, 4096)]
            {
                let seen = read(&mut client, start, len).unwrap();
                if !matches!(round, 0 | 19) {
                    continue;
                }
                let at = usize::try_from(start).unwrap();
                let wrong = seen.iter().zip(at..).position(|(seen, at)| *seen != expected(at));
                assert_eq!(wrong, None, "{access:?} {start} {len}");
            }
        }
        assert_eq!(statistics(&place).errors, 0);
    }
}

#[test]
fn a_reply_that_waits_for_its_reader_never_shows_what_its_clusters_became() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    create(&path, 2 * MIB);
    let place = serve_one(open(&path, Access::ReadWrite, None));
    let mut slow = place.connect();
    slow.go(true);
    let mut other = place.connect();
    other.go(true);
    // So that long reads are as they are when they are quick.
    for _ in 0..40 {
        read(&mut other, 0, 256 << 10).unwrap();
    }
    for round in 0..6 {
        // Nobody reads these replies yet.
        let pieces = [0, 128 << 10, MIB, MIB + (128 << 10)];
        for start in pieces {
            slow.request(0, 0, start.into(), 128 << 10);
        }
        assert_eq!(other.errno(0, 0, 0, 4096), 0);
        std::thread::sleep(std::time::Duration::from_millis(10));
        // The clusters are freed, and belong to another part of the disk soon.
        other.request(0, 4, 0, 2 * MIB);
        assert!(matches!(other.reply(), Reply::Simple { errno: 0, .. }));
        assert_eq!(other.errno(0, 3, 0, 0), 0);
        let foreign = 4 * MIB + round * 2 * MIB;
        other.request(0, 1, foreign.into(), 2 * MIB);
        other.say(&vec![0xee; 2 << 20]);
        assert!(matches!(other.reply(), Reply::Simple { errno: 0, .. }));
        let mut left = 4;
        while left > 0 {
            let Reply::Chunk { done, kind, payload, .. } = slow.reply() else { panic!("no chunk") };
            if kind == 1 {
                let offset = u64::from_be_bytes(*payload.first_chunk().unwrap());
                let at = usize::try_from(offset).unwrap();
                let mut bytes = payload[8..].iter().zip(at..);
                let fits = bytes.all(|(seen, at)| *seen == 0 || *seen == byte(at));
                assert!(fits, "bytes of another place in round {round}");
            }
            left -= usize::from(done);
        }
        let bytes: Vec<u8> = (0..2 << 20).map(byte).collect();
        other.request(0, 1, 0, 2 * MIB);
        other.say(&bytes);
        assert!(matches!(other.reply(), Reply::Simple { errno: 0, .. }));
    }
}

/// The size that a new client is told.
fn told(place: &Place) -> u64 {
    let mut client = place.connect();
    client.say(&3u32.to_be_bytes());
    let (kind, payloads) = client.option(6, &info("vda", &[]));
    assert_eq!(kind, ACK);
    u64::from_be_bytes(*payloads[0][2..].first_chunk().unwrap())
}

#[test]
fn new_clients_see_a_raw_disk_as_long_as_it_is_now() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![1; 4 << 20]).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let place = serve_one(Arc::new(RawFile::open(&path, Access::ReadWrite).unwrap()));
    let mut old = place.connect();
    old.go(true);
    file.set_len(8 << 20).unwrap();
    assert_eq!(told(&place), 8 << 20);
    // Who came before knows the size that it was told.
    assert_eq!(old.errno(0, 0, 4 << 20, 4096), 22);
    let mut new = place.connect();
    new.go(true);
    assert_eq!(read(&mut new, 7 * MIB, 4096), Ok(vec![0; 4096]));
    new.request(0, 1, (8 << 20) - 4, 4);
    new.say(b"last");
    assert!(matches!(new.reply(), Reply::Simple { errno: 0, .. }));
    file.set_len(2 << 20).unwrap();
    // Before anybody has noticed, and afterwards.
    for known in [false, true] {
        if known {
            assert_eq!(told(&place), 2 << 20);
        }
        for client in [&mut old, &mut new] {
            for (start, len) in [(3 * MIB, 4096), (3 * MIB, MIB), (2 * MIB - 4096, MIB)] {
                let failed = read(client, start, len).err();
                assert_eq!(failed, Some(5), "{start} {len} {known}");
            }
            assert_eq!(read(client, MIB, 4096), Ok(vec![1; 4096]));
        }
        if known {
            // Nothing makes the file longer again behind the back of who cut it.
            new.request(0, 1, 7 << 20, 4096);
            new.say(&[9; 4096]);
            assert!(matches!(
                new.reply(),
                Reply::Simple { errno: 5, .. }
                    | Reply::Chunk { done: true, kind: 0x8001 | 0x8002, .. }
            ));
            assert_eq!(fs::metadata(&path).unwrap().len(), 2 << 20);
            assert_eq!(new.errno(0, 7, 3 << 20, MIB), 5);
        }
        assert_eq!(new.errno(0, 3, 0, 0), 0);
    }
}

#[test]
fn an_image_whose_file_is_cut_gives_errors_and_goes_on() {
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        create(&path, 8 * MIB);
        let place = serve_one(open(&path, access, None));
        let mut client = place.connect();
        client.go(true);
        assert!(read(&mut client, 7 * MIB, MIB).is_ok());
        File::options().write(true).open(&path).unwrap().set_len(4 << 20).unwrap();
        // The size is the image's own.
        assert_eq!(told(&place), u64::from(SIZE));
        for len in [4096, MIB] {
            for _ in 0..20 {
                assert_eq!(read(&mut client, 7 * MIB, len).err(), Some(5), "{access:?}");
            }
        }
        let seen = read(&mut client, MIB, MIB).unwrap();
        assert!(seen.iter().zip(1 << 20..).all(|(seen, at)| *seen == byte(at)));
    }
}
