// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images beside readers that others have written: what is written here, or by QEMU, has to
//! be the same bytes for all of them.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "tests")]

mod children;
mod qcow2;
#[path = "../support/mod.rs"]
mod support;
mod vhd;
mod vmdk;

use proptest::sample::select;
use proptest::strategy::Strategy;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tempfile::TempDir;
use tranship_block::BlockDevice;
use tranship_format_testing::{Op, apply, has_tool, operations, pattern, verify};
use tranship_formats::{Format, OpenOptions, Opened};

/// Bytes of the disks: a few blocks of every format.
const SIZE: u64 = 5 << 20;

/// What makes an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maker {
    Here,
    Qemu,
}

/// The makers that are there. Those who want to test more than this program's images find
/// QEMU's missing in the output.
fn makers() -> Vec<Maker> {
    let qemu = has_tool("qemu-img").then_some(Maker::Qemu);
    qemu.into_iter().chain([Maker::Here]).collect()
}

/// One of the makers, one of the `options` of a format, and what is done to the disk.
fn cases(
    options: &'static [&'static str],
    unit: u64,
) -> impl Strategy<Value = (Maker, &'static str, Vec<Op>)> {
    (select(makers()), select(options), operations(SIZE, unit, 16))
}

/// A folder with the images of a test.
struct Folder {
    folder: TempDir,
    program: PathBuf,
}

impl Folder {
    /// An empty one, if the program has been built.
    fn new() -> Option<Self> {
        let program = support::program()?.canonicalize().unwrap();
        Some(Self { folder: tempfile::tempdir().unwrap(), program })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Gives the same words to the program or to `qemu-img`.
    fn run(&self, maker: Maker, words: &[&str]) {
        let mut command = match maker {
            Maker::Qemu => Command::new("qemu-img"),
            Maker::Here => {
                let mut command = Command::new(&self.program);
                command.arg("image");
                command
            }
        };
        let output = command.args(words).current_dir(self.folder.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{maker:?} {words:?}: {stderr}");
    }

    fn create(&self, maker: Maker, format: &str, options: &str, name: &str) {
        let size = SIZE.to_string();
        self.run(maker, &["create", "-q", "-f", format, "-o", options, name, &size]);
    }

    /// A raw disk and its bytes: data, holes, and something that can be compressed.
    fn disk(&self, seed: u64) -> (PathBuf, Vec<u8>) {
        let mut model = pattern(SIZE as usize, seed);
        model[300_000..1_200_000].fill(b'c');
        model[2 << 20..(3 << 20) + 700].fill(0);
        let path = self.path("disk.raw");
        std::fs::write(&path, &model).unwrap();
        (path, model)
    }

    fn open(&self, format: Format, name: &str, read_only: bool) -> Opened {
        let options = OpenOptions { format: Some(format), read_only, ..OpenOptions::default() };
        tranship_formats::open(&self.path(name), &options).unwrap()
    }

    /// Does all of it to the image and to the bytes that it should have.
    fn work(&self, format: Format, name: &str, model: &mut [u8], ops: &[Op]) {
        let mut opened = self.open(format, name, false);
        assert_eq!(opened.device.size(), model.len() as u64);
        for op in ops {
            if matches!(op, Op::Reopen) {
                drop(opened);
                opened = self.open(format, name, false);
            }
            apply(&*opened.device, model, op);
        }
        opened.device.flush().unwrap();
    }

    /// The disk as it is read here.
    fn device(&self, format: Format, name: &str) -> Arc<dyn BlockDevice> {
        self.open(format, name, true).device
    }

    /// The image has these bytes, for this project and for another reader.
    fn assert_same<R: Read + Seek>(
        &self,
        format: Format,
        name: &str,
        model: &[u8],
        other: impl FnOnce(&Path) -> R,
    ) {
        verify(&*self.device(format, name), model);
        assert_reads(other(&self.path(name)), model);
    }
}

/// A reader gives these bytes, from front to back and in pieces from back to front.
fn assert_reads(mut reader: impl Read + Seek, model: &[u8]) {
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), model.len());
    let differing = all.iter().zip(model).position(|(found, expected)| found != expected);
    assert_eq!(differing, None, "first byte that differs");
    for (number, piece) in model.chunks(70_000).enumerate().rev() {
        let mut found = vec![0xee; piece.len()];
        reader.seek(SeekFrom::Start(number as u64 * 70_000)).unwrap();
        reader.read_exact(&mut found).unwrap();
        assert!(found == piece, "piece {number}");
    }
}
