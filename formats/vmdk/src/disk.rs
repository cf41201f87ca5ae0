// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The open disk: extents in a row, used like any other device.

use crate::identity::Identity;
use crate::layout::Place;
use crate::line::{Access, ExtentType};
use crate::sparse::SparseExtent;
use crate::{Descriptor, Parent};
use std::collections::BTreeMap;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Result, Slice, Span, Zeroing};

/// An open VMDK disk.
#[derive(Debug)]
pub struct Vmdk {
    pieces: Vec<Piece>,
    size: u64,
    descriptor: Descriptor,
    parent: Option<Parent>,
    warnings: Vec<String>,
    /// What changes when the disk is written; none if it must not be.
    identity: Option<Identity>,
    /// Files of flat extents that may be written, each once.
    flat_files: Vec<Arc<dyn BlockDevice>>,
}

/// An extent and its place in the disk.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) kind: ExtentType,
    pub(crate) access: Access,
    pub(crate) name: Option<String>,
    pub(crate) backing: Backing,
}

/// Where the bytes of an extent come from.
#[derive(Debug)]
pub(crate) enum Backing {
    Zero,
    Flat(Slice),
    Sparse(Box<SparseExtent>),
}

/// The disk below an extent that starts at byte `start` of its own disk.
pub(crate) struct Below<'a> {
    disk: &'a Vmdk,
    start: u64,
}

impl Below<'_> {
    /// Fills `buf` with what is below byte `at` of the extent.
    pub(crate) fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.disk.read_below(buf, self.start.saturating_add(at))
    }

    /// Whether there is no disk below.
    pub(crate) fn is_nothing(&self) -> bool {
        self.disk.parent.is_none()
    }

    /// How many of the `len` bytes below byte `at` of the extent are known to be zero
    /// before the first that may be data.
    pub(crate) fn zeroes(&self, at: u64, len: u64) -> Result<u64> {
        let extent = self.disk.extent_below(self.start.saturating_add(at), len)?;
        Ok(if extent.kind.reads_zero() { extent.len } else { 0 })
    }
}

/// What `info` shows about an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentInfo {
    /// The file as the descriptor names it; none if it is the disk's own file.
    pub name: Option<String>,
    /// How it stores its bytes.
    pub kind: ExtentType,
    /// Its size in bytes as the guest sees it.
    pub len: u64,
    /// Bytes per grain, for sparse extents.
    pub grain: Option<u64>,
    /// Whether its grains are compressed.
    pub compressed: bool,
}

impl Vmdk {
    pub(crate) fn new(
        pieces: Vec<Piece>,
        size: u64,
        descriptor: Descriptor,
        parent: Option<Parent>,
        mut warnings: Vec<String>,
    ) -> Self {
        warnings.extend(descriptor.warnings.iter().cloned());
        Self { pieces, size, descriptor, parent, warnings, identity: None, flat_files: Vec::new() }
    }

    /// The same disk, to be written.
    pub(crate) fn writable(
        mut self,
        identity: Identity,
        flat_files: Vec<Arc<dyn BlockDevice>>,
    ) -> Self {
        self.identity = Some(identity);
        self.flat_files = flat_files;
        self
    }

    /// The kind of disk in VMware's words, for example `monolithicSparse`; empty if the
    /// disk has no descriptor.
    pub fn create_type(&self) -> &str {
        &self.descriptor.create_type
    }

    /// What the descriptor said when the disk was opened; empty if there is none.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The content id, which changes with the first write after opening.
    pub fn cid(&self) -> Option<u32> {
        let now = self.identity.as_ref().map(Identity::cid);
        self.descriptor.cid.map(|cid| now.unwrap_or(cid))
    }

    /// The content id that the parent must have, if the disk is a snapshot.
    pub fn parent_cid(&self) -> Option<u32> {
        self.descriptor.parent_cid
    }

    /// The extents in disk order.
    pub fn extents(&self) -> Vec<ExtentInfo> {
        let info = |piece: &Piece| {
            let header = match &piece.backing {
                Backing::Sparse(extent) => Some(extent.layout()),
                Backing::Zero | Backing::Flat(_) => None,
            };
            ExtentInfo {
                name: piece.name.clone(),
                kind: piece.kind,
                len: piece.len,
                grain: header.map(|header| header.grain.get()),
                compressed: header.is_some_and(|header| header.compressed),
            }
        };
        self.pieces.iter().map(info).collect()
    }

    /// The `ddb.` entries of the descriptor, keys in lower case without the prefix.
    pub fn database(&self) -> &BTreeMap<String, String> {
        &self.descriptor.database
    }

    /// What was wrong with the disk and could be worked around.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What could not be read so far and became zeroes, in a disk that is salvaged; what
    /// tables alone tell is among the warnings already.
    pub fn losses(&self) -> Vec<String> {
        let sparse = self.pieces.iter().filter_map(Piece::sparse);
        sparse.flat_map(SparseExtent::losses).collect()
    }

    /// Checks a range that is to be changed, and changes the content id.
    fn check_write(&self, span: Span) -> Result<()> {
        let Some(identity) = &self.identity else {
            return Err(Error::usage("device is read-only").at(span.start));
        };
        span.check_within(self.size)?;
        if span.is_empty() { Ok(()) } else { identity.touch() }
    }

    /// Does `work` to the part of every extent that `span` touches: the extent, the part
    /// in its own bytes, and where the part starts in the disk.
    fn for_pieces(
        &self,
        span: Span,
        mut work: impl FnMut(&Piece, Span, u64) -> Result<()>,
    ) -> Result<()> {
        let mut offset = span.start;
        while offset < span.end() {
            let piece = self.piece_at(offset)?;
            let within = offset.saturating_sub(piece.start);
            let left = piece.len.saturating_sub(within);
            let len = span.end().saturating_sub(offset).min(left);
            if piece.access != Access::ReadWrite {
                return Err(
                    piece.blame(Error::usage("the extent is marked RDONLY or NOACCESS").at(offset))
                );
            }
            work(piece, Span::new(within, len), offset).map_err(|error| piece.blame(error))?;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    fn below<'a>(&'a self, piece: &Piece) -> Below<'a> {
        Below { disk: self, start: piece.start }
    }

    /// The extent that byte `offset` of the disk lies in.
    fn piece_at(&self, offset: u64) -> Result<&Piece> {
        let behind = self.pieces.partition_point(|piece| piece.start <= offset);
        behind
            .checked_sub(1)
            .and_then(|index| self.pieces.get(index))
            .filter(|piece| offset.saturating_sub(piece.start) < piece.len)
            .ok_or_else(|| Error::usage("offset past the end of the disk").at(offset))
    }

    /// Fills `buf` with what the parent has at `offset`; zeroes where it has nothing.
    fn read_below(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(parent) = &self.parent else {
            buf.fill(0);
            return Ok(());
        };
        let left = parent.device.size().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let (there, beyond) = buf.split_at_mut(len);
        beyond.fill(0);
        if there.is_empty() { Ok(()) } else { parent.device.read_at(there, offset) }
    }

    fn extent_below(&self, offset: u64, len: u64) -> Result<Extent> {
        let below = self.parent.as_ref().filter(|parent| offset < parent.device.size());
        let Some(parent) = below else { return Ok(Extent::new(ExtentKind::Hole, len)) };
        let mut extent = parent.device.extent_at(offset)?.limited_to(len);
        extent.depth = extent.depth.saturating_add(1);
        Ok(extent)
    }
}

impl Piece {
    pub(crate) fn sparse(&self) -> Option<&SparseExtent> {
        match &self.backing {
            Backing::Sparse(extent) => Some(extent),
            Backing::Zero | Backing::Flat(_) => None,
        }
    }

    fn read(&self, disk: &Vmdk, buf: &mut [u8], within: u64) -> Result<()> {
        match &self.backing {
            Backing::Zero => {
                buf.fill(0);
                Ok(())
            }
            Backing::Flat(slice) => slice.read_at(buf, within),
            Backing::Sparse(extent) => extent.read(buf, within, &disk.below(self)),
        }
    }

    fn extent(&self, disk: &Vmdk, within: u64) -> Result<Extent> {
        match &self.backing {
            Backing::Zero => Ok(Extent::new(ExtentKind::Zero, self.len.saturating_sub(within))),
            Backing::Flat(slice) => slice.extent_at(within),
            Backing::Sparse(extent) => {
                let start = self.start.saturating_add(within);
                let left = self.len.saturating_sub(within);
                // The disk below may answer in small pieces; looking further than them each
                // time would cost the square of their number.
                let bound = match (extent.place(within)?, &disk.parent) {
                    (Place::Absent, Some(_)) => disk.extent_below(start, left)?.len,
                    _ => left,
                };
                let (place, len) = extent.extent(within, bound)?;
                match place {
                    Place::Absent => disk.extent_below(start, len),
                    Place::Zero => Ok(Extent::new(ExtentKind::Zero, len)),
                    Place::Stored(_) if extent.layout().compressed => {
                        let data = Extent::new(ExtentKind::Data, len);
                        Ok(Extent { compressed: true, ..data })
                    }
                    Place::Stored(at) => {
                        let data = Extent::new(ExtentKind::Data, len);
                        // A grain that is salvaged may end behind the file.
                        let is_there = Span::new(at, len).check_within(extent.file.size()).is_ok();
                        Ok(if is_there { data.mapped_to(at) } else { data })
                    }
                }
            }
        }
    }

    fn blame(&self, error: Error) -> Error {
        match &self.name {
            Some(name) => error.in_file(name),
            None => error,
        }
    }
}

impl BlockDevice for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.identity.is_none()
    }

    fn preferred_block(&self) -> u32 {
        let grains = self.pieces.iter().filter_map(|piece| match &piece.backing {
            Backing::Sparse(extent) => u32::try_from(extent.layout().grain.get()).ok(),
            Backing::Zero | Backing::Flat(_) => None,
        });
        grains.max().unwrap_or(0).max(4096)
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let wanted = u64::try_from(buf.len()).unwrap_or(u64::MAX);
        Span::new(offset, wanted).check_within(self.size)?;
        while !buf.is_empty() {
            let piece = self.piece_at(offset)?;
            let within = offset.saturating_sub(piece.start);
            let left = piece.len.saturating_sub(within);
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            let (part, rest) = buf.split_at_mut(len);
            piece.read(self, part, within).map_err(|error| piece.blame(error))?;
            offset = offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
            buf = rest;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let span = Span::new(offset, u64::try_from(buf.len()).unwrap_or(u64::MAX));
        self.check_write(span)?;
        self.for_pieces(span, |piece, part, start| {
            let from = usize::try_from(start.saturating_sub(offset)).unwrap_or(usize::MAX);
            let len = usize::try_from(part.len).unwrap_or(usize::MAX);
            let now = buf.get(from..).and_then(|tail| tail.get(..len)).unwrap_or_default();
            match &piece.backing {
                Backing::Zero => Err(Error::usage("the extent is of type ZERO").at(start)),
                Backing::Flat(slice) => slice.write_at(now, part.start),
                Backing::Sparse(extent) => extent.write(now, part.start, &self.below(piece)),
            }
        })
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.check_write(span)?;
        self.for_pieces(span, |piece, part, _| match &piece.backing {
            Backing::Zero => Ok(()),
            Backing::Flat(slice) => slice.write_zeroes(part, mode),
            Backing::Sparse(extent) => extent.zero(part, mode, &self.below(piece)),
        })
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.check_write(span)?;
        self.for_pieces(span, |piece, part, _| match &piece.backing {
            Backing::Zero => Ok(()),
            Backing::Flat(slice) => slice.discard(part),
            Backing::Sparse(extent) => extent.discard(part, &self.below(piece)),
        })
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let piece = self.piece_at(offset)?;
        let within = offset.saturating_sub(piece.start);
        let extent = piece.extent(self, within).map_err(|error| piece.blame(error))?;
        Ok(extent.limited_to(piece.len.saturating_sub(within)))
    }

    fn flush(&self) -> Result<()> {
        for piece in &self.pieces {
            if let Some(extent) = piece.sparse() {
                extent.flush().map_err(|error| piece.blame(error))?;
            }
        }
        self.flat_files.iter().try_for_each(BlockDevice::flush)
    }
}

impl Drop for Vmdk {
    fn drop(&mut self) {
        if self.identity.as_ref().is_some_and(Identity::has_changed) {
            // Errors have nobody to go to here: who needs to know calls flush first.
            let _ = self.flush();
        }
    }
}
