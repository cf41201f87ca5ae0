// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program as `qemu-img`, beside the real one: the same words have to give the same
//! standard output and exit code.
//!
//! Where they differ on purpose, the table says why, and the test fails once they do not
//! differ any more. Errors have to come from both; their words may be better here.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod change;
mod look;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use tempfile::TempDir;

/// The version whose texts these are.
const VERSION: &str = "qemu-img version 10.";

/// Makes the images that the cases use, with the real programs.
const IMAGES: &str = include_str!("images.sh");

/// Words that both programs get.
struct Case {
    words: &'static str,
    /// Why the outcome is another one here.
    differs: Option<&'static str>,
}

const fn same(words: &'static str) -> Case {
    Case { words, differs: None }
}

const fn differs(words: &'static str, because: &'static str) -> Case {
    Case { words, differs: Some(because) }
}

/// What came of the words.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    stdout: String,
    code: Option<i32>,
}

/// Both programs.
struct Programs {
    ours: PathBuf,
    _link: TempDir,
}

impl Programs {
    /// Both, if they are there in the right version.
    fn find() -> Option<Self> {
        let program = support::program()?;
        if !support::installed("qemu-img") || !support::installed("qemu-io") {
            return None;
        }
        let version = support::host("qemu-img", &["--version"]);
        if !version.starts_with(VERSION) {
            let found = version.lines().next().unwrap_or_default();
            eprintln!("skipped: expected {VERSION}x, found {found}");
            return None;
        }
        let link = tempfile::tempdir().unwrap();
        let ours = link.path().join("qemu-img");
        symlink(program.canonicalize().unwrap(), &ours).unwrap();
        Some(Self { ours, _link: link })
    }

    /// Runs one of them; what it says on standard error comes as well.
    fn run(&self, is_ours: bool, words: &str, folder: &Path) -> (Outcome, String) {
        let program = if is_ours { self.ours.as_path() } else { Path::new("qemu-img") };
        let output = Command::new("timeout")
            .arg("60")
            .arg(program)
            .args(split(words))
            .current_dir(folder)
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stdout = without_dates(&String::from_utf8_lossy(&output.stdout));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (Outcome { stdout, code: output.status.code() }, stderr)
    }

    /// Runs both in their folders; what is wrong, if anything is.
    fn compare(&self, case: &Case, [ours, theirs]: [&Path; 2]) -> Option<String> {
        let words = case.words;
        let (theirs, their_words) = self.run(false, words, theirs);
        let (ours, our_words) = self.run(true, words, ours);
        let details = format!(
            "qemu-img {words}\n--- real: {:?}\n{}{their_words}--- ours: {:?}\n{}{our_words}",
            theirs.code, theirs.stdout, ours.code, ours.stdout
        );
        if our_words.contains("panicked") {
            return Some(format!("it panicked: {details}"));
        }
        match (ours == theirs, case.differs) {
            (true, Some(reason)) => {
                Some(format!("this is the same by now, not: {reason}\n{details}"))
            }
            (false, None) => Some(details),
            (true, None)
                if ours.code != Some(0) && our_words.is_empty() != their_words.is_empty() =>
            {
                Some(format!("only one of them says why: {details}"))
            }
            _ => None,
        }
    }
}

/// Words as a shell splits them; single quotes keep spaces.
fn split(words: &str) -> Vec<String> {
    let mut split = Vec::new();
    let (mut word, mut is_quoted, mut is_word) = (String::new(), false, false);
    for letter in words.chars() {
        match letter {
            '\'' => {
                is_quoted = !is_quoted;
                is_word = true;
            }
            ' ' if !is_quoted => {
                if is_word {
                    split.push(std::mem::take(&mut word));
                }
                is_word = false;
            }
            _ => {
                word.push(letter);
                is_word = true;
            }
        }
    }
    if is_word {
        split.push(word);
    }
    split
}

/// The text with `DATE` for every date and time: no two runs are at the same one.
fn without_dates(text: &str) -> String {
    let shape = "0000-00-00 00:00:00";
    let is_date = |start: &str| {
        start.len() >= shape.len()
            && shape.bytes().zip(start.bytes()).all(|(shape, byte)| match shape {
                b'0' => byte.is_ascii_digit(),
                _ => shape == byte,
            })
    };
    let (mut found, mut rest) = (String::new(), text);
    while let Some(letter) = rest.chars().next() {
        let len = if is_date(rest) { shape.len() } else { letter.len_utf8() };
        found.push_str(if is_date(rest) { "DATE" } else { &rest[..len] });
        rest = &rest[len..];
    }
    found
}

/// An empty folder, in memory if possible: the programs wait for the disk most of the time.
fn empty() -> TempDir {
    match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => folder,
        Err(_) => tempfile::tempdir().unwrap(),
    }
}

/// A folder with the images.
fn images() -> TempDir {
    let folder = empty();
    let made = Command::new("sh")
        .args(["-euc", IMAGES])
        .current_dir(folder.path())
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    folder
}

/// A copy of a folder, holes and times included.
fn copy_of(folder: &Path) -> TempDir {
    let copy = empty();
    let from = format!("{}/.", folder.display());
    support::host("cp", &["-a", "--sparse=always", &from, copy.path().to_str().unwrap()]);
    copy
}

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

fn assert_none(wrong: &[String], of: usize) {
    assert!(
        wrong.is_empty(),
        "{} of {of} cases are wrong\n\n{}",
        wrong.len(),
        wrong.join("\n----------------------------------------\n")
    );
}

#[test]
fn looking_gives_what_qemu_img_gives_and_changes_nothing() {
    let Some(programs) = Programs::find() else { return };
    let folder = images();
    let before = state(folder.path());
    let wrong: Vec<String> =
        look::CASES.iter().filter_map(|case| programs.compare(case, [folder.path(); 2])).collect();
    assert_none(&wrong, look::CASES.len());
    assert_eq!(state(folder.path()), before);
}

#[test]
fn changing_gives_what_qemu_img_gives() {
    let Some(programs) = Programs::find() else { return };
    let images = images();
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    // Most of the time goes into starting programs and copying files.
    let work = || {
        while let Some(row) = change::ROWS.get(next.fetch_add(1, Ordering::Relaxed)) {
            let [ours, theirs] = [copy_of(images.path()), copy_of(images.path())];
            let folders = [ours.path(), theirs.path()];
            let failed = row.cases.iter().find_map(|case| programs.compare(case, folders));
            let failed = failed.or_else(|| change::differing(&programs, row.result?, folders));
            wrong.lock().unwrap().extend(failed);
        }
    };
    thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(work))));
    let wrong = wrong.into_inner().unwrap();
    assert_none(&wrong, change::ROWS.len());
}

#[test]
fn the_other_name_has_the_same_commands_and_exit_codes() {
    let Some(program) = support::program() else { return };
    if !support::installed("qemu-img") || !support::installed("qemu-io") {
        return;
    }
    let folder = images();
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
