// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is counted of disks, what they are held to, and how they are cached.

use super::{Bench, kill, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What was counted: the disk in this role.
#[track_caller]
fn disk<'a>(told: &'a Value, role: &str) -> &'a Value {
    let disks = told["disks"].as_array().unwrap();
    disks.iter().find(|disk| disk["role"] == role).unwrap_or_else(|| panic!("{role}: {told:#}"))
}

#[test]
fn statistics_add_up_to_the_disk() {
    let Some(bench) = Bench::new() else { return };
    for (options, target) in [
        ("-O qcow2", "t.q"),
        ("-c -O qcow2", "c.q"),
        ("-O vmdk -o subformat=twoGbMaxExtentFlat", "t.vmdk"),
        ("-n --target-is-zero -O raw", "n.raw"),
    ] {
        File::create(bench.path("n.raw")).unwrap().set_len(24 << 20).unwrap();
        bench.run(&format!("convert --statistics s.json {options} disk.raw {target}"), 0);
        let told = bench.told();
        assert_eq!(told["command"], "convert");
        let copied = |name: &str| told["copied"][name].as_u64().unwrap();
        assert_eq!([copied("bytes_written"), copied("bytes_zero")], [22 << 20, 2 << 20]);
        let (from, to) = (disk(&told, "source"), disk(&told, "target"));
        assert_eq!((&from["name"], &to["name"]), (&json!("disk.raw"), &json!(target)));
        assert_eq!(from["reads"]["bytes"], copied("bytes_read"), "{options}");
        assert_eq!(to["zeroes_skipped"], 2 << 20, "{options}");
        let written = to["writes"]["bytes"].as_u64().unwrap();
        if options.starts_with("-c") {
            assert!(written > 0 && written < 11 << 20, "{written}");
        } else {
            assert_eq!(written, 22 << 20, "{options}");
        }
        // What is written to the disk is written to its files, with what describes it.
        let files = to["files"].as_array().unwrap();
        let stored = files.iter().map(|file| file["writes"]["bytes"].as_u64().unwrap());
        assert!(stored.sum::<u64>() >= written, "{options}: {files:?}");
        for file in files {
            let path = file["path"].as_str().unwrap();
            assert!(bench.path(path).exists(), "{options}: {path}");
        }
    }
}

#[test]
fn every_command_that_moves_data_counts_it() {
    let Some(bench) = Bench::new() else { return };
    let size = 24 << 20;
    bench.run("convert -f raw -O qcow2 disk.raw base.q", 0);
    bench.run("convert -f raw -O vhdx disk.raw t.vhdx", 0);
    bench.run("convert -f raw --hash t.hash disk.raw copy.raw", 0);
    bench.run("create -q -f qcow2 -b base.q -F qcow2 t.q", 0);
    bench.run("bench -w -c 2 -s 1M --pattern 7 t.q", 0);
    // The words, the role of a disk, what it did, and at least how much.
    for (words, role, what, key, least) in [
        ("bench -c 8 -s 1M t.q", "image", "reads", "bytes", 8 << 20),
        ("bench -w -c 8 -s 1M --flush-interval 8 -d 1 t.q", "image", "flushes", "operations", 1),
        ("check t.q", "image", "reads", "bytes", 4096),
        ("check t.vhdx", "image", "reads", "bytes", 4096),
        ("compare base.q -F raw disk.raw", "first", "reads", "bytes", 22 << 20),
        ("compare base.q -F raw disk.raw", "second", "reads", "bytes", 22 << 20),
        (
            "dd -f raw -O qcow2 if=disk.raw of=d.q bs=1M count=3",
            "source",
            "reads",
            "bytes",
            3 << 20,
        ),
        (
            "dd -f raw -O qcow2 if=disk.raw of=d.q bs=1M count=3",
            "target",
            "writes",
            "bytes",
            3 << 20,
        ),
        ("map t.q", "image", "extents", "operations", 2),
        ("measure -O qcow2 t.q", "image", "extents", "operations", 2),
        ("verify --hash t.hash copy.raw", "image", "reads", "bytes", 22 << 20),
        ("rebase -f qcow2 -b disk.raw -F raw t.q", "image", "reads", "bytes", 14 << 20),
        ("rebase -f qcow2 -b base.q -F qcow2 t.q", "base", "reads", "bytes", 14 << 20),
        ("commit t.q", "image", "reads", "bytes", 8 << 20),
        ("commit t.q", "base", "flushes", "operations", 1),
        ("compact base.q", "image", "reads", "bytes", 20 << 20),
        ("compact t.vhdx", "image", "reads", "bytes", 4096),
    ] {
        bench.run(&format!("{words} --statistics s.json"), 0);
        let told = bench.told();
        assert_eq!(told["command"], words.split(' ').next().unwrap());
        let did = &disk(&told, role)[what];
        let count = did[key].as_u64().unwrap();
        assert!(count >= least && count <= size * 2, "{words}: {count} {key}");
        assert_eq!(did["errors"], 0);
        let slowest = did["max_microseconds"].as_u64().unwrap();
        assert!(did["p50_microseconds"].as_u64().unwrap() <= slowest, "{words}");
        let classes = did["latency"].as_array().unwrap();
        let sum: u64 = classes.iter().map(|class| class["operations"].as_u64().unwrap()).sum();
        assert_eq!(did["operations"], sum, "{words}");
        // What an image was based on has its files among those of the image.
        let files = disk(&told, role)["files"].as_array().unwrap();
        assert_eq!(files.is_empty(), words.starts_with("rebase") && role == "base", "{words}");
    }
    // Both layers of a chain, by name.
    bench.run("map t.q --statistics s.json", 0);
    let told = bench.told();
    let files = disk(&told, "image")["files"].as_array().unwrap();
    let mut paths: Vec<_> = files.iter().map(|file| file["path"].as_str().unwrap()).collect();
    paths.sort_unstable();
    assert_eq!(paths.len(), 2, "{paths:?}");
    assert!(paths[0].ends_with("base.q") && paths[1].ends_with("t.q"), "{paths:?}");
}

#[test]
fn statistics_do_not_get_between_the_results() {
    let Some(bench) = Bench::new() else { return };
    let output = bench.command("map -f raw --output json --statistics - disk.raw").output();
    let output = output.unwrap();
    assert!(serde_json::from_slice::<Value>(&output.stdout).unwrap().is_array());
    let told: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(told["command"], "map");
    // What went wrong is counted as well, and a longer file of an earlier run replaced.
    fs::write(bench.path("s.json"), "x".repeat(1 << 20)).unwrap();
    bench.run("compare -f raw disk.raw nofile --statistics s.json", 2);
    assert_eq!(disk(&bench.told(), "first")["name"], "disk.raw");
    bench.run("compare -f raw disk.raw disk.raw --statistics no/s.json", 2);
    bench.run("map -f raw disk.raw --statistics no/s.json", 1);
}

#[test]
fn every_command_that_moves_data_keeps_a_limit() {
    let Some(bench) = Bench::new() else { return };
    bench.run("convert -f raw -O qcow2 disk.raw base.q", 0);
    bench.run("convert -f raw --hash t.hash disk.raw copy.raw", 0);
    for words in [
        "bench -c 20 -s 1M base.q",
        "compare -f raw disk.raw base.q",
        "dd -f raw if=disk.raw of=d.raw bs=1M",
        "verify --hash t.hash copy.raw",
        "rebase -f qcow2 -b '' t.q",
        "compact base.q",
    ] {
        if words.starts_with("rebase") {
            bench.run("create -q -f qcow2 -b base.q -F qcow2 t.q", 0);
        }
        let begun = Instant::now();
        bench.run(&format!("{words} --limit-rate 40M"), 0);
        // At least 20 MiB, less a burst of a tenth of a second.
        assert!(begun.elapsed() > Duration::from_millis(390), "{words}: {:?}", begun.elapsed());
    }
    bench.run("compare -f raw disk.raw base.q --limit-rate x", 2);
    bench.run("map base.q --limit-rate x", 1);
}

/// The flags with which a running program has opened the file of this name.
fn flags(id: u32, name: &str) -> Vec<u32> {
    let folder = PathBuf::from(format!("/proc/{id}"));
    let Ok(found) = fs::read_dir(folder.join("fd")) else { return Vec::new() };
    let named = found.flatten().filter(|entry| {
        fs::read_link(entry.path()).is_ok_and(|path| path.file_name().is_some_and(|n| n == name))
    });
    let facts = named.filter_map(|entry| {
        let text = fs::read_to_string(folder.join("fdinfo").join(entry.file_name())).ok()?;
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"))?.trim().to_owned();
        u32::from_str_radix(&flags, 8).ok()
    });
    facts.collect()
}

#[test]
fn cache_modes_decide_about_the_page_cache() {
    let Some(bench) = Bench::new() else { return };
    let direct = rustix::fs::OFlags::DIRECT.bits();
    bench.run("convert -f raw -O qcow2 disk.raw base.q", 0);
    bench.run("create -q -f qcow2 -b base.q -F qcow2 t.q", 0);
    bench.run("bench -w -c 2 -s 1M --pattern 7 t.q", 0);
    bench.run("convert -f raw -O vmdk -o subformat=monolithicFlat disk.raw m.vmdk", 0);
    for (words, name, expected) in [
        ("convert -f raw -t none disk.raw t.img", "t.img", true),
        ("convert -f raw -t none disk.raw t.img", "disk.raw", false),
        ("convert -f raw -T none disk.raw t.img", "disk.raw", true),
        ("convert -f raw -T none disk.raw t.img", "t.img", false),
        // What an image is based on goes the same way, unless there is an option for it.
        ("convert -T directsync t.q t.img", "base.q", true),
        ("rebase -T none -b disk.raw -F raw t.q", "base.q", true),
        ("rebase -T none -b disk.raw -F raw t.q", "disk.raw", true),
        ("rebase -T none -b disk.raw -F raw t.q", "t.q", false),
        ("rebase -t none -b disk.raw -F raw t.q", "t.q", true),
        ("rebase -t none -b disk.raw -F raw t.q", "base.q", false),
        // The other files of a disk go the same way.
        (
            "convert -f raw -O vmdk -o subformat=monolithicFlat -t none disk.raw f.vmdk",
            "f-flat.vmdk",
            true,
        ),
        ("convert -T none m.vmdk t.img", "m-flat.vmdk", true),
        ("bench -w -t none -c 100 -s 1M m.vmdk", "m-flat.vmdk", true),
        ("commit -t none t.q", "t.q", true),
        ("commit -t none t.q", "base.q", true),
    ] {
        let mut child = bench.start(&format!("{words} --limit-rate 100k"));
        let id = child.id();
        wait_until(&mut child, || !flags(id, name).is_empty());
        let is_direct = || flags(id, name).iter().any(|flags| flags & direct != 0);
        if expected {
            wait_until(&mut child, is_direct);
        } else {
            sleep(Duration::from_millis(300));
            assert!(!is_direct(), "{words}: {name}");
        }
        kill(child, Signal::KILL);
    }
}

#[test]
fn an_extent_size_is_asked_of_the_filesystem() {
    let Some(bench) = Bench::new() else { return };
    for (words, name) in [
        ("create -q -f raw -o extent_size_hint=1M a.raw 10M", "a.raw"),
        ("convert -f raw -O qcow2 -o extent_size_hint=1M disk.raw a.q", "a.q"),
    ] {
        let output = bench.command(words).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words}: {stderr}");
        // Whether it can be done is for the filesystem to say, and the image is made.
        assert!(stderr.is_empty() || stderr.contains("Failed to set extent size hint"), "{stderr}");
        assert!(bench.path(name).exists());
    }
    bench.assert_same("a.q");
    bench.run("create -q -f raw -o extent_size_hint=8G b.raw 10M", 1);
}

#[test]
fn bench_says_who_makes_its_requests() {
    let Some(bench) = Bench::new() else { return };
    for (options, expected) in [
        ("", false),
        ("-i threads", false),
        ("-i io_uring", true),
        ("-i native -t none", true),
        ("-n -t none", true),
    ] {
        let output = bench.command(&format!("bench -f raw -c 10 {options} disk.raw")).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{options}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(stderr.contains("made by threads"), expected, "{options}: {stderr}");
    }
}
