// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The open disk.

use crate::header::{Header, Kind, format_uuid};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Lower, Result, Span, Zeroing};

/// The entry of a block that the image does not have.
pub(crate) const ABSENT: u32 = u32::MAX;
/// The entry of a block that reads as zero, whatever the parent has.
pub(crate) const ZERO: u32 = u32::MAX - 1;
/// Bytes of the map that one read brings in.
const READ_PIECE: usize = 1 << 20;
/// Blocks that one query passes over: a caller who asks again and again from nearby
/// offsets stays linear.
const BLOCKS_PER_QUERY: usize = 1 << 20;
/// The same for disks with a parent, where many extents may lie below a single one.
const BLOCKS_PER_QUERY_OF_CHILD: usize = 4096;

/// The disk below a differencing one.
#[derive(Clone, Debug)]
pub struct Parent {
    /// Its bytes.
    pub device: Arc<dyn BlockDevice>,
    /// Its UUID, which has to be the one that the child names.
    pub uuid: [u8; 16],
    /// The UUID of its last change, which has to be the one that the child knows.
    pub modification: [u8; 16],
}

/// How an image is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Give what is there of a damaged image: zeroes for the rest, and a warning for
    /// everything that would be refused otherwise.
    pub salvage: bool,
    /// The parent of a differencing disk.
    pub parent: Option<Parent>,
}

/// An open VDI.
#[derive(Debug)]
pub struct Vdi {
    file: Arc<dyn BlockDevice>,
    header: Header,
    map: Vec<u32>,
    parent: Lower,
    warnings: Vec<String>,
}

/// Where bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Below,
    Zero,
    Stored(u64),
}

impl Vdi {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if the image contradicts itself, is cut off
    /// or asks for another parent, [`tranship_block::ErrorKind::Usage`] for a differencing
    /// image without parent or a parent for any other, and I/O errors.
    pub fn open_read_only(file: Arc<dyn BlockDevice>, options: OpenOptions) -> Result<Self> {
        let header = Header::read(&file)?;
        let mut warnings = Vec::new();
        if let Err(error) = check_parent(&header, options.parent.as_ref()) {
            if !options.salvage {
                return Err(error);
            }
            warnings.push(error.to_string());
        }
        let map = read_map(&file, &header)?;
        let parent = Lower::new(options.parent.map(|parent| parent.device));
        let mut disk = Self { file, header, map, parent, warnings };
        disk.check_blocks(options.salvage)?;
        Ok(disk)
    }

    /// The fields of the header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What was wrong with the image and could be worked around.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Checks that all stored blocks are in the file.
    fn check_blocks(&mut self, salvage: bool) -> Result<()> {
        let block = u64::from(self.header.block_size);
        let mut left = self.header.size;
        let mut lost: Vec<usize> = Vec::new();
        for (index, entry) in self.map.iter().copied().enumerate() {
            let used = left.min(block);
            left = left.saturating_sub(used);
            if entry == ABSENT || entry == ZERO {
                continue;
            }
            let end = self.header.data_at(entry).saturating_add(used);
            if end <= self.file.size() {
                continue;
            }
            if !salvage {
                let at = u64::try_from(index).unwrap_or(0).saturating_mul(4);
                return Err(Error::corrupt(format!(
                    "block {index} (entry {entry:#x}) ends at {end:#x}, past the file's {} bytes",
                    self.file.size()
                ))
                .at(self.header.map_offset.saturating_add(at)));
            }
            lost.push(index);
        }
        if let Some(first) = lost.first() {
            let count = lost.len();
            self.warnings.push(format!(
                "{count} blocks, the first of them {first}, are not in the file: they read as zero"
            ));
        }
        for index in lost {
            if let Some(entry) = self.map.get_mut(index) {
                *entry = ZERO;
            }
        }
        Ok(())
    }

    /// Where byte `offset` is, and for how many bytes, at most `most`, the answer holds.
    fn locate(&self, offset: u64, most: u64) -> (Place, u64) {
        let block = u64::from(self.header.block_size);
        let shift = block.trailing_zeros();
        let index = usize::try_from(offset.checked_shr(shift).unwrap_or(0)).unwrap_or(usize::MAX);
        let within = offset & block.saturating_sub(1);
        let blocks = within.saturating_add(most).div_ceil(block.max(1));
        let bound =
            if self.parent.is_some() { BLOCKS_PER_QUERY_OF_CHILD } else { BLOCKS_PER_QUERY };
        let blocks = usize::try_from(blocks).unwrap_or(usize::MAX).min(bound);
        let mut entries = self.map.iter().skip(index).take(blocks).copied();
        let first = entries.next().unwrap_or(ABSENT);
        let (place, more) = match first {
            ABSENT | ZERO => {
                let place = if first == ABSENT { Place::Below } else { Place::Zero };
                (place, entries.take_while(|entry| *entry == first).count())
            }
            stored => {
                // With nothing between them, blocks that follow each other are one piece.
                let is_dense = self.header.block_extra == 0;
                let expected = (stored..).skip(1).take_while(|_| is_dense);
                let run = entries.zip(expected);
                let more = run.take_while(|(entry, next)| *entry < ZERO && entry == next).count();
                (Place::Stored(self.header.data_at(stored).saturating_add(within)), more)
            }
        };
        let run = u64::try_from(more).unwrap_or(0).saturating_add(1).saturating_mul(block);
        (place, run.saturating_sub(within).min(most))
    }
}

fn check_parent(header: &Header, parent: Option<&Parent>) -> Result<()> {
    match (header.kind, parent) {
        (Kind::Differencing, None) => Err(Error::usage(format!(
            "the disk is differencing and its parent {} is missing",
            format_uuid(&header.parent)
        ))),
        (Kind::Differencing, Some(parent)) if parent.uuid != header.parent => {
            Err(Error::corrupt(format!(
                "parent has UUID {}, expected {}",
                format_uuid(&parent.uuid),
                format_uuid(&header.parent)
            )))
        }
        (Kind::Differencing, Some(parent)) => {
            let expected = header.parent_modification;
            let is_known = expected != [0; 16] && parent.modification != [0; 16];
            if is_known && parent.modification != expected {
                return Err(Error::corrupt(format!(
                    "parent was changed since the disk was made: its last change is {}, \
                     expected {}",
                    format_uuid(&parent.modification),
                    format_uuid(&expected)
                )));
            }
            Ok(())
        }
        (Kind::Dynamic | Kind::Fixed, None) => Ok(()),
        (Kind::Dynamic | Kind::Fixed, Some(_)) => {
            Err(Error::usage("the disk is not differencing, but a parent was given"))
        }
    }
}

pub(crate) fn read_map(file: &dyn BlockDevice, header: &Header) -> Result<Vec<u32>> {
    let entries = usize::try_from(header.entries())
        .map_err(|_| Error::unsupported("block map does not fit into memory"))?;
    let mut map = Vec::with_capacity(entries);
    let mut piece = vec![0; entries.saturating_mul(4).min(READ_PIECE)];
    let mut at = header.map_offset;
    while map.len() < entries {
        let left = entries.saturating_sub(map.len()).saturating_mul(4);
        let now = piece.get_mut(..left.min(READ_PIECE)).unwrap_or_default();
        file.read_at(now, at)?;
        at = at.saturating_add(u64::try_from(now.len()).unwrap_or(u64::MAX));
        map.extend(now.as_chunks().0.iter().map(|entry| u32::from_le_bytes(*entry)));
    }
    Ok(map)
}

impl BlockDevice for Vdi {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn preferred_block(&self) -> u32 {
        self.header.block_size
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let wanted = |buf: &[u8]| u64::try_from(buf.len()).unwrap_or(u64::MAX);
        Span::new(offset, wanted(buf)).check_within(self.size())?;
        while !buf.is_empty() {
            let (place, len) = self.locate(offset, wanted(buf));
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
            let (now, rest) = buf.split_at_mut(len);
            match place {
                Place::Below => self.parent.read_at(now, offset)?,
                Place::Zero => now.fill(0),
                Place::Stored(at) => self.file.read_at(now, at)?,
            }
            offset = offset.saturating_add(wanted(now));
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
        let (place, len) = self.locate(offset, self.size().saturating_sub(offset));
        match place {
            Place::Below => self.parent.extent_at(offset, len),
            Place::Zero => Ok(Extent::new(ExtentKind::Zero, len)),
            Place::Stored(at) => Ok(Extent::new(ExtentKind::Data, len).mapped_to(at)),
        }
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
