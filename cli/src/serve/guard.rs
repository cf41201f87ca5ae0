// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeps a disk that was taken for raw from becoming something else.
//!
//! Whoever writes to such a disk could write the header of an image that names any file of
//! the host, and get that file the next time the disk is opened by guess.

use std::io::{IoSlice, IoSliceMut};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tranship_block::{
    Advice, BlockDevice, Error, ErrorKind, Extent, FileRange, Result, Span, Zeroing,
};
use tranship_formats::Format;

/// Bytes at either end in which formats have what they are known by.
const ENDS: u64 = 64 << 10;

/// A raw disk that stays one.
#[derive(Debug)]
pub(super) struct StaysRaw {
    device: Arc<dyn BlockDevice>,
    path: PathBuf,
    /// Held while something is written at an end: two halves must not make a whole.
    ends: Mutex<()>,
}

impl StaysRaw {
    /// Guards `device`, which is called `path`.
    pub(super) fn new(device: Arc<dyn BlockDevice>, path: PathBuf) -> Self {
        Self { device, path, ends: Mutex::default() }
    }

    /// Writes with `write` unless the disk would be something else with the bytes of
    /// `bufs` from `offset` on.
    fn guarded(
        &self,
        bufs: &[IoSlice<'_>],
        offset: u64,
        write: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let len = bufs.iter().map(|buf| buf.len() as u64).sum::<u64>();
        let tail = self.device.size().saturating_sub(ENDS);
        if offset >= ENDS && offset.saturating_add(len) <= tail {
            return write();
        }
        let _alone = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let then = Then { device: &*self.device, bufs, offset };
        match tranship_formats::probe(&then, &self.path)? {
            Format::Raw => write(),
            format => Err(Error::new(
                ErrorKind::Denied,
                format!(
                    "the disk was taken for raw, and with this write it would be {}: give its \
                     format with -f raw",
                    format.name()
                ),
            )
            .at(offset)),
        }
    }
}

/// What a device would be after a write.
#[derive(Debug)]
struct Then<'a> {
    device: &'a dyn BlockDevice,
    bufs: &'a [IoSlice<'a>],
    offset: u64,
}

impl BlockDevice for Then<'_> {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device.read_at(buf, offset)?;
        let mut at = self.offset;
        for written in self.bufs {
            // Where the two overlap, by their own counts.
            let from = at.max(offset);
            let end = (at + written.len() as u64).min(offset + buf.len() as u64);
            if let Some(len) = end.checked_sub(from) {
                let place = |start: u64| usize::try_from(from - start).ok();
                let (Some(source), Some(target)) = (place(at), place(offset)) else { continue };
                let len = usize::try_from(len).unwrap_or(0);
                buf[target..target + len].copy_from_slice(&written[source..source + len]);
            }
            at += written.len() as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.device.extent_at(offset)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

impl BlockDevice for StaysRaw {
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
        self.guarded(&[IoSlice::new(buf)], offset, || self.device.write_at(buf, offset))
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.guarded(bufs, offset, || self.device.write_vectored_at(bufs, offset))
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.device.write_zeroes(span, mode)
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.device.discard(span)
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.device.extent_at(offset)
    }

    fn extent_within(&self, span: Span) -> Result<Extent> {
        self.device.extent_within(span)
    }

    fn flush(&self) -> Result<()> {
        self.device.flush()
    }

    fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
        self.device.file_range(offset)
    }

    fn advise(&self, span: Span, advice: Advice) {
        self.device.advise(span, advice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;

    #[test]
    fn no_write_makes_an_image_of_it() {
        let memory = Arc::new(MemoryDevice::new(vec![0; 1 << 20]));
        let disk = StaysRaw::new(memory, "d.img".into());
        let end = (1 << 20) - 512;
        disk.write_at(b"a boot sector", 0).unwrap();
        disk.write_at(b"FI\xfb", 1).unwrap();
        for (bytes, offset) in [(&b"Q"[..], 0), (b"conectix", end), (b"koly", end)] {
            let error = disk.write_at(bytes, offset).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
            assert!(error.to_string().contains("-f raw"), "{error}");
        }
        let parts = [IoSlice::new(b"vhd"), IoSlice::new(b"x"), IoSlice::new(b"file")];
        assert!(disk.write_vectored_at(&parts, 0).is_err());
        // What was refused has changed nothing.
        let mut found = [0; 4];
        disk.read_at(&mut found, 0).unwrap();
        assert_eq!(&found, b"aFI\xfb");
        disk.write_at(b"QFI\xfb", 512 << 10).unwrap();
    }
}
