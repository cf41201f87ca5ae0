// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Encrypted connections: our client with our server's half and with others' servers.

use crate::client::ACK;
use crate::foreign::{Foreign, qemu_nbd, text};
use crate::remote::{options, pattern, work};
use crate::scripted::{Mode, Peer, chunk, data, option_reply};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use tranship_block::{BlockDevice, ErrorKind, Result};
use tranship_nbd::{
    ClientOptions, ClientTls, Remote, ServerTls, TlsReading, TlsWriting, Uri, list_exports,
};

/// Folders with certificates, of one authority and of another.
pub(crate) struct Certificates(tempfile::TempDir);

impl Certificates {
    /// `None`, with a visible line, if there is nothing to make them with.
    pub(crate) fn make() -> Option<Self> {
        let made = Self(tempfile::tempdir().unwrap());
        for name in ["good", "other"] {
            let folder = made.folder(name);
            std::fs::create_dir(&folder).unwrap();
            let ca = format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
                      -keyout ca-key.pem -out ca-cert.pem -subj /CN=authority-{name} \
                 -addext basicConstraints=critical,CA:TRUE \
                 -addext keyUsage=critical,keyCertSign,cRLSign"
            );
            openssl(&folder, &ca)?;
            made.sign(name, "server", "DNS:localhost,DNS:disk.example,IP:127.0.0.1", 2);
            made.sign(name, "client", "DNS:client", 2);
        }
        // The other authority's folders of the same server, and one that is out of date.
        std::fs::create_dir(made.folder("old")).unwrap();
        for file in ["ca-cert.pem", "ca-key.pem"] {
            std::fs::copy(made.folder("good").join(file), made.folder("old").join(file)).unwrap();
        }
        made.sign("old", "server", "DNS:localhost", -1);
        std::fs::create_dir(made.folder("bare")).unwrap();
        let ca = made.folder("good").join("ca-cert.pem");
        std::fs::copy(ca, made.folder("bare").join("ca-cert.pem")).unwrap();
        Some(made)
    }

    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn sign(&self, name: &str, side: &str, names: &str, days: i32) {
        let folder = self.folder(name);
        let extensions = format!(
            "basicConstraints=CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n\
             extendedKeyUsage={side}Auth\nsubjectAltName={names}\n"
        );
        std::fs::write(folder.join("extensions"), extensions).unwrap();
        let request = format!(
            "req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
             -keyout {side}-key.pem -out {side}.csr -subj /CN={side}"
        );
        openssl(&folder, &request).unwrap();
        let sign = format!(
            "x509 -req -in {side}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial \
             -days {days} -extfile extensions -out {side}-cert.pem"
        );
        openssl(&folder, &sign).unwrap();
    }

    pub(crate) fn client(&self, name: &str) -> ClientTls {
        ClientTls::new(Some(&self.folder(name)), true).unwrap()
    }

    pub(crate) fn server(&self, name: &str, verify_clients: bool) -> ServerTls {
        ServerTls::from_folder(&self.folder(name), verify_clients).unwrap()
    }
}

pub(crate) fn openssl(folder: &Path, words: &str) -> Option<()> {
    match Command::new("openssl").args(words.split_whitespace()).current_dir(folder).output() {
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "openssl {words}: {errors}");
            Some(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            eprintln!("skipped: openssl is not installed");
            None
        }
        Err(error) => panic!("openssl: {error}"),
    }
}

/// Both halves together.
struct Both(TlsReading<UnixStream>, TlsWriting<UnixStream>);

impl Read for Both {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Both {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.1.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

/// What a client with these means sees of a server with those: a read of 200,000 bytes.
fn met(server: &ServerTls, client: ClientTls) -> Result<Vec<u8>> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = server.clone();
    let thread = std::thread::spawn(move || {
        let mut peer = Peer(theirs);
        peer.hello();
        assert_eq!(peer.option().0, 5);
        peer.say(&option_reply(5, ACK, b""));
        let reading = peer.0.try_clone().unwrap();
        let mut plain = peer.0.try_clone().unwrap();
        let Ok((reading, writing)) = server.accept(reading, peer.0) else {
            // Whoever closes with bytes unread takes back what he said last.
            let _ = plain.read_to_end(&mut Vec::new());
            return;
        };
        let mut peer = Peer(Both(reading, writing));
        peer.negotiate(Mode::Structured, 1 << 20, 0xd6d);
        let asked = peer.request();
        let bytes = pattern(usize::try_from(asked.len).unwrap(), 1);
        peer.say(&chunk(asked.cookie, 1, 1, &data(asked.offset, &bytes)));
        peer.drain();
    });
    let result = Remote::from_stream(ours, &ClientOptions { tls: Some(client), ..options("") })
        .and_then(|remote| {
            assert!(remote.facts().tls);
            let mut buf = vec![0; 200_000];
            remote.read_at(&mut buf, 0)?;
            Ok(buf)
        });
    // A server whose client is not let in panics in its script, and that is all right.
    let _ = thread.join();
    result
}

#[test]
fn certificates_decide_who_talks_to_whom() {
    let Some(certificates) = Certificates::make() else { return };
    let open = certificates.server("good", false);
    let closed = certificates.server("good", true);
    let bytes = pattern(200_000, 1);
    let good = || certificates.client("good");
    assert!(met(&open, good()).unwrap() == bytes);
    assert!(met(&closed, good()).unwrap() == bytes);
    assert!(met(&open, certificates.client("bare")).unwrap() == bytes);
    assert!(met(&open, good().for_host("disk.example")).unwrap() == bytes);
    assert!(met(&open, good().for_host("127.0.0.1")).unwrap() == bytes);
    let blind = ClientTls::new(None, false).unwrap();
    assert!(met(&open, blind.clone()).unwrap() == bytes);
    assert!(met(&certificates.server("old", false), blind).unwrap() == bytes);
    let refusals = [
        (met(&open, certificates.client("other")), "UnknownIssuer"),
        (met(&open, good().for_host("else.example")), "not valid for name \"else.example\""),
        (met(&certificates.server("old", false), good()), "invalid peer certificate"),
        (met(&closed, certificates.client("bare")), "CertificateRequired"),
        (met(&closed, ClientTls::new(None, false).unwrap()), "CertificateRequired"),
        (met(&open, ClientTls::new(None, true).unwrap()), "UnknownIssuer"),
    ];
    for (number, (result, expected)) in refusals.into_iter().enumerate() {
        let error = result.unwrap_err();
        assert!(error.to_string().contains(expected), "{number}: {error}");
        assert_eq!(error.kind(), ErrorKind::Denied, "{number}: {error}");
    }
    let error = met(&open, good().for_host("a b")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn folders_without_what_is_needed_are_named() {
    let Some(certificates) = Certificates::make() else { return };
    let bare = certificates.folder("bare");
    let error = ServerTls::from_folder(&bare, false).unwrap_err();
    assert_eq!((error.kind(), error.path()), (ErrorKind::NotFound, Some(bare.as_path())));
    let empty = certificates.folder("");
    let error = ClientTls::new(Some(&empty), true).unwrap_err();
    assert_eq!(error.path(), Some(empty.join("ca-cert.pem").as_path()), "{error}");
    std::fs::write(bare.join("server-cert.pem"), "nonsense").unwrap();
    let error = ServerTls::from_folder(&bare, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

/// A greeting and what follows STARTTLS, and what the client makes of it.
fn after_starttls(reply: Vec<u8>, tls: ClientTls) -> tranship_block::Error {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut peer = Peer(theirs);
        peer.hello();
        assert_eq!(peer.option().0, 5);
        peer.say(&reply);
        peer.drain();
    });
    let error = Remote::from_stream(ours, &ClientOptions { tls: Some(tls), ..options("") });
    thread.join().unwrap();
    error.unwrap_err()
}

#[test]
fn a_client_that_wants_tls_takes_nothing_else() {
    let tls = || ClientTls::new(None, false).unwrap();
    let error = after_starttls(option_reply(5, 0x8000_0001, b"what?"), tls());
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("does not have it"), "{error}");
    // Somebody in the middle adds a reply that would count after the handshake.
    let injected = [option_reply(5, ACK, b""), option_reply(11, ACK, b"")].concat();
    let error = after_starttls(injected, tls());
    assert!(error.message().contains("in plain text after"), "{error}");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut peer = Peer(theirs);
        peer.hello();
        peer.option();
        peer.say(&option_reply(5, ACK, b""));
        // Past the client's own hello.
        let mut byte = [0];
        peer.0.read_exact(&mut byte).unwrap();
        peer.say(&[0x17; 100]);
        peer.drain();
    });
    let options = ClientOptions { tls: Some(tls()), ..options("") };
    let error = Remote::from_stream(ours, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    thread.join().unwrap();
    // A server whose handshake has no options cannot encrypt.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"NBDMAGICIHAVEOPT\0\0").unwrap();
    let error = Remote::from_stream(ours, &options).unwrap_err();
    assert!(error.message().contains("too old"), "{error}");
}

#[test]
fn both_directions_are_used_at_the_same_time() {
    const LEN: usize = 6 << 20;
    let Some(certificates) = Certificates::make() else { return };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = certificates.server("good", false);
    let pump = |mut reading: TlsReading<UnixStream>, mut writing: TlsWriting<UnixStream>| {
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for piece in pattern(LEN, 6).chunks(300_001) {
                    writing.write_all(piece).unwrap();
                }
                writing.finish().unwrap();
            });
            let mut found = Vec::new();
            reading.read_to_end(&mut found).unwrap();
            assert!(found == pattern(LEN, 6));
        });
    };
    let thread = std::thread::spawn(move || {
        let (reading, writing) = server.accept(theirs.try_clone().unwrap(), theirs).unwrap();
        pump(reading, writing);
    });
    let client = certificates.client("good");
    let (reading, writing) = client.connect("localhost", ours.try_clone().unwrap(), ours).unwrap();
    pump(reading, writing);
    thread.join().unwrap();
}

pub(crate) fn encrypted(tls: ClientTls) -> ClientOptions {
    ClientOptions { tls: Some(tls), ..options("") }
}

#[test]
fn an_encrypted_qemu_nbd_is_a_disk() {
    let Some(certificates) = Certificates::make() else { return };
    let object = format!(
        "--object=tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir={}",
        text(&certificates.folder("good"))
    );
    let server = Foreign::start("qemu-nbd", |socket, disk| {
        qemu_nbd(socket, disk, &["--tls-creds=t", &object])
    });
    let Some(server) = server else { return };
    let remote = server.connect(&encrypted(certificates.client("good")));
    assert!(remote.facts().tls && remote.facts().extended && remote.connections() > 1);
    work(&remote);
    let listing = list_exports(&server.address(), &encrypted(certificates.client("good"))).unwrap();
    assert!(listing.tls && listing.exports.len() == 1);
    let plain = Remote::connect(&server.address(), &options("")).unwrap_err();
    assert_eq!(plain.kind(), ErrorKind::Denied);
    assert!(plain.message().contains("requires TLS"), "{plain}");
    let other = encrypted(certificates.client("other"));
    let error = Remote::connect(&server.address(), &other).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    let folder = certificates.folder("good");
    let uri = format!(
        "nbds+unix:///?socket={}&tls-certificates={}&tls-hostname=disk.example",
        text(&server.socket),
        text(&folder)
    );
    let uri = Uri::parse(&uri).unwrap();
    let tls = uri.client_tls().unwrap();
    Remote::connect(&uri.address, &ClientOptions { tls, ..options("") }).unwrap();
}

#[test]
fn an_encrypted_nbdkit_is_a_disk() {
    let Some(certificates) = Certificates::make() else { return };
    let server = Foreign::start("nbdkit", |socket, disk| {
        vec![
            "--foreground".to_owned(),
            format!("--unix={}", text(socket)),
            "--tls=require".to_owned(),
            "--tls-verify-peer".to_owned(),
            format!("--tls-certificates={}", text(&certificates.folder("good"))),
            "file".to_owned(),
            text(disk),
        ]
    });
    let Some(server) = server else { return };
    let remote = server.connect(&encrypted(certificates.client("good")));
    assert!(remote.facts().tls);
    work(&remote);
}
