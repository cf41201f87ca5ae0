// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that lie, and what a client makes of it: an error, soon, and nothing else.

use crate::client::ACK;
use crate::scripted::{
    Asked, CONTEXT, HELLO, Mode, Peer, chunk, connect, data, long_chunk, option_reply, simple,
};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, ErrorKind, Span, Zeroing};
use tranship_nbd::{ClientOptions, Remote};

fn hole(offset: u64, len: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

pub(crate) fn error(number: u32, text: &[u8], offset: Option<u64>) -> Vec<u8> {
    let len = u16::try_from(text.len()).unwrap();
    let mut bytes = [&number.to_be_bytes()[..], &len.to_be_bytes(), text].concat();
    bytes.extend(offset.iter().flat_map(|offset| offset.to_be_bytes()));
    bytes
}

type Answer = Box<dyn Fn(&Asked) -> Vec<u8> + Send>;

fn answer(answer: impl Fn(&Asked) -> Vec<u8> + Send + 'static) -> Answer {
    Box::new(answer)
}

/// What a read of 1024 bytes at 4096 says, with that for an answer; by itself or with a
/// queue.
fn read_with(mode: Mode, is_queued: bool, answer: Answer) -> String {
    let (remote, server) = connect(mode, move |peer| {
        let asked = peer.request();
        assert_eq!((asked.command, asked.offset, asked.len), (0, 4096, 1024));
        let bytes = answer(&asked);
        peer.say(&bytes);
        let _ = peer.0.shutdown(std::net::Shutdown::Write);
    });
    let remote = remote.unwrap();
    let mut buf = vec![0xee; 1024];
    let read = if is_queued {
        let queues = remote.read_queues();
        queues[0].start(&[Span::new(4096, 1024)]).unwrap();
        let (span, read) = queues[0].next(&mut buf).unwrap();
        assert_eq!(span.start, 4096);
        assert!(queues[0].next(&mut Vec::new()).is_none());
        read
    } else {
        remote.read_at(&mut buf, 4096)
    };
    let said = match read {
        Ok(()) => format!("{} and {}", buf[0], buf[1023]),
        Err(error) => error.to_string(),
    };
    drop(remote);
    server.join().unwrap();
    said
}

#[allow(clippy::too_many_lines, reason = "a table")]
fn lies() -> Vec<(Mode, &'static str, Answer)> {
    vec![
        (
            Mode::Structured,
            "7 and 0",
            answer(|asked| {
                let first = chunk(asked.cookie, 0, 2, &hole(4096 + 512, 512));
                [first, chunk(asked.cookie, 1, 1, &data(4096, &[7; 512]))].concat()
            }),
        ),
        (
            Mode::Structured,
            "or twice",
            answer(|asked| {
                let first = chunk(asked.cookie, 0, 2, &hole(4096, 1024));
                [first, chunk(asked.cookie, 1, 1, &data(5000, &[7; 50]))].concat()
            }),
        ),
        (
            Mode::Structured,
            "before all bytes have come",
            answer(|asked| chunk(asked.cookie, 1, 1, &data(4096, &[7; 1023]))),
        ),
        (
            Mode::Structured,
            "before all bytes have come",
            answer(|asked| chunk(asked.cookie, 1, 0, &[])),
        ),
        (
            Mode::Structured,
            "outside of the 1024",
            answer(|asked| chunk(asked.cookie, 1, 1, &data(4096, &[7; 1025]))),
        ),
        (
            Mode::Structured,
            "outside of the 1024",
            answer(|asked| chunk(asked.cookie, 1, 2, &hole(u64::MAX, u32::MAX))),
        ),
        (
            Mode::Structured,
            "does not answer",
            answer(|asked| chunk(asked.cookie, 1, 1, &4096_u64.to_be_bytes())),
        ),
        (Mode::Structured, "is not the last one", answer(|asked| chunk(asked.cookie, 0, 0, &[]))),
        (Mode::Structured, "which nobody sent", answer(|asked| chunk(asked.cookie ^ 1, 1, 0, &[]))),
        (
            Mode::Structured,
            "which nobody sent",
            // A second reply to what is answered already.
            answer(|asked| chunk(asked.cookie.wrapping_add(77), 1, 2, &hole(4096, 1024))),
        ),
        (Mode::Structured, "by a simple reply", answer(|asked| simple(asked.cookie, 0))),
        (Mode::Structured, "begins with 0x21", answer(|_| vec![0x21; 20])),
        (
            Mode::Structured,
            "which is not Structured",
            answer(|asked| long_chunk(asked, 1, 2, &hole(4096, 1024))),
        ),
        (
            Mode::Extended,
            "which is not Extended",
            answer(|asked| chunk(asked.cookie, 1, 2, &hole(4096, 1024))),
        ),
        (Mode::Extended, "which is not Extended", answer(|asked| simple(asked.cookie, 0))),
        (Mode::Extended, "0 and 0", answer(|asked| long_chunk(asked, 1, 2, &hole(4096, 1024)))),
        (
            Mode::Extended,
            "expected at most",
            answer(|asked| {
                let mut bytes = long_chunk(asked, 1, 5, &[]);
                let len = bytes.len();
                bytes[len - 8..].copy_from_slice(&u64::MAX.to_be_bytes());
                bytes
            }),
        ),
        (
            Mode::Extended,
            "outside of the 1024",
            answer(|asked| {
                let mut bytes = long_chunk(asked, 1, 1, &data(4096, &[]));
                let len = bytes.len();
                bytes[len - 16..len - 8].copy_from_slice(&u64::MAX.to_be_bytes());
                bytes
            }),
        ),
        (
            Mode::Structured,
            "expected at most 4110",
            answer(|asked| chunk(asked.cookie, 1, 0x8001, &error(5, &[b'a'; 5000], None))),
        ),
        (Mode::Structured, "error chunk", answer(|asked| chunk(asked.cookie, 1, 0x8001, &[0, 0]))),
        (
            Mode::Structured,
            "EIO: bad sector (at offset 0x1200)",
            answer(|asked| {
                let first = chunk(asked.cookie, 0, 1, &data(4096, &[7; 512]));
                let payload = error(5, b"bad\x07 sector", Some(0x1200));
                [first, chunk(asked.cookie, 1, 0x8002, &payload)].concat()
            }),
        ),
        (
            Mode::Structured,
            "EINVAL",
            answer(|asked| chunk(asked.cookie, 1, 0x8001, &error(4711, b"", None))),
        ),
        (Mode::Simple, "EIO (at offset 0x1000)", answer(|asked| simple(asked.cookie, 5))),
        (Mode::Simple, "which is not Simple", answer(|asked| chunk(asked.cookie, 1, 0, &[]))),
        (
            Mode::Simple,
            "closed the connection",
            answer(|asked| [simple(asked.cookie, 0), vec![1; 1023]].concat()),
        ),
        (Mode::Extended, "closed the connection", answer(|_| Vec::new())),
    ]
}

#[test]
fn replies_that_do_not_fit_their_request_are_refused() {
    for is_queued in [false, true] {
        for (number, (mode, expected, answer)) in lies().into_iter().enumerate() {
            let said = read_with(mode, is_queued, answer);
            assert!(said.contains(expected), "case {number}, {expected}: {said}");
        }
    }
}

#[test]
fn an_error_about_one_request_leaves_the_others_alone() {
    let (remote, server) = connect(Mode::Extended, |peer| {
        let asked = peer.request();
        let payload = error(28, b"no room", None);
        peer.say(&long_chunk(&asked, 1, 0x8001, &payload));
        let asked = peer.request();
        // The length of a write is that of its payload, and says so.
        assert_eq!((asked.command, asked.flags, asked.len), (1, 1 << 5, 3));
        let mut payload = [0; 3];
        std::io::Read::read_exact(&mut peer.0, &mut payload).unwrap();
        assert_eq!(&payload, b"abc");
        peer.say(&long_chunk(&asked, 1, 0, &[]));
    });
    let remote = remote.unwrap();
    let error = remote.write_zeroes(Span::new(0, 1 << 20), Zeroing::MayUnmap).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("ENOSPC: no room"), "{error}");
    remote.write_at(b"abc", 77).unwrap();
    drop(remote);
    server.join().unwrap();
}

#[test]
fn replies_may_come_in_any_order() {
    const READERS: usize = 8;
    let (remote, server) = connect(Mode::Structured, |peer| {
        let mut asked: Vec<Asked> = (0..READERS).map(|_| peer.request()).collect();
        // Neither the order in which they came nor the reverse of it.
        asked.sort_by_key(|asked| (asked.offset / 4096) % 3);
        for half in [2048, 0] {
            for asked in &asked {
                let offset = asked.offset + half;
                let byte = u8::try_from(asked.offset / 4096).unwrap();
                let last = u16::from(half == 0);
                peer.say(&chunk(asked.cookie, last, 1, &data(offset, &[byte; 2048])));
            }
        }
    });
    let remote = Arc::new(remote.unwrap());
    std::thread::scope(|scope| {
        for reader in 0..READERS {
            let remote = Arc::clone(&remote);
            scope.spawn(move || {
                let mut buf = [0xee; 4096];
                remote.read_at(&mut buf, reader as u64 * 4096).unwrap();
                assert!(buf.iter().all(|byte| usize::from(*byte) == reader), "{reader}");
            });
        }
    });
    drop(remote);
    server.join().unwrap();
}

/// What block status of the whole disk says, with these extents for an answer.
fn status_with(mode: Mode, extents: Vec<(u64, u64)>) -> Result<Vec<(u64, u64)>, String> {
    let (remote, server) = connect(mode, move |peer| {
        let asked = peer.request();
        assert_eq!((asked.command, asked.offset, asked.len), (7, 4096, 8192));
        let mut payload = CONTEXT.to_be_bytes().to_vec();
        if mode == Mode::Extended {
            payload.extend(u32::try_from(extents.len()).unwrap().to_be_bytes());
        }
        for (len, flags) in extents {
            if mode == Mode::Extended {
                payload.extend(len.to_be_bytes());
                payload.extend(flags.to_be_bytes());
            } else {
                payload.extend((len as u32).to_be_bytes());
                payload.extend((flags as u32).to_be_bytes());
            }
        }
        let bytes = match mode {
            Mode::Extended => long_chunk(&asked, 1, 6, &payload),
            _ => chunk(asked.cookie, 1, 5, &payload),
        };
        peer.say(&bytes);
    });
    let remote = remote.unwrap();
    let said = remote.status("base:allocation", 4096, 8192).map_err(|error| error.to_string());
    drop(remote);
    server.join().unwrap();
    said
}

#[test]
fn block_status_is_held_to_what_was_asked() {
    for mode in [Mode::Structured, Mode::Extended] {
        let said = status_with(mode, vec![(4096, 0), (1 << 30, 3)]).unwrap();
        assert_eq!(said, [(4096, 0), (4096, 3)]);
        // Neighbours that are the same are one.
        assert_eq!(status_with(mode, vec![(512, 3), (512, 3)]).unwrap(), [(1024, 3)]);
        assert!(status_with(mode, vec![]).unwrap_err().contains("0 extents"));
        assert!(status_with(mode, vec![(512, 0), (0, 3)]).unwrap_err().contains("without bytes"));
    }
    assert_eq!(status_with(Mode::Extended, vec![(u64::MAX, 1)]).unwrap(), [(8192, 1)]);
    let twice = vec![(u64::MAX, 1), (u64::MAX, 0)];
    assert_eq!(status_with(Mode::Extended, twice).unwrap(), [(8192, 1)]);
}

#[test]
fn a_context_that_was_not_agreed_upon_is_not_asked_for() {
    let (remote, server) = connect(Mode::Extended, |_| ());
    let remote = remote.unwrap();
    assert_eq!(remote.facts().contexts, ["base:allocation"]);
    let error = remote.status("qemu:allocation-depth", 0, 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    drop(remote);
    server.join().unwrap();
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = ClientOptions { timeout: Duration::from_secs(1), ..ClientOptions::default() };
    let start = Instant::now();
    let error = Remote::from_stream(ours, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("did not answer in time during the handshake"), "{error}");
    drop(theirs);

    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut peer = Peer(theirs);
        peer.hello();
        peer.negotiate(Mode::Simple, 1 << 20, 0xd6d);
        peer.drain();
    });
    let remote = Remote::from_stream(ours, &options).unwrap();
    let error = remote.read_at(&mut [0; 512], 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let text = error.to_string();
    assert!(text.contains("did not answer within 1 s (at offset 0x200)"), "{text}");
    // Everything after it fails at once.
    remote.read_at(&mut [0; 512], 0).unwrap_err();
    drop(remote);
    server.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10));
}

/// What a client says to a server that greets and then sends this, whatever it is asked.
fn after_hello(bytes: Vec<u8>, options: &ClientOptions) -> String {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut peer = Peer(theirs);
        let _ = std::io::Write::write_all(&mut peer.0, &[HELLO, &bytes].concat());
        peer.drain();
    });
    let error = Remote::from_stream(ours, options).unwrap_err();
    server.join().unwrap();
    error.to_string()
}

#[test]
fn a_handshake_that_does_not_end_is_given_up() {
    let options = ClientOptions { timeout: Duration::from_secs(10), ..ClientOptions::default() };
    let unsup = [option_reply(11, 0x8000_0001, b""), option_reply(8, 0x8000_0001, b"")].concat();
    let info = option_reply(7, 3, &[0, 9]);
    let endless = [unsup.clone(), info.repeat(5000)].concat();
    assert!(after_hello(endless, &options).contains("more than 4096 replies"));
    let mut long = unsup.clone();
    long.extend(&option_reply(7, 3, b"")[..16]);
    long.extend(u32::MAX.to_be_bytes());
    assert!(after_hello(long, &options).contains("has 4294967295 bytes"));
    let text = option_reply(7, 0x8000_0002, "ü\n".repeat(600).as_bytes());
    let said = after_hello([unsup.clone(), text].concat(), &options);
    assert!(said.contains("does not allow export \"\""), "{said}");
    assert!(said.len() < 700 && !said.contains('\n'), "{said}");
    let size = [&[0, 0][..], &(1_u64 << 63).to_be_bytes(), &[0, 1]].concat();
    let size = [unsup, option_reply(7, 3, &size), option_reply(7, ACK, b"")].concat();
    assert!(after_hello(size, &options).contains("9223372036854775808 bytes"));
}
