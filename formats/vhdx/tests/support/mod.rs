// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the tests of this crate share.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses a part of it")]

use std::sync::Arc;
use tranship_block::{BlockDevice, MemoryDevice, Repair, Storage};
use tranship_vhdx::{CreateOptions, Guid, OpenOptions, Parent, ParentLocator, Vhdx, check, create};

pub(crate) const MIB: u64 = 1 << 20;

/// An image of `size` bytes with blocks of 1 MiB: where everything is cheap to test.
pub(crate) fn options(size: u64) -> CreateOptions {
    CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(size) }
}

/// The same as the child of a parent with this data-write GUID.
pub(crate) fn child_options(size: u64) -> CreateOptions {
    let parent = Some(ParentLocator::new(LINKAGE, Some("base.vhdx"), None));
    CreateOptions { parent, ..options(size) }
}

pub(crate) const LINKAGE: Guid = Guid::from_bytes([9; 16]);

pub(crate) fn in_memory(options: &CreateOptions) -> Arc<MemoryDevice> {
    let storage = Arc::new(MemoryDevice::new(Vec::new()));
    create(&*storage, options).unwrap();
    storage
}

pub(crate) fn parent(bytes: Vec<u8>) -> Parent {
    Parent { device: Arc::new(MemoryDevice::read_only(bytes)), data_write_guid: LINKAGE }
}

pub(crate) fn open(storage: &Arc<dyn Storage>, parent: Option<&Parent>) -> Vhdx {
    let options = OpenOptions { parent: parent.cloned(), ..OpenOptions::default() };
    Vhdx::open(storage.clone(), options).unwrap()
}

pub(crate) fn open_read_only(
    bytes: Vec<u8>,
    parent: Option<&Parent>,
) -> tranship_block::Result<Vhdx> {
    let options = OpenOptions { parent: parent.cloned(), ..OpenOptions::default() };
    Vhdx::open_read_only(Arc::new(MemoryDevice::read_only(bytes)), options)
}

/// The image has no faults.
pub(crate) fn assert_clean(storage: &dyn Storage) {
    let report = check(storage, Repair::Nothing).unwrap();
    assert!(report.is_clean(), "{:?}", report.details);
}

/// A storage for the image in `bytes`.
pub(crate) fn storage(bytes: Vec<u8>) -> Arc<dyn Storage> {
    Arc::new(MemoryDevice::new(bytes))
}

/// The device behind an image, as bytes.
pub(crate) fn bytes_of(device: &dyn BlockDevice) -> Vec<u8> {
    tranship_format_testing::contents(device)
}
