// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Our client with our server, and with those of others.

use crate::client::{Place, sample, serve_one};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, ErrorKind, ExtentKind, Extents, MemoryDevice, Span, Zeroing};
use tranship_nbd::{Address, ClientOptions, Remote};

const SIZE: usize = 3 << 20;

fn options(export: &str) -> ClientOptions {
    let timeout = Duration::from_secs(20);
    ClientOptions { export: export.to_owned(), timeout, ..ClientOptions::default() }
}

fn ours(place: &Place) -> Remote {
    Remote::connect(&Address::Unix(place.socket()), &options("vda")).unwrap()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (((at as u64 * 31) >> 3) as u8 ^ seed) | 1).collect()
}

/// Everything that a device can do, beside bytes in memory.
fn work(device: &dyn BlockDevice) {
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
    let unsup = reply(8, 0x8000_0001, b"");
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
        ([&hello[..], &[0xff; 20]].concat(), "reply to option 8 has magic"),
        ([&hello[..], &reply(8, 0x8000_0005, b"")].concat(), "requires TLS"),
        ([&hello[..], &unsup, &reply(7, 1, b"")].concat(), "did not tell the export's size"),
        ([&hello[..], &unsup, &export(1 << 20, 0), &reply(7, 1, b"")].concat(), "HAS_FLAGS"),
        (
            [&hello[..], &unsup, &export(1 << 20, 1), &sizes, &reply(7, 1, b"")].concat(),
            "block sizes are 3",
        ),
        (
            [&hello[..], &unsup, &reply(7, 0x8000_0006, b"go \x1baway")].concat(),
            "no export \"\": go away",
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

/// A server of somebody else's, which ends with the test.
struct Foreign {
    child: Child,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Foreign {
    /// `None`, with a visible line, if the program is not there.
    fn start(program: &str, arguments: impl Fn(&Path, &Path) -> Vec<String>) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let (socket, disk) = (folder.path().join("socket"), folder.path().join("disk"));
        std::fs::File::create(&disk).unwrap().set_len(SIZE as u64).unwrap();
        let child = Command::new(program)
            .args(arguments(&socket, &disk))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: {program} is not installed");
                return None;
            }
            Err(error) => panic!("{program}: {error}"),
        };
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < Duration::from_secs(20), "{program} does not listen");
            std::thread::yield_now();
        }
        Some(Self { child, socket, _folder: folder })
    }

    fn connect(&self, options: &ClientOptions) -> Remote {
        let start = Instant::now();
        loop {
            match Remote::connect(&Address::Unix(self.socket.clone()), options) {
                // The socket is bound a moment before somebody listens.
                Err(error) if error.kind() == ErrorKind::Busy && start.elapsed().as_secs() < 10 => {
                }
                other => return other.unwrap(),
            }
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[test]
fn qemu_nbd_is_a_disk() {
    let server = Foreign::start("qemu-nbd", |socket, disk| {
        let socket = format!("--socket={}", text(socket));
        let words = ["--persistent", "--shared=8", "--format=raw", "--export-name=a b"];
        let words = words.iter().map(|word| (*word).to_owned());
        words.chain([socket, text(disk)]).collect()
    });
    let Some(server) = server else { return };
    let remote = server.connect(&options("a b"));
    assert!(remote.connections() > 1);
    work(&remote);
}

#[test]
fn nbdkit_is_a_disk_also_in_blocks_and_without_structured_replies() {
    let plain: &[&str] = &[];
    for more in [plain, &["--no-sr"], &["--filter=blocksize-policy", "blocksize-minimum=4096"]] {
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
