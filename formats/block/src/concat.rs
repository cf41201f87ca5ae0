// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Several devices behind one another as one.

use crate::{Advice, BlockDevice, Error, Extent, FileRange, Result, Span, Zeroing};
use std::sync::Arc;

/// Devices, each of which begins where the one before it ends.
#[derive(Clone, Debug)]
pub struct Concat {
    /// Each with where it lies.
    parts: Vec<(Span, Arc<dyn BlockDevice>)>,
    size: u64,
}

impl Concat {
    /// Joins `devices` in this order.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Usage`] if the sizes add up to more than 2^64 bytes.
    pub fn new(devices: impl IntoIterator<Item = Arc<dyn BlockDevice>>) -> Result<Self> {
        let mut size = 0_u64;
        let mut parts = Vec::new();
        for device in devices {
            let span = Span::new(size, device.size());
            size = size
                .checked_add(span.len)
                .ok_or_else(|| Error::usage("sizes of the joined disks overflow").at(size))?;
            parts.push((span, device));
        }
        Ok(Self { parts, size })
    }

    /// Calls `work` with each device that `span` touches, and where in it.
    fn each(
        &self,
        span: Span,
        mut work: impl FnMut(&dyn BlockDevice, Span) -> Result<()>,
    ) -> Result<()> {
        span.check_within(self.size)?;
        let first = self.parts.partition_point(|(part, _)| part.end() <= span.start);
        for (part, device) in self.parts.get(first..).unwrap_or_default() {
            let start = span.start.max(part.start);
            let end = span.end().min(part.end());
            if start >= span.end() {
                break;
            }
            let inner = start.saturating_sub(part.start);
            work(device.as_ref(), Span::new(inner, end.saturating_sub(start)))?;
        }
        Ok(())
    }

    fn at(&self, offset: u64) -> Option<(Span, &dyn BlockDevice)> {
        let first = self.parts.partition_point(|(part, _)| part.end() <= offset);
        self.parts.get(first).map(|(part, device)| (*part, device.as_ref()))
    }
}

fn split(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

impl BlockDevice for Concat {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.parts.iter().any(|(_, device)| device.is_read_only())
    }

    fn preferred_block(&self) -> u32 {
        self.parts.iter().map(|(_, device)| device.preferred_block()).max().unwrap_or(4096)
    }

    fn sector_size(&self) -> u32 {
        self.parts.iter().map(|(_, device)| device.sector_size()).max().unwrap_or(512)
    }

    fn read_at(&self, mut buf: &mut [u8], offset: u64) -> Result<()> {
        let len = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        self.each(Span::new(offset, len), |device, span| {
            let part = buf.split_off_mut(..split(span.len)).unwrap_or_default();
            device.read_at(part, span.start)
        })
    }

    fn write_at(&self, mut buf: &[u8], offset: u64) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::usage("device is read-only").at(offset));
        }
        let len = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        self.each(Span::new(offset, len), |device, span| {
            let part = buf.split_off(..split(span.len)).unwrap_or_default();
            device.write_at(part, span.start)
        })
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::usage("device is read-only").at(span.start));
        }
        self.each(span, |device, span| device.write_zeroes(span, mode))
    }

    fn discard(&self, span: Span) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::usage("device is read-only").at(span.start));
        }
        self.each(span, |device, span| device.discard(span))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let (part, device) = self
            .at(offset)
            .ok_or_else(|| Error::usage("extent past the end of the device").at(offset))?;
        let left = part.end().saturating_sub(offset);
        Ok(device.extent_at(offset.saturating_sub(part.start))?.limited_to(left))
    }

    fn flush(&self) -> Result<()> {
        self.parts.iter().try_for_each(|(_, device)| device.flush())
    }

    fn file_range(&self, offset: u64) -> Option<FileRange<'_>> {
        let (part, device) = self.at(offset)?;
        let range = device.file_range(offset.saturating_sub(part.start))?;
        Some(FileRange { len: range.len.min(part.end().saturating_sub(offset)), ..range })
    }

    fn advise(&self, span: Span, advice: Advice) {
        let span = Span::new(span.start, span.len.min(self.size.saturating_sub(span.start)));
        // It cannot fail: advice is no operation, and the span was cut to the device.
        let _ = self.each(span, |device, span| {
            device.advise(span, advice);
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Extents, MemoryDevice};

    fn device(part: Arc<MemoryDevice>) -> Arc<dyn BlockDevice> {
        part
    }

    fn joined() -> (Vec<Arc<MemoryDevice>>, Concat) {
        let parts: Vec<Arc<MemoryDevice>> = [vec![1; 10], vec![], vec![0; 5000], vec![3; 7]]
            .into_iter()
            .map(|bytes| Arc::new(MemoryDevice::new(bytes)))
            .collect();
        let whole = Concat::new(parts.iter().map(|part| device(part.clone()))).unwrap();
        (parts, whole)
    }

    #[test]
    fn the_parts_follow_one_another() {
        let (_, whole) = joined();
        assert_eq!(whole.size(), 5017);
        let mut bytes = vec![9; 5017];
        whole.read_at(&mut bytes, 0).unwrap();
        let expected: Vec<u8> = [vec![1; 10], vec![0; 5000], vec![3; 7]].concat();
        assert_eq!(bytes, expected);
        whole.read_at(&mut bytes[..4], 5009).unwrap();
        assert_eq!(bytes[..4], [0, 3, 3, 3]);
        whole.read_at(&mut [], 5017).unwrap();
        assert!(whole.read_at(&mut [0; 2], 5016).is_err());
        let zeroes = Extents::new(&whole, Span::new(0, u64::MAX))
            .map(Result::unwrap)
            .filter(|(_, kind)| kind.reads_zero())
            .collect::<Vec<_>>();
        assert_eq!(zeroes, [(Span::new(10, 5000), crate::ExtentKind::Hole)]);
        assert!(whole.extent_at(5017).is_err());
    }

    #[test]
    fn changes_reach_the_part_that_they_are_for() {
        let (parts, whole) = joined();
        whole.write_at(&[8; 5002], 9).unwrap();
        whole.write_zeroes(Span::new(5009, 3), Zeroing::MayUnmap).unwrap();
        assert_eq!(parts[0].snapshot()[8..], [1, 8]);
        assert_eq!(parts[2].snapshot()[4997..], [8, 8, 0]);
        assert_eq!(parts[3].snapshot(), [0, 0, 3, 3, 3, 3, 3]);
        let mixed = [MemoryDevice::new(vec![1]), MemoryDevice::read_only(vec![1])];
        let mixed = Concat::new(mixed.map(|part| device(Arc::new(part)))).unwrap();
        assert!(mixed.is_read_only() && mixed.write_at(&[2], 0).is_err());
    }
}
