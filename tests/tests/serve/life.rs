// SPDX-License-Identifier: Apache-2.0 OR MIT
//! When a server starts to listen, when it ends, and what it leaves.

use crate::bench::{Bench, Who};
use crate::support::{SHORT, host};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Waits until it holds.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < SHORT, "no {what}");
        sleep(Duration::from_millis(5));
    }
}

fn use_it(bench: &Bench) {
    host("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0x11 0 64k", &bench.uri("")]);
}

#[test]
fn it_ends_with_its_last_client_unless_it_is_to_stay() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    for who in [Who::Link, Who::Serve, Who::Real] {
        for words in ["", "-e 2"] {
            let mut server = bench.start(who, &format!("{words} -r -f raw @d.raw"));
            // Whoever only connects is no client: `start` has done it as well.
            drop(UnixStream::connect(bench.path("s")).unwrap());
            let mut stays = 0;
            server.until("a moment", SHORT, || {
                stays += 1;
                stays > 30
            });
            use_it(&bench);
            server.wait(SHORT).ended_with(0);
            assert!(!bench.path("s").exists(), "{who:?}");
        }
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let mut server = bench.start(who, "-t -r -f raw @d.raw");
            use_it(&bench);
            use_it(&bench);
            let mut stays = 0;
            server.until("a moment", SHORT, || {
                stays += 1;
                stays > 30
            });
            server.signal(signal);
            server.wait(SHORT).ended_with(0);
            assert!(!bench.path("s").exists(), "{who:?}");
        }
    }
}

#[test]
fn a_client_in_the_middle_does_not_hold_up_the_end() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    let server = bench.start(Who::Serve, "-e 0 -t -f raw @d.raw");
    let _silent = UnixStream::connect(bench.path("s")).unwrap();
    let client = bench.place.start({
        let mut command = std::process::Command::new("qemu-io");
        command.args(["-f", "raw", "-c", "write -P 1 0 1M", "-c", "sleep 20000"]);
        command.arg(bench.uri(""));
        command
    });
    until("write", || fs::read(bench.path("d.raw")).unwrap().starts_with(&[1; 512]));
    let begun = Instant::now();
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(client);
}

#[test]
fn it_goes_to_the_background_when_clients_can_connect() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    for who in [Who::Link, Who::Serve, Who::Real] {
        let words = "-k @s --fork --pid-file @pid -t -r -f raw @d.raw";
        let first = bench.run(who, words).ended_with(0);
        assert_eq!((first.stdout.as_str(), first.stderr.as_str()), ("", ""), "{who:?}");
        let text = fs::read_to_string(bench.path("pid")).unwrap();
        let number: i32 = text.strip_suffix('\n').unwrap().parse().unwrap();
        let pid = Pid::from_raw(number).unwrap();
        let mode = bench.path("pid").metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{who:?}");
        use_it(&bench);
        let session = |number: &str| {
            let stat = fs::read_to_string(format!("/proc/{number}/stat")).unwrap();
            stat.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().to_owned()
        };
        assert_ne!(session(&number.to_string()), session("self"), "{who:?}");
        kill_process(pid, Signal::TERM).unwrap();
        // Nobody may be there who takes note of its end.
        let exe = format!("/proc/{number}/exe");
        until("end", || fs::read_link(&exe).is_err());
        assert!(!bench.path("s").exists(), "{who:?}");
        // As with the real one, the file stays.
        fs::remove_file(bench.path("pid")).unwrap();
    }
}

#[test]
fn in_the_background_a_failure_is_still_told() {
    let Some(bench) = Bench::new() else { return };
    for who in [Who::Link, Who::Serve] {
        bench.run(who, "-k @s --fork -f raw @none.raw").ended_with(1).saying("none.raw");
        bench.run(who, "-k @s --fork --nope").ended_with(1).saying("--nope");
    }
}

#[test]
fn a_live_server_is_not_pushed_aside() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    let server = bench.start(Who::Serve, "-t -r -f raw @d.raw");
    bench.run(Who::Serve, "-k @s -r -f raw @d.raw").ended_with(1).saying("listens");
    use_it(&bench);
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
    fs::write(bench.path("s"), "no socket").unwrap();
    bench.run(Who::Serve, "-k @s -r -f raw @d.raw").ended_with(1).saying("socket");
    assert_eq!(fs::read(bench.path("s")).unwrap(), b"no socket");
}

#[test]
fn only_one_may_write_an_image() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.qcow2", "qcow2");
    for [first, second] in [[Who::Serve, Who::Link], [Who::Real, Who::Link], [Who::Link, Who::Real]]
    {
        let server = bench.start(first, "-t -f qcow2 @d.qcow2");
        bench
            .run(second, "-k @other -f qcow2 @d.qcow2")
            .ended_with(1)
            .saying("Is another process using the image [");
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
    }
}

#[test]
fn what_clients_did_is_told() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    let told = || -> serde_json::Value {
        let text = fs::read(bench.path("told.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    };
    let server = bench.start(Who::Serve, "-t -x vda -f raw --statistics @told.json @d.raw");
    host("qemu-io", &["-f", "raw", "-c", "write 0 64k", "-c", "flush", &bench.uri("vda")]);
    server.signal(Signal::USR1);
    until("statistics", || told()["exports"][0]["writes"]["bytes"] == 65_536);
    host("qemu-io", &["-f", "raw", "-c", "read 0 128k", &bench.uri("vda")]);
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
    let told = told();
    assert_eq!(told["command"], "serve", "{told}");
    let export = &told["exports"][0];
    assert_eq!(export["name"], "vda");
    assert_eq!(export["connections"], 2);
    assert!(export["reads"]["bytes"].as_u64().unwrap() >= 131_072, "{told}");
    assert!(export["flushes"]["operations"].as_u64().unwrap() >= 1, "{told}");
    assert_eq!(told["disks"][0]["role"], "export");
    assert!(told["disks"][0]["writes"]["latency"].is_array(), "{told}");
}

#[test]
fn disks_are_held_to_their_rates() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    for (words, io) in [
        // A second's worth of data, holes aside, of which a tenth comes at once.
        ("--limit-rate 1M", "read 0 4M".to_owned()),
        ("--limit-iops 40", "aio_read -q 0 512\n".repeat(40)),
    ] {
        let server = bench.start(Who::Serve, &format!("-r -f raw {words} @d.raw"));
        let begun = Instant::now();
        let mut args = vec!["-r".to_owned(), "-f".to_owned(), "raw".to_owned()];
        for line in io.lines() {
            args.extend(["-c".to_owned(), line.to_owned()]);
        }
        args.extend(["-c".to_owned(), "aio_flush".to_owned(), bench.uri("")]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        host("qemu-io", &args);
        assert!(begun.elapsed() > Duration::from_millis(700), "{words}: {:?}", begun.elapsed());
        server.wait(SHORT).ended_with(0);
    }
}
