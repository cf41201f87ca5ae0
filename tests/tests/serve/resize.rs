// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that get another size while they are served.

use crate::bench::{Bench, Who};
use crate::support::{SHORT, host};
use rustix::process::Signal;
use std::fs::File;

#[test]
fn the_next_client_sees_the_new_size_of_a_raw_disk() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("d.raw", "raw");
    let file = File::options().write(true).open(&disk).unwrap();
    let server = bench.start(Who::Serve, "-t -f raw @d.raw");
    let size = || host("nbdinfo", &["--size", &bench.uri("")]).trim().to_owned();
    let io = |words: &str| host("qemu-io", &["-f", "raw", "-c", words, &bench.uri("")]);
    assert_eq!(size(), "4194304");
    file.set_len(8 << 20).unwrap();
    assert_eq!(size(), "8388608");
    io("read -P 0 6M 1M");
    io("write -P 0x66 7M 1M");
    io("read -P 0x66 7M 1M");
    file.set_len(1 << 20).unwrap();
    assert_eq!(size(), "1048576");
    io("read -P 0x11 0 64k");
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}

#[test]
fn an_image_that_is_served_cannot_be_resized() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.qcow2", "qcow2");
    for words in ["-t", "-t -r"] {
        let server = bench.start(Who::Serve, &format!("{words} -f qcow2 @d.qcow2"));
        let resized = ["image", "resize", "-f", "qcow2", &bench.text("d.qcow2"), "8M"];
        bench.place.run(&resized, SHORT).ended_with(1).saying("lock");
        let size = host("nbdinfo", &["--size", &bench.uri("")]);
        assert_eq!(size.trim(), "4194304");
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
    }
}
