// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Image locks, among ourselves and with QEMU's tools, both ways.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "failing is what tests do")]

use std::error::Error as _;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tranship_block::{Error, ErrorKind};
use tranship_format_testing::{has_tool, qemu_img, qemu_img_status};
use tranship_raw::{Access, ImageLock, LockConflict, Permission, RawFile};

fn open(path: &Path) -> RawFile {
    RawFile::open(path, Access::ReadWrite).unwrap()
}

fn conflict(error: &Error) -> &LockConflict {
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(error.message(), "is in use by another process");
    error.source().and_then(|cause| cause.downcast_ref()).expect("a conflict as the cause")
}

#[test]
fn many_may_read_but_only_one_writes() {
    use ImageLock::{Read, ReadShared, Write};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    RawFile::create(&path, 512).unwrap();
    let cases = [
        (Read, Read, None),
        (Read, ReadShared, None),
        (Write, ReadShared, None),
        (Read, Write, Some((Permission::Write, false))),
        (Write, Read, Some((Permission::Write, true))),
        (Write, Write, Some((Permission::Write, false))),
    ];
    for (first, second, expected) in cases {
        let (one, two) = (open(&path), open(&path));
        assert!(one.lock(first).unwrap());
        let result = two.lock(second);
        let found = result.as_ref().err().map(conflict);
        assert_eq!(found.map(|found| (found.permission, found.shared)), expected);
        one.unlock().unwrap();
        assert!(two.lock(second).unwrap());
    }
}

#[test]
fn a_refused_lock_leaves_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    RawFile::create(&path, 512).unwrap();
    let (one, two, three) = (open(&path), open(&path), open(&path));
    one.lock(ImageLock::Read).unwrap();
    two.lock(ImageLock::Read).unwrap();
    assert!(one.lock(ImageLock::Write).is_err());
    drop(two);
    // Were anything of the writer left, this could not be read.
    three.lock(ImageLock::Read).unwrap();
    drop(three);
    one.lock(ImageLock::Write).unwrap();
    one.lock(ImageLock::Read).unwrap();
    open(&path).lock(ImageLock::Read).unwrap();
}

/// A qemu-io that has an image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(args: &[&str], path: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It answers once the image is open.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut answer).unwrap();
        assert!(answer.contains("MiB"), "{answer}");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn qemu_holds_and_we_are_refused() {
    if !has_tool("qemu-io") || !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2"], &[&path, Path::new("1M")]);
    let writer = Holder::new(&["-f", "qcow2"], &path);
    let error = open(&path).lock(ImageLock::Read).unwrap_err();
    assert_eq!(conflict(&error).to_string(), "Failed to get shared \"write\" lock");
    assert_eq!(
        conflict(&error).hint(),
        format!("Is another process using the image [{}]?", path.display())
    );
    let error = open(&path).lock(ImageLock::Write).unwrap_err();
    assert_eq!(conflict(&error).to_string(), "Failed to get \"write\" lock");
    RawFile::open(&path, Access::ReadOnly).unwrap().lock(ImageLock::ReadShared).unwrap();
    drop(writer);
    let _reader = Holder::new(&["-r", "-f", "qcow2"], &path);
    open(&path).lock(ImageLock::Read).unwrap();
    assert!(open(&path).lock(ImageLock::Write).is_err());
}

#[test]
fn we_hold_and_qemu_is_refused() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2"], &[&path, Path::new("1M")]);
    let file = open(&path);
    let text = |args: &[&str]| {
        let output = qemu_img_status(args, &[&path]);
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    file.lock(ImageLock::Write).unwrap();
    let (good, said) = text(&["info", "-f", "qcow2"]);
    assert!(!good && said.contains("Failed to get shared \"write\" lock"), "{said}");
    assert!(text(&["info", "-U", "-f", "qcow2"]).0);
    file.lock(ImageLock::Read).unwrap();
    assert!(text(&["info", "-f", "qcow2"]).0);
    let (good, said) = text(&["check", "-r", "all", "-f", "qcow2"]);
    assert!(!good && said.contains("Failed to get \"write\" lock"), "{said}");
    file.unlock().unwrap();
    assert!(text(&["check", "-r", "all", "-f", "qcow2"]).0);
}
