// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections that another process makes, and such that go on in another process.

use crate::client::{export, sample, serve, serve_one};
use crate::remote::{options, work};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice};
use tranship_nbd::{Address, ClientOptions, Dialer, Export, Limits, Moved, Remote, Retry, Server};

const TIME: Duration = Duration::from_secs(20);

/// Where nobody listens: whoever connects to anything there has not asked the dialer.
fn nowhere() -> Address {
    Address::Unix(PathBuf::from("/nowhere/socket"))
}

fn dialing(address: Address, seconds: u64) -> ClientOptions {
    let dialer = Dialer::over(Dialer::start(address, options("vda")).unwrap());
    let retry = Retry { budget: Duration::from_secs(seconds) };
    ClientOptions { dialer: Some(Arc::new(dialer)), retry, ..options("vda") }
}

/// As it goes to another process.
fn sent(connections: Vec<(Moved, OwnedFd)>) -> Vec<(Moved, OwnedFd)> {
    let again = |(moved, socket): (Moved, OwnedFd)| {
        let text = serde_json::to_string(&moved).unwrap();
        assert_eq!(serde_json::from_str::<Moved>(&text).unwrap(), moved);
        (moved, socket)
    };
    connections.into_iter().map(again).collect()
}

#[test]
fn an_export_that_is_not_there_is_not_asked_for_again() {
    let place = serve(vec![export("another", sample())], Limits::default());
    let begun = Instant::now();
    let error = Remote::connect(&nowhere(), &dialing(Address::Unix(place.socket()), 20));
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("vda"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn connections_are_made_by_the_dialer_alone() {
    let place = serve_one(Arc::new(MemoryDevice::new(vec![0; 3 << 20])));
    let options = dialing(Address::Unix(place.socket()), 0);
    work(&Remote::connect(&nowhere(), &options).unwrap());
    let shared = Export { shared: true, ..export("vda", sample()) };
    let place = serve(vec![shared], Limits::default());
    let options = dialing(Address::Unix(place.socket()), 0);
    assert_eq!(Remote::connect(&nowhere(), &options).unwrap().connections(), 4);
}

#[test]
fn what_keeps_the_dialer_from_connecting_is_told() {
    let error = Remote::connect(&nowhere(), &dialing(nowhere(), 0)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let text = error.to_string();
    assert!(text.contains("cannot connect to the NBD server at /nowhere/socket"), "{text}");
    assert!(text.contains("No such file"), "{text}");
}

/// Both ends of a line, the second one without anybody who answers.
fn line() -> (OwnedFd, OwnedFd) {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    rustix::net::socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap()
}

#[test]
fn late_answers_and_silence_are_no_answers() {
    let (ours, theirs) = line();
    let dialer = Some(Arc::new(Dialer::over(ours)));
    let options = ClientOptions { dialer, timeout: Duration::from_millis(50), ..options("vda") };
    let begun = Instant::now();
    let error = Remote::connect(&nowhere(), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(begun.elapsed() >= Duration::from_millis(100) && begun.elapsed() < TIME);
    // The answer to that question comes when the next one was asked.
    let answers = std::thread::spawn(move || {
        for why in ["too late", "nobody there"] {
            let mut question = [0; 8];
            rustix::net::recv(&theirs, &mut question[..], RecvFlags::empty()).unwrap();
            let answer = [&question[..], br#"{"Busy": ""#, why.as_bytes(), br#""}"#].concat();
            rustix::net::send(&theirs, &answer, SendFlags::empty()).unwrap();
        }
    });
    let options = ClientOptions { timeout: TIME, ..options };
    let error = Remote::connect(&nowhere(), &options).unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::Busy, "nobody there"));
    answers.join().unwrap();
    // The other end is gone.
    let error = Remote::connect(&nowhere(), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.message().contains("the process that would do it"), "{error}");
}

#[test]
fn a_connection_goes_on_where_it_was_handed_to() {
    // The server takes no second client.
    let limits = Limits { connections: 1, ..Limits::default() };
    let device = Arc::new(MemoryDevice::new(vec![0; 3 << 20]));
    let place = serve(vec![Export { shared: false, ..export("vda", device) }], limits);
    let first = Remote::connect(&Address::Unix(place.socket()), &options("vda")).unwrap();
    first.read_at(&mut [0; 4096], 0).unwrap();
    let connections = sent(first.hand_over());
    assert_eq!(connections.len(), 1);
    let error = first.read_at(&mut [0; 4096], 0).unwrap_err();
    assert!(error.message().contains("another process has the connection"), "{error}");
    assert!(first.hand_over().is_empty());
    let second = Remote::take_over(connections, &nowhere(), &options("vda")).unwrap();
    drop(first);
    work(&second);
    assert_eq!(
        Remote::take_over(Vec::new(), &nowhere(), &options("vda")).unwrap_err().kind(),
        ErrorKind::Usage
    );
}

#[test]
fn what_was_handed_over_is_renewed_by_the_dialer() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let serve = || {
        let shared = Export { shared: true, ..export("vda", sample()) };
        Server::bind(&socket, vec![shared], Limits::default()).unwrap().start().unwrap()
    };
    let running = serve();
    let address = Address::Unix(socket.clone());
    let connections = sent(Remote::connect(&address, &options("vda")).unwrap().hand_over());
    let options = dialing(address, 20);
    let remote = Remote::take_over(connections, &nowhere(), &options).unwrap();
    assert_eq!(remote.connections(), 4);
    let read = || {
        let mut found = [0; 4096];
        // Each of its connections.
        for _ in 0..4 {
            remote.read_at(&mut found, 512 << 10).unwrap();
        }
        found
    };
    let before = read();
    assert_ne!(before, [0; 4096]);
    running.stop().unwrap();
    std::thread::scope(|scope| {
        let again = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            serve()
        });
        assert_eq!(read(), before);
        drop(again.join().unwrap());
    });
}
