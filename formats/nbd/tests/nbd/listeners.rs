// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where clients connect, and how a server tells of them.

use crate::client::{Client, export, sample};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_block::ErrorKind;
use tranship_nbd::{Limits, Listener, Place, Running, Server};

fn serve(listeners: Vec<Listener>) -> Running {
    let exports = vec![export("vda", sample())];
    Server::new(listeners, exports, Limits::default()).unwrap().start().unwrap()
}

fn local() -> Listener {
    Listener::tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap()
}

#[test]
fn one_server_answers_on_every_listener() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let inherited = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listeners = vec![
        Listener::unix(&path).unwrap(),
        local(),
        Listener::inherited(inherited.into()).unwrap(),
    ];
    let running = serve(listeners);
    let places = running.places().to_vec();
    assert_eq!(places[0], Place::Unix(path.clone()));
    for place in &places {
        let mut client = match place {
            Place::Unix(path) => Client::connect(path),
            Place::Tcp(address) => {
                assert_ne!(address.port(), 0);
                Client::connect_tcp(*address)
            }
            other => panic!("{other:?}"),
        };
        client.go(true);
        assert_eq!(client.errno(0, 0, 0, 1 << 20), 0);
    }
    running.stop().unwrap();
    assert!(!path.exists());
}

#[test]
fn a_taken_port_is_busy_and_version_6_is_another_address() {
    let first = local();
    let Place::Tcp(address) = first.place() else { panic!("{first:?}") };
    let error = Listener::tcp(address).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(error.message(), format!("cannot listen on {address}"));
    match Listener::tcp(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))) {
        Ok(listener) => assert!(matches!(listener.place(), Place::Tcp(SocketAddr::V6(_)))),
        Err(error) => eprintln!("skipped: no IP version 6: {error}"),
    }
}

#[test]
fn vsock_listens_where_the_system_has_it() {
    let listener = match Listener::vsock(u32::MAX) {
        Ok(listener) => listener,
        Err(error) => return eprintln!("skipped: no vsock: {error}"),
    };
    assert!(matches!(listener.place(), Place::Vsock { .. }), "{listener:?}");
    drop(serve(vec![listener]));
}

#[test]
fn what_does_not_listen_is_not_inherited() {
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(folder.path().join("file")).unwrap();
    let datagram = UnixDatagram::bind(folder.path().join("datagram")).unwrap();
    let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    for descriptor in [file.into(), datagram.into(), connected.into()] {
        assert_eq!(Listener::inherited(descriptor).unwrap_err().kind(), ErrorKind::Usage);
    }
    // The name of an inherited socket belongs to whoever made it.
    let path = folder.path().join("socket");
    let listener = Listener::inherited(UnixListener::bind(&path).unwrap().into()).unwrap();
    assert_eq!(listener.place(), Place::Unix(path.clone()));
    drop(listener);
    assert!(path.exists());
    let error = Server::new(vec![], vec![], Limits::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn a_waiter_hears_of_comings_and_goings() {
    let running = Arc::new(serve(vec![local()]));
    let [Place::Tcp(address)] = *running.places() else { panic!("{running:?}") };
    let started = Instant::now();
    running.wait(Some(Duration::from_millis(50)));
    assert!(started.elapsed() >= Duration::from_millis(50));
    // A client that leaves in the handshake is none that was served.
    drop(Client::connect_tcp(address));
    while running.connections() > 0 || running.negotiated() > 0 {
        running.wait(Some(Duration::from_secs(20)));
    }
    let mut client = Client::connect_tcp(address);
    client.go(true);
    while running.negotiated() == 0 {
        running.wait(None);
    }
    let waiting = std::thread::spawn({
        let running = running.clone();
        move || {
            while running.connections() > 0 {
                running.wait(None);
            }
        }
    });
    drop(client);
    waiting.join().unwrap();
    assert_eq!(running.negotiated(), 1);
}
