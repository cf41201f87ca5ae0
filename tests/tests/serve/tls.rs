// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Encrypted serving: `--tls-creds` and its relatives beside qemu-nbd, and the clients of
//! `copy`, `image` and `nbd info`.

use crate::bench::{Bench, Who};
use crate::support::{SHORT, digest, host};
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// The name in the client's certificate as GnuTLS writes it, with QEMU's doubled commas.
const CLIENT: &str = "C=GB,,O=Example,,CN=client.example";

/// Makes the folder `pki` with certificates for a server and a client. False, with a
/// visible line, if there is nothing to make them with.
fn certificates(bench: &Bench) -> bool {
    let folder = bench.path("pki");
    fs::create_dir(&folder).unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    let ca = format!(
        "req -x509 {key} -days 2 -keyout ca-key.pem -out ca-cert.pem -subj /CN=authority \
         -addext basicConstraints=critical,CA:TRUE \
         -addext keyUsage=critical,keyCertSign,cRLSign"
    );
    if !openssl(&folder, &ca) {
        return false;
    }
    for side in ["server", "client"] {
        let extensions = format!(
            "basicConstraints=CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n\
             extendedKeyUsage={side}Auth\nsubjectAltName=DNS:localhost\n"
        );
        fs::write(folder.join("extensions"), extensions).unwrap();
        let request = format!(
            "req -new {key} -keyout {side}-key.pem -out {side}.csr \
             -subj /C=GB/O=Example/CN={side}.example"
        );
        assert!(openssl(&folder, &request));
        let sign = format!(
            "x509 -req -in {side}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial \
             -days 2 -extfile extensions -out {side}-cert.pem"
        );
        assert!(openssl(&folder, &sign));
    }
    true
}

fn openssl(folder: &Path, words: &str) -> bool {
    match Command::new("openssl").args(words.split_whitespace()).current_dir(folder).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "openssl {words}: {said}");
            true
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: openssl is not installed");
            false
        }
        Err(error) => panic!("openssl: {error}"),
    }
}

/// An object with the folder's certificates.
fn object(bench: &Bench, endpoint: &str) -> String {
    format!("tls-creds-x509,id=t,endpoint={endpoint},dir={}", bench.text("pki"))
}

fn uri(bench: &Bench) -> String {
    format!(
        "nbds+unix:///?socket={}&tls-certificates={}&tls-hostname=localhost",
        bench.text("s"),
        bench.text("pki")
    )
}

fn info(words: &[&str]) -> Output {
    Command::new("nbdinfo").args(words).output().unwrap()
}

#[test]
fn clients_have_to_encrypt_and_find_the_same_disk() {
    let Some(bench) = Bench::new() else { return };
    if !certificates(&bench) {
        return;
    }
    let disk = bench.disk("d.raw", "raw");
    for who in [Who::Serve, Who::Link, Who::Real] {
        let words =
            format!("-t -e 4 -f raw --tls-creds t --object {} @d.raw", object(&bench, "server"));
        let server = bench.start(who, &words);
        assert!(!info(&["--size", &bench.uri("")]).status.success(), "{who:?}");
        assert_eq!(info(&["--size", &uri(&bench)]).stdout, b"4194304\n", "{who:?}");
        let ours = bench.place.tranship(&["nbd", "info", "--can", "tls", &uri(&bench)]).output();
        assert!(ours.unwrap().status.success(), "{who:?}");
        // The list of the one and of the other.
        let words = format!(
            "-L -k @s --tls-creds t --tls-hostname localhost --object {}",
            object(&bench, "client")
        );
        let lists = [Who::Link, Who::Real].map(|who| bench.run(who, &words).ended_with(0).stdout);
        assert_eq!(lists[0], lists[1], "{who:?}");
        let wrong = words.replace("localhost", "else.example");
        bench.run(Who::Link, &wrong).ended_with(1).saying("not valid for name");
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
    }
    assert_eq!(digest(&disk), bench.raw(&disk, "raw"));
}

#[test]
fn names_decide_as_with_qemu_nbd() {
    let Some(bench) = Bench::new() else { return };
    if !certificates(&bench) {
        return;
    }
    bench.disk("d.raw", "raw");
    let glob = "authz-list,id=a,policy=deny,rules.0.policy=allow,rules.0.format=glob,rules.0.match";
    for (rule, is_let_in) in [
        (format!("authz-simple,id=a,identity={CLIENT}"), true),
        ("authz-simple,id=a,identity=CN=client.example".to_owned(), false),
        (format!("{glob}=*,,CN=client.*"), true),
        (format!("{glob}=*,,CN=server.*"), false),
        (format!("authz-list,id=a,policy=allow,rules.0.policy=deny,rules.0.match={CLIENT}"), false),
    ] {
        for who in [Who::Link, Who::Real] {
            let words = format!(
                "-t -f raw --tls-creds t --tls-authz a --object {rule} --object {} @d.raw",
                object(&bench, "server")
            );
            let server = bench.start(who, &words);
            let found = info(&["--size", &uri(&bench)]).status.success();
            assert_eq!(found, is_let_in, "{who:?} {rule}");
            server.signal(Signal::TERM);
            server.wait(SHORT).ended_with(0);
        }
    }
}

#[test]
fn nbdkits_words_do_it_too() {
    let Some(bench) = Bench::new() else { return };
    if !certificates(&bench) {
        return;
    }
    bench.disk("d.raw", "raw");
    let pki = bench.text("pki");
    let run = |words: &[&str], script: &str| {
        let words = [&["serve", "-f", "raw", "-r", "-U", "-", "--run", script][..], words].concat();
        bench.place.start(bench.place.tranship(&words)).wait(SHORT)
    };
    let both = "nbdinfo --size \"nbd+unix:///?socket=$unixsocket\"";
    let folder = ["--tls-certificates", &pki, "d.raw"];
    let ended = run(&folder, "nbdinfo --size \"$uri\" && echo \"$uri\"").ended_with(0);
    assert!(ended.stdout.starts_with("4194304\nnbds+unix:"), "{}", ended.stdout);
    assert_ne!(run(&folder, both).code, Some(0));
    run(&[&["--tls=on"], &folder[..]].concat(), both).ended_with(0);
    run(&[&["--tls=off"], &folder[..]].concat(), both).ended_with(0);
    run(&[&["--tls=foo"], &folder[..]].concat(), both).ended_with(1).saying("Invalid TLS mode");
    run(&["--tls=require", "d.raw"], both).ended_with(1).saying("without certificates");
    let folder = [&["--tls-verify-peer"], &folder[..]].concat();
    run(&folder, "nbdinfo --size \"$uri\"").ended_with(0);
    fs::remove_file(bench.path("pki/client-cert.pem")).unwrap();
    assert_ne!(run(&folder, "nbdinfo --size \"$uri\"").code, Some(0));
}

#[test]
fn copies_and_images_take_credentials() {
    let Some(bench) = Bench::new() else { return };
    if !certificates(&bench) {
        return;
    }
    let disk = bench.disk("d.raw", "raw");
    let for_server = object(&bench, "server");
    let (socket, object) = (bench.text("s"), object(&bench, "client"));
    let options = format!(
        "driver=nbd,server.type=unix,server.path={socket},tls-creds=t,tls-hostname=localhost"
    );
    let json = format!(
        r#"json:{{"driver":"nbd","server":{{"type":"unix","path":"{socket}"}},"tls-creds":"t","tls-hostname":"localhost"}}"#
    );
    for who in [Who::Serve, Who::Real] {
        let words = format!("-t -e 8 -f raw --tls-creds t --object {for_server} @d.raw");
        let server = bench.start(who, &words);
        let runs = |words: &[&str]| bench.place.start(bench.place.tranship(words)).wait(SHORT);
        let copy = bench.text("copy");
        runs(&["copy", "--object", &object, &json, &copy]).ended_with(0);
        assert_eq!(digest(&bench.path("copy")), digest(&disk), "{who:?}");
        runs(&["copy", "--object", &object, &copy, &json]).ended_with(0);
        runs(&["copy", &uri(&bench), &copy]).ended_with(0);
        runs(&["copy", &json, &copy]).ended_with(1).saying("no TLS credentials with id 't'");
        let image = ["image", "convert", "--object", &object, "--image-opts", "-O", "qcow2"];
        let target = bench.text("copy.qcow2");
        runs(&[&image[..], &[&options, &target]].concat()).ended_with(0);
        host(
            "qemu-img",
            &["compare", "-q", "-f", "raw", "-F", "qcow2", &bench.text("d.raw"), &target],
        );
        runs(&["image", "info", "--object", &object, "--image-opts", &options]).ended_with(0);
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
    }
}
