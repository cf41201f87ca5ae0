// SPDX-License-Identifier: Apache-2.0 OR MIT
//! nbdinfo, nbdcopy and qemu-img as clients of our server.

use crate::client::{Place, export, sample, serve, serve_one};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tranship_block::{BlockDevice, MemoryDevice};
use tranship_nbd::{Export, Limits};
use tranship_qcow2::{OpenOptions, Qcow2};
use tranship_raw::{Access, RawFile};

/// Runs a tool and gives its output; `None`, with a visible line, if it is not there.
fn run(tool: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(tool).args(arguments).output() {
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{tool} {arguments:?}: {errors}");
            Some(String::from_utf8(output.stdout).unwrap())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: {tool} is not installed");
            None
        }
        Err(error) => panic!("{tool}: {error}"),
    }
}

fn uri(place: &Place, name: &str) -> String {
    format!("nbd+unix:///{name}?socket={}", place.socket().display())
}

/// A disk of an odd size with data, written zeroes and holes.
fn disk() -> Vec<u8> {
    let mut bytes = vec![0; (24 << 20) + 1536];
    let mut state = 1u32;
    for from in [0, 5 << 20, 17 << 20, 24 << 20] {
        let to = (from + (3 << 20)).min(bytes.len());
        for byte in &mut bytes[from..to] {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = state.to_be_bytes()[0];
        }
    }
    bytes
}

#[test]
fn nbdinfo_sees_everything_that_is_offered() {
    let place = serve_one(sample());
    place.running.add_export(export("second", sample())).unwrap();
    let Some(json) = run("nbdinfo", &["--json", &uri(&place, "vda")]) else { return };
    for line in [
        r#""protocol": "newstyle-fixed""#,
        r#""structured": true"#,
        r#""export-name": "vda""#,
        r#""description": "a test""#,
        r#""base:allocation""#,
        r#""is_read_only": false"#,
        r#""can_df": true"#,
        r#""can_fast_zero": true"#,
        r#""can_flush": true"#,
        r#""can_fua": true"#,
        r#""can_multi_conn": true"#,
        r#""can_trim": true"#,
        r#""can_zero": true"#,
        r#""block_size_minimum": 1"#,
        r#""block_size_preferred": 4096"#,
        r#""block_size_maximum": 33554432"#,
        r#""export-size": 1048576"#,
    ] {
        assert!(json.contains(line), "{line} is missing in {json}");
    }
    let list = run("nbdinfo", &["--list", &uri(&place, "")]).unwrap();
    assert!(list.contains("export=\"vda\"") && list.contains("export=\"second\""), "{list}");
    let map = run("nbdinfo", &["--map", &uri(&place, "vda")]).unwrap();
    let words: Vec<Vec<&str>> = map.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(
        words,
        [
            ["0", "524288", "3", "hole,zero"].to_vec(),
            ["524288", "262144", "0", "data"].to_vec(),
            ["786432", "262144", "3", "hole,zero"].to_vec()
        ]
    );
}

#[test]
fn nbdcopy_brings_the_same_bytes_out_and_in() {
    let bytes = disk();
    let source = serve_one(Arc::new(MemoryDevice::read_only(bytes.clone())));
    let target = Arc::new(MemoryDevice::new(vec![0xee; bytes.len()]));
    let sink = serve_one(target.clone());
    let file = source.folder.path().join("out.raw");
    let file_name = file.to_str().unwrap();
    if run("nbdcopy", &[&uri(&source, "vda"), file_name]).is_none() {
        return;
    }
    assert!(std::fs::read(&file).unwrap() == bytes, "nbdcopy out differs");
    run("nbdcopy", &["--flush", file_name, &uri(&sink, "vda")]);
    assert!(target.snapshot() == bytes, "nbdcopy in differs");
    run("nbdcopy", &[&uri(&source, "vda"), &uri(&sink, "vda")]);
    assert!(target.snapshot() == bytes, "nbdcopy across differs");
    let statistics = sink.running.statistics("vda").unwrap();
    assert!(statistics.writes.operations > 0 && statistics.zeroes.operations > 0, "{statistics:?}");
}

#[test]
fn qemu_img_converts_out_and_in_and_compares_equal() {
    let bytes = disk();
    let source = serve_one(Arc::new(MemoryDevice::read_only(bytes.clone())));
    let target = Arc::new(MemoryDevice::new(vec![0xee; bytes.len()]));
    let sink = serve_one(target.clone());
    let file = source.folder.path().join("out.qcow2");
    let file_name = file.to_str().unwrap();
    let from = uri(&source, "vda");
    if run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &from, file_name]).is_none() {
        return;
    }
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &from, file_name]);
    let to = uri(&sink, "vda");
    run("qemu-img", &["convert", "-n", "-W", "-f", "qcow2", "-O", "raw", file_name, &to]);
    assert!(target.snapshot() == bytes, "qemu-img convert in differs");
}

/// A peer that is ended when the test is.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qcow2(path: &Path, backing: Option<Arc<dyn BlockDevice>>) -> Arc<dyn BlockDevice> {
    let file = Arc::new(RawFile::open(path, Access::ReadOnly).unwrap());
    Arc::new(
        Qcow2::open_read_only_with(file, OpenOptions { backing, ..OpenOptions::default() })
            .unwrap(),
    )
}

#[test]
fn maps_are_those_of_qemu_nbd() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let name = |name: &str| path(name).to_str().unwrap().to_owned();
    let (base, top) = (name("base"), name("top"));
    if run("qemu-img", &["create", "-q", "-f", "qcow2", &base, "64M"]).is_none() {
        return;
    }
    run("qemu-io", &["-f", "qcow2", "-c", "write 8M 3M", &base]);
    let create = ["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top];
    run("qemu-img", &create);
    run("qemu-io", &["-f", "qcow2", "-c", "write 1M 2M", "-c", "write -z 20M 4M", &top]);
    let socket = name("peer");
    let arguments = ["-t", "-r", "-A", "-f", "qcow2", "-k", &socket, &top];
    let Ok(peer) = Command::new("qemu-nbd").args(arguments).spawn().map(Peer) else {
        return eprintln!("skipped: qemu-nbd is not installed");
    };
    let started = Instant::now();
    while !path("peer").exists() {
        assert!(started.elapsed() < Duration::from_secs(10), "qemu-nbd does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    let device = qcow2(&path("top"), Some(qcow2(&path("base"), None)));
    let place = serve(vec![Export { depth: true, ..export("", device) }], Limits::default());
    let theirs = format!("nbd+unix:///?socket={socket}");
    for context in ["base:allocation", "qemu:allocation-depth"] {
        let map = |uri: &str| run("nbdinfo", &[&format!("--map={context}"), uri]);
        let Some(expected) = map(&theirs) else { break };
        assert!(expected.lines().count() >= 5, "{expected}");
        let seen = map(&uri(&place, "")).unwrap();
        assert_eq!(seen, expected, "{context}");
    }
    drop(peer);
}
