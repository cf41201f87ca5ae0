// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same words for both programs.

use crate::servers::Server;
use crate::support::{digest, host};
use crate::{copies, fails, junk, place, program, run, same, stored};
use std::fs;
use std::process::{Command, Stdio};

/// Servers that a disk is read from.
const SOURCES: &[(&str, &str)] = &[
    ("plain", "nbdkit -f -U SOCKET file disk"),
    ("noextents", "nbdkit -f -U SOCKET --filter=noextents file disk"),
    (
        "policy",
        "nbdkit -f -U SOCKET --filter=blocksize-policy file disk blocksize-minimum=4096 \
         blocksize-preferred=65536 blocksize-maximum=1M blocksize-error-policy=error",
    ),
    ("delay", "nbdkit -f -U SOCKET --filter=delay file disk delay-read=3ms delay-extents=3ms"),
    ("single", "nbdkit -f -U SOCKET --filter=multi-conn file disk multi-conn-mode=disable"),
    ("simple", "nbdkit -f -U SOCKET --no-sr file disk"),
    ("slow", "nbdkit -f -U SOCKET --filter=noparallel file disk serialize=requests"),
    ("qemu", "qemu-nbd -t -r -e 4 -k SOCKET -f raw disk"),
    ("qcow2", "qemu-nbd -t -r -e 4 -k SOCKET -f qcow2 disk.qcow2"),
];

/// Servers that a disk is written to.
const TARGETS: &[(&str, &str)] = &[
    ("plain", "nbdkit -f -U SOCKET file target"),
    ("nozero", "nbdkit -f -U SOCKET --filter=nozero file target"),
    ("notrim", "nbdkit -f -U SOCKET --filter=nozero file target zeromode=notrim"),
    (
        "policy",
        "nbdkit -f -U SOCKET --filter=blocksize-policy file target blocksize-minimum=4096 \
         blocksize-preferred=65536 blocksize-maximum=1M blocksize-error-policy=error",
    ),
    ("delay", "nbdkit -f -U SOCKET --filter=delay file target delay-write=3ms delay-zero=3ms"),
    ("single", "nbdkit -f -U SOCKET --filter=multi-conn file target multi-conn-mode=disable"),
    ("qemu", "qemu-nbd -t -e 4 -k SOCKET -f raw --discard=unmap target"),
];

#[test]
fn what_servers_have_comes_out_the_same() {
    let Some(place) = place() else { return };
    let [disk, image] = ["disk", "disk.qcow2"].map(|name| place.text(name));
    host("qemu-img", &["convert", "-q", "-f", "raw", "-O", "qcow2", &disk, &image]);
    for (name, words) in SOURCES {
        let server = Server::start(&place, name, words);
        for is_ours in [false, true] {
            copies(&place, is_ours, &[&server.uri(), if is_ours { "ours" } else { "theirs" }]);
        }
        let [disk, ours, theirs] = ["disk", "ours", "theirs"].map(|name| place.path(name));
        same(&disk, &ours, name);
        let (ours, theirs) = (stored(&ours), stored(&theirs));
        assert!(ours * 10 <= theirs * 12, "{name}: {ours} bytes are stored, theirs {theirs}");
        for name in ["ours", "theirs"] {
            fs::remove_file(place.path(name)).unwrap();
        }
    }
}

#[test]
fn what_servers_get_is_the_same() {
    let Some(place) = place() else { return };
    for (name, words) in TARGETS {
        for flags in [&["--flush"][..], &["--allocated"], &["-S", "0", "--no-extents"]] {
            let mut took = Vec::new();
            for is_ours in [false, true] {
                junk(&place.path("target"));
                let server = Server::start(&place, name, words);
                let uri = server.uri();
                copies(&place, is_ours, &[flags, &["disk", &uri]].concat());
                drop(server);
                same(&place.path("disk"), &place.path("target"), &format!("{name} {flags:?}"));
                took.push(stored(&place.path("target")));
            }
            let [theirs, ours] = took[..] else { unreachable!() };
            assert!(ours * 10 <= theirs * 12, "{name} {flags:?}: {ours} stored, theirs {theirs}");
        }
    }
}

#[test]
fn files_are_copied_and_cut_to_the_source() {
    let Some(place) = place() else { return };
    for is_ours in [false, true] {
        let target = if is_ours { "ours" } else { "theirs" };
        copies(&place, is_ours, &["disk", target]);
        same(&place.path("disk"), &place.path(target), target);
        // Longer before, and full of something else.
        fs::write(place.path(target), vec![0xee; 15 << 20]).unwrap();
        copies(&place, is_ours, &["disk", target]);
        same(&place.path("disk"), &place.path(target), target);
        copies(&place, is_ours, &["disk", "null:"]);
    }
    let [ours, theirs] = ["ours", "theirs"].map(|name| stored(&place.path(name)));
    assert!(ours * 10 <= theirs * 12, "{ours} bytes are stored, theirs {theirs}");
}

#[test]
fn pipes_work_both_ways() {
    let Some(place) = place() else { return };
    let wanted = digest(&place.path("disk"));
    let source = Server::start(&place, "source", "nbdkit -f -U SOCKET file disk");
    for is_ours in [false, true] {
        let ours = program(&place, is_ours);
        let shell = |script: &str, uri: &str| {
            let output = Command::new("timeout")
                .args(["60", "bash", "-euo", "pipefail", "-c", script, "bash"])
                .arg(&ours)
                .arg(uri)
                .current_dir(place.path("."))
                .stdin(Stdio::null())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{is_ours} {script}: {said}");
        };
        shell("\"$1\" \"$2\" - | cat >copied", &source.uri());
        assert_eq!(digest(&place.path("copied")), wanted);
        shell("cat disk | \"$1\" -- - - | cat >out2", "");
        assert_eq!(digest(&place.path("out2")), wanted);
        if is_ours {
            // nbdcopy 1.14 cannot write a stream to a file. In pieces that are no blocks.
            shell("dd if=disk bs=10007 status=none | \"$1\" - out3", "");
            assert_eq!(digest(&place.path("out3")), wanted);
            assert!(stored(&place.path("out3")) < 8 << 20, "no holes in a copy of a stream");
        }
        junk(&place.path("target"));
        let server = Server::start(&place, "sink", "nbdkit -f -U SOCKET file target");
        shell("cat disk | \"$1\" - \"$2\"", &server.uri());
        drop(server);
        assert_eq!(digest(&place.path("target")), wanted);
        for name in ["copied", "out2", "target"] {
            fs::remove_file(place.path(name)).unwrap();
        }
    }
}

#[test]
fn servers_are_started_and_ended() {
    let Some(place) = place() else { return };
    for is_ours in [false, true] {
        let target = if is_ours { "ours" } else { "theirs" };
        copies(&place, is_ours, &["--", "[", "nbdkit", "file", "disk", "]", target]);
        same(&place.path("disk"), &place.path(target), target);
        let size = crate::SIZE.to_string();
        host("qemu-img", &["create", "-q", "-f", "qcow2", &place.text("t.qcow2"), &size]);
        let words = ["--flush", "--", "disk", "[", "qemu-nbd", "-f", "qcow2", "t.qcow2", "]"];
        copies(&place, is_ours, &words);
        let [disk, image] = ["disk", "t.qcow2"].map(|name| place.text(name));
        host("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &disk, &image]);
        host("qemu-img", &["check", "-q", "-f", "qcow2", &image]);
    }
    // Both sides, and nobody stays behind.
    let words = ["--", "[", "nbdkit", "file", "disk", "]", "[", "nbdkit", "memory", "14M", "]"];
    copies(&place, true, &words);
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
    fails(&place, &["--", "[", "false", "]", "x"], &["the server false has ended: exit status: 1"]);
    fails(&place, &["[", "/nowhere/nbdkit", "]", "x"], &["has ended", "127"]);
    fails(&place, &["[", "nbdkit", "null:"], &["without ']'"]);
    assert!(place.left_behind().is_empty() && !place.path("x").exists());
}

#[test]
fn whoever_says_that_a_disk_is_zero_is_believed() {
    let Some(place) = place() else { return };
    for flag in ["--destination-is-zero", "--target-is-zero"] {
        let mut made = Vec::new();
        for is_ours in [false, true] {
            junk(&place.path("target"));
            let server = Server::start(&place, "zero", "nbdkit -f -U SOCKET file target");
            copies(&place, is_ours, &[flag, "disk", &server.uri()]);
            drop(server);
            made.push(fs::read(place.path("target")).unwrap());
        }
        // It was not true: both have left what was there.
        assert!(made[0][4 << 20] == 0xee && made[1][4 << 20] == 0xee, "{flag}");
        assert!(made[0] == made[1], "{flag}");
    }
}

#[test]
fn an_allocated_disk_has_no_holes() {
    let Some(place) = place() else { return };
    copies(&place, true, &["--allocated", "disk", "new"]);
    junk(&place.path("old"));
    copies(&place, true, &["--allocated", "disk", "old"]);
    for name in ["new", "old"] {
        same(&place.path("disk"), &place.path(name), name);
        let bytes = stored(&place.path(name));
        assert!(bytes >= crate::SIZE, "{name}: {bytes} bytes are stored");
    }
}

#[test]
fn progress_comes_as_lines() {
    let Some(place) = place() else { return };
    for is_ours in [false, true] {
        let output = Command::new("bash")
            .args(["-c", "exec 5>lines; exec \"$@\"", "bash"])
            .arg(program(&place, is_ours))
            .args(["--progress=5", "disk", "null:"])
            .current_dir(place.path("."))
            .output()
            .unwrap();
        assert!(output.status.success() && output.stdout.is_empty());
        let text = fs::read_to_string(place.path("lines")).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], *lines.last().unwrap()), ("0/100", "100/100"), "{is_ours}");
        assert!(lines.iter().all(|line| line.ends_with("/100")));
    }
    let output = run(&place, true, &["-p", "disk", "null:"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("100% [****"));
}

#[test]
fn requests_can_be_of_any_size_and_number() {
    let Some(place) = place() else { return };
    let source = Server::start(&place, "source", "nbdkit -f -U SOCKET file disk");
    for flags in [
        &["--request-size=4096", "-R", "2"][..],
        &["--request-size=33554432", "-C", "1"],
        &["--synchronous"],
        &["-T", "1", "-R", "1"],
        &["-C", "8", "-R", "64", "--queue-size=1M"],
        &["-S", "65536"],
    ] {
        junk(&place.path("target"));
        let sink = Server::start(&place, "sink", "nbdkit -f -U SOCKET file target");
        copies(&place, true, &[flags, &[&source.uri(), &sink.uri()]].concat());
        drop(sink);
        same(&place.path("disk"), &place.path("target"), &format!("{flags:?}"));
    }
}
