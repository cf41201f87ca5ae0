// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Makes what the fuzzer starts from: small images of every format and variant, by our own
//! crates, by qemu-img if it is there, and the small ones of `TRANSHIP_SAMPLES`.
//!
//! Usage: `fuzz_seeds FOLDER` writes them into a folder per target;
//! `fuzz_seeds CASE FIRST SECOND` writes the two files of one case instead, to look at a
//! finding with other tools.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "fuzz_seeds/by_qemu.rs"]
mod by_qemu;
#[path = "../../formats/dmg/tests/make/mod.rs"]
mod dmg;
#[path = "fuzz_seeds/own.rs"]
mod own;
#[path = "fuzz_seeds/streams.rs"]
mod streams;

use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use tranship_block::Span;
use tranship_format_testing::samples;
use tranship_tests::fuzz::{Case, Contents, Op};

/// Bytes of an input; longer ones make the fuzzer slow.
const LONGEST: usize = 96 << 10;
/// Samples that are unpacked to be looked at.
const LARGEST_SAMPLE: u64 = 64 << 20;

fn main() {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    match arguments.as_slice() {
        [folder] => make(folder),
        [case, files @ ..] if files.len() == 2 => {
            let case = Case::decode(&std::fs::read(case).unwrap());
            println!("flags {:#010b}, variant {}, {:?}", case.flags, case.variant, case.ops);
            for (contents, path) in case.files.iter().zip(files) {
                let image = contents.image();
                let file = std::fs::File::create(path).unwrap();
                file.set_len(contents.len).unwrap();
                for (at, bytes) in &contents.pieces {
                    let len = (bytes.len() as u64).min(contents.len.saturating_sub(*at));
                    let Some(bytes) = image.get(Span::new(*at, len)) else { continue };
                    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, *at).unwrap();
                }
            }
        }
        _ => panic!("usage: fuzz_seeds FOLDER | fuzz_seeds CASE FIRST SECOND"),
    }
}

fn make(folder: &Path) {
    let seeds = Seeds { folder: folder.to_owned() };
    own::make(&seeds);
    streams::make(&seeds);
    by_qemu::make(&seeds);
    let all = samples();
    let scratch = tempfile::tempdir().unwrap();
    for sample in &all {
        let Some(target) = sample.format.as_deref().and_then(target_of) else { continue };
        let path = sample.unpack(scratch.path(), &all);
        if std::fs::metadata(&path).unwrap().len() <= LARGEST_SAMPLE {
            seeds.add(target, &[&std::fs::read(&path).unwrap()]);
        }
        std::fs::remove_file(&path).unwrap();
    }
}

/// The target that takes images of a format.
fn target_of(format: &str) -> Option<&'static str> {
    let targets = ["qcow2", "vhdx", "vmdk", "vpc", "vdi", "qed", "parallels", "dmg", "luks"];
    targets.into_iter().find(|target| *target == format)
}

/// Where the seeds go.
pub(crate) struct Seeds {
    folder: PathBuf,
}

impl Seeds {
    /// Adds an image, and another file that it refers to, to the seeds of `target`.
    pub(crate) fn add(&self, target: &str, files: &[&[u8]]) {
        let mut case = Case::default();
        for (file, bytes) in case.files.iter_mut().zip(files) {
            *file = shortened(bytes);
        }
        let hash = Sha256::digest(files.concat());
        for (number, flags) in [0xff_u8, 0x0d, 0x5f].into_iter().enumerate() {
            case.flags = flags;
            case.variant = hash[number] % 16;
            for (op, bytes) in case.ops.iter_mut().zip(hash[number..].chunks_exact(3)) {
                let place = u16::from_le_bytes([bytes[0], bytes[1]]);
                *op = Op { kind: bytes[2], place, len: bytes[0] ^ bytes[2] };
            }
            if let Some(input) = case.encode() {
                self.put(target, &input);
                self.put("formats", &input);
            }
        }
    }

    /// Adds an input that is no image.
    pub(crate) fn put(&self, target: &str, input: &[u8]) {
        let folder = self.folder.join(target);
        std::fs::create_dir_all(&folder).unwrap();
        let mut name = String::new();
        for byte in &Sha256::digest(input)[..10] {
            write!(name, "{byte:02x}").unwrap();
        }
        std::fs::write(folder.join(name), input).unwrap();
    }
}

/// The start and the end of a file, as far as an input has room.
fn shortened(bytes: &[u8]) -> Contents {
    let mut contents = Contents::of(bytes);
    let most = LONGEST / 2;
    let mut room = most;
    let last = contents.pieces.pop();
    for (_, piece) in &mut contents.pieces {
        piece.truncate(room.min(most / 4));
        room -= piece.len();
    }
    contents.pieces.retain(|(_, piece)| !piece.is_empty());
    contents.pieces.truncate(200);
    if let Some((at, piece)) = last {
        // What matters at the end are footers.
        let skip = piece.len().saturating_sub(4096);
        contents.pieces.push((at + skip as u64, piece[skip..].to_vec()));
    }
    contents
}
