// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks in archives.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice};
use tranship_formats::{Format, OpenOptions, Spec, open_spec};

const MIB: usize = 1 << 20;

/// A qcow2 image with a one at its first byte, based on `backing`.
fn image(backing: Option<&str>) -> Vec<u8> {
    let mut options = tranship_qcow2::CreateOptions::new(MIB as u64);
    options.backing = backing.map(|name| tranship_qcow2::Backing {
        name: name.to_owned(),
        format: Some("raw".to_owned()),
    });
    let storage = MemoryDevice::new(Vec::new());
    tranship_qcow2::create(&storage, &options).unwrap();
    storage.snapshot()
}

fn write(folder: &Path, name: &str, members: &[(&str, &[u8])]) -> PathBuf {
    let path = folder.join(name);
    let mut builder = tar::Builder::new(std::fs::File::create(&path).unwrap());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.finish().unwrap();
    path
}

fn open(name: &str) -> tranship_block::Result<tranship_formats::Opened> {
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    open_spec(&Spec::from_name(name)?, &options)
}

fn first_byte(device: &dyn BlockDevice) -> u8 {
    let mut byte = [0];
    device.read_at(&mut byte, 0).unwrap();
    byte[0]
}

#[test]
fn the_only_disk_of_an_archive_needs_no_name() {
    let folder = tempfile::tempdir().unwrap();
    let members: [(&str, &[u8]); 4] = [
        ("x.ovf", b"<xml>"),
        ("._disk.qcow2", &image(None)),
        ("disk.qcow2", &image(None)),
        ("x.iso", &[0; 4096]),
    ];
    let path = write(folder.path(), "x.ova", &members);
    let path = path.to_str().unwrap();
    for name in [path, &format!("tar:{path}"), &format!("tar:{path}:member=disk.qcow2")] {
        let opened = open(name).unwrap();
        assert_eq!((opened.format, opened.device.size()), (Format::Qcow2, MIB as u64), "{name}");
        assert!(opened.device.is_read_only());
    }
    let json = format!(
        "json:{{\"driver\": \"raw\", \"file\": {{\"driver\": \"tar\", \"filename\": \"{path}\", \
         \"member\": \"x.ovf\"}}}}"
    );
    assert_eq!(first_byte(&*open(&json).unwrap().device), b'<');
    // Its user may say that it is a disk itself.
    let raw = OpenOptions { read_only: true, format: Some(Format::Raw), ..OpenOptions::default() };
    let opened = open_spec(&Spec::from_name(path).unwrap(), &raw).unwrap();
    assert_eq!(opened.device.size(), std::fs::metadata(path).unwrap().len());
}

#[test]
fn what_is_not_clear_is_an_error_that_names_the_members() {
    let folder = tempfile::tempdir().unwrap();
    let two = write(folder.path(), "two.ova", &[("a.qcow2", &image(None)), ("b.IMG", &[0; 512])]);
    let error = open(two.to_str().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.message().ends_with("member=NAME: a.qcow2, b.IMG"), "{error}");
    let none = write(folder.path(), "none.tar", &[("text", b"text")]);
    let error = open(none.to_str().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let name = format!("tar:{}:member=c", two.display());
    assert_eq!(open(&name).unwrap_err().kind(), ErrorKind::NotFound);
    let spec = Spec::from_name(none.to_str().unwrap()).unwrap();
    let error = open_spec(&spec, &OpenOptions::default()).unwrap_err();
    assert!(error.message().contains("read-only"), "{error}");
}

/// What a member is based on is a member, too: nothing beside the archive is reached.
#[test]
fn requests_stay_in_the_archive() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("outside.raw"), vec![1; MIB]).unwrap();
    let base = vec![2; MIB];
    let members: [(&str, &[u8]); 3] = [
        ("d/base.raw", &base),
        ("d/good.qcow2", &image(Some("base.raw"))),
        ("d/bad.qcow2", &image(Some("outside.raw"))),
    ];
    let path = write(folder.path(), "x.ova", &members);
    let named = |member: &str| format!("tar:{}:member=d/{member}", path.display());
    assert_eq!(first_byte(&*open(&named("good.qcow2")).unwrap().device), 2);
    assert_eq!(open(&named("bad.qcow2")).unwrap_err().kind(), ErrorKind::NotFound);
}
