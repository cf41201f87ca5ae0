// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the tests share: making images, reading them, and asking qemu-img.
// Outside of #[test] functions clippy does not know that this is a test.
#![allow(dead_code, unreachable_pub, clippy::cast_possible_truncation, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice, Span, Storage, Zeroing};
use tranship_qcow2::{CreateOptions, OpenOptions, Qcow2, create};

pub fn options(size: u64, cluster_bits: u32) -> CreateOptions {
    CreateOptions { cluster_bits, ..CreateOptions::new(size) }
}

pub fn open(storage: &Arc<dyn Storage>, backing: Option<Arc<dyn BlockDevice>>) -> Qcow2 {
    Qcow2::open(storage.clone(), OpenOptions { backing, ..OpenOptions::default() }).unwrap()
}

pub fn in_memory(size: u64, cluster_bits: u32) -> Arc<MemoryDevice> {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &options(size, cluster_bits)).unwrap();
    storage
}

pub fn contents(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0xee; device.size() as usize];
    device.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Bytes that differ from place to place and from seed to seed, never zero.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8 | 1
        })
        .collect()
}

/// Something that is done to a disk.
#[derive(Clone, Debug)]
pub enum Op {
    Write(u64, usize, u64),
    Zero(u64, u64, Zeroing),
    Discard(u64, u64),
    Flush,
    Reopen,
}

/// Does `op` to `device` and to the bytes that it should have afterwards.
///
/// A discard makes whole clusters zero and leaves the rest, which is more than the trait
/// promises, but what this crate does.
pub fn apply(device: &dyn BlockDevice, model: &mut [u8], cluster: u64, op: &Op) {
    let size = device.size();
    let clip = |at: u64, len: u64| Span::new(at.min(size), len.min(size - at.min(size)));
    let range = |span: Span| span.start as usize..span.end() as usize;
    match op {
        Op::Write(at, len, seed) => {
            let span = clip(*at, *len as u64);
            let bytes = pattern(span.len as usize, *seed);
            device.write_at(&bytes, span.start).unwrap();
            model[range(span)].copy_from_slice(&bytes);
        }
        Op::Zero(at, len, mode) => {
            let span = clip(*at, *len);
            device.write_zeroes(span, *mode).unwrap();
            model[range(span)].fill(0);
        }
        Op::Discard(at, len) => {
            let span = clip(*at, *len);
            device.discard(span).unwrap();
            let start = span.start.next_multiple_of(cluster);
            let end = if span.end() == size { size } else { span.end() / cluster * cluster };
            if start < end {
                model[start as usize..end as usize].fill(0);
            }
        }
        Op::Flush => device.flush().unwrap(),
        Op::Reopen => {}
    }
}

pub fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: qemu-img is not installed");
    }
    found
}

/// Runs qemu-img and returns its standard output.
pub fn qemu_img(args: &[&str], paths: &[&Path]) -> String {
    let output = Command::new("qemu-img").args(args).args(paths).output().unwrap();
    assert!(
        output.status.success(),
        "qemu-img {args:?} {paths:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The guest's bytes as qemu-img sees them.
pub fn raw_by_qemu(folder: &Path, image: &Path) -> Vec<u8> {
    let raw: PathBuf = folder.join("by-qemu.raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[image, &raw]);
    std::fs::read(raw).unwrap()
}
