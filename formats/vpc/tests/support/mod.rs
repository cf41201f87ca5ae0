// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the tests share: making images and opening them.
// Outside of #[test] functions clippy does not know that this is a test.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice, Repair, Storage};
use tranship_raw::{Access, RawFile};
use tranship_vpc::{
    CreateOptions, Kind, NewParent, OpenOptions, Parent, Sizing, Vpc, check, create,
};

pub const PARENT_ID: [u8; 16] = [7; 16];
pub const BLOCK: u32 = 8192;

/// Options for a disk of exactly `size` bytes in small blocks.
pub fn options(kind: Kind, size: u64) -> CreateOptions {
    let parent = NewParent {
        unique_id: PARENT_ID,
        timestamp: 5,
        relative: Some("base.vhd".into()),
        absolute: Some("/disks/base.vhd".into()),
    };
    CreateOptions {
        kind,
        sizing: Sizing::Exact,
        block_size: BLOCK,
        parent: (kind == Kind::Differencing).then_some(parent),
        ..CreateOptions::new(size)
    }
}

pub fn in_memory(kind: Kind, size: u64) -> Arc<MemoryDevice> {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &options(kind, size)).unwrap();
    storage
}

/// An image whose table grows over its first block when it gets 128 entries.
pub fn in_tiny_blocks(kind: Kind, size: u64) -> Arc<MemoryDevice> {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, &CreateOptions { block_size: 512, ..options(kind, size) }).unwrap();
    storage
}

pub fn parent(bytes: &[u8]) -> Parent {
    Parent { device: Arc::new(MemoryDevice::read_only(bytes.to_vec())), unique_id: PARENT_ID }
}

pub fn over(base: Option<&[u8]>) -> OpenOptions {
    OpenOptions { parent: base.map(parent), ..OpenOptions::default() }
}

pub fn open(storage: &Arc<impl Storage + 'static>, base: Option<&[u8]>) -> Vpc {
    Vpc::open(storage.clone(), over(base)).unwrap()
}

pub fn open_bytes(bytes: Vec<u8>, options: OpenOptions) -> tranship_block::Result<Vpc> {
    Vpc::open_read_only(Arc::new(MemoryDevice::read_only(bytes)), options)
}

/// What the image's bytes are for the guest without anything written.
pub fn initially(size: usize, base: Option<&[u8]>) -> Vec<u8> {
    let mut model = base.unwrap_or_default().to_vec();
    model.resize(size, 0);
    model
}

pub fn assert_clean(storage: &dyn Storage) {
    let report = check(storage, Repair::Nothing).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

pub fn writable(path: &Path) -> Arc<RawFile> {
    Arc::new(RawFile::open(path, Access::ReadWrite).unwrap())
}

pub fn read_only(path: &Path) -> Arc<dyn BlockDevice> {
    Arc::new(RawFile::open(path, Access::ReadOnly).unwrap())
}
