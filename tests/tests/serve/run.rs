// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--run`: a command that lives with the server.

use crate::bench::Bench;
use crate::support::{Finished, SHORT, digest, host};
use rustix::process::Signal;
use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

fn command(bench: &Bench, options: &[&str], script: &str) -> Command {
    let mut words = vec!["serve", "-f", "raw", "-r"];
    words.extend(options);
    words.extend(["--run", script, "d.raw"]);
    bench.place.tranship(&words)
}

fn run(bench: &Bench, options: &[&str], script: &str) -> Finished {
    bench.place.start(command(bench, options, script)).wait(SHORT)
}

#[test]
fn the_commands_end_is_the_end() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    for (script, code) in [("exit 7", 7), ("true", 0), ("kill -9 $$", 137), ("nonsense-x", 127)] {
        let ended = run(&bench, &["-U", "-"], script).ended_with(code);
        if code == 137 {
            ended.saying("killed by signal 9");
        }
        assert_eq!(bench.place.left_behind(), [""; 0], "{script}");
    }
}

#[test]
fn variables_lead_to_the_server() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    let ended = run(&bench, &["-U", "-"], r#"nbdinfo --size "$uri" && test "$nbd" = "$uri""#);
    assert_eq!(ended.ended_with(0).stdout, "4194304\n");
    let name = "/odd name?&#%ü'$x";
    let script = r#"printf '%s\n' "$exportname"; test -S "$unixsocket" && test -z "$port" &&
        nbdinfo --size "$uri""#;
    let ended = run(&bench, &["-U", "-", "-x", name], script).ended_with(0);
    assert_eq!(ended.stdout, format!("{name}\n4194304\n"));
    // Several clients one after the other do not end it.
    let ended = run(&bench, &["-U", "sock"], r#"for i in 1 2 3; do nbdinfo --size "$uri"; done"#);
    assert_eq!(ended.ended_with(0).stdout, "4194304\n".repeat(3));
    assert!(!bench.path("sock").exists());
}

#[test]
fn a_signal_ends_the_command_first() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    // A shell that forks still has its parent's trap for a moment: only what the child itself says
    // after it has given up the trap tells that the signal ends it.
    let script = "trap 'echo over > ended; exit 5' TERM
        (trap - TERM; touch begun; exec sleep 60) & wait";
    let begun = bench.path("begun");
    let mut running = bench.place.start(command(&bench, &["-U", "-"], script));
    running.until("command", SHORT, || begun.exists());
    running.signal(Signal::TERM);
    running.wait(SHORT).ended_with(5);
    // What was in the background got the signal as well, and dies by itself.
    let over = Instant::now();
    while !bench.place.processes().is_empty() && over.elapsed() < SHORT {
        sleep(Duration::from_millis(5));
    }
    assert_eq!(fs::read_to_string(bench.path("ended")).unwrap(), "over\n");
    assert_eq!(bench.place.processes(), [""; 0]);
    assert_eq!(bench.place.left_behind(), [""; 0]);
}

#[test]
fn a_free_port_is_told() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    let script = r#"nbdinfo --size "$uri"; echo "$port""#;
    let ended = run(&bench, &["-p", "0", "-b", "localhost"], script).ended_with(0);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!((lines[0], lines[1]), (lines[2], "4194304"));
}

#[test]
fn sockets_of_others_are_used() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("d.qcow2", "qcow2");
    let expected = bench.raw(&disk, "qcow2");
    let server = bench.text("qemu-nbd");
    let (disk, copy) = (disk.to_str().unwrap(), bench.text("copy"));
    let words = ["--", "[", &server, "-r", "-e", "0", "-f", "qcow2", disk, "]", &copy];
    host("nbdcopy", &words);
    assert_eq!(digest(&bench.path("copy")), expected);
}
