// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is under an image that has only a part of its disk.

use crate::{BlockDevice, Extent, ExtentKind, Result};
use std::sync::Arc;

/// The disk that shows where an image has nothing of its own: a backing file, a parent, or
/// none at all. What it does not reach reads as zero.
#[derive(Clone, Debug, Default)]
pub struct Lower(Option<Arc<dyn BlockDevice>>);

impl Lower {
    /// What is under an image with this disk below it.
    pub fn new(device: Option<Arc<dyn BlockDevice>>) -> Self {
        Self(device)
    }

    /// Whether there is a disk below.
    pub fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// Fills `buf` with the bytes from `offset` onward.
    ///
    /// # Errors
    ///
    /// As [`BlockDevice::read_at`] of the disk below; its end is none.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let size = self.0.as_ref().map_or(0, BlockDevice::size);
        let left = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (there, beyond) = buf.split_at_mut(left.min(buf.len()));
        beyond.fill(0);
        match &self.0 {
            Some(device) if !there.is_empty() => device.read_at(there, offset),
            _ => Ok(()),
        }
    }

    /// Classifies at most `len` bytes from `offset` onward, one layer deeper than the disk
    /// below does.
    ///
    /// # Errors
    ///
    /// As [`BlockDevice::extent_at`] of the disk below.
    pub fn extent_at(&self, offset: u64, len: u64) -> Result<Extent> {
        match &self.0 {
            Some(device) if offset < device.size() => {
                let mut extent = device.extent_at(offset)?.limited_to(len);
                extent.depth = extent.depth.saturating_add(1);
                Ok(extent)
            }
            _ => Ok(Extent::new(ExtentKind::Hole, len)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;

    #[test]
    fn past_its_end_there_are_zeroes() {
        let lower = Lower::new(Some(Arc::new(MemoryDevice::read_only(vec![7; 1000]))));
        for (offset, there) in [(0, 8), (996, 4), (1000, 0), (u64::MAX, 0)] {
            let mut buf = [0xee; 8];
            lower.read_at(&mut buf, offset).unwrap();
            assert!(buf[..there].iter().all(|byte| *byte == 7), "{offset}");
            assert!(buf[there..].iter().all(|byte| *byte == 0), "{offset}");
        }
        let extent = lower.extent_at(990, 500).unwrap();
        assert_eq!((extent.kind, extent.len, extent.depth), (ExtentKind::Data, 10, 1));
        let extent = lower.extent_at(1000, 500).unwrap();
        assert_eq!((extent.kind, extent.len, extent.depth), (ExtentKind::Hole, 500, 0));
    }

    #[test]
    fn without_a_disk_there_are_only_zeroes() {
        let mut buf = [0xee; 8];
        Lower::default().read_at(&mut buf, 5).unwrap();
        assert_eq!(buf, [0; 8]);
        assert_eq!(Lower::default().extent_at(5, 9).unwrap().len, 9);
    }
}
