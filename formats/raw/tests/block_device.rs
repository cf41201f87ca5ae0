// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same, on a block device: a loop device, which only root can make.
#![allow(clippy::unwrap_used, reason = "failing is what tests do")]

use std::path::{Path, PathBuf};
use std::process::Command;
use tranship_block::{
    BlockDevice, CopyOptions, ErrorKind, ExtentKind, MemoryDevice, Span, Storage, Zeroing, copy,
};
use tranship_raw::{Access, Preallocation, RawFile};

const SIZE: u64 = 4 << 20;

/// A loop device that goes when the test ends, well or badly.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path) -> Self {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").arg("-d").arg(&self.0).status().unwrap();
    }
}

#[test]
#[ignore = "needs root and a free loop device"]
fn a_block_device_is_a_disk_of_fixed_size() {
    let folder = tempfile::tempdir().unwrap();
    let backing = folder.path().join("backing");
    RawFile::create(&backing, SIZE).unwrap();
    let device = Loop::new(&backing);
    for direct in [false, true] {
        let file = RawFile::open(&device.0, Access::ReadWrite).unwrap();
        let file = if direct { file.into_direct().unwrap() } else { file };
        assert!(file.is_block_device());
        assert_eq!((file.size(), file.sector_size()), (SIZE, 512));
        assert!(file.discard_granularity().is_some());
        let extent = file.extent_at(5).unwrap();
        assert_eq!((extent.kind, extent.len), (ExtentKind::Data, SIZE - 5));
        assert!(file.file_range(0).is_none());
        file.set_len(SIZE - 1).unwrap();
        assert_eq!(file.set_len(SIZE + 1).unwrap_err().kind(), ErrorKind::NoSpace);

        let model = MemoryDevice::new(vec![0; usize::try_from(SIZE).unwrap()]);
        file.write_zeroes(Span::new(0, SIZE), Zeroing::MayUnmap).unwrap();
        for both in [&file as &dyn BlockDevice, &model] {
            // Whole sectors, odd ones, and the last byte.
            both.write_at(&vec![1; 100_000], 8192).unwrap();
            both.write_at(&vec![2; 70_000], 1_000_001).unwrap();
            both.write_at(&[3], SIZE - 1).unwrap();
            both.write_zeroes(Span::new(16_384, 8192), Zeroing::MayUnmap).unwrap();
            both.write_zeroes(Span::new(32_768, 4096), Zeroing::KeepAllocated).unwrap();
            both.write_zeroes(Span::new(1_010_101, 777), Zeroing::MayUnmap).unwrap();
            both.flush().unwrap();
        }
        file.discard(Span::new(2 << 20, 65_536)).unwrap();
        drop(file);
        let file = RawFile::open(&device.0, Access::ReadOnly).unwrap();
        let mut bytes = vec![9; usize::try_from(SIZE).unwrap()];
        file.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == model.snapshot(), "direct {direct}");
    }

    let too_big = RawFile::create_or_replace(&device.0, SIZE + 1, Preallocation::Off);
    assert_eq!(too_big.unwrap_err().kind(), ErrorKind::NoSpace);
    let target = RawFile::create_or_replace(&device.0, SIZE / 2, Preallocation::Off).unwrap();
    let source = MemoryDevice::new(vec![7; 1_234_567]);
    copy(&source, &target, &CopyOptions::default(), &()).unwrap();
    let mut bytes = vec![9; usize::try_from(SIZE).unwrap()];
    target.read_at(&mut bytes, 0).unwrap();
    assert!(bytes[..1_234_567].iter().all(|byte| *byte == 7));
    assert!(tranship_block::is_zero(&bytes[1_234_567..]));
}
