// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program under the name `qemu-img`, beside the real one: the same words for both, and
//! what came of them.
#![allow(dead_code, reason = "every test program uses a part of it")]

use crate::support;
use serde_json::Value;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use tempfile::TempDir;

/// The version whose texts these are.
const VERSION: &str = "qemu-img version 10.";

/// Facts that do not depend on how an image is laid out.
const FACTS: &[&str] = &[
    "virtual-size",
    "format",
    "cluster-size",
    "backing-filename",
    "backing-filename-format",
    "dirty-flag",
];

/// The same, of QCOW2 and VMDK images.
const SPECIFIC: &[&str] = &[
    "compat",
    "compression-type",
    "lazy-refcounts",
    "refcount-bits",
    "corrupt",
    "extended-l2",
    "bitmaps",
    "data-file",
    "data-file-raw",
    "create-type",
];

/// Words that both programs get.
pub(crate) struct Case {
    pub(crate) words: &'static str,
    /// Why the outcome is another one here.
    pub(crate) differs: Option<&'static str>,
}

pub(crate) const fn same(words: &'static str) -> Case {
    Case { words, differs: None }
}

pub(crate) const fn differs(words: &'static str, because: &'static str) -> Case {
    Case { words, differs: Some(because) }
}

/// What came of the words.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) stdout: String,
    pub(crate) code: Option<i32>,
}

/// Both programs.
pub(crate) struct Programs {
    ours: PathBuf,
    _link: TempDir,
}

impl Programs {
    /// Both, if they are there in the right version.
    pub(crate) fn find() -> Option<Self> {
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
    pub(crate) fn run(&self, is_ours: bool, words: &str, folder: &Path) -> (Outcome, String) {
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
        let stdout = without_times(&without_dates(&String::from_utf8_lossy(&output.stdout)));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (Outcome { stdout, code: output.status.code() }, stderr)
    }

    /// Runs both in their folders; what is wrong, if anything is.
    pub(crate) fn compare(&self, case: &Case, [ours, theirs]: [&Path; 2]) -> Option<String> {
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

    /// What the real program finds different about the two images called `image`.
    pub(crate) fn differing(&self, image: &str, folders: [&Path; 2]) -> Option<String> {
        let facts = folders.map(|folder| {
            let (outcome, stderr) = self.run(false, &format!("info --output json {image}"), folder);
            let value: Value = serde_json::from_str(&outcome.stdout).unwrap_or(Value::Null);
            let pick = |names: &[&str], value: &Value| -> Vec<String> {
                names.iter().map(|name| format!("{name}: {}", value[name])).collect()
            };
            let mut facts = pick(FACTS, &value);
            facts.extend(pick(SPECIFIC, &value["format-specific"]["data"]));
            for snapshot in value["snapshots"].as_array().into_iter().flatten() {
                facts.push(format!("snapshot {} {}", snapshot["id"], snapshot["name"]));
            }
            facts.push(stderr);
            facts
        });
        if facts[0] != facts[1] {
            return Some(format!(
                "{image} differs\n--- real: {:#?}\n--- ours: {:#?}",
                facts[1], facts[0]
            ));
        }
        let (checked, stderr) = self.run(false, &format!("check {image}"), folders[0]);
        if !matches!(checked.code, Some(0 | 63)) {
            return Some(format!("{image} is not clean: {checked:?}\n{stderr}"));
        }
        let [ours, theirs] = folders.map(|folder| folder.join(image).display().to_string());
        let (compared, stderr) = self.run(false, &format!("compare {ours} {theirs}"), folders[0]);
        (compared.code != Some(0))
            .then(|| format!("{image} reads differently: {compared:?}\n{stderr}"))
    }
}

/// Words as a shell splits them; single quotes keep spaces.
pub(crate) fn split(words: &str) -> Vec<String> {
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

/// The text with `in N seconds` for every time, and without lines of progress before
/// the last one.
fn without_times(text: &str) -> String {
    let line = |line: &str| {
        let is_early = |shown: &&str| shown.ends_with("/100%)") && !shown.contains("(100.00");
        let mut shown: Vec<&str> = line.split('\r').filter(|shown| !is_early(shown)).collect();
        shown.dedup();
        let line = shown.join("\r");
        match line.split_once(" in ") {
            Some((before, after)) if after.ends_with(" seconds.") => {
                format!("{before} in N seconds.")
            }
            _ => line,
        }
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

/// An empty folder, in memory if possible: the programs wait for the disk most of the time.
pub(crate) fn empty() -> TempDir {
    match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => folder,
        Err(_) => tempfile::tempdir().unwrap(),
    }
}

/// A folder with what the script makes: the images that the cases use.
pub(crate) fn images(script: &str) -> TempDir {
    let folder = empty();
    let made = Command::new("sh")
        .args(["-euc", script])
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
pub(crate) fn copy_of(folder: &Path) -> TempDir {
    let copy = empty();
    let from = format!("{}/.", folder.display());
    support::host("cp", &["-a", "--sparse=always", &from, copy.path().to_str().unwrap()]);
    copy
}

/// Runs every row in two fresh folders with the images, ours and the real program's; `run`
/// tells what is wrong, if anything is.
pub(crate) fn assert_rows<R: Sync>(
    rows: &[R],
    script: &str,
    run: impl Fn(&Programs, &R, [&Path; 2]) -> Option<String> + Sync,
) {
    let Some(programs) = Programs::find() else { return };
    let images = images(script);
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    // Most of the time goes into starting programs and copying files.
    let work = || {
        while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
            let [ours, theirs] = [copy_of(images.path()), copy_of(images.path())];
            let failed = run(&programs, row, [ours.path(), theirs.path()]);
            wrong.lock().unwrap().extend(failed);
        }
    };
    thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(work))));
    assert_none(&wrong.into_inner().unwrap(), rows.len());
}

#[track_caller]
pub(crate) fn assert_none(wrong: &[String], of: usize) {
    assert!(
        wrong.is_empty(),
        "{} of {of} cases are wrong\n\n{}",
        wrong.len(),
        wrong.join("\n----------------------------------------\n")
    );
}

#[test]
fn words_are_split_as_by_a_shell() {
    assert_eq!(split("a -b '' c"), ["a", "-b", "", "c"]);
    assert_eq!(split("a 'b c'd"), ["a", "b cd"]);
}

#[test]
fn times_do_not_count() {
    assert_eq!(without_dates("at 2026-01-02 03:04:05.\n"), "at DATE.\n");
    assert_eq!(without_times("    (0.00/100%)\r    (9.00/100%)\r\nx\n"), "\nx\n");
    assert_eq!(without_times("    (9.00/100%)\r    (100.00/100%)\rx"), "    (100.00/100%)\rx");
    assert_eq!(without_times("Run completed in 0.012 seconds.\n"), "Run completed in N seconds.\n");
}
