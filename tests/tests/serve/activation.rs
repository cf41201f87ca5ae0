// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets that somebody else has opened, as systemd does it.

use crate::bench::{Bench, Who};
use crate::client::Client;
use crate::support::{SHORT, host, installed, listens};
use rustix::process::Signal;
use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Command;

fn read(bench: &Bench) {
    let uri = bench.uri("vda");
    host("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0x11 0 64k", &uri]);
}

#[test]
fn systemd_starts_it_when_a_client_comes() {
    let Some(bench) = Bench::new() else { return };
    if !installed("systemd-socket-activate") {
        return;
    }
    bench.disk("d.raw", "raw");
    for who in [Who::Serve, Who::Link, Who::Real] {
        let plain = bench.server(who, "-r -x vda -f raw @d.raw");
        // It hands few variables on.
        let launcher = "exec systemd-socket-activate -l \"$PWD/s\"";
        let mut server = bench.place.start(bench.behind(launcher, &plain));
        let socket = bench.path("s");
        server.until("a socket", SHORT, || listens(&socket));
        read(&bench);
        // It has become the server, which ends with its last client.
        server.wait(SHORT).ended_with(0);
        let _ = fs::remove_file(&socket);
    }
}

/// Starts a server with `LISTEN_FDS` of `count`, of which the first is a socket at `s` if
/// that is wanted.
fn start(bench: &Bench, who: Who, [process, count]: [&str; 2], words: &str) -> Command {
    // The shell becomes the server, and so its number is the server's.
    let script = format!("export LISTEN_PID={process} LISTEN_FDS={count}; exec");
    bench.behind(&script, &bench.server(who, words))
}

#[test]
fn descriptors_that_are_no_sockets_are_refused() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    for who in [Who::Serve, Who::Link, Who::Real] {
        // There is nothing at 3, and there is a file.
        let words = "-r -x vda -f raw @d.raw";
        bench.place.start(start(&bench, who, ["$$", "1"], words)).wait(SHORT).ended_with(1);
        let plain = bench.server(who, words);
        let script = "exec 3<d.raw; export LISTEN_PID=$$ LISTEN_FDS=1; exec";
        bench.place.start(bench.behind(script, &plain)).wait(SHORT).ended_with(1);
        if who != Who::Real {
            for count in ["x", "-1", "65", "99999999999"] {
                let ended = bench.place.start(start(&bench, who, ["$$", count], words));
                ended.wait(SHORT).ended_with(1).saying("LISTEN_FDS");
            }
        }
    }
}

#[test]
fn sockets_of_other_processes_are_left_alone() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    let elsewhere = UnixListener::bind(bench.path("elsewhere")).unwrap();
    for who in [Who::Serve, Who::Link, Who::Real] {
        let command = start(&bench, who, ["1", "1"], "-k @s -t -r -x vda -f raw @d.raw");
        let mut server = bench.place.start(command);
        let socket = bench.path("s");
        server.until("a socket", SHORT, || listens(&socket));
        read(&bench);
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
    }
    drop(elsewhere);
}

#[test]
fn the_file_with_its_number_is_for_one_server() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    for who in [Who::Serve, Who::Link, Who::Real] {
        let mut server = bench.start(who, "--pid-file @pid -t -r -x vda -f raw @d.raw");
        let number = |server: &crate::support::Running| {
            fs::read_to_string(bench.path("pid")).ok() == Some(format!("{}\n", server.id()))
        };
        server
            .until("a file", SHORT, || fs::metadata(bench.path("pid")).is_ok_and(|m| m.len() > 0));
        assert!(number(&server), "{who:?}");
        for other in [Who::Serve, Who::Link, Who::Real] {
            bench
                .run(other, "-k @other --pid-file @pid -r -f raw @d.raw")
                .ended_with(1)
                .saying("Cannot lock pid file");
        }
        assert!(number(&server), "{who:?}");
        let mut client = Client::connect(&bench.path("s"));
        client.go(false);
        assert_eq!(client.errno(0, 0, 0, 512), 0);
        drop(client);
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
        // What is left of one that has ended is in nobody's way.
        let server = bench.start(who, "--pid-file @pid -r -f raw @d.raw");
        host("qemu-io", &["-r", "-f", "raw", "-c", "read 0 512", &bench.uri("")]);
        server.wait(SHORT).ended_with(0);
        fs::remove_file(bench.path("pid")).unwrap();
    }
}
