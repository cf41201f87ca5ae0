// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The commands that move what is in images, under the name `qemu-img` beside the real one:
//! the same words have to give the same contents, standard output and exit code. And what
//! only this program can do.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ours;
mod rows;
#[path = "../support/mod.rs"]
mod support;

use rows::{Case, Row};
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

/// Makes the images that the cases use, with the real programs.
const IMAGES: &str = include_str!("images.sh");

/// Facts that do not depend on how an image is laid out.
const FACTS: &[&str] =
    &["virtual-size", "format", "cluster-size", "backing-filename", "backing-filename-format"];

/// The same, of QCOW2 and VMDK images.
const SPECIFIC: &[&str] =
    &["compat", "compression-type", "refcount-bits", "extended-l2", "bitmaps", "create-type"];

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
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stdout = without_times(&String::from_utf8_lossy(&output.stdout));
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

    /// What the real program finds different about the two images called `image`.
    fn differing(&self, image: &str, folders: [&Path; 2]) -> Option<String> {
        let facts = folders.map(|folder| {
            let words = format!("info --output json {image}");
            let (outcome, stderr) = self.run(false, &words, folder);
            let value: Value = serde_json::from_str(&outcome.stdout).unwrap_or(Value::Null);
            let pick = |names: &[&str], value: &Value| -> Vec<String> {
                names.iter().map(|name| format!("{name}: {}", value[name])).collect()
            };
            let mut facts = pick(FACTS, &value);
            facts.extend(pick(SPECIFIC, &value["format-specific"]["data"]));
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

    /// Runs a row's cases in fresh folders and looks at what they have made.
    fn row(&self, row: &Row, images: &Path) -> Option<String> {
        let [ours, theirs] = [copy_of(images), copy_of(images)];
        let folders = [ours.path(), theirs.path()];
        if let Some(wrong) = row.cases.iter().find_map(|case| self.compare(case, folders)) {
            return Some(wrong);
        }
        let words = || row.cases.iter().map(|case| case.words).collect::<Vec<_>>().join("; ");
        row.results
            .iter()
            .find_map(|image| self.differing(image, folders))
            .or_else(|| {
                let [ours, theirs] = folders.map(support::names);
                (row.is_strict && ours != theirs).then(|| format!("files: {ours:?} {theirs:?}"))
            })
            .map(|wrong| format!("qemu-img {}\n{wrong}", words()))
    }
}

/// Words as a shell splits them; single quotes keep spaces.
fn split(words: &str) -> Vec<String> {
    let quoted = |part: (usize, &str)| -> Vec<String> {
        match part {
            (number, text) if number % 2 == 1 => vec![text.to_owned()],
            (_, text) => text.split_whitespace().map(ToOwned::to_owned).collect(),
        }
    };
    words.split('\'').enumerate().flat_map(quoted).collect()
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

fn assert_rows(rows: &[Row]) {
    let Some(programs) = Programs::find() else { return };
    let images = images();
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    // Most of the time goes into starting programs and copying files.
    let work = || {
        while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
            wrong.lock().unwrap().extend(programs.row(row, images.path()));
        }
    };
    thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(work))));
    let wrong = wrong.into_inner().unwrap();
    assert!(
        wrong.is_empty(),
        "{} of {} rows are wrong\n\n{}",
        wrong.len(),
        rows.len(),
        wrong.join("\n----------------------------------------\n")
    );
}

#[test]
fn convert_makes_what_qemu_img_makes() {
    assert_rows(rows::CONVERT);
}

#[test]
fn rebase_and_commit_do_what_qemu_img_does() {
    assert_rows(rows::CHAINS);
}

#[test]
fn dd_bench_and_compare_do_what_qemu_img_does() {
    assert_rows(rows::OTHERS);
}

#[test]
fn words_are_split_as_by_a_shell() {
    assert_eq!(split("a -b '' c"), ["a", "-b", "", "c"]);
    assert_eq!(without_times("    (0.00/100%)\r    (9.00/100%)\r\nx\n"), "\nx\n");
    assert_eq!(without_times("    (9.00/100%)\r    (100.00/100%)\rx"), "    (100.00/100%)\rx");
    assert_eq!(without_times("Run completed in 0.012 seconds.\n"), "Run completed in N seconds.\n");
}
