// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `tranship copy` beside nbdcopy: the same words have to bring the same bytes, with as
//! many holes, between files, pipes and other people's servers. And what only ours can do.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod beside;
mod faults;
mod ours;
mod resume;
mod returning;
mod servers;
#[path = "../support/mod.rs"]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use support::{Place, installed};

const MIB: u64 = 1 << 20;

/// Longest time of a copy of a few MiB.
const COPY: Duration = Duration::from_mins(1);

/// Bytes of the disk: no multiple of anything larger than 4 KiB.
const SIZE: u64 = 13 * MIB + 4096;

/// Everything that the tests are made of, if the servers and nbdcopy are installed.
fn place() -> Option<Place> {
    let place = Place::new()?;
    if !["nbdcopy", "nbdkit", "qemu-nbd", "qemu-img"].into_iter().all(installed) {
        return None;
    }
    disk(&place.path("disk"));
    Some(place)
}

/// A sparse disk: data, holes, zeroes that are stored, and data up to its end.
fn disk(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    for (start, len) in [(0, 512), (MIB, 2 * MIB + 512), (6 * MIB + 4096, 65_536), (9 * MIB, MIB)] {
        let bytes: Vec<u8> = (start..start + len).map(|at: u64| (at % 251) as u8).collect();
        file.write_all_at(&bytes, start).unwrap();
    }
    file.write_all_at(&vec![0; 512 << 10], 11 * MIB).unwrap();
    file.write_all_at(&[7; 100], SIZE - 100).unwrap();
}

/// A file of the disk's size with something else in it.
fn junk(path: &Path) {
    fs::write(path, vec![0xee; usize::try_from(SIZE).unwrap()]).unwrap();
}

/// One of the two programs.
fn program(place: &Place, is_ours: bool) -> PathBuf {
    if !is_ours {
        return PathBuf::from("nbdcopy");
    }
    let link = place.path("nbdcopy");
    if !link.exists() {
        let program = support::program().unwrap();
        symlink(program.canonicalize().unwrap(), &link).unwrap();
    }
    link
}

/// Runs one of them to its end.
fn run(place: &Place, is_ours: bool, words: &[&str]) -> Output {
    Command::new("timeout")
        .arg("60")
        .arg(program(place, is_ours))
        .args(words)
        .current_dir(place.path("."))
        .env("TMPDIR", place.path("tmp"))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// The same, which has to succeed.
#[track_caller]
fn copies(place: &Place, is_ours: bool, words: &[&str]) {
    let output = run(place, is_ours, words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ours: {is_ours}, {words:?}: {}\n{said}", output.status);
}

/// The same, which has to fail as nbdcopy does, and say this.
#[track_caller]
fn fails(place: &Place, words: &[&str], texts: &[&str]) {
    let output = run(place, true, words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words:?}\n{said}");
    for text in texts {
        assert!(said.contains(text), "{words:?}: {text:?} is missing\n{said}");
    }
}

#[track_caller]
fn same(a: &Path, b: &Path, what: &str) {
    assert_eq!(support::digest(a), support::digest(b), "{what}: the bytes differ");
}

/// Bytes that a file takes.
fn stored(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}
