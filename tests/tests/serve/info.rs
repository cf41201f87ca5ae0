// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `tranship nbd info` and the link `nbdinfo`, beside the real ones, on both servers.

use crate::bench::{Bench, Who};
use crate::support::{SHORT, host, listens};
use rustix::process::Signal;
use serde_json::Value;
use std::process::Command;

/// Runs ours and the real nbdinfo with the same words: code and standard output.
fn both(bench: &Bench, words: &[&str]) -> [(Option<i32>, String); 2] {
    [bench.path("nbdinfo"), "nbdinfo".into()].map(|program| {
        let output = Command::new(program).args(words).env("LC_ALL", "C").output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(!complained.contains("panicked"), "{words:?}: {complained}");
        (output.status.code(), said)
    })
}

fn keys(value: &Value) -> Vec<String> {
    let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
    keys.sort();
    keys
}

#[test]
fn sizes_and_features_are_what_nbdinfo_says() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    for who in [Who::Link, Who::Real] {
        for words in ["-r", "-e 2", ""] {
            let server = bench.start(who, &format!("{words} -t -x vda -f raw @d.raw"));
            let uri = bench.uri("vda");
            let [ours, theirs] = both(&bench, &["--size", &uri]);
            assert_eq!(ours, theirs);
            for feature in [
                "cache",
                "connect",
                "df",
                "fast-zero",
                "flush",
                "fua",
                "multi-conn",
                "read",
                "structured-reply",
                "trim",
                "write",
                "zero",
                "read-only",
                "rotational",
                "tls",
                "nonsense",
            ] {
                let [ours, theirs] = both(&bench, &["--can", feature, &uri]);
                assert_eq!(ours, theirs, "{who:?} {words} --can {feature}");
                let [ours, theirs] = both(&bench, &["--is", feature, &uri]);
                assert_eq!(ours, theirs, "{who:?} {words} --is {feature}");
            }
            server.signal(Signal::TERM);
            server.wait(SHORT).ended_with(0);
        }
    }
    let [ours, theirs] = both(&bench, &["--can", "connect", &bench.uri("vda")]);
    assert_eq!(ours, theirs, "nobody is there");
    let [ours, theirs] = both(&bench, &["--size", &bench.uri("vda")]);
    assert_eq!(ours, theirs, "nobody is there");
}

#[test]
fn json_has_nbdinfos_keys() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.qcow2", "qcow2");
    for who in [Who::Link, Who::Real] {
        let server = bench.start(who, "-t -x vda -D text -f qcow2 @d.qcow2");
        for words in [&["--json"][..], &["--json", "--list"]] {
            let uri = bench.uri("vda");
            let words: Vec<&str> = words.iter().copied().chain([uri.as_str()]).collect();
            let [ours, theirs] = both(&bench, &words).map(|(code, said)| {
                assert_eq!(code, Some(0));
                serde_json::from_str::<Value>(&said).unwrap()
            });
            for key in keys(&theirs) {
                // What is negotiated depends on the client's age.
                if key != "exports" && key != "structured" {
                    assert_eq!(ours[&key], theirs[&key], "{who:?} {key}");
                }
            }
            let [own, their] = [&ours, &theirs].map(|value| &value["exports"][0]);
            for key in keys(their) {
                let is_own = key == "uri" || key == "content";
                assert!(!own[&key].is_null(), "{who:?} {key} is missing: {own}");
                assert!(is_own || own[&key] == their[&key], "{who:?} {key}: {own}\n{their}");
            }
        }
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
    }
}

#[test]
fn text_has_nbdinfos_lines() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.qcow2", "qcow2");
    for who in [Who::Link, Who::Real] {
        let server = bench.start(who, "-t -r -x vda -D text -f qcow2 @d.qcow2");
        let uri = bench.uri("vda");
        for words in [&[uri.as_str()][..], &["--no-content", &uri], &["--list", &uri]] {
            let [ours, theirs] = both(&bench, words);
            let lines = |text: &str| -> Vec<String> {
                // What speaks, what it finds and how it spells the way there are its own.
                let own = ["protocol:", "\tcontent:", "\turi:", "\tcan_block_status_payload"];
                let lines =
                    text.lines().filter(|line| !own.iter().any(|own| line.starts_with(own)));
                lines.map(ToOwned::to_owned).collect()
            };
            assert_eq!(ours.0, theirs.0);
            assert_eq!(lines(&ours.1), lines(&theirs.1), "{who:?} {words:?}");
        }
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
    }
}

#[test]
fn maps_are_what_nbdinfo_prints() {
    let Some(bench) = Bench::new() else { return };
    for format in ["raw", "qcow2"] {
        let disk = bench.disk("d", format);
        assert!(disk.exists());
        for who in [Who::Link, Who::Real] {
            let server = bench.start(who, &format!("-t -r -f {format} @d"));
            let uri = bench.uri("");
            for words in [&["--map"][..], &["--map", "--totals"], &["--map=base:allocation"]] {
                let words: Vec<&str> = words.iter().copied().chain([uri.as_str()]).collect();
                let [ours, theirs] = both(&bench, &words);
                assert_eq!(ours, theirs, "{who:?} {format} {words:?}");
            }
            let [ours, theirs] = both(&bench, &["--map", "--json", &uri]).map(|(code, said)| {
                assert_eq!(code, Some(0));
                serde_json::from_str::<Value>(&said).unwrap()
            });
            assert_eq!(ours, theirs, "{who:?} {format}");
            let [ours, theirs] = both(&bench, &["--map=x:y", &uri]);
            assert_eq!(ours.0, theirs.0, "{who:?} {format}");
            server.signal(Signal::TERM);
            server.wait(SHORT).ended_with(0);
        }
    }
}

#[test]
fn lists_are_what_qemu_nbd_prints() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.qcow2", "qcow2");
    for who in [Who::Link, Who::Real] {
        for words in ["-r", "-e 2 -D text"] {
            let server = bench.start(who, &format!("{words} -t -x vda -f qcow2 @d.qcow2"));
            let [ours, theirs] =
                [Who::Link, Who::Real].map(|who| bench.run(who, "-L -k @s").ended_with(0).stdout);
            assert_eq!(ours, theirs, "{who:?} {words}");
            server.signal(Signal::TERM);
            server.wait(SHORT).ended_with(0);
        }
    }
}

#[test]
fn what_is_not_there_is_named() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("d.raw", "raw");
    let server = bench.start(Who::Link, "-t -r -x vda -f raw @d.raw");
    let ended = bench.place.run(&["nbd", "info", &bench.uri("nope")], SHORT);
    ended.ended_with(1).saying("nope");
    let ended = bench.place.run(&["nbd", "info", &bench.uri("vda")], SHORT).ended_with(0);
    assert!(ended.stdout.contains("export=\"vda\""), "{}", ended.stdout);
    let ended = bench.place.run(&["nbd", "info"], SHORT).ended_with(1);
    assert!(ended.stderr.contains("URI"), "{}", ended.stderr);
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}

#[test]
fn bitmaps_and_depths_are_told_as_by_qemu_nbd() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.disk("d.qcow2", "qcow2");
    let disk = disk.to_str().unwrap();
    host("qemu-img", &["bitmap", "--add", "-g", "64k", disk, "b0"]);
    host("qemu-io", &["-f", "qcow2", "-c", "write -P 0x44 2M 64k", disk]);
    let told = [Who::Link, Who::Real].map(|who| {
        let server = bench.start(who, "-t -r -A -B b0 -f qcow2 @d.qcow2");
        let uri = bench.uri("");
        let maps = ["qemu:dirty-bitmap:b0", "qemu:allocation-depth"].map(|context| {
            let [ours, theirs] = both(&bench, &[&format!("--map={context}"), &uri]);
            assert_eq!(ours, theirs, "{who:?} {context}");
            ours
        });
        server.signal(Signal::TERM);
        server.wait(SHORT).ended_with(0);
        maps
    });
    assert_eq!(told[0], told[1]);
    assert!(told[0][0].1.contains("dirty"), "{told:?}");
    // What changes while it is looked at cannot be shown as it was.
    bench.run(Who::Link, "-k @s -B b0 -f qcow2 @d.qcow2").ended_with(1).saying("-r");
}

#[test]
fn uris_lead_to_the_exports_that_nbdinfo_finds() {
    let Some(bench) = Bench::new() else { return };
    // A size for each name, which tells what was found.
    let mut command = bench.server(Who::Serve, "-k @s -r -t -e 0 -f raw");
    for (name, number) in ["", "vda", ".", "..", "a b", "a+b"].into_iter().zip(1..) {
        std::fs::write(bench.path(&format!("d{number}")), vec![0; 4096 * number]).unwrap();
        command.arg(format!("{name}=d{number}"));
    }
    let mut server = bench.place.start(command);
    let path = bench.path("s");
    server.until("a socket", SHORT, || listens(&path));
    let socket = bench.text("s");
    for uri in [
        "nbd+unix://?socket=S",
        "nbd+unix:///?socket=S",
        "nbd+unix:///vda?socket=S",
        "nbd+unix:///a%20b?socket=S",
        "nbd+unix:///a+b?socket=S",
        "nbd+unix:///.?socket=S",
        "nbd+unix:///..?socket=S",
        "nbd+unix:///%76da?socket=S",
        "nbd+unix:///nobody?socket=S",
        "nbd+unix:////vda?socket=S",
        "nbd+unix:///vda",
        "nbd+unix:///%zz?socket=S",
        "nbd+unix:///vda?socket=S-none",
        "nbds+unix:///vda?socket=S",
        "nbd://localhost:1/vda",
        "http://localhost/vda",
    ] {
        let uri = uri.replace('S', &socket);
        let [ours, theirs] = both(&bench, &["--size", &uri]);
        assert_eq!(ours, theirs, "{uri}");
    }
    server.signal(Signal::TERM);
    server.wait(SHORT).ended_with(0);
}
