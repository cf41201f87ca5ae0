// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sample disks, if `TRANSHIP_SAMPLES` names the folder that has them: images of
//! other writers read as recorded, hostile ones are refused or do no harm.
#![allow(clippy::unwrap_used)]

use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use tranship_block::{BlockDevice, Extents, Result, Span};
use tranship_formats::{Format, OpenOptions, open};

/// Bytes that are read from an image at most: hostile ones claim a lot.
const MOST: u64 = 64 << 20;
const CHUNK: u64 = 64 << 10;

/// The digest that the samples' manifest records: the size, then every chunk with data.
fn digest(device: &dyn BlockDevice) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(device.size().to_string());
    let mut left = MOST;
    let mut buf = vec![0; usize::try_from(CHUNK).unwrap()];
    let mut next = 0;
    for run in Extents::new(device, Span::new(0, u64::MAX)) {
        let (span, kind) = run?;
        if kind.reads_zero() {
            continue;
        }
        let first = (span.start / CHUNK).max(next);
        for chunk in first..span.end().div_ceil(CHUNK) {
            next = chunk + 1;
            let start = chunk * CHUNK;
            let len = CHUNK.min(device.size() - start);
            let now = &mut buf[..usize::try_from(len).unwrap()];
            device.read_at(now, start)?;
            if now.iter().any(|byte| *byte != 0) {
                hash.update(format!("{chunk}:"));
                hash.update(&*now);
            }
            left = left.saturating_sub(len);
            if left == 0 {
                return Ok("too much data".into());
            }
        }
    }
    Ok(hash.finalize().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    }))
}

fn unpack(samples: &Path, folder: &Path, row: &serde_json::Value) {
    let target = folder.join(row["path"].as_str().unwrap());
    std::fs::create_dir_all(target.parent().unwrap()).unwrap();
    let source = samples.join(row["file"].as_str().unwrap());
    if row["packed"] == "xz" {
        let output = Command::new("xz").arg("-dc").arg(&source).output().unwrap();
        assert!(output.status.success(), "xz failed on {}", source.display());
        std::fs::write(target, output.stdout).unwrap();
    } else {
        std::fs::copy(source, target).unwrap();
    }
}

#[test]
fn samples_do_as_recorded() {
    let Some(samples) = std::env::var_os("TRANSHIP_SAMPLES") else {
        eprintln!("skipped: TRANSHIP_SAMPLES does not name the folder of the sample disks");
        return;
    };
    let samples = Path::new(&samples);
    let manifest = std::fs::read(samples.join("MANIFEST.json")).unwrap();
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&manifest).unwrap();
    let mine = |row: &&serde_json::Value| {
        row["format"] == "qcow2" || row["path"] == "hostile/raw-with-qcow2-header.img"
    };
    let rows: Vec<_> = rows.iter().filter(mine).collect();
    assert!(rows.len() > 40, "only {} samples found", rows.len());
    let folder = tempfile::tempdir().unwrap();
    for row in &rows {
        unpack(samples, folder.path(), row);
    }
    let mut failures = Vec::new();
    for row in &rows {
        let path = folder.path().join(row["path"].as_str().unwrap());
        let before = std::fs::read(&path).unwrap();
        let options =
            OpenOptions { read_only: true, format: Some(Format::Qcow2), ..OpenOptions::default() };
        let found = open(&path, &options).and_then(|opened| {
            opened.device.extent_at(0)?;
            digest(&*opened.device)
        });
        let good = match row["expect"].as_str().unwrap() {
            "content" => found.as_deref().is_ok_and(|found| row["content_digest"] == found),
            "open" => found.is_ok(),
            "refuse" | "no-leak" => found.is_err(),
            _ => true,
        };
        if !good {
            failures.push(format!("{} ({}): {found:?}", row["path"], row["expect"]));
        }
        assert!(std::fs::read(&path).unwrap() == before, "{} was changed", path.display());

        // Writing to what can be opened at all harms nothing either: errors, no panics.
        let options = OpenOptions { read_only: false, ..options };
        if let Ok(opened) = open(&path, &options)
            && opened.device.size() > 0
        {
            let size = opened.device.size();
            for at in [0, size / 2, size - 1] {
                let _ = opened.device.write_at(&[1], at);
                let _ = opened.device.discard(Span::new(at / 2, size / 2));
            }
            let _ = opened.device.flush();
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
