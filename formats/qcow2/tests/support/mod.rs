// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the tests share: making images, opening them, and what a discard does to them.
// Outside of #[test] functions clippy does not know that this is a test.
#![allow(dead_code, unreachable_pub, clippy::cast_possible_truncation, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice, Span, Storage};
use tranship_format_testing::{Op, qemu_img_status};
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

/// Does `op` to `device` and to the bytes that it should have afterwards.
///
/// A discard makes whole clusters zero and leaves the rest, which is more than the trait
/// promises, but what this crate does.
pub fn apply(device: &dyn BlockDevice, model: &mut [u8], cluster: u64, op: &Op) {
    let Op::Discard(start, len) = *op else {
        return tranship_format_testing::apply(device, model, op);
    };
    let size = device.size();
    let end = start.saturating_add(len).min(size);
    device.discard(Span::new(start, end - start)).unwrap();
    let start = start.next_multiple_of(cluster);
    let end = if end == size { size } else { end / cluster * cluster };
    if start < end {
        model[start as usize..end as usize].fill(0);
    }
}

/// What was made in memory, for qemu-img.
pub fn save(storage: &MemoryDevice, path: &Path) {
    std::fs::write(path, storage.snapshot()).unwrap();
}

/// qemu-img finds nothing wrong with the image; `name` tells which one it was.
#[track_caller]
pub fn clean(path: &Path, name: &str) {
    let output = qemu_img_status(&["check", "-f", "qcow2"], &[path]);
    assert!(
        output.status.success(),
        "{name}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
