// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same words for both programs: the same exit code, and the same first line of what
//! is wrong.

use crate::bench::{Bench, Who};
use crate::support;
use std::fs;

/// Mistakes that both find; the words of ours differ where a reason is given.
const MISTAKES: &[(&str, Option<&str>)] = &[
    ("", None),
    ("a.raw b.raw", None),
    ("--nope a.raw", None),
    ("-k", None),
    ("-k s -f raw @a.raw", None),
    ("-k @s -f raw -e -1 @a.raw", None),
    ("-k @s -f raw -e x @a.raw", None),
    ("-k @s -f raw -o 1M @a.raw", None),
    ("-k @s -f raw --cache=foo @a.raw", None),
    ("-k @s -f raw --cache=none --cache=none @a.raw", None),
    ("-k @s -f raw -n --cache=none @a.raw", None),
    ("-k @s -f raw --aio=foo @a.raw", None),
    ("-k @s -f raw --discard=foo @a.raw", None),
    ("-k @s -f raw --discard=unmap --discard=unmap @a.raw", None),
    ("-k @s -f raw --detect-zeroes=foo @a.raw", None),
    ("-k @s -f raw --detect-zeroes=unmap @a.raw", None),
    ("-k @s --image-opts -f raw driver=raw", None),
    ("-k @s -f raw @none.raw", Some("the cause is told as everywhere else here")),
    ("-k @s -f nonsense @a.raw", None),
    ("-k @s -f qcow2 @a.raw", Some("the magic number that was found is told")),
    ("-k @s -f qcow2 -l none @a.qcow2", None),
    ("-k @s -f qcow2 -B none @a.qcow2", None),
    ("-k @s -f raw --tls-creds none @a.raw", None),
    ("-k @s -f raw --tls-authz a @a.raw", None),
    ("-k @s -f raw --tls-hostname h @a.raw", None),
    ("-k @s -f raw --tls-creds t --object tls-creds-x509,id=t,endpoint=server @a.raw", None),
    ("-k @s -f raw --tls-creds t --object tls-creds-x509,id=t,dir=x,foo=x @a.raw", None),
    ("-k @s -f raw --tls-creds t --object tls-creds-x509,id=t,dir=x,endpoint=x @a.raw", None),
    ("-k @s -f raw --tls-creds t --object tls-creds-x509,id=t,dir=x,verify-peer=x @a.raw", None),
    ("-k @s -f raw --tls-creds t --object authz-simple,id=t,identity=x @a.raw", None),
    ("-k @s -f raw --object authz-simple,id=t @a.raw", None),
    ("-k @s -f raw --object authz-list,id=t,rules.0.match=x @a.raw", None),
    (
        "-k @s -f raw --tls-creds t --object tls-creds-psk,id=t,endpoint=server,dir=/none @a.raw",
        Some("there are no such keys here"),
    ),
    ("-L @a.raw", None),
    ("-L -k @s -x a", None),
    ("-L -k @s -f raw", None),
    ("-L -k @s --cache=none", None),
    ("-L -k @s --fork", None),
    ("-L -k @none", Some("our client's words")),
];

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[test]
fn mistakes_end_as_with_qemu_nbd() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("a.raw", "raw");
    bench.disk("a.qcow2", "qcow2");
    let mut wrong = Vec::new();
    for (words, differs) in MISTAKES {
        let ours = bench.run(Who::Link, words);
        assert!(!bench.path("s").exists(), "{words}");
        let theirs = bench.run(Who::Real, words);
        // The real one may leave its socket.
        let _ = fs::remove_file(bench.path("s"));
        let lines = [&ours, &theirs].map(|run| first_line(&run.stderr).to_owned());
        let is_same = ours.code == theirs.code && (lines[0] == lines[1]) == differs.is_none();
        if !is_same || ours.code != Some(1) || ours.stderr.contains("panicked") {
            wrong.push(format!("{words}\n ours: {ours:?}\n real: {theirs:?}"));
        }
        let native = bench.run(Who::Serve, words);
        if native.code != Some(1) {
            wrong.push(format!("serve {words}: {native:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn what_has_nothing_behind_it_is_refused() {
    let Some(bench) = Bench::new() else { return };
    bench.disk("a.raw", "raw");
    for (words, expected) in [
        ("-c /dev/nbd0 @a.raw", "-c, -d"),
        ("-d /dev/nbd0", "-c, -d"),
        ("-p 99999 -f raw @a.raw", "99999"),
        ("-k @s -f raw --salvage @a.raw", "--salvage"),
        ("-U - -f raw @a.raw", "--run"),
        ("-k @s -f raw --run true --fork @a.raw", "--fork"),
        ("-k @s -f raw @a.raw @a.raw", "a.raw has none"),
        ("-k @s -f raw a=@a.raw", "blk_new_open"),
    ] {
        bench.run(Who::Serve, words).ended_with(1).saying(expected);
    }
}

#[test]
fn help_and_version_are_results() {
    let Some(bench) = Bench::new() else { return };
    let version = bench.run(Who::Link, "--version").ended_with(0).stdout;
    assert!(version.starts_with("qemu-nbd 10."), "{version}");
    let help = bench.run(Who::Link, "--help").ended_with(0).stdout;
    let theirs = support::host("qemu-nbd", &["--help"]);
    let options = |text: &str| -> Vec<String> {
        let words = text.split([' ', ',', '=', '\n']).filter(|word| word.starts_with("--"));
        words.map(ToOwned::to_owned).collect()
    };
    let ours = options(&help);
    // Tracing, SELinux and the kernel's client are not there.
    let absent = ["--trace", "--selinux-label", "--connect", "--disconnect", "--tls-authz"];
    for option in options(&theirs).iter().filter(|option| !absent.contains(&option.as_str())) {
        assert!(ours.contains(option), "{option}");
    }
}
