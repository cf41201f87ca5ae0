// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that die under a client and come back.

use crate::foreign::{Foreign, qemu_nbd};
use crate::remote::{options, pattern};
use crate::scripted::{Mode, Peer, chunk, data, simple};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, ErrorKind, Span, Zeroing};
use tranship_nbd::{Address, ClientOptions, Remote, Retry};

const DISK: usize = 32 << 20;
const PIECE: usize = 128 << 10;
const PIECES: usize = DISK / PIECE;

fn patient(seconds: u64) -> ClientOptions {
    let retry = Retry { budget: Duration::from_secs(seconds) };
    ClientOptions { retry, ..options("") }
}

/// Four threads do `work` for each piece; the server is killed when a third is done, and
/// started again 1.5 s later.
fn while_killed(server: &mut Foreign, work: impl Fn(usize) + Sync) {
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let piece = next.fetch_add(1, Ordering::Relaxed);
                    if piece >= PIECES {
                        break;
                    }
                    // The others find a server that is on its way down.
                    if piece == PIECES / 3 {
                        while done.load(Ordering::Relaxed) < usize::MAX / 2 {
                            std::thread::yield_now();
                        }
                    }
                    work(piece);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while done.load(Ordering::Relaxed) < PIECES / 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
        server.kill();
        done.store(usize::MAX / 2, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1500));
        server.start_again();
    });
}

fn with_disk(bytes: &[u8]) -> Option<Foreign> {
    Foreign::start_with("qemu-nbd", bytes, |socket, disk| qemu_nbd(socket, disk, &[]))
}

#[test]
fn reads_go_on_when_a_killed_server_is_back() {
    let bytes = pattern(DISK, 3);
    let Some(mut server) = with_disk(&bytes) else { return };
    let remote = server.connect(&patient(20));
    let start = Instant::now();
    while_killed(&mut server, |piece| {
        let mut buf = vec![0; PIECE];
        remote.read_at(&mut buf, (piece * PIECE) as u64).unwrap();
        assert!(buf == bytes[piece * PIECE..][..PIECE], "piece {piece} differs");
    });
    assert!(start.elapsed() >= Duration::from_millis(1500));
    assert_eq!(remote.facts().size, DISK as u64);
    // Nothing was written, so nothing can be lost.
    remote.flush().unwrap();
}

#[test]
fn writes_are_repeated_and_the_next_flush_tells_what_may_be_lost() {
    let Some(mut server) = with_disk(&vec![0; DISK]) else { return };
    let bytes = pattern(DISK, 5);
    let remote = server.connect(&patient(20));
    while_killed(&mut server, |piece| {
        let at = piece * PIECE;
        if piece % 16 == 7 {
            remote.write_zeroes(Span::new(at as u64, PIECE as u64), Zeroing::MayUnmap).unwrap();
        } else {
            remote.write_at(&bytes[at..at + PIECE], at as u64).unwrap();
        }
    });
    let error = remote.flush().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    assert!(error.message().contains("may be lost"), "{error}");
    remote.flush().unwrap();
    drop(remote);
    // It was the process that died and not the machine: its page cache has everything.
    let found = std::fs::read(server.disk()).unwrap();
    for (piece, found) in found.chunks(PIECE).enumerate() {
        if piece % 16 == 7 {
            assert!(found.iter().all(|byte| *byte == 0), "piece {piece} is not zero");
        } else {
            assert!(found == &bytes[piece * PIECE..][..PIECE], "piece {piece} differs");
        }
    }
}

#[test]
fn without_a_budget_the_error_names_the_offset() {
    let Some(mut server) = with_disk(&pattern(DISK, 3)) else { return };
    let remote = server.connect(&options(""));
    remote.read_at(&mut [0; 512], 0).unwrap();
    server.kill();
    let error = remote.read_at(&mut [0; 512], 1 << 20).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Busy, Some(1 << 20)));
    assert!(error.to_string().contains("closed the connection (at offset 0x100000)"), "{error}");
}

#[test]
fn a_server_that_stays_away_or_comes_back_as_another_is_given_up() {
    let Some(mut server) = with_disk(&pattern(DISK, 3)) else { return };
    let remote = server.connect(&patient(1));
    server.kill();
    let start = Instant::now();
    let error = remote.read_at(&mut [0; 512], 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.message().contains("within 1 s"), "{error}");
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(1) && waited < Duration::from_secs(15), "{waited:?}");

    server.start_again();
    let remote = server.connect(&ClientOptions { connections: 1, ..patient(20) });
    server.kill();
    let file = std::fs::File::options().write(true).open(server.disk()).unwrap();
    file.set_len(1 << 20).unwrap();
    server.start_again();
    let error = remote.read_at(&mut [0; 512], 512).unwrap_err();
    assert!(error.message().contains("another export: 1048576 bytes"), "{error}");
    // Nobody tries that again.
    remote.read_at(&mut [0; 512], 512).unwrap_err();
}

#[test]
fn requests_are_repeated_after_half_a_reply_and_after_a_shutdown() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let mut commands = Vec::new();
        for round in 0..4 {
            let (stream, _) = listener.accept().unwrap();
            let mut peer = Peer(stream);
            peer.hello();
            let mode = Mode::Structured;
            peer.negotiate(mode, 1 << 20, 0x46d);
            let asked = peer.request();
            commands.push((asked.command, asked.offset, asked.len));
            match round {
                // Half of what was asked for, then nothing.
                0 => peer.say(&chunk(asked.cookie, 0, 1, &data(asked.offset, &[7; 512]))),
                1 => peer.say(&simple_error(asked.cookie)),
                2 => peer.say(&chunk(asked.cookie, 1, 1, &data(asked.offset, &[9; 1024]))[..40]),
                _ => {
                    peer.say(&chunk(asked.cookie, 1, 1, &data(asked.offset, &[5; 1024])));
                    let asked = peer.request();
                    commands.push((asked.command, asked.offset, asked.len));
                    peer.say(&simple(asked.cookie, 0));
                    peer.drain();
                }
            }
        }
        commands
    });
    let one = ClientOptions { connections: 1, ..patient(20) };
    let remote = Remote::connect(&Address::Unix(path), &one).unwrap();
    let mut buf = [0; 1024];
    remote.read_at(&mut buf, 4096).unwrap();
    assert_eq!(buf, [5; 1024]);
    remote.flush().unwrap();
    drop(remote);
    assert_eq!(server.join().unwrap(), [[(0, 4096, 1024); 4].as_slice(), &[(3, 0, 0)]].concat());
}

#[test]
fn a_write_that_fails_is_repeated_unless_there_is_no_space() {
    for (number, budget, expected) in [(5, 5, 2), (5, 0, 1), (28, 5, 1)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let mut peer = Peer(listener.accept().unwrap().0);
            peer.hello();
            peer.negotiate(Mode::Structured, 1 << 20, 0x46d);
            let mut writes = 0;
            loop {
                let asked = peer.request();
                if asked.command == 2 {
                    return writes;
                }
                let mut payload = [0; 512];
                std::io::Read::read_exact(&mut peer.0, &mut payload).unwrap();
                assert_eq!((asked.command, asked.offset, payload), (1, 4096, [7; 512]));
                peer.say(&simple(asked.cookie, if writes == 0 { number } else { 0 }));
                writes += 1;
            }
        });
        let one = ClientOptions { connections: 1, ..patient(budget) };
        let remote = Remote::connect(&Address::Unix(path), &one).unwrap();
        let written = remote.write_at(&[7; 512], 4096);
        assert_eq!(written.is_ok(), expected == 2, "{number}");
        drop(remote);
        assert_eq!(server.join().unwrap(), expected, "{number}");
    }
}

/// ESHUTDOWN.
fn simple_error(cookie: u64) -> Vec<u8> {
    chunk(cookie, 1, 0x8001, &[&108_u32.to_be_bytes()[..], &[0, 4], b"soon"].concat())
}
