// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program as `qemu-img`, beside the real one: the same words have to give the same
//! standard output and exit code.
//!
//! Where they differ on purpose, the table says why, and the test fails once they do not
//! differ any more. Errors have to come from both; their words may be better here.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod change;
mod look;
#[path = "../support/qemu_img.rs"]
mod qemu_img;
#[path = "../support/mod.rs"]
mod support;

use qemu_img::{Case, Programs, assert_none, assert_rows, differs, images, same, split};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes the images that the cases use, with the real programs.
const IMAGES: &str = include_str!("images.sh");

/// Name, size and time of the last change of every file.
fn state(folder: &Path) -> Vec<String> {
    let mut files: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let facts = entry.metadata().unwrap();
            format!(
                "{} {} {:?}",
                entry.file_name().display(),
                facts.len(),
                facts.modified().unwrap()
            )
        })
        .collect();
    files.sort();
    files
}

#[test]
fn looking_gives_what_qemu_img_gives_and_changes_nothing() {
    let Some(programs) = Programs::find() else { return };
    let folder = images(IMAGES);
    let before = state(folder.path());
    let wrong: Vec<String> =
        look::CASES.iter().filter_map(|case| programs.compare(case, [folder.path(); 2])).collect();
    assert_none(&wrong, look::CASES.len());
    assert_eq!(state(folder.path()), before);
}

#[test]
fn changing_gives_what_qemu_img_gives() {
    assert_rows(change::ROWS, IMAGES, |programs, row, folders| {
        let failed = row.cases.iter().find_map(|case| programs.compare(case, folders));
        failed.or_else(|| programs.differing(row.result?, folders))
    });
}

#[test]
fn the_other_name_has_the_same_commands_and_exit_codes() {
    let Some(program) = support::program() else { return };
    if !support::installed("qemu-img") || !support::installed("qemu-io") {
        return;
    }
    let folder = images(IMAGES);
    for (words, code) in [
        ("image info a.q", 0),
        ("image info nofile", 1),
        ("image info --nope a.q", 1),
        ("image check leak.q", 3),
        ("image check bad.q", 2),
        ("image check c.raw", 63),
        ("image compare k1.raw k3.raw", 1),
        ("image compare k1.raw nofile", 2),
        ("image resize a.q", 1),
    ] {
        let output = Command::new(&program)
            .args(split(words))
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words}\n{stderr}");
        assert!(!stderr.contains("qemu-img"), "{words}\n{stderr}");
    }
}
