// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Our client with our server, and with those of others.

use crate::client::{Place, sample, serve_one};
use crate::foreign::{Foreign, SIZE, qemu_nbd, text};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use tranship_block::{BlockDevice, ErrorKind, ExtentKind, Extents, MemoryDevice, Span, Zeroing};
use tranship_nbd::{Address, ClientOptions, Remote, describe_export, list_exports};

pub(crate) fn options(export: &str) -> ClientOptions {
    let timeout = Duration::from_secs(20);
    ClientOptions { export: export.to_owned(), timeout, ..ClientOptions::default() }
}

fn ours(place: &Place) -> Remote {
    Remote::connect(&Address::Unix(place.socket()), &options("vda")).unwrap()
}

pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (((at as u64 * 31) >> 3) as u8 ^ seed) | 1).collect()
}

/// Everything that a device can do, beside bytes in memory.
pub(crate) fn work(device: &dyn BlockDevice) {
    let size = usize::try_from(device.size()).unwrap();
    let mut model = vec![0; size];
    device.read_at(&mut model, 0).unwrap();
    let writes = [(0, 512), (4096, 70_000), (size - 513, 513), (1 << 20, 1 << 20), (777, 1)];
    for (seed, (at, len)) in (1_u8..).zip(writes) {
        let bytes = pattern(len, seed);
        device.write_at(&bytes, at as u64).unwrap();
        model[at..at + len].copy_from_slice(&bytes);
    }
    for (at, len) in [(65_536, 65_536), (size - 4096, 4096), (1000, 3)] {
        device.write_zeroes(Span::new(at as u64, len as u64), Zeroing::MayUnmap).unwrap();
        model[at..at + len].fill(0);
    }
    device.flush().unwrap();
    let mut found = vec![0xee; size];
    device.read_at(&mut found, 0).unwrap();
    assert!(found == model, "contents differ");
    let mut covered = 0;
    for run in Extents::new(device, Span::new(0, u64::MAX)) {
        let (span, kind) = run.unwrap();
        assert_eq!(span.start, covered);
        covered = span.end();
        let range = usize::try_from(span.start).unwrap()..usize::try_from(span.end()).unwrap();
        assert!(kind == ExtentKind::Data || model[range].iter().all(|byte| *byte == 0));
    }
    assert_eq!(covered, device.size());
    let error = device.read_at(&mut [0; 2], device.size() - 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn our_own_server_is_a_disk() {
    let place = serve_one(Arc::new(MemoryDevice::new(vec![0; SIZE])));
    let remote = ours(&place);
    assert_eq!(remote.size(), SIZE as u64);
    assert!(remote.connections() > 1);
    work(&remote);
}

#[test]
fn many_threads_share_one_connection() {
    let place = serve_one(Arc::new(MemoryDevice::new(pattern(SIZE, 9))));
    let one = ClientOptions { connections: 1, ..options("vda") };
    let remote = Remote::connect(&Address::Unix(place.socket()), &one).unwrap();
    let expected = pattern(SIZE, 9);
    std::thread::scope(|scope| {
        for thread in 0..8_usize {
            let (remote, expected) = (&remote, &expected);
            scope.spawn(move || {
                for round in 0..60_usize {
                    let at = (round * 7919 + thread * 131_071) % (SIZE - 50_000);
                    let len = 1 + (round * 977) % 50_000;
                    let mut bytes = vec![0; len];
                    remote.read_at(&mut bytes, at as u64).unwrap();
                    assert!(bytes == expected[at..at + len], "{thread} {round}");
                }
            });
        }
    });
}

#[test]
fn an_export_that_is_not_there_is_not_found() {
    let place = serve_one(sample());
    let error = Remote::connect(&Address::Unix(place.socket()), &options("no")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.message().contains("\"no\""), "{error}");
    let nobody = Address::Unix(place.folder.path().join("nobody"));
    assert_eq!(Remote::connect(&nobody, &options("")).unwrap_err().kind(), ErrorKind::Busy);
}

#[test]
fn a_server_that_stops_fails_requests_and_hangs_nobody() {
    let place = serve_one(sample());
    let remote = ours(&place);
    place.running.stop().unwrap();
    let error = remote.read_at(&mut [0; 512], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(remote.flush().unwrap_err().kind(), ErrorKind::Busy);
}

/// What a server that lies sends after the client's first bytes; the client has to give
/// up with an error, soon.
#[test]
fn servers_that_lie_are_found_out() {
    let hello = b"NBDMAGICIHAVEOPT\0\x03";
    let reply = |option: u8, kind: u32, data: &[u8]| {
        let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        bytes.extend([0, 0, 0, option]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        bytes
    };
    let unsup = [reply(11, 0x8000_0001, b""), reply(8, 0x8000_0001, b"")].concat();
    let export = |size: u64, flags: u16| {
        let mut data = vec![0, 0];
        data.extend(size.to_be_bytes());
        data.extend(flags.to_be_bytes());
        reply(7, 3, &data)
    };
    let sizes = reply(7, 3, &[0, 3, 0, 0, 0, 3, 0, 0, 16, 0, 0, 1, 0, 0]);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), "no NBD server"),
        ([&hello[..8], &[0; 10]].concat(), "oldstyle"),
        ([&hello[..], &[0xff; 20]].concat(), "reply to option 11 has magic"),
        ([&hello[..], &reply(11, 0x8000_0005, b"")].concat(), "requires TLS"),
        ([&hello[..], &unsup, &reply(7, 1, b"")].concat(), "did not tell the export's size"),
        ([&hello[..], &unsup, &export(1 << 20, 0), &reply(7, 1, b"")].concat(), "HAS_FLAGS"),
        (
            [&hello[..], &unsup, &export(1 << 20, 1), &sizes, &reply(7, 1, b"")].concat(),
            "block sizes are 3",
        ),
        (
            [&hello[..], &unsup, &reply(7, 0x8000_0006, b"go \x1baway")].concat(),
            "does not have export \"\": go away",
        ),
    ];
    for (bytes, expected) in cases {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&bytes).unwrap();
            // Until the client has had enough.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let address = Address::Tcp { host: "127.0.0.1".to_owned(), port };
        let error = Remote::connect(&address, &options("")).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        server.join().unwrap();
    }
}

#[test]
fn qemu_nbd_is_a_disk() {
    let server = Foreign::start("qemu-nbd", |socket, disk| {
        qemu_nbd(socket, disk, &["--export-name=a b", "--description=c d", "--allocation-depth"])
    });
    let Some(server) = server else { return };
    let contexts = vec!["qemu:allocation-depth".to_owned()];
    let remote = server.connect(&ClientOptions { contexts, ..options("a b") });
    assert!(remote.connections() > 1);
    let facts = remote.facts();
    assert!(facts.extended && facts.structured && facts.has_block_sizes && !facts.tls);
    assert!(facts.can_fast_zero() && facts.can_cache() && facts.can_block_status_payload());
    assert_eq!((facts.size, facts.min_block), (SIZE as u64, 1));
    assert_eq!(facts.description.as_deref(), Some("c d"));
    assert_eq!(facts.contexts, ["base:allocation", "qemu:allocation-depth"]);
    let depth = remote.status("qemu:allocation-depth", 0, SIZE as u64).unwrap();
    assert_eq!(depth.iter().map(|(len, _)| len).sum::<u64>(), SIZE as u64);
    work(&remote);
    for (structured, extended) in [(true, false), (false, true), (false, false)] {
        let remote = server.connect(&ClientOptions { structured, extended, ..options("a b") });
        assert_eq!((remote.facts().structured, remote.facts().extended), (structured, false));
        work(&remote);
    }
}

#[test]
fn exports_are_listed_with_all_that_is_known() {
    let place = serve_one(sample());
    let listing = list_exports(&Address::Unix(place.socket()), &options("")).unwrap();
    let [export] = &listing.exports[..] else { panic!("{listing:?}") };
    assert_eq!((export.name.as_str(), export.description.as_str()), ("vda", "a test"));
    assert!(export.contexts.contains(&"base:allocation".to_owned()));
    assert_eq!(export.facts.as_ref().unwrap().size, 1 << 20);
    let one = describe_export(&Address::Unix(place.socket()), &options("vda")).unwrap();
    assert_eq!(one, *export);
    let error = describe_export(&Address::Unix(place.socket()), &options("x")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn exports_of_others_are_listed() {
    let server = Foreign::start("qemu-nbd", |socket, disk| {
        qemu_nbd(socket, disk, &["--export-name=vda", "--description=mine", "--allocation-depth"])
    });
    let Some(server) = server else { return };
    server.connect(&options("vda"));
    let listing = list_exports(&server.address(), &options("")).unwrap();
    assert!(listing.structured && listing.extended && !listing.tls);
    let [export] = &listing.exports[..] else { panic!("{listing:?}") };
    assert_eq!((export.name.as_str(), export.description.as_str()), ("vda", "mine"));
    assert_eq!(export.contexts, ["base:allocation", "qemu:allocation-depth"]);
    let facts = export.facts.as_ref().unwrap();
    assert_eq!((facts.preferred_block, facts.max_payload), (4096, 32 << 20));

    let server = Foreign::start("nbdkit", |socket, disk| {
        let folder = disk.parent().unwrap();
        std::fs::create_dir(folder.join("disks")).unwrap();
        std::fs::write(folder.join("disks/a"), [0; 512]).unwrap();
        std::fs::write(folder.join("disks/b"), [0; 1024]).unwrap();
        let disks = format!("dir={}", text(&folder.join("disks")));
        vec!["--foreground".into(), format!("--unix={}", text(socket)), "file".into(), disks]
    });
    let Some(server) = server else { return };
    server.connect(&options("a"));
    let listing = list_exports(&server.address(), &options("")).unwrap();
    let mut found: Vec<(&str, u64)> = listing
        .exports
        .iter()
        .map(|export| (export.name.as_str(), export.facts.as_ref().unwrap().size))
        .collect();
    found.sort_unstable();
    assert_eq!(found, [("a", 512), ("b", 1024)]);
}

#[test]
fn nbdkit_is_a_disk_also_in_blocks_and_without_structured_replies() {
    let plain: &[&str] = &[];
    let cases = [
        plain,
        &["--no-sr"],
        &["--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-error-policy=error"],
        &["--filter=nozero", "zeromode=none"],
        &["--filter=noextents"],
        &["--filter=multi-conn", "multi-conn-mode=disable"],
    ];
    for more in cases {
        let server = Foreign::start("nbdkit", |socket, disk| {
            let socket = format!("--unix={}", text(socket));
            let mut words = vec!["--foreground".to_owned(), socket];
            words.extend(more.iter().filter(|word| word.starts_with('-')).map(|w| (*w).to_owned()));
            words.extend(["file".to_owned(), text(disk)]);
            words
                .extend(more.iter().filter(|word| !word.starts_with('-')).map(|w| (*w).to_owned()));
            words
        });
        let Some(server) = server else { return };
        work(&server.connect(&options("")));
    }
}
