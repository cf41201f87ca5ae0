// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies that cannot work, or that somebody breaks off.

use crate::servers::Server;
use crate::support::{Place, names};
use crate::{SIZE, fails, junk, place, run};
use std::fs::{self, File};

/// What is left of a file that was to be new.
fn nothing_of(place: &Place, name: &str) {
    let names = names(&place.path("."));
    assert!(!names.iter().any(|found| found.contains(name)), "{names:?}");
}

#[test]
fn a_server_that_fails_is_named_with_the_place() {
    let Some(place) = place() else { return };
    let filter = "nbdkit -f -U SOCKET --filter=error file disk error=EIO error-pread-rate=100% \
                  error-file=trigger";
    let server = Server::start(&place, "reads", filter);
    let uri = server.uri();
    File::create(place.path("trigger")).unwrap();
    let texts = ["reading the source failed (at offset 0x0)", &uri];
    fails(&place, &[&uri, "new"], &texts);
    nothing_of(&place, "new");
    // One that is there is not what it was, and the user hears of it.
    junk(&place.path("old"));
    fails(&place, &[&uri, "old"], &["holds a part of the copy alone"]);
    assert_eq!(run(&place, false, &[&uri, "theirs"]).status.code(), Some(1));

    junk(&place.path("target"));
    let filter = filter.replace("disk", "target").replace("pread", "pwrite");
    let server = Server::start(&place, "writes", &filter);
    fails(&place, &["disk", &server.uri()], &["writing the target failed (at offset 0x0)"]);
    let shell = format!("cat disk | \"$0\" -v - '{}'", server.uri());
    let output = std::process::Command::new("bash")
        .args(["-c", &shell])
        .arg(crate::program(&place, true))
        .current_dir(place.path("."))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("writing the target failed (at offset 0x0)"), "{said}");
}

#[test]
fn a_destination_has_to_be_large_enough_and_writable() {
    let Some(place) = place() else { return };
    File::create(place.path("small")).unwrap().set_len(SIZE - 4096).unwrap();
    let server = Server::start(&place, "small", "nbdkit -f -U SOCKET file small");
    let text = "destination size is smaller than source size";
    let words = ["disk", &server.uri()];
    fails(&place, &words, &[text]);
    let theirs = run(&place, false, &words);
    assert!(String::from_utf8_lossy(&theirs.stderr).contains(text));
    // Of a stream that is known when it is there.
    let shell = format!("cat disk | \"$0\" - '{}'", server.uri());
    let output = std::process::Command::new("bash")
        .args(["-c", &shell])
        .arg(crate::program(&place, true))
        .current_dir(place.path("."))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(text));
    // A larger one keeps what it has behind the source's end.
    fs::write(place.path("large"), vec![0xee; 14 << 20]).unwrap();
    let server = Server::start(&place, "large", "nbdkit -f -U SOCKET file large");
    crate::copies(&place, true, &["disk", &server.uri()]);
    drop(server);
    let (large, disk) =
        (fs::read(place.path("large")).unwrap(), fs::read(place.path("disk")).unwrap());
    assert!(large[..disk.len()] == disk && large[disk.len()..].iter().all(|byte| *byte == 0xee));

    junk(&place.path("target"));
    for words in ["nbdkit -f -r -U SOCKET file target", "qemu-nbd -t -r -k SOCKET -f raw target"] {
        let server = Server::start(&place, "ro", words);
        let text = "the destination is read-only, cannot write to it";
        fails(&place, &["disk", &server.uri()], &[text]);
        let theirs = run(&place, false, &["disk", &server.uri()]);
        assert!(String::from_utf8_lossy(&theirs.stderr).contains(text));
    }
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_written() {
    let Some(place) = place() else { return };
    let cases: &[(&[&str], &str)] = &[
        (&["disk"], "expected two names"),
        (&["disk", "a", "b"], "expected two names"),
        (&["disk", "disk"], "are the same file"),
        (&["disk", "./disk"], "are the same file"),
        (&["-O", "qcow2", "disk", "disk"], "are the same file"),
        (&["nowhere", "new"], "nowhere"),
        (&["null:", "new"], "null:"),
        (&["disk", "/nowhere/new"], "/nowhere/"),
        (&["disk", "out"], "s a directory"),
        (&["disk", "[", "]"], "missing command name"),
        (&["--request-size=5000", "disk", "new"], "must be a power of 2 within 4096-33554432"),
        (&["-f", "qcow2", "disk", "new"], "disk"),
        (&["-f", "qcow2", "-", "new"], "front to back"),
        (&["-O", "qcow2", "-", "new"], "front to back"),
        (&["--json", "disk", "-"], "standard output"),
        (&["--resume", "-", "new"], "cannot be read again"),
        (&["--resume", "disk", "null:"], "nothing is kept"),
        (&["nbd+unix:///?socket=/nowhere", "new"], "/nowhere"),
        (&["nbd://127.0.0.1:1", "new"], "127.0.0.1"),
    ];
    let before = crate::support::digest(&place.path("disk"));
    for (words, text) in cases {
        fails(&place, words, &[text]);
    }
    assert_eq!(crate::support::digest(&place.path("disk")), before);
    nothing_of(&place, "new");
}

/// A server that tells of each request as it comes and takes its time for the answer.
const SLOW: &str = "nbdkit -f -U SOCKET --filter=log --filter=delay file disk delay-read=100ms \
                    logfile=asked";

/// Whether that server was asked for data: maps are asked for before it, on their own.
fn reads(place: &Place) -> bool {
    fs::read_to_string(place.path("asked")).is_ok_and(|asked| asked.contains(" Read "))
}

#[test]
fn a_server_that_dies_ends_the_copy() {
    let Some(place) = place() else { return };
    let mut server = Server::start(&place, "dying", SLOW);
    let uri = server.uri();
    let mut running = place.start(place.tranship(&["copy", "--progress=2", &uri, "new"]));
    running.until("read", crate::COPY, || reads(&place));
    server.kill();
    let finished = running.wait(crate::COPY).ended_with(1);
    let finished = finished.saying("reading the source failed (at offset");
    assert!(finished.elapsed.as_secs() < 10);
    nothing_of(&place, "new");
}

#[test]
fn a_server_that_comes_back_in_time_is_asked_again() {
    let Some(place) = place() else { return };
    let mut server = Server::start(&place, "returning", SLOW);
    let uri = server.uri();
    let args = ["copy", "--progress=2", "--retry", "30", &uri, "new"];
    let mut running = place.start(place.tranship(&args));
    running.until("read", crate::COPY, || reads(&place));
    server.kill();
    std::thread::sleep(std::time::Duration::from_millis(700));
    let _again = Server::start(&place, "returning", "nbdkit -f -U SOCKET file disk");
    running.wait(crate::COPY).ended_with(0);
    crate::same(&place.path("disk"), &place.path("new"), "a server that came back");
}
