// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Differencing VHD, whose parents QEMU's tools ignore: beside libvhdi, and beside a reader
//! that goes through the tables sector by sector, as the specification has it.
//!
//! libvhdi of 2021 takes the sectors behind a stored one for stored, to the end of their byte
//! of the bitmap: it gets whole bytes only. It does not get VHDX: of a child without blocks
//! it reads the image's header at byte 64 KiB of the disk.

use crate::{Folder, Maker, SIZE};
use proptest::prelude::*;
use std::path::Path;
use std::process::Command;
use tranship_format_testing::{Op, operations, verify};
use tranship_formats::Format;

/// The system's own: others do not see the packages of the distribution.
const PYTHON: &str = "/usr/bin/python3";

/// Writes what libvhdi reads from the first image, whose parents follow, to the last name.
const SCRIPT: &str = r"
import sys, pyvhdi
files = []
for name in sys.argv[1:-1]:
    file = pyvhdi.file()
    file.open(name)
    files.append(file)
for child, parent in zip(files, files[1:]):
    assert child.get_parent_identifier() == parent.get_identifier(), 'identifiers'
    child.set_parent(parent)
with open(sys.argv[-1], 'wb') as raw:
    left = files[0].get_media_size()
    while left:
        piece = files[0].read_buffer(min(left, 1 << 20))
        raw.write(piece)
        left -= len(piece)
";

/// Sectors of a byte of a bitmap.
const BYTE: u64 = 8 * 512;

fn has_libvhdi() -> bool {
    let found = Command::new(PYTHON)
        .args(["-c", "import pyvhdi"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: python3-libvhdi is not installed");
    }
    found
}

/// The disk of the last image, as libvhdi reads it.
fn by_libvhdi(folder: &Folder, names: &[String]) -> Vec<u8> {
    let output = Command::new(PYTHON)
        .args(["-c", SCRIPT])
        .args(names.iter().rev().map(|name| folder.path(name)))
        .arg(folder.path("flat.raw"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(folder.path("flat.raw")).unwrap()
}

fn number<const LEN: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + LEN].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Lays the sectors that a dynamic or differencing image has over the disk of its parent.
fn lay_over(image: &Path, disk: &mut [u8]) {
    let file = std::fs::read(image).unwrap();
    let header = &file[number::<8>(&file, 16) as usize..];
    assert_eq!((&file[..8], &header[..8]), (&b"conectix"[..], &b"cxsparse"[..]));
    let is_child = number::<4>(&file, 60) == 4;
    let table = number::<8>(header, 16) as usize;
    let sectors = number::<4>(header, 32) as usize / 512;
    for (sector, bytes) in disk.chunks_mut(512).enumerate() {
        let (block, within) = (sector / sectors, sector % sectors);
        let place = number::<4>(&file, table + block * 4);
        if place == 0xffff_ffff {
            continue;
        }
        let bitmap = place as usize * 512;
        let is_stored = file[bitmap + within / 8] & (0x80 >> (within % 8)) != 0;
        if is_stored || !is_child {
            let at = bitmap + (sectors / 8).next_multiple_of(512) + within * 512;
            bytes.copy_from_slice(&file[at..at + bytes.len()]);
        }
    }
}

/// A chain with these changes at each of its levels; the names, the parents first.
fn chain(folder: &Folder, levels: &[Vec<Op>]) -> (Vec<String>, Vec<u8>) {
    let mut model = vec![0; SIZE as usize];
    let mut names: Vec<String> = Vec::new();
    for (number, ops) in levels.iter().enumerate() {
        let name = format!("level-{number}.vhd");
        match names.last() {
            None => folder.create(Maker::Here, "vpc", "force_size=on", &name),
            Some(parent) => {
                let words = ["create", "-q", "-f", "vpc", "-b", parent, "-F", "vpc", &name];
                folder.run(Maker::Here, &words);
            }
        }
        folder.work(Format::Vpc, &name, &mut model, ops);
        names.push(name);
    }
    verify(&*folder.device(Format::Vpc, names.last().unwrap()), &model);
    (names, model)
}

/// The same with whole bytes of bitmaps.
fn whole(op: Op) -> Op {
    let out = |at: u64, len: u64| {
        let start = at / BYTE * BYTE;
        (start, (at + len).next_multiple_of(BYTE) - start)
    };
    match op {
        Op::Write(at, len, seed) => {
            let (at, len) = out(at, len as u64);
            Op::Write(at, len as usize, seed)
        }
        Op::Zero(at, len, mode) => {
            let (at, len) = out(at, len);
            Op::Zero(at, len, mode)
        }
        Op::Discard(at, len) => {
            let (at, len) = out(at, len);
            Op::Discard(at, len)
        }
        other => other,
    }
}

fn levels() -> impl Strategy<Value = Vec<Vec<Op>>> {
    prop::collection::vec(operations(SIZE, 64 << 10, 10), 2..4)
}

#[track_caller]
fn assert_equal(found: &[u8], model: &[u8]) {
    assert_eq!(found.len(), model.len());
    let differing = found.iter().zip(model).position(|(found, expected)| found != expected);
    assert_eq!(differing, None, "first byte that differs");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn chains_are_what_their_tables_say(levels in levels()) {
        let Some(folder) = Folder::new() else { return Ok(()) };
        let (names, model) = chain(&folder, &levels);
        let mut found = vec![0; model.len()];
        for name in &names {
            lay_over(&folder.path(name), &mut found);
        }
        assert_equal(&found, &model);
    }

    #[test]
    fn chains_read_the_same(levels in levels()) {
        let Some(folder) = Folder::new() else { return Ok(()) };
        if !has_libvhdi() {
            return Ok(());
        }
        let levels: Vec<Vec<Op>> =
            levels.into_iter().map(|ops| ops.into_iter().map(whole).collect()).collect();
        let (names, model) = chain(&folder, &levels);
        assert_equal(&by_libvhdi(&folder, &names), &model);
    }
}
