// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What becomes of clients' writes on their way to the disk.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use tranship_block::{Advice, BlockDevice, Extent, FileRange, Result, Span, Zeroing, is_zero};

/// When what was written has to survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    /// When the client flushes.
    WhenFlushed,
    /// Before the client is answered.
    Always,
    /// Clients' flushes are not heeded.
    Never,
}

/// What is done with data that is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DetectZeroes {
    /// It is written.
    Off,
    /// Zeroes are made of it, with their space reserved.
    On,
    /// Zeroes are made of it, and their space is given back.
    Unmap,
}

/// How writes are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    /// Space that clients give back is given back.
    pub(super) discards: bool,
    pub(super) zeroes: DetectZeroes,
    pub(super) durability: Durability,
}

impl Policy {
    /// The device with this policy.
    pub(super) fn over(self, device: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        let is_plain = self.discards
            && self.zeroes == DetectZeroes::Off
            && self.durability == Durability::WhenFlushed;
        if is_plain { device } else { Arc::new(Ruled { device, policy: self }) }
    }
}

/// A device whose writes follow a policy.
#[derive(Debug)]
struct Ruled {
    device: Arc<dyn BlockDevice>,
    policy: Policy,
}

impl Ruled {
    fn written(&self) -> Result<()> {
        match self.policy.durability {
            Durability::Always => self.device.flush(),
            Durability::WhenFlushed | Durability::Never => Ok(()),
        }
    }

    /// Makes zeroes of data that is zero, if that is wanted; whether it was done.
    fn zeroed(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<bool> {
        let mode = match self.policy.zeroes {
            DetectZeroes::Off => return Ok(false),
            DetectZeroes::On => Zeroing::KeepAllocated,
            DetectZeroes::Unmap => Zeroing::MayUnmap,
        };
        if !bufs.iter().all(|buf| is_zero(buf)) {
            return Ok(false);
        }
        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
        self.device.write_zeroes(Span::new(offset, len), mode)?;
        Ok(true)
    }
}

impl BlockDevice for Ruled {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn refresh_size(&self) {
        self.device.refresh_size();
    }

    fn is_read_only(&self) -> bool {
        self.device.is_read_only()
    }

    fn preferred_block(&self) -> u32 {
        self.device.preferred_block()
    }

    fn sector_size(&self) -> u32 {
        self.device.sector_size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device.read_at(buf, offset)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.device.read_vectored_at(bufs, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if !self.zeroed(&[IoSlice::new(buf)], offset)? {
            self.device.write_at(buf, offset)?;
        }
        self.written()
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        if !self.zeroed(bufs, offset)? {
            self.device.write_vectored_at(bufs, offset)?;
        }
        self.written()
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        let mode = if self.policy.discards { mode } else { Zeroing::KeepAllocated };
        self.device.write_zeroes(span, mode)?;
        self.written()
    }

    fn discard(&self, span: Span) -> Result<()> {
        if !self.policy.discards {
            return span.check_within(self.size());
        }
        self.device.discard(span)?;
        self.written()
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.device.extent_at(offset)
    }

    fn extent_within(&self, span: Span) -> Result<Extent> {
        self.device.extent_within(span)
    }

    fn flush(&self) -> Result<()> {
        match self.policy.durability {
            Durability::Never => Ok(()),
            Durability::WhenFlushed | Durability::Always => self.device.flush(),
        }
    }

    fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
        self.device.file_range(offset)
    }

    fn write_from_file(&self, offset: u64, range: &FileRange<'_>) -> Result<bool> {
        let is_done = self.device.write_from_file(offset, range)?;
        if is_done {
            self.written()?;
        }
        Ok(is_done)
    }

    fn advise(&self, span: Span, advice: Advice) {
        self.device.advise(span, advice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::{Measured, MemoryDevice};

    const PLAIN: Policy =
        Policy { discards: true, zeroes: DetectZeroes::Off, durability: Durability::WhenFlushed };

    /// Operations that reach the disk: writes, zeroes, discards, flushes.
    fn reached(policy: Policy, work: impl FnOnce(&dyn BlockDevice)) -> [u64; 4] {
        let disk = Measured::new(Arc::new(MemoryDevice::new(vec![1; 8192])));
        work(&*policy.over(Arc::new(disk.clone())));
        let told = disk.snapshot();
        [told.writes, told.zeroes, told.discards, told.flushes].map(|counted| counted.operations)
    }

    #[test]
    fn writes_follow_the_policy() {
        let all = |device: &dyn BlockDevice| {
            device.write_at(&[7; 512], 0).unwrap();
            device.write_at(&[0; 512], 512).unwrap();
            device
                .write_vectored_at(&[IoSlice::new(&[0; 8]), IoSlice::new(&[1; 8])], 1024)
                .unwrap();
            device.discard(Span::new(4096, 512)).unwrap();
            device.flush().unwrap();
        };
        let cases = [
            (PLAIN, [3, 0, 1, 1]),
            (Policy { discards: false, ..PLAIN }, [3, 0, 0, 1]),
            (Policy { zeroes: DetectZeroes::On, ..PLAIN }, [2, 1, 1, 1]),
            (Policy { durability: Durability::Always, ..PLAIN }, [3, 0, 1, 5]),
            (Policy { durability: Durability::Never, ..PLAIN }, [3, 0, 1, 0]),
        ];
        for (policy, expected) in cases {
            assert_eq!(reached(policy, all), expected, "{policy:?}");
        }
    }

    #[test]
    fn space_stays_reserved_unless_it_may_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.img");
        for (discards, is_data) in [(true, false), (false, true)] {
            std::fs::write(&path, vec![1; 1 << 20]).unwrap();
            let file = tranship_raw::RawFile::open(&path, tranship_raw::Access::ReadWrite).unwrap();
            let device = Policy { discards, ..PLAIN }.over(Arc::new(file));
            let half = Span::new(0, 512 << 10);
            device.write_zeroes(half, Zeroing::MayUnmap).unwrap();
            device.flush().unwrap();
            let mut found = [1; 512];
            device.read_at(&mut found, 0).unwrap();
            assert_eq!(found, [0; 512]);
            let blocks = std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap());
            assert_eq!(blocks >= 2048, is_data, "{blocks} blocks, discards: {discards}");
        }
    }
}
