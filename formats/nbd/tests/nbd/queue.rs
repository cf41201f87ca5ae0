// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many reads on one connection, of which any thread takes what comes next.

use crate::foreign::Foreign;
use crate::hostile::error;
use crate::remote::{options, pattern};
use crate::scripted::{Asked, Mode, chunk, connect, data, simple};
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tranship_block::{BlockDevice, ErrorKind, ReadQueue, Span};
use tranship_nbd::{ClientOptions, Retry};

const KIB: u64 = 1024;

fn bytes_of(span: Span, buf: &[u8]) -> &[u8] {
    &buf[..usize::try_from(span.len).unwrap()]
}

/// Takes everything that is in flight with so many threads.
fn take_all(queue: &dyn ReadQueue, threads: usize, seen: impl Fn(Span, &[u8]) + Sync) -> usize {
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buf = Vec::new();
                while let Some((span, read)) = queue.next(&mut buf) {
                    read.unwrap();
                    seen(span, bytes_of(span, &buf));
                    count.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    count.into_inner()
}

#[test]
fn replies_in_parts_of_each_other_are_put_together() {
    const READS: u64 = 12;
    for threads in [1, 3] {
        let (remote, server) = connect(Mode::Structured, |peer| {
            let mut asked: Vec<Asked> = (0..READS).map(|_| peer.request()).collect();
            asked.sort_by_key(|asked| (asked.offset / (64 * KIB)) % 5);
            for part in [1, 0] {
                for asked in &asked {
                    let half = asked.len / 2;
                    let at = asked.offset + part * half;
                    let last = u16::from(part == 0);
                    let number = asked.offset / (64 * KIB);
                    if number == 3 {
                        let hole = [&at.to_be_bytes()[..], &(half as u32).to_be_bytes()].concat();
                        peer.say(&chunk(asked.cookie, last, 2, &hole));
                        continue;
                    }
                    let byte = u8::try_from(number + 100 * part).unwrap();
                    let payload = vec![byte; usize::try_from(half).unwrap()];
                    peer.say(&chunk(asked.cookie, last, 1, &data(at, &payload)));
                }
            }
        });
        let remote = remote.unwrap();
        let queues = remote.read_queues();
        assert_eq!(queues.len(), 1);
        let spans: Vec<Span> =
            (0..READS).map(|number| Span::new(number * 64 * KIB, 60 * KIB)).collect();
        queues[0].start(&spans).unwrap();
        let starts = Mutex::new(BTreeSet::new());
        let count = take_all(&*queues[0], threads, |span, bytes| {
            let number = u8::try_from(span.start / (64 * KIB)).unwrap();
            let (low, high) = bytes.split_at(bytes.len() / 2);
            let (first, second) = if number == 3 { (0, 0) } else { (number, number + 100) };
            assert!(low.iter().all(|byte| *byte == first), "{number}");
            assert!(high.iter().all(|byte| *byte == second), "{number}");
            starts.lock().unwrap().insert(span.start);
        });
        assert_eq!((count, starts.into_inner().unwrap().len()), (12, 12));
        drop(queues);
        drop(remote);
        server.join().unwrap();
    }
}

#[test]
fn others_read_beside_a_queue_on_the_same_connection() {
    const DISK: usize = 16 << 20;
    let bytes = pattern(DISK, 9);
    let words = |socket: &std::path::Path, disk: &std::path::Path| {
        crate::foreign::qemu_nbd(socket, disk, &[])
    };
    let Some(server) = Foreign::start_with("qemu-nbd", &bytes, words) else { return };
    let remote = server.connect(&ClientOptions { connections: 1, ..options("") });
    let queues = remote.read_queues();
    let spans: Vec<Span> = (0..64).map(|number| Span::new(number * 256 * KIB, 256 * KIB)).collect();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..3_usize {
            let (remote, bytes, is_over) = (&remote, &bytes, &is_over);
            scope.spawn(move || {
                let mut at = seed * 1_000_003;
                while !is_over.load(Ordering::SeqCst) {
                    // Short ones go through boxes, long ones to their owner.
                    let len = if at % 2 == 0 { 512 } else { 200_000 };
                    at = (at * 5 + 4321) % (DISK - len);
                    let mut buf = vec![0; len];
                    remote.read_at(&mut buf, at as u64).unwrap();
                    assert!(buf == bytes[at..at + len], "{at}");
                    remote.extent_at(at as u64).unwrap();
                }
            });
        }
        for _ in 0..4 {
            for spans in spans.chunks(16) {
                queues[0].start(spans).unwrap();
                let count = take_all(&*queues[0], 2, |span, found| {
                    let at = usize::try_from(span.start).unwrap();
                    assert!(found == &bytes[at..at + found.len()], "{span:?}");
                });
                assert_eq!(count, spans.len());
            }
        }
        is_over.store(true, Ordering::SeqCst);
    });
}

#[test]
fn what_was_in_flight_is_read_again_when_a_killed_server_is_back() {
    let bytes = pattern(8 << 20, 3);
    // Slow enough to be killed in the middle.
    let words = |socket: &std::path::Path, disk: &std::path::Path| {
        let words = ["-f", "-U", &crate::foreign::text(socket), "--filter=delay", "file"];
        let mut words: Vec<String> = words.map(ToOwned::to_owned).to_vec();
        words.extend([crate::foreign::text(disk), "rdelay=100ms".to_owned()]);
        words
    };
    let Some(mut server) = Foreign::start_with("nbdkit", &bytes, words) else { return };
    let retry = Retry { budget: Duration::from_secs(20) };
    let remote = server.connect(&ClientOptions { connections: 2, retry, ..options("") });
    let queues = remote.read_queues();
    assert_eq!(queues.len(), 2);
    let spans: Vec<Span> = (0..64).map(|number| Span::new(number * 128 * KIB, 128 * KIB)).collect();
    let (low, high) = spans.split_at(30);
    queues[0].start(low).unwrap();
    queues[1].start(high).unwrap();
    server.kill();
    // nbdkit refuses a socket that is there.
    std::fs::remove_file(&server.socket).unwrap();
    server.start_again();
    for (queue, spans) in queues.iter().zip([low, high]) {
        let count = take_all(&**queue, 2, |span, found| {
            let at = usize::try_from(span.start).unwrap();
            assert!(found == &bytes[at..at + found.len()], "{span:?}");
        });
        assert_eq!(count, spans.len());
        // And it goes on, on the new connection.
        queue.start(&spans[..3]).unwrap();
        assert_eq!(take_all(&**queue, 1, |_, _| ()), 3);
    }
}

#[test]
fn a_server_that_leaves_in_the_middle_of_a_payload_fails_all_of_it() {
    let (remote, server) = connect(Mode::Structured, |peer| {
        let asked: Vec<Asked> = (0..3).map(|_| peer.request()).collect();
        peer.say(&chunk(asked[1].cookie, 1, 1, &data(asked[1].offset, &[7; 4096])));
        peer.say(&chunk(asked[0].cookie, 1, 1, &data(asked[0].offset, &[7; 4096]))[..2000]);
        let _ = peer.0.shutdown(std::net::Shutdown::Both);
    });
    let remote = remote.unwrap();
    let queues = remote.read_queues();
    let spans = [0, 1, 2].map(|number| Span::new(number * 8192, 4096));
    queues[0].start(&spans).unwrap();
    let mut buf = Vec::new();
    let mut said = Vec::new();
    while let Some((span, read)) = queues[0].next(&mut buf) {
        said.push((span.start, read.map_err(|error| (error.kind(), error.to_string()))));
    }
    said.sort_by_key(|(start, _)| *start);
    assert_eq!(said[1], (8192, Ok(())));
    for (number, offset) in [(0, "(at offset 0x0)"), (2, "(at offset 0x4000)")] {
        let (kind, text) = said[number].1.as_ref().unwrap_err();
        assert_eq!(*kind, ErrorKind::Busy);
        assert!(text.contains("closed the connection") && text.contains(offset), "{text}");
    }
    // Nobody asks again without a budget.
    assert!(queues[0].start(&spans).is_err() || queues[0].next(&mut buf).unwrap().1.is_err());
    drop(queues);
    drop(remote);
    server.join().unwrap();
}

#[test]
fn a_silent_server_is_given_up_by_all_who_wait() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut peer = crate::scripted::Peer(theirs);
        peer.hello();
        peer.negotiate(Mode::Extended, 1 << 20, 0xd6d);
        peer.drain();
    });
    let options = ClientOptions { timeout: Duration::from_secs(1), ..ClientOptions::default() };
    let remote = tranship_nbd::Remote::from_stream(ours, &options).unwrap();
    let queues = remote.read_queues();
    queues[0].start(&[Span::new(0, 512), Span::new(512, 512), Span::new(4096, 512)]).unwrap();
    let failed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while let Some((span, read)) = queues[0].next(&mut Vec::new()) {
                    let error = read.unwrap_err();
                    assert_eq!((error.kind(), error.offset()), (ErrorKind::Busy, Some(span.start)));
                    assert!(error.message().contains("did not answer within 1 s"), "{error}");
                    failed.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    assert_eq!(failed.into_inner(), 3);
    drop(queues);
    drop(remote);
    server.join().unwrap();
}

/// Offsets and lengths of reads.
type Reads = Vec<(u64, u64)>;

/// What a read says, and what it asked for, where the reads of one byte fail as often as that
/// says.
fn read_bad(times: usize, retry: Duration) -> (Result<Vec<u8>, String>, Reads) {
    const BAD: u64 = 70_000;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let mut peer = crate::scripted::Peer(listener.accept().unwrap().0);
        peer.hello();
        peer.negotiate(Mode::Structured, 1 << 20, 0x46d);
        let (mut asked, mut left) = (Vec::new(), times);
        loop {
            let now = peer.request();
            if now.command == 2 {
                return asked;
            }
            asked.push((now.offset, now.len));
            let is_bad = now.offset <= BAD && BAD < now.offset + now.len && left > 0;
            if is_bad {
                left -= 1;
                peer.say(&chunk(now.cookie, 1, 0x8001, &error(5, b"worn", None)));
            } else {
                let payload = vec![3; usize::try_from(now.len).unwrap()];
                peer.say(&chunk(now.cookie, 1, 1, &data(now.offset, &payload)));
            }
        }
    });
    let retry = Retry { budget: retry };
    let options = ClientOptions { connections: 1, retry, ..options("") };
    let remote =
        tranship_nbd::Remote::connect(&tranship_nbd::Address::Unix(path), &options).unwrap();
    let queues = remote.read_queues();
    queues[0].start(&[Span::new(65_536, 32_768)]).unwrap();
    let mut buf = Vec::new();
    let (span, read) = queues[0].next(&mut buf).unwrap();
    assert_eq!(
        (span, queues[0].next(&mut Vec::new()).is_none()),
        (Span::new(65_536, 32_768), true)
    );
    drop(queues);
    drop(remote);
    let said = read.map(|()| bytes_of(span, &buf).to_vec()).map_err(|error| error.to_string());
    (said, server.join().unwrap())
}

#[test]
fn a_bad_place_is_tried_again_and_then_narrowed_down() {
    let whole = (65_536, 32_768);
    let (said, asked) = read_bad(1, Duration::ZERO);
    assert!(said.unwrap_err().contains("EIO: worn (at offset 0x10000)"));
    assert_eq!(asked, [whole]);
    let (said, asked) = read_bad(2, Duration::from_secs(5));
    assert_eq!((said.unwrap(), asked), (vec![3; 32_768], vec![whole; 3]));
    let (said, asked) = read_bad(usize::MAX, Duration::from_secs(5));
    let said = said.unwrap_err();
    assert!(said.contains("EIO: worn (a read of 4096 bytes) (at offset 0x11000)"), "{said}");
    let parts = [(65_536, 16_384), (65_536, 8192), (65_536, 4096), (69_632, 4096)];
    assert_eq!(asked, [&[whole; 3][..], &parts, &[parts[3]; 2]].concat());
}

#[test]
fn ranges_that_the_server_does_not_take_are_read_in_other_ways() {
    let bytes = pattern(3 << 20, 5);
    let words = |socket: &std::path::Path, disk: &std::path::Path| {
        let text = crate::foreign::text;
        let words = ["-f", "-U", &text(socket), "--filter=blocksize-policy", "file", &text(disk)];
        let mut words: Vec<String> = words.map(ToOwned::to_owned).to_vec();
        for word in ["blocksize-minimum=4096", "blocksize-preferred=4096"] {
            words.push(word.to_owned());
        }
        words.push("blocksize-maximum=65536".to_owned());
        words.push("blocksize-error-policy=error".to_owned());
        words
    };
    let Some(server) = Foreign::start_with("nbdkit", &bytes, words) else { return };
    let remote = server.connect(&options(""));
    let queues = remote.read_queues();
    let spans = [(0, 4096), (5000, 3), (8192, 65_536), (100_000, 300_000), (3 << 20, 0)];
    let spans = spans.map(|(start, len)| Span::new(start, len));
    queues[0].start(&spans[..4]).unwrap();
    let count = take_all(&*queues[0], 2, |span, found| {
        let at = usize::try_from(span.start).unwrap();
        assert!(found == &bytes[at..at + found.len()], "{span:?}");
    });
    assert_eq!(count, 4);
    assert!(queues[0].start(&[Span::new(3 << 20, 1)]).is_err());
    assert!(queues[0].next(&mut Vec::new()).is_none());
}

#[test]
fn whoever_waits_for_a_reply_that_comes_late_hears_of_those_before_it() {
    // A write's reply behind long payloads of others: each owner reads its own.
    let (remote, server) = connect(Mode::Simple, |peer| {
        let asked: Vec<Asked> = (0..4).map(|_| peer.request()).collect();
        for asked in asked.iter().rev() {
            peer.say(&simple(asked.cookie, 0));
            peer.say(&vec![u8::try_from(asked.offset >> 17).unwrap(); 131_072]);
        }
    });
    let remote = remote.unwrap();
    std::thread::scope(|scope| {
        for number in 0..4_u64 {
            let remote = &remote;
            scope.spawn(move || {
                let mut buf = vec![0xee; 131_072];
                remote.read_at(&mut buf, number << 17).unwrap();
                assert!(buf.iter().all(|byte| u64::from(*byte) == number));
            });
        }
    });
    drop(remote);
    server.join().unwrap();
}
