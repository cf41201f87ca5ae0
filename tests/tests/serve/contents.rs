// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What clients read and write.

use crate::bench::{Bench, Who};
use crate::support::{SHORT, digest, host};
use rustix::process::Signal;
use std::fs;

#[test]
fn clients_read_every_format() {
    let Some(bench) = Bench::new() else { return };
    for format in ["raw", "qcow2", "vhdx", "vmdk", "vpc"] {
        let disk = bench.disk(&format!("disk.{format}"), format);
        let expected = bench.raw(&disk, format);
        let words = format!("-r -t -e 4 -x vda -f {format} @disk.{format}");
        let server = bench.start(Who::Link, &words);
        let copy = bench.text("copy.raw");
        host("nbdcopy", &[&bench.uri("vda"), &copy]);
        assert_eq!(digest(&bench.path("copy.raw")), expected, "nbdcopy of {format}");
        host("qemu-img", &["convert", "-f", "raw", "-O", "raw", &bench.uri("vda"), &copy]);
        assert_eq!(digest(&bench.path("copy.raw")), expected, "qemu-img of {format}");
        // What is not there need not be read.
        let map = host("nbdinfo", &["--map", &bench.uri("vda")]);
        // A VHDX of this size has one block.
        let has_holes = map.contains("hole,zero") || format == "vhdx";
        assert!(has_holes && map.contains("data"), "{format}: {map}");
        let refused = std::process::Command::new("qemu-io")
            .args(["-f", "raw", "-c", "write 0 512", &bench.uri("vda")])
            .output()
            .unwrap();
        assert!(!refused.status.success(), "{format}: {refused:?}");
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
        assert_eq!(bench.raw(&disk, format), expected, "{format} was changed");
    }
}

#[test]
fn clients_write_every_format() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("source.raw", "raw");
    for format in ["raw", "qcow2", "vhdx", "vmdk", "vpc"] {
        let path = bench.text(&format!("disk.{format}"));
        host("qemu-img", &["create", "-q", "-f", format, &path, "4M"]);
        let size = host("qemu-img", &["info", "-f", format, "--output=json", &path]);
        assert!(size.contains("virtual-size"), "{size}");
        let server = bench.start(Who::Link, &format!("-f {format} @disk.{format}"));
        host(
            "qemu-img",
            &["convert", "-n", "-f", "raw", "-O", "raw", &bench.text("source.raw"), &bench.uri("")],
        );
        // The only client has left.
        server.wait(SHORT).ended_with(0);
        assert!(!bench.path("s").exists(), "{format}");
        let source = bench.text("source.raw");
        host("qemu-img", &["compare", "-f", "raw", "-F", format, &source, &path]);
        if format != "raw" && format != "vpc" {
            host("qemu-img", &["check", "-q", "-f", format, &path]);
        }
    }
}

#[test]
fn a_temporary_overlay_leaves_the_disk_alone() {
    let Some(bench) = Bench::new() else { return };
    for who in [Who::Link, Who::Serve] {
        let disk = bench.disk("d.qcow2", "qcow2");
        let before = digest(&disk);
        let server = bench.start(who, "-s -t -f qcow2 @d.qcow2");
        let io = |words: &str| {
            host("qemu-io", &["-f", "raw", "-c", words, &bench.uri("")]);
        };
        io("write -P 0x77 0 2M");
        io("read -P 0x77 0 2M");
        io("read -P 0x33 3145728 4096");
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
        assert_eq!(digest(&disk), before, "{who:?}");
        assert_eq!(bench.place.left_behind(), [""; 0], "{who:?}");
    }
}

#[test]
fn parts_and_snapshots_are_served() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("d.qcow2", "qcow2");
    let path = disk.to_str().unwrap();
    host("qemu-img", &["snapshot", "-c", "before", path]);
    host("qemu-io", &["-f", "qcow2", "-c", "write -P 0x44 1M 64k", path]);
    for (words, checks) in [
        ("-l before", ["read -P 0x22 1M 64k", "read -P 0x11 0 64k"]),
        ("-l snapshot.name=before", ["read -P 0x22 1M 64k", "read -P 0x11 0 64k"]),
        ("-r", ["read -P 0x44 1M 64k", "read -P 0x22 1114112 64k"]),
        ("-r -o 1048576", ["read -P 0x44 0 64k", "read -P 0x22 64k 64k"]),
    ] {
        for who in [Who::Link, Who::Real] {
            let server = bench.start(who, &format!("{words} -f qcow2 @d.qcow2"));
            let [first, second] = checks;
            host("qemu-io", &["-r", "-f", "raw", "-c", first, "-c", second, &bench.uri("")]);
            server.wait(SHORT).ended_with(0);
        }
    }
    bench.run(Who::Link, "-k @s -f qcow2 -o 4194304 @d.qcow2").ended_with(1);
}

#[test]
fn what_was_flushed_survives_a_kill() {
    let Some(bench) = Bench::new() else { return };
    for format in ["raw", "qcow2"] {
        let name = format!("d.{format}");
        host("qemu-img", &["create", "-q", "-f", format, &bench.text(&name), "16M"]);
        let server = bench.start(Who::Serve, &format!("-t -f {format} @{name}"));
        host("qemu-io", &["-f", "raw", "-c", "write -P 0x55 0 8M", "-c", "flush", &bench.uri("")]);
        server.signal(Signal::KILL);
        let ended = server.wait(SHORT);
        assert_eq!(ended.signal, Some(9), "{ended:?}");
        // What is left is a socket that nobody listens on, which is replaced.
        assert!(bench.path("s").exists());
        let server = bench.start(Who::Serve, &format!("-r -f {format} @{name}"));
        host("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0x55 0 8M", &bench.uri("")]);
        server.wait(SHORT).ended_with(0);
        if format == "qcow2" {
            host("qemu-img", &["check", "-q", "-f", format, &bench.text(&name)]);
        }
    }
}

#[test]
fn several_disks_are_several_exports() {
    let Some(bench) = Bench::new() else { return };
    for format in ["raw", "qcow2", "vhdx"] {
        bench.disk(&format!("d.{format}"), format);
    }
    let words: Vec<String> =
        ["raw", "qcow2", "vhdx"].map(|f| format!("{f}={}", bench.text(&format!("d.{f}")))).into();
    let server = bench.start(Who::Serve, &format!("-r -t -e 0 {}", words.join(" ")));
    for name in ["raw", "qcow2", "vhdx"] {
        let uri = bench.uri(name);
        host("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0x22 1M 1M", &uri]);
    }
    let list = host("nbdinfo", &["--list", &bench.uri("")]);
    for name in ["raw", "qcow2", "vhdx"] {
        assert!(list.contains(&format!("export=\"{name}\"")), "{list}");
    }
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}

#[test]
fn a_disk_that_was_taken_for_raw_stays_raw() {
    let Some(bench) = Bench::new() else { return };
    fs::write(bench.path("d.img"), vec![0; 1 << 20]).unwrap();
    let server = bench.start(Who::Link, "-t @d.img");
    fs::write(bench.path("magic"), b"QFI\xfb\0\0\0\x03").unwrap();
    let write = |words: &str| {
        let output = std::process::Command::new("qemu-io")
            .args(["-f", "raw", "-c", words, &bench.uri("")])
            .output()
            .unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let said = write(&format!("write -s {} 0 512", bench.text("magic")));
    assert!(said.contains("Operation not permitted"), "{said}");
    let said = write("write -P 0x11 0 512");
    assert!(said.contains("wrote 512/512"), "{said}");
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0).saying("Image format was not specified for");
    assert!(fs::read(bench.path("d.img")).unwrap().starts_with(&[0x11; 512]));
}

#[test]
fn images_get_no_file_outside_of_their_folder() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("base.raw", "raw");
    let image = bench.text("out/d.qcow2");
    let words = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &bench.text("base.raw"), &image];
    host("qemu-img", &words);
    bench.run(Who::Link, "-k @s -r -f qcow2 @out/d.qcow2").ended_with(1).saying("--allow-path DIR");
    let words = format!("-r -f qcow2 --allow-path {} @out/d.qcow2", bench.text(""));
    let server = bench.start(Who::Link, &words);
    host("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0x22 1M 1M", &bench.uri("")]);
    server.wait(SHORT).ended_with(0);
}

#[test]
fn zeroes_and_space_are_kept_as_wanted() {
    use std::os::unix::fs::MetadataExt;
    let Some(bench) = Bench::new() else { return };
    for (words, io, is_kept) in [
        ("", "discard 1M 1M", true),
        ("--discard=unmap", "discard 1M 1M", false),
        ("", "write -z -u 1M 1M", true),
        ("--discard=unmap", "write -z -u 1M 1M", false),
        ("--discard=unmap --detect-zeroes=unmap", "write -P 0 1M 1M", false),
        ("--discard=unmap --detect-zeroes=on", "write -P 0 1M 1M", true),
        ("--cache=writethrough", "write -P 0 1M 1M", true),
        ("--cache=unsafe --aio=threads", "write -P 0 1M 1M", true),
    ] {
        let disk = bench.disk("d.raw", "raw");
        let server = bench.start(Who::Link, &format!("-f raw {words} @d.raw"));
        host("qemu-io", &["-f", "raw", "-d", "unmap", "-c", io, &bench.uri("")]);
        server.wait(SHORT).ended_with(0);
        let blocks = disk.metadata().unwrap().blocks();
        assert_eq!(blocks >= 2048, is_kept, "{words}, {io}: {blocks} blocks");
    }
}
