// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk that is not there, to measure everything else with.

use tranship_block::{BlockDevice, Extent, ExtentKind, Result, Span, Storage, Zeroing};

/// Reads as zero; writes are forgotten.
#[derive(Debug)]
pub(crate) struct NullDevice {
    pub(crate) size: u64,
}

impl BlockDevice for NullDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Span::new(offset, length(buf)).check_within(self.size)?;
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        Span::new(offset, length(buf)).check_within(self.size)
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        span.check_within(self.size)
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Span::new(offset, 1).check_within(self.size)?;
        Ok(Extent::new(ExtentKind::Zero, self.size.saturating_sub(offset)))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

impl Storage for NullDevice {
    fn set_len(&self, len: u64) -> Result<()> {
        Span::new(0, len).check_within(self.size)
    }
}

fn length(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}
