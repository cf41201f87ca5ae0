// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks by other vendors' software and hostile ones, outside of the source tree:
//! the folder is named by `TRANSHIP_SAMPLES`.
#![allow(clippy::unwrap_used, reason = "the manifest is part of the test")]

mod folder;

use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use tranship_block::{BlockDevice, Extents, Result, Span, is_zero};

/// SHA-256 of the size in decimal, then of number, colon and bytes of each chunk of
/// 64 KiB that is not zero.
fn digest(disk: &dyn BlockDevice) -> Result<String> {
    const CHUNK: u64 = 64 << 10;
    let mut hash = Sha256::new();
    hash.update(disk.size().to_string());
    for extent in Extents::new(disk, Span::new(0, u64::MAX)) {
        let (span, kind) = extent?;
        // Extents of the samples start at chunk boundaries or hold whole chunks of zeroes.
        let mut at = span.start;
        while !kind.reads_zero() && at < span.end() {
            let mut chunk = vec![0; usize::try_from(CHUNK.min(disk.size() - at)).unwrap()];
            disk.read_at(&mut chunk, at)?;
            if !is_zero(&chunk) {
                hash.update(format!("{}:", at / CHUNK));
                hash.update(&chunk);
            }
            at += CHUNK;
        }
    }
    let mut hex = String::new();
    for byte in hash.finalize() {
        write!(hex, "{byte:02x}").expect("a string takes everything");
    }
    Ok(hex)
}

fn unpack(samples: &Path, row: &Value, folder: &Path) -> bool {
    let from = samples.join(row["file"].as_str().unwrap());
    let to = folder.join(Path::new(row["path"].as_str().unwrap()).file_name().unwrap());
    if row["packed"] != "xz" {
        std::fs::copy(from, to).unwrap();
        return true;
    }
    match Command::new("xz").arg("-dc").arg(from).output() {
        Ok(output) if output.status.success() => {
            std::fs::write(to, output.stdout).unwrap();
            true
        }
        _ => {
            eprintln!("skipped: xz is not installed");
            false
        }
    }
}

#[test]
fn samples_meet_their_expectations() {
    let Some(samples) = std::env::var_os("TRANSHIP_SAMPLES") else {
        return eprintln!("skipped: TRANSHIP_SAMPLES is not set");
    };
    let samples = Path::new(&samples);
    let manifest = std::fs::read(samples.join("MANIFEST.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let rows = manifest.as_array().or_else(|| manifest["files"].as_array()).unwrap();
    let mut seen = 0;
    for row in rows.iter().filter(|row| row["format"] == "vmdk") {
        let folder = tempfile::tempdir().unwrap();
        let neighbours = row["files"].as_array().cloned().unwrap_or_default();
        let needed = rows.iter().filter(|other| neighbours.contains(&other["path"]));
        if !needed.chain([row]).all(|row| unpack(samples, row, folder.path())) {
            return;
        }
        let path = row["path"].as_str().unwrap();
        let disk = folder::open(&folder.path().join(Path::new(path).file_name().unwrap()));
        match (row["expect"].as_str().unwrap(), disk) {
            ("content", disk) => {
                let disk = disk.unwrap_or_else(|error| panic!("{path}: {error}"));
                assert_eq!(Some(disk.size()), row["virtual_size"].as_u64(), "{path}");
                assert_eq!(digest(&disk).unwrap(), row["content_digest"], "{path}");
            }
            ("open", disk) => drop(disk.unwrap_or_else(|error| panic!("{path}: {error}"))),
            ("refuse" | "no-leak", Ok(_)) => panic!("{path} was opened"),
            ("clean", Ok(disk)) => eprintln!("{path}: {:?}", digest(&disk)),
            (_, Err(error)) => eprintln!("{path}: {error}"),
            (expect, Ok(_)) => panic!("{path}: unknown expectation {expect}"),
        }
        seen += 1;
    }
    assert!(seen > 15, "only {seen} VMDK rows in the manifest");
}
