// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Archives of other programs, and hostile ones.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

use proptest::prelude::*;
use std::process::Command;
use std::sync::Arc;
use tranship_block::{BlockDevice, ErrorKind, MemoryDevice, Span};
use tranship_format_testing::{contents, damaged, exercise, pattern};
use tranship_tar::{Archive, is_tar};

fn open(bytes: Vec<u8>) -> tranship_block::Result<Archive> {
    Archive::open(Arc::new(MemoryDevice::read_only(bytes)))
}

fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        // The builder would refuse the names that are to be tried here.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

/// GNU tar itself, in each of its formats.
#[test]
fn members_of_every_dialect_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let long = format!("{}/{}/disk.img", "d".repeat(90), "e".repeat(60));
    let disk = pattern(70_001, 1);
    std::fs::create_dir_all(folder.path().join(&long).parent().unwrap()).unwrap();
    std::fs::write(folder.path().join(&long), &disk).unwrap();
    std::fs::write(folder.path().join("x.ovf"), "text").unwrap();
    for format in ["gnu", "oldgnu", "pax", "posix", "ustar"] {
        let status = Command::new("tar")
            .current_dir(folder.path())
            .args(["--create", "--file", "x.tar", "--format", format, "./x.ovf", &long])
            .status()
            .unwrap();
        assert!(status.success());
        let bytes = std::fs::read(folder.path().join("x.tar")).unwrap();
        assert!(is_tar(&MemoryDevice::read_only(bytes.clone())).unwrap(), "{format}");
        let archive = open(bytes.clone()).unwrap();
        assert_eq!(archive.names().collect::<Vec<_>>(), [long.as_str(), "x.ovf"], "{format}");
        assert!(contents(&*archive.member(&long).unwrap()) == disk, "{format}");
        assert_eq!(contents(&*archive.member("./x.ovf").unwrap()), b"text");
        let span = archive.span("x.ovf").unwrap();
        assert_eq!(&bytes[span.start as usize..span.end() as usize], b"text");
        let error = archive.member("y").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}

#[test]
fn a_name_that_is_told_leads_to_its_member() {
    let archive_of = |name: &str| open(archive(&[(name, b"1")]));
    for name in ["a", "./a", "././a", "./././a"] {
        let archive = archive_of(name).unwrap();
        assert_eq!(archive.names().collect::<Vec<_>>(), ["a"], "{name}");
        assert_eq!(contents(&*archive.member("a").unwrap()), b"1");
        assert_eq!(contents(&*archive.member(name).unwrap()), b"1");
    }
    assert_eq!(archive_of("././").unwrap_err().kind(), ErrorKind::Denied);
    let error = open(archive(&[("././a", b"1"), ("a", b"2")])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
}

#[test]
fn what_is_no_archive_of_disks_is_refused() {
    let good = archive(&[("a", b"1")]);
    let mut damaged_header = good.clone();
    damaged_header[3] ^= 1;
    let mut sparse = archive(&[("a", b"1")]);
    sparse[156] = b'S';
    let sum: u64 = sparse[..512].iter().map(|byte| u64::from(*byte)).sum::<u64>()
        - sparse[148..156].iter().map(|byte| u64::from(*byte)).sum::<u64>()
        + 8 * 32;
    sparse[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let cases: [(&str, Vec<u8>, ErrorKind, &str); 9] = [
        ("a name twice", archive(&[("a", b""), ("a", b"")]), ErrorKind::Denied, "there twice"),
        ("upwards", archive(&[("../a", b"")]), ErrorKind::Denied, "\"../a\" is not allowed"),
        ("absolute", archive(&[("/a", b"")]), ErrorKind::Denied, "\"/a\" is not allowed"),
        ("a wrong checksum", damaged_header, ErrorKind::Corrupt, "not a tar archive"),
        ("a sparse member", sparse, ErrorKind::Unsupported, "unpack"),
        ("gzip", [&[0x1f, 0x8b][..], &[1; 600]].concat(), ErrorKind::Unsupported, "with gzip"),
        ("a cut member", good[..512].to_vec(), ErrorKind::Corrupt, "1 bytes are missing"),
        ("a cut header", good[..300].to_vec(), ErrorKind::Corrupt, "212 bytes are missing"),
        ("text", vec![b'x'; 2000], ErrorKind::Corrupt, "not a tar archive"),
    ];
    for (what, bytes, kind, text) in cases {
        let error = open(bytes).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert!(error.to_string().contains(text), "{what}: {error}");
    }
    assert_eq!(open(Vec::new()).unwrap().names().count(), 0);
    assert!(!is_tar(&MemoryDevice::read_only(vec![0; 2000])).unwrap());
    assert!(!is_tar(&MemoryDevice::read_only(vec![0; 100])).unwrap());
}

fn victim() -> Vec<u8> {
    let long = "n".repeat(200);
    let mut builder = tar::Builder::new(archive(&[("x.ovf", b"text")])[..1024].to_vec());
    let mut header = tar::Header::new_gnu();
    header.set_size(5000);
    builder.append_data(&mut header, long, &pattern(5000, 3)[..]).unwrap();
    builder.append_pax_extensions([("path", &b"c/disk.img"[..]), ("size", b"700")]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_path("short").unwrap();
    header.set_size(700);
    header.set_cksum();
    builder.append(&header, &[7; 700][..]).unwrap();
    builder.into_inner().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damage_is_survived(bytes in damaged(victim(), vec![Span::new(0, 512), Span::new(1024, 1024)])) {
        if let Ok(archive) = open(bytes) {
            for name in archive.names() {
                let member = archive.member(name).unwrap();
                prop_assert!(member.is_read_only());
                exercise(&*member);
            }
        }
    }
}
