// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The commands that move what is in images, under the name `qemu-img` beside the real one:
//! the same words have to give the same contents, standard output and exit code. And what
//! only this program can do.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod files;
mod ours;
#[path = "../support/qemu_img.rs"]
mod qemu_img;
mod rows;
#[path = "../support/mod.rs"]
mod support;

use qemu_img::{Case, Programs, assert_rows, differs, empty, same, split};
use rows::Row;
use std::path::Path;

/// Makes the images that the cases use, with the real programs.
const IMAGES: &str = include_str!("images.sh");

/// Runs a row's cases and looks at what they have made.
fn run(programs: &Programs, row: &Row, folders: [&Path; 2]) -> Option<String> {
    if let Some(wrong) = row.cases.iter().find_map(|case| programs.compare(case, folders)) {
        return Some(wrong);
    }
    let words = || row.cases.iter().map(|case| case.words).collect::<Vec<_>>().join("; ");
    row.results
        .iter()
        .find_map(|image| programs.differing(image, folders))
        .or_else(|| {
            let [ours, theirs] = folders.map(support::names);
            (row.is_strict && ours != theirs).then(|| format!("files: {ours:?} {theirs:?}"))
        })
        .map(|wrong| format!("qemu-img {}\n{wrong}", words()))
}

#[test]
fn convert_makes_what_qemu_img_makes() {
    assert_rows(rows::CONVERT, IMAGES, run);
}

#[test]
fn rebase_and_commit_do_what_qemu_img_does() {
    assert_rows(rows::CHAINS, IMAGES, run);
}

#[test]
fn dd_bench_and_compare_do_what_qemu_img_does() {
    assert_rows(rows::OTHERS, IMAGES, run);
}
