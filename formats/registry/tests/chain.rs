// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Chains of images in a folder: good ones open, hostile ones reach nothing.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, DenyAll, ErrorKind, Gate, MemoryDevice, Request, Result};
use tranship_formats::{Format, OpenOptions, open, open_device};
use tranship_qcow2::{Backing, CreateOptions, create};
use tranship_raw::RawFile;

fn overlay(path: &Path, backing: &str, format: Option<&str>) {
    let mut options = CreateOptions::new(1 << 20);
    let given = format.unwrap_or("raw").to_owned();
    options.backing = Some(Backing { name: backing.to_owned(), format: Some(given) });
    let file = RawFile::create(path, 0).unwrap();
    create(&file, &options).unwrap();
    if format.is_none() {
        // As an old writer would have made it: no extensions at all, the name stays.
        file.write_at(&[0; 8], 112).unwrap();
    }
}

fn read_only() -> OpenOptions {
    OpenOptions { read_only: true, ..OpenOptions::default() }
}

fn byte(device: &dyn BlockDevice, offset: u64) -> u8 {
    let mut byte = [0];
    device.read_at(&mut byte, offset).unwrap();
    byte[0]
}

#[test]
fn a_chain_shows_each_layer_and_only_the_first_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir(path("base")).unwrap();
    std::fs::write(path("base/disk.raw"), vec![1; 1 << 20]).unwrap();
    overlay(&path("base/middle.qcow2"), "disk.raw", Some("raw"));
    overlay(&path("top.qcow2"), "base/middle.qcow2", Some("qcow2"));
    {
        let opened = open(&path("top.qcow2"), &OpenOptions::default()).unwrap();
        opened.device.write_at(&[2; 10], 5).unwrap();
        opened.device.flush().unwrap();
    }
    let opened = open(&path("top.qcow2"), &read_only()).unwrap();
    assert_eq!(byte(&*opened.device, 4), 1);
    assert_eq!(byte(&*opened.device, 5), 2);
    assert_eq!(opened.device.extent_at(1 << 19).unwrap().depth, 2);
    assert!(opened.device.is_read_only());
    let expected: Vec<(PathBuf, Format)> = vec![
        (path("top.qcow2"), Format::Qcow2),
        (path("base/middle.qcow2"), Format::Qcow2),
        (path("base/disk.raw"), Format::Raw),
    ];
    assert_eq!(opened.chain, expected);
    assert_eq!((opened.format, opened.path), (Format::Qcow2, path("top.qcow2")));
    assert!(opened.warnings.is_empty());
    assert!(std::fs::read(path("base/disk.raw")).unwrap() == vec![1; 1 << 20]);
}

#[test]
fn loops_are_found_by_identity() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    overlay(&path("self"), "self", Some("qcow2"));
    overlay(&path("a"), "b", Some("qcow2"));
    overlay(&path("b"), "link", Some("qcow2"));
    std::fs::hard_link(path("a"), path("link")).unwrap();
    for name in ["self", "a", "b"] {
        let error = open(&path(name), &read_only()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.message().contains("loop"), "{error}");
    }
}

#[test]
fn a_chain_has_an_end() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..70 {
        let next = (number + 1).to_string();
        overlay(&folder.path().join(number.to_string()), &next, Some("qcow2"));
    }
    let error = open(&folder.path().join("0"), &read_only()).unwrap_err();
    assert_eq!(error.message(), "backing chain has more than 64 images");
}

#[test]
fn names_that_leave_the_folder_are_denied_unless_allowed() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("images");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(outer.path().join("secret"), vec![7; 4096]).unwrap();
    let image = folder.join("image");
    overlay(&image, "../secret", Some("raw"));
    let error = open(&image, &read_only()).unwrap_err();
    assert_eq!((error.kind(), error.path()), (ErrorKind::Denied, Some(image.as_path())));
    let options = OpenOptions { allowed: vec![outer.path().to_owned()], ..read_only() };
    assert_eq!(byte(&*open(&image, &options).unwrap().device, 0), 7);
}

#[test]
fn the_format_of_a_backing_file_is_not_guessed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    overlay(&path("image"), "base", None);
    std::fs::write(path("base"), vec![1; 4096]).unwrap();
    let guessing = OpenOptions { guess_backing: true, ..read_only() };
    for options in [&read_only(), &guessing] {
        let error = open(&path("image"), options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.message().contains("which format"), "{error}");
    }
    std::fs::remove_file(path("base")).unwrap();
    create(&RawFile::create(&path("base"), 0).unwrap(), &CreateOptions::new(512)).unwrap();
    open(&path("image"), &read_only()).unwrap_err();
    assert_eq!(open(&path("image"), &guessing).unwrap().chain.len(), 2);
}

#[test]
fn formats_that_cannot_be_opened_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, b"QFI\xfb\0\0\0\x01").unwrap();
    let error = open(&path, &read_only()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(error.message(), "disks of format qcow cannot be opened");
    let raw = OpenOptions { format: Some(Format::Raw), ..read_only() };
    let opened = open(&path, &raw).unwrap();
    assert_eq!(byte(&*opened.device, 0), b'Q');
    assert!(opened.warnings.is_empty(), "the format was given");
}

#[derive(Debug)]
struct OneFile(&'static str, Vec<u8>);

impl Gate for OneFile {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        if request.name == self.0 {
            return Ok(Arc::new(MemoryDevice::read_only(self.1.clone())));
        }
        DenyAll.open(request)
    }
}

#[test]
fn disks_inside_an_archive_ask_the_archive() {
    let image = Arc::new(MemoryDevice::new(Vec::new()));
    let mut options = CreateOptions::new(1 << 20);
    options.backing = Some(Backing { name: "base".into(), format: Some("raw".into()) });
    create(&*image, &options).unwrap();
    let gate = OneFile("base", vec![3; 1000]);
    let name = Path::new("guest.ova/disk.qcow2");
    let opened = open_device(image.clone(), name, &OpenOptions::default(), &gate).unwrap();
    assert_eq!(byte(&*opened.device, 999), 3);
    assert!(opened.device.is_read_only());
    assert_eq!(opened.chain[1].0, Path::new("guest.ova/base"));
    let error = open_device(image, name, &OpenOptions::default(), &DenyAll).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
}
