// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A growing image, with or without one below it.

use crate::header::Header;
use crate::table::{Place, Table};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Result, Span, Zeroing};

/// How to open a growing image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// What shows where the image has nothing: the image that the snapshot was made of.
    pub parent: Option<Arc<dyn BlockDevice>>,
    /// Gives zeroes for clusters that lie behind the end of a truncated file.
    pub salvage: bool,
}

/// A growing image (`.hds`), open for reading.
#[derive(Debug)]
pub struct Image {
    file: Arc<dyn BlockDevice>,
    header: Header,
    table: Table,
    parent: Option<Arc<dyn BlockDevice>>,
    salvage: bool,
    warnings: Vec<String>,
}

impl Image {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// Those of [`Header::read`].
    pub fn open_read_only(file: Arc<dyn BlockDevice>, options: OpenOptions) -> Result<Self> {
        let header = Header::read(&file)?;
        let mut warnings = Vec::new();
        if header.dirty {
            warnings.push(
                "image is marked as in use: its writer did not close it, or still has it open"
                    .to_owned(),
            );
        }
        if options.salvage {
            warnings.push(
                "clusters behind the end of the file, if there are any, read as zeroes".to_owned(),
            );
        }
        let table = Table::new(Arc::clone(&file), header.clone());
        let OpenOptions { parent, salvage } = options;
        Ok(Self { file, header, table, parent, salvage, warnings })
    }

    /// The facts of the image.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What was wrong with the image and could be worked around.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What the bytes from `offset` onward are, for at most `len` bytes: where they lie
    /// in the file, and how many do.
    fn run(&self, offset: u64, len: u64) -> Result<(Place, u64)> {
        let cluster = self.header.cluster;
        let within = offset % cluster;
        let first = offset / cluster;
        let end = offset.saturating_add(len).div_ceil(cluster.get());
        let (place, clusters) = self.table.run(first, end)?;
        let bytes = clusters.saturating_mul(cluster.get()).saturating_sub(within);
        let place = match place {
            Place::Absent => Place::Absent,
            Place::Stored(at) => Place::Stored(at.saturating_add(within)),
        };
        Ok((place, bytes.min(len)))
    }

    fn read_stored(&self, buf: &mut [u8], at: u64, offset: u64) -> Result<()> {
        let wanted = length(buf);
        let there = self.file.size().saturating_sub(at).min(wanted);
        if there < wanted && !self.salvage {
            return Err(Error::corrupt(format!(
                "{wanted} bytes of a cluster at byte {at} end past the file's size of {} bytes",
                self.file.size()
            ))
            .at(offset));
        }
        let (part, beyond) = buf.split_at_mut(usize::try_from(there).unwrap_or(0));
        beyond.fill(0);
        if part.is_empty() { Ok(()) } else { self.file.read_at(part, at) }
    }

    fn read_below(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let size = self.parent.as_ref().map_or(0, BlockDevice::size);
        let there = size.saturating_sub(offset).min(length(buf));
        let (part, beyond) = buf.split_at_mut(usize::try_from(there).unwrap_or(0));
        beyond.fill(0);
        match &self.parent {
            Some(parent) if !part.is_empty() => parent.read_at(part, offset),
            _ => Ok(()),
        }
    }
}

fn length(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

impl BlockDevice for Image {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn preferred_block(&self) -> u32 {
        u32::try_from(self.header.cluster.get()).unwrap_or(4096)
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        Span::new(offset, length(buf)).check_within(self.size())?;
        while !buf.is_empty() {
            let (place, len) = self.run(offset, length(buf))?;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
            let (part, rest) = buf.split_at_mut(len);
            match place {
                Place::Stored(at) => self.read_stored(part, at, offset)?,
                Place::Absent => self.read_below(part, offset)?,
            }
            offset = offset.saturating_add(length(part));
            buf = rest;
        }
        Ok(())
    }

    fn write_zeroes(&self, span: Span, _mode: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn discard(&self, span: Span) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Span::new(offset, 1).check_within(self.size())?;
        let (place, len) = self.run(offset, self.size().saturating_sub(offset))?;
        match (place, &self.parent) {
            (Place::Stored(at), _) if self.salvage => {
                let there = self.file.size().saturating_sub(at);
                // What lies behind the file's end reads as zero.
                Ok(match there {
                    0 => Extent::new(ExtentKind::Zero, len),
                    _ => Extent::new(ExtentKind::Data, len.min(there)).mapped_to(at),
                })
            }
            (Place::Stored(at), _) => Ok(Extent::new(ExtentKind::Data, len).mapped_to(at)),
            (Place::Absent, Some(parent)) if offset < parent.size() => {
                let mut extent = parent.extent_at(offset)?.limited_to(len);
                extent.depth = extent.depth.saturating_add(1);
                Ok(extent)
            }
            (Place::Absent, _) => Ok(Extent::new(ExtentKind::Hole, len)),
        }
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
