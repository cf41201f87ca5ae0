// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writing compressed clusters into an image that is open for everything else as well.

use std::sync::Arc;
use tranship_block::{BlockDevice, Extent, Result, Span, Zeroing};
use tranship_qcow2::Qcow2;

/// An image in which whole clusters are stored compressed when they are written.
#[derive(Debug)]
pub struct Compressing(pub Arc<Qcow2>);

impl BlockDevice for Compressing {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn is_read_only(&self) -> bool {
        self.0.is_read_only()
    }

    fn preferred_block(&self) -> u32 {
        self.0.preferred_block()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }

    /// Parts of clusters are stored as they are.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let cluster = u64::from(self.0.preferred_block());
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let into = at.checked_rem(cluster).unwrap_or(0);
            let len = usize::try_from(cluster.saturating_sub(into)).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(len.min(rest.len()));
            let end = at.saturating_add(u64::try_from(now.len()).unwrap_or(u64::MAX));
            let is_whole = into == 0 && (now.len() == len || end == self.size());
            if is_whole {
                self.0.write_compressed(at, now)?;
            } else {
                self.0.write_at(now, at)?;
            }
            rest = later;
            at = end;
        }
        Ok(())
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.0.write_zeroes(span, mode)
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.0.discard(span)
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        self.0.extent_at(offset)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
}
