// SPDX-License-Identifier: Apache-2.0 OR MIT
//! nbdinfo, nbdcopy and qemu-img as clients of our server.

use crate::client::{Place, export, sample, serve_one};
use std::process::Command;
use std::sync::Arc;
use tranship_block::MemoryDevice;

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
