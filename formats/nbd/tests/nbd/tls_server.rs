// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Our server with TLS: what it tells before, what it keeps, and whom it lets in.

use crate::client::{
    ACK, Client, INVALID, Place, UNSUP, export, header, info, meta, sample, serve_one,
};
use crate::foreign::{SIZE, text};
use crate::remote::{options, work};
use crate::tls::{Certificates, encrypted, openssl};
use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice};
use tranship_nbd::{Address, ClientOptions, ClientTls, Limits, Remote, Server, ServerTls};

const TLS_REQUIRED: u32 = 0x8000_0005;

fn serve_with(tls: ServerTls, required: bool, limits: Limits) -> Place {
    let folder = tempfile::tempdir().unwrap();
    let exports = vec![export("vda", Arc::new(MemoryDevice::new(vec![1; SIZE])))];
    let server = Server::bind(folder.path().join("socket"), exports, limits).unwrap();
    Place { running: server.with_tls(tls, required).start().unwrap(), folder }
}

fn connect(place: &Place, tls: ClientTls) -> tranship_block::Result<Remote> {
    let address = Address::Unix(place.socket());
    let options = ClientOptions { export: "vda".to_owned(), ..encrypted(tls) };
    Remote::connect(&address, &options)
}

/// A connection to which the server has said that TLS may begin.
fn started(place: &Place) -> Client {
    let mut client = place.connect();
    client.say(&3u32.to_be_bytes());
    assert_eq!(client.option(5, b"").0, ACK);
    client
}

/// The same connection under TLS, as a client that says exactly what it is told to.
fn encrypted_client(client: &Client, tls: &ClientTls) -> Client {
    let reading = client.0.try_clone().unwrap();
    let writing = client.0.try_clone().unwrap();
    let (mut reading, mut writing) = tls.connect("localhost", reading, writing).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut from, mut to) = (theirs.try_clone().unwrap(), theirs);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut writing);
    });
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut reading, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    Client::resumed(OwnedFd::from(ours))
}

#[test]
fn nothing_is_told_before_tls_where_it_is_required() {
    let Some(certificates) = Certificates::make() else { return };
    let place = serve_with(certificates.server("good", false), true, Limits::default());
    let mut client = place.connect();
    client.say(&3u32.to_be_bytes());
    let refused: [(u32, Vec<u8>); 8] = [
        (3, vec![]),
        (6, info("vda", &[])),
        (7, info("vda", &[])),
        (8, vec![]),
        (9, meta("vda", &[])),
        (10, meta("vda", &["base:allocation"])),
        (11, vec![]),
        (4242, b"data".to_vec()),
    ];
    for (number, data) in refused {
        assert_eq!(client.option(number, &data), (TLS_REQUIRED, vec![]), "option {number}");
    }
    assert_eq!(client.option(5, b"data").0, INVALID);
    assert_eq!(client.option(2, b"").0, ACK);
    assert!(client.is_closed());
    let mut client = place.connect();
    client.say(&3u32.to_be_bytes());
    client.send_option(1, b"vda");
    assert!(client.is_closed());
    let error = Remote::connect(&Address::Unix(place.socket()), &options("vda")).unwrap_err();
    assert!(error.message().contains("requires TLS"), "{error}");
    connect(&place, certificates.client("good")).unwrap();
}

#[test]
fn a_server_without_tls_says_so_and_one_that_offers_it_takes_both() {
    let Some(certificates) = Certificates::make() else { return };
    let plain = serve_one(sample());
    let mut client = plain.connect();
    client.say(&3u32.to_be_bytes());
    assert_eq!(client.option(5, b"").0, UNSUP);
    let place = serve_with(certificates.server("good", false), false, Limits::default());
    let remote = Remote::connect(&Address::Unix(place.socket()), &options("vda")).unwrap();
    assert!(!remote.facts().tls);
    work(&remote);
    let remote = connect(&place, certificates.client("good")).unwrap();
    assert!(remote.facts().tls && remote.facts().extended && remote.connections() > 1);
    work(&remote);
}

#[test]
fn what_was_agreed_in_plain_text_is_forgotten() {
    let Some(certificates) = Certificates::make() else { return };
    let place = serve_with(certificates.server("good", false), false, Limits::default());
    let mut plain = place.connect();
    plain.say(&3u32.to_be_bytes());
    assert_eq!(plain.option(11, b"").0, ACK);
    assert_eq!(plain.option(10, &meta("vda", &["base:allocation"])).0, ACK);
    assert_eq!(plain.option(5, b"").0, ACK);
    let mut client = encrypted_client(&plain, &certificates.client("good"));
    assert_eq!(client.option(5, b"").0, INVALID);
    // It would need extended or structured replies, which are gone.
    assert_eq!(client.option(10, &meta("vda", &[])).0, INVALID);
    let (kind, infos) = client.option(7, &info("vda", &[]));
    assert_eq!(kind, ACK);
    assert_eq!(infos[0][10..], [0x0d, 0x6d], "flags of simple replies");
    assert_eq!(client.errno(0, 0, 0, 4096), 0);
    assert_eq!(client.errno(0, 7, 0, 4096), 22);
}

#[test]
fn bytes_that_come_before_the_handshake_are_not_taken_for_options() {
    let Some(certificates) = Certificates::make() else { return };
    let place = serve_with(certificates.server("good", false), true, Limits::default());
    let option = |number: u32| [b"IHAVEOPT", &number.to_be_bytes()[..], &[0; 4]].concat();
    for injected in [option(8), option(3), option(2), vec![0x16], vec![0; 64]] {
        let mut client = place.connect();
        client.say(&[&3u32.to_be_bytes()[..], &option(5), &injected].concat());
        let (number, kind, _) = client.option_reply();
        assert_eq!((number, kind), (5, ACK));
        // The answer is an alert of TLS at most; of the protocol there is nothing more.
        let _ = client.0.write_all(&option(3));
        let mut rest = Vec::new();
        let _ = client.0.read_to_end(&mut rest);
        let shown = rest.escape_ascii();
        assert!(rest.is_empty() || rest[0] == 21, "{shown}");
        assert!(!rest.windows(3).any(|window| window == b"vda"), "{shown}");
    }
    connect(&place, certificates.client("good")).unwrap();
}

#[test]
fn a_handshake_that_stalls_ends_in_time_and_holds_nobody_up() {
    let Some(certificates) = Certificates::make() else { return };
    let limits = Limits { handshake: Duration::from_secs(3), ..Limits::default() };
    let place = serve_with(certificates.server("good", false), true, limits);
    let begun = Instant::now();
    let mut silent = started(&place);
    let mut half = started(&place);
    half.say(&[0x16, 3, 1, 2, 0, 1, 0]);
    let mut slow = started(&place);
    connect(&place, certificates.client("good")).unwrap();
    assert!(place.running.negotiated() >= 1);
    // A byte now and then is no progress.
    for byte in [0x16, 3, 1, 2, 0] {
        std::thread::sleep(Duration::from_millis(100));
        let _ = slow.0.write_all(&[byte]);
    }
    for client in [&mut silent, &mut half, &mut slow] {
        let _ = client.0.read_to_end(&mut Vec::new());
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    connect(&place, certificates.client("good")).unwrap();
}

#[test]
fn clients_that_vanish_or_talk_nonsense_harm_nobody() {
    let Some(certificates) = Certificates::make() else { return };
    let place = serve_with(certificates.server("good", false), true, Limits::default());
    let tls = certificates.client("good");
    for cut in [0, 1, 5, 6, 40, 100] {
        let mut client = started(&place);
        client.say(&[&[0x16, 3, 1, 0, 200][..], &vec![1; cut]].concat());
    }
    for _ in 0..5 {
        // In the middle of a record, and with a record that nobody has encrypted.
        let plain = started(&place);
        let mut client = encrypted_client(&plain, &tls);
        assert_eq!(client.option(7, &info("vda", &[])).0, ACK);
        assert_eq!(client.errno(0, 0, 0, 512), 0);
        let mut raw = &plain.0;
        raw.write_all(&[0x17, 3, 3, 0x40, 0, 1, 2, 3]).unwrap();
        raw.write_all(&[0; 0x4000]).unwrap();
        assert!(client.is_closed());
    }
    let remote = connect(&place, tls).unwrap();
    remote.read_at(&mut [0; 4096], 0).unwrap();
}

/// Counts what comes, and keeps the last record's type.
struct Watched<'a>(UnixStream, &'a std::sync::Mutex<Vec<u8>>);

impl Read for Watched<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = self.0.read(buf)?;
        self.1.lock().unwrap().extend_from_slice(&buf[..len]);
        Ok(len)
    }
}

#[test]
fn a_farewell_is_answered_by_the_end_of_tls() {
    let Some(certificates) = Certificates::make() else { return };
    let place = serve_with(certificates.server("good", false), true, Limits::default());
    let client = started(&place);
    let socket = UnixStream::from(OwnedFd::from(client.0));
    let seen = std::sync::Mutex::new(Vec::new());
    let reading = Watched(socket.try_clone().unwrap(), &seen);
    let tls = certificates.client("good");
    let (mut reading, mut writing) = tls.connect("localhost", reading, socket).unwrap();
    let option = [b"IHAVEOPT", &7u32.to_be_bytes()[..], &9u32.to_be_bytes(), &info("vda", &[])];
    writing.write_all(&option.concat()).unwrap();
    let mut replies = vec![0; 20 + 12 + 20 + 14 + 20];
    reading.read_exact(&mut replies).unwrap();
    let before = seen.lock().unwrap().len();
    writing.write_all(&header(0, 2, 1, 0, 0)).unwrap();
    assert_eq!(reading.read(&mut [0; 1]).unwrap(), 0);
    // One record of two bytes, its type and the tag of the cipher.
    assert_eq!(seen.lock().unwrap().len() - before, 5 + 2 + 1 + 16);
}

#[test]
fn keys_are_renewed_while_requests_go_on() {
    let Some(certificates) = Certificates::make() else { return };
    let place = serve_with(certificates.server("good", false), true, Limits::default());
    let mut roots = rustls::RootCertStore::empty();
    let ca = certificates.folder("good").join("ca-cert.pem");
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "localhost".try_into().unwrap();
    let connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = rustls::StreamOwned::new(connection, started(&place).0);
    let option = [b"IHAVEOPT", &7u32.to_be_bytes()[..], &9u32.to_be_bytes(), &info("vda", &[])];
    stream.write_all(&option.concat()).unwrap();
    stream.read_exact(&mut [0; 20 + 12 + 20 + 14 + 20]).unwrap();
    for round in 0..6_u64 {
        if round % 2 == 1 {
            // Wants new keys of the server as well, and reads what comes under them.
            stream.conn.refresh_traffic_keys().unwrap();
        }
        let len = 300_000_u32;
        stream.write_all(&header(0, 0, round, 4096, len)).unwrap();
        let mut reply = vec![0; 16 + 300_000];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4]);
        assert_eq!(reply[8..16], round.to_be_bytes());
        assert!(reply[16..].iter().all(|byte| *byte == 1));
    }
}

#[test]
fn clients_are_let_in_by_certificate_list_and_name() {
    let Some(certificates) = Certificates::make() else { return };
    let good = certificates.folder("good");
    let refused = |tls: ServerTls, client: ClientTls| {
        let place = serve_with(tls, true, Limits::default());
        let error = connect(&place, client).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Denied | ErrorKind::Busy), "{error}");
        assert_eq!(place.running.negotiated(), 0);
        // The server goes on: the next one is refused in the same way.
        assert!(connect(&place, certificates.client("other")).is_err());
    };
    let open = |tls: ServerTls, client: ClientTls| {
        let place = serve_with(tls, true, Limits::default());
        connect(&place, client).unwrap().read_at(&mut [0; 512], 0).unwrap();
    };
    let closed = || certificates.server("good", true);
    open(closed(), certificates.client("good"));
    refused(closed(), certificates.client("bare"));
    let other = ClientTls::new(Some(&certificates.folder("other")), false).unwrap();
    refused(closed(), other);
    open(closed().admitting(|name| name == "CN=client").unwrap(), certificates.client("good"));
    refused(closed().admitting(|name| name == "CN=else").unwrap(), certificates.client("good"));
    let error = certificates.server("good", false).admitting(|_| true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    // Out of date.
    certificates.sign("old", "client", "DNS:client", -1);
    refused(closed(), ClientTls::new(Some(&certificates.folder("old")), false).unwrap());
    // On the list of those that count no more.
    revoke(&good);
    refused(closed(), certificates.client("good"));
}

/// Puts the client's certificate on the list of its authority.
fn revoke(folder: &Path) {
    let settings = "[ca]\ndefault_ca = own\n[own]\ndatabase = index\ncrlnumber = number\n\
                    default_md = sha256\ndefault_crl_days = 2\n";
    std::fs::write(folder.join("settings"), settings).unwrap();
    std::fs::write(folder.join("index"), "").unwrap();
    std::fs::write(folder.join("number"), "01\n").unwrap();
    let ca = "ca -config settings -cert ca-cert.pem -keyfile ca-key.pem";
    openssl(folder, &format!("{ca} -revoke client-cert.pem")).unwrap();
    openssl(folder, &format!("{ca} -gencrl -out ca-crl.pem")).unwrap();
}

#[test]
fn tools_of_others_work_in_either_version() {
    let Some(certificates) = Certificates::make() else { return };
    let folder = certificates.folder("good");
    let tls = certificates.server("good", true);
    let place = serve_with(tls, true, Limits::default());
    place.running.add_export(export("", Arc::new(MemoryDevice::new(vec![7; 3 << 20])))).unwrap();
    for version in ["1.2", "1.3"] {
        let object = format!(
            "tls-creds-x509,id=c,endpoint=client,dir={},priority=NORMAL:-VERS-ALL:+VERS-TLS{version}",
            text(&folder)
        );
        let image = format!(
            "driver=nbd,server.type=unix,server.path={},tls-creds=c,tls-hostname=localhost",
            text(&place.socket())
        );
        let words = ["--object", &object, "--image-opts", &image];
        let commands = ["write -P 9 100k 700k", "flush", "read -P 9 100k 700k", "read -P 7 0 100k"];
        let commands: Vec<&str> = commands.iter().flat_map(|text| ["-c", text]).collect();
        runs("qemu-io", &[&words[..], &commands].concat());
    }
    let uri = format!(
        "nbds+unix:///?socket={}&tls-certificates={}&tls-hostname=localhost",
        text(&place.socket()),
        text(&folder)
    );
    runs("nbdinfo", &["--can", "tls", &uri]);
    let copy = place.folder.path().join("copy");
    runs("nbdcopy", &[&uri, &text(&copy)]);
    runs("nbdcopy", &[&text(&copy), &uri]);
    let mut expected = vec![7; 3 << 20];
    expected[100 << 10..800 << 10].fill(9);
    assert!(std::fs::read(&copy).unwrap() == expected);
}

/// Runs a tool, if it is there, and expects that it succeeds.
fn runs(program: &str, words: &[&str]) {
    match Command::new(program).args(words).output() {
        Ok(output) => {
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(output.status.success(), "{program} {words:?}: {said}");
            assert!(!said.contains("Pattern verification failed"), "{program} {words:?}: {said}");
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: {program} is not installed");
        }
        Err(error) => panic!("{program}: {error}"),
    }
}
