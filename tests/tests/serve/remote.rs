// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks of other servers where disks are named: in `tranship image`, as a base, and served
//! once more.

use crate::bench::{Bench, Who};
use crate::support::{Running, SHORT, host};
use rustix::process::Signal;
use std::fs;
use std::os::unix::net::UnixStream;
use std::process::Command;

/// The real qemu-nbd with an image's own bytes as its disk, at a socket of its own.
fn far(bench: &Bench, image: &str) -> (Running, String) {
    let socket = bench.path(&format!("{image}.sock"));
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-e", "0", "-f", "raw", "-x", "far", "-k"]).arg(&socket);
    command.arg(bench.path(image));
    let mut server = bench.place.start(command);
    server.until("a socket", SHORT, || UnixStream::connect(&socket).is_ok());
    (server, format!("nbd+unix:///far?socket={}", socket.display()))
}

/// Runs the words with both programs; what they say and their codes.
fn both(bench: &Bench, words: &[&str]) -> [(Option<i32>, String); 2] {
    let ours = bench.place.tranship(&[&["image"], words].concat());
    let mut theirs = Command::new("qemu-img");
    theirs.args(words).current_dir(bench.path(""));
    [ours, theirs].map(|mut command| {
        let output = command.env("LC_ALL", "C").output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    })
}

#[test]
fn image_commands_take_uris_as_qemu_img_does() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("q", "qcow2");
    bench.disk("r", "raw");
    bench.disk("local", "raw");
    fs::write(bench.path("room"), vec![0x5b; 8 << 20]).unwrap();
    let servers = ["q", "r", "room"].map(|image| far(&bench, image));
    let [q, r, room] = servers.each_ref().map(|(_, uri)| uri.as_str());
    for words in [
        &["map", q][..],
        &["map", "--output=json", "-f", "raw", r],
        &["check", q],
        &["compare", q, "local"],
        &["compare", "-f", "raw", "-F", "qcow2", r, q],
        &["measure", "-O", "qcow2", q],
        &["measure", "-O", "qcow2", "-f", "raw", r],
        &["convert", "-O", "raw", q, "out"],
        &["convert", "-n", "-f", "raw", "-O", "raw", "local", r],
        &["dd", "-f", "raw", "-O", "raw", &format!("if={r}"), "of=out", "bs=64k"],
        &["create", "-f", "qcow2", "-F", "raw", "-b", r, "top"],
        &["info", "top"],
        &["rebase", "-u", "-F", "qcow2", "-b", q, "top"],
        &["snapshot", "-l", q],
        &["resize", "-f", "raw", r, "8M"],
        &["create", "-f", "raw", room, "8M"],
        &["create", "-f", "qcow2", room, "4M"],
        &["check", "-f", "qcow2", room],
        &["convert", "-f", "raw", "-O", "qcow2", "local", room],
        &["compare", room, "local"],
        &["convert", "-f", "raw", "-O", "raw", "local", room],
        &["create", "-f", "qcow2", "nbd://localhost:1/nobody", "1M"],
        &["info", "nbd://localhost:1/nobody"],
    ] {
        let [ours, theirs] = both(&bench, words);
        assert_eq!(ours, theirs, "{words:?}");
    }
    // What we make of what was there is whole.
    bench.place.run(&["image", "create", "-f", "qcow2", room, "4M"], SHORT).ended_with(0);
    host("qemu-img", &["check", "-q", "-f", "qcow2", room]);
    host("qemu-io", &["-f", "qcow2", "-c", "read -P 0 0 4M", room]);
    bench.place.run(&["image", "convert", "-O", "qcow2", q, room], SHORT).ended_with(0);
    host("qemu-img", &["check", "-q", "-f", "qcow2", room]);
    host("qemu-img", &["compare", room, &bench.text("local")]);
}

#[test]
fn names_in_images_lead_to_servers_that_were_named_alone() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("r", "raw");
    let (_server, r) = far(&bench, "r");
    host("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &r, &bench.text("top")]);
    let ours = |words: &[&str], code: i32| bench.place.run(words, SHORT).ended_with(code);
    for words in [
        &["image", "map", "top"][..],
        &["image", "convert", "-O", "raw", "top", "out"],
        &["shell", "--ro", "-a", "top", "run"],
        &["copy", "-f", "qcow2", "top", "null:"],
        &["serve", "-r", "-f", "qcow2", "-U", "-", "--run", "true", "top"],
        &["convert", "top", "-os", "out"],
    ] {
        let ended = bench.place.run(words, SHORT);
        assert_ne!(ended.code, Some(0), "{words:?}");
        assert!(ended.stderr.contains("far?socket="), "{words:?}: {}", ended.stderr);
    }
    let map = ours(&["image", "map", "--allow-path", &r, "top"], 0).stdout;
    assert_eq!(map, host("qemu-img", &["map", &bench.text("top")]));
    let words = ["image", "rebase", "--allow-path", &r, "-b", "", "top"];
    ours(&words, 0);
    host("qemu-img", &["compare", "-F", "raw", &bench.text("top"), &bench.text("r")]);
}

#[test]
fn an_image_on_a_server_gets_no_file_of_this_host() {
    let Some(bench) = Bench::new() else { return };
    // A secret in the folder that commands run in.
    fs::write(bench.path("secret"), vec![0x55; 1 << 20]).unwrap();
    let words = ["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", "secret"];
    host("qemu-img", &[&words[..], &[&bench.text("top"), "1M"]].concat());
    let (_server, uri) = far(&bench, "top");
    let older = uri.replace("nbd+unix:///far?socket=", "nbd:unix:") + ":exportname=far";
    for uri in [&uri, &older] {
        for words in [
            &["serve", "-r", "-f", "qcow2", "-U", "-", "--run", "true", uri][..],
            &["image", "convert", "-f", "qcow2", "-O", "raw", uri, "out"],
            &["copy", "-f", "qcow2", uri, "null:"],
        ] {
            let ended = bench.place.run(words, SHORT);
            assert_eq!(ended.code, Some(1), "{words:?}");
            ended.saying("\"secret\"");
        }
    }
}

#[test]
fn what_others_serve_is_served_once_more() {
    let Some(bench) = Bench::new() else { return };
    for image in ["q", "r"] {
        let format = if image == "q" { "qcow2" } else { "raw" };
        bench.disk(image, format);
        let (far, uri) = far(&bench, image);
        let server = bench.start(Who::Serve, &format!("-t -e 4 -f {format} {uri}"));
        let io = |words: &str| {
            host("qemu-io", &["-f", "raw", "-c", words, &bench.uri("")]);
        };
        io("read -P 0x22 1M 1M");
        // A server's image cannot grow.
        io("write -P 0x66 1M 64k");
        io("write -z 1536k 64k");
        io("flush");
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
        drop(far);
        let path = bench.text(image);
        for words in ["read -P 0x66 1M 64k", "read -P 0 1536k 64k"] {
            host("qemu-io", &["-r", "-f", format, "-c", words, &path]);
        }
    }
}
