// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The open disk.

use crate::header::Header;
use crate::table::{Cache, PIECE, Piece, read};
use std::collections::HashSet;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Extent, ExtentKind, Lower, Result, Span, Zeroing};

/// Pieces of tables that one query looks at: a caller who asks again and again from nearby
/// offsets stays linear.
const PIECES_PER_QUERY: u32 = 32;
/// The entry of a cluster that reads as zero, whatever is below.
pub(crate) const ZERO: u64 = 1;

/// How an image is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Give what is there of a damaged image: zeroes for the rest, and a warning for
    /// everything that would be refused otherwise.
    pub salvage: bool,
    /// The backing file that the header asks for.
    pub backing: Option<Arc<dyn BlockDevice>>,
}

/// An open QED image.
#[derive(Debug)]
pub struct Qed {
    file: Arc<dyn BlockDevice>,
    header: Header,
    l1: Vec<u64>,
    cache: Cache,
    backing: Lower,
    /// Whether entries that lead nowhere read as zero.
    salvage: bool,
    warnings: Vec<String>,
}

/// Where bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Below,
    Zero,
    Stored(u64),
}

impl Qed {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if the image contradicts itself,
    /// [`tranship_block::ErrorKind::Usage`] for an image with a backing file that is not
    /// given, or the other way round, and I/O errors. Second-level tables are looked at
    /// when they are needed; what is wrong with them is an error of reading.
    pub fn open_read_only(file: Arc<dyn BlockDevice>, options: OpenOptions) -> Result<Self> {
        let header = Header::read(&file)?;
        let mut warnings = Vec::new();
        match (&header.backing, &options.backing) {
            (Some(backing), None) => {
                let text = format!("the image's backing file {:?} is missing", backing.name);
                if !options.salvage {
                    return Err(Error::usage(text));
                }
                warnings.push(format!("{text}: its part reads as zero"));
            }
            (None, Some(_)) => {
                return Err(Error::usage("the image has no backing file, but one was given"));
            }
            _ => {}
        }
        if header.needs_check() {
            warnings.push(
                "the last writer did not close the image: it may hold clusters that nothing \
                 refers to"
                    .into(),
            );
        }
        let l1 = read(&file, header.l1_table_offset, header.l1_entries())?;
        let disk = Self {
            file,
            header,
            l1,
            cache: Cache::default(),
            backing: Lower::new(options.backing),
            salvage: options.salvage,
            warnings,
        };
        if disk.salvage { disk.with_losses_counted() } else { Ok(disk) }
    }

    /// The fields of the header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What was wrong with the image and could be worked around.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Walks all tables once, to tell how much of a salvaged image is lost.
    fn with_losses_counted(mut self) -> Result<Self> {
        let mut lost = 0_u64;
        // A table that many entries share is walked once, however large that makes the disk.
        let mut seen = HashSet::new();
        for (index, l2) in (0_u64..).zip(&self.l1) {
            let start = index.saturating_mul(self.header.covered_by_l2());
            if *l2 == 0 || !seen.insert(*l2) {
                continue;
            }
            if self.check_l2(*l2, start).is_err() {
                lost = lost.saturating_add(1);
                continue;
            }
            let mut at = start;
            let end = start.saturating_add(self.header.covered_by_l2()).min(self.size());
            while at < end {
                let (piece, skip) = self.piece_at(*l2, at)?;
                let entries = piece.entries.get(skip..).unwrap_or_default();
                let cluster = u64::from(self.header.cluster_size);
                let covered = u64::try_from(entries.len()).unwrap_or(0).saturating_mul(cluster);
                for (number, entry) in (0_u64..).zip(entries) {
                    let offset = at.saturating_add(number.saturating_mul(cluster));
                    let is_bad = offset < end && self.check_data(*entry, offset).is_err();
                    lost = lost.saturating_add(u64::from(is_bad));
                }
                at = at.saturating_add(covered.max(cluster));
            }
        }
        if lost > 0 {
            self.warnings.push(format!(
                "{lost} entries of the tables lead out of the file: they read as zero"
            ));
        }
        Ok(self)
    }

    /// Checks the place of the second-level table for byte `offset` of the disk.
    fn check_l2(&self, l2: u64, offset: u64) -> Result<()> {
        let cluster = u64::from(self.header.cluster_size);
        let len = self.header.entries().saturating_mul(8);
        let is_within = Span::new(l2, len).check_within(self.file.size()).is_ok();
        if l2 < cluster || !l2.is_multiple_of(cluster) || !is_within {
            return Err(Error::corrupt(format!(
                "L2 table for {offset:#x} is at {l2:#x}, expected a cluster within the file of \
                 {} bytes",
                self.file.size()
            ))
            .at(self.header.l1_table_offset));
        }
        Ok(())
    }

    /// Checks the entry for byte `offset` of the disk, the first one of a cluster.
    fn check_data(&self, entry: u64, offset: u64) -> Result<()> {
        if entry == 0 || entry == ZERO {
            return Ok(());
        }
        let cluster = u64::from(self.header.cluster_size);
        let used = self.size().saturating_sub(offset).min(cluster);
        let is_within = Span::new(entry, used).check_within(self.file.size()).is_ok();
        if entry < cluster || !entry.is_multiple_of(cluster) || !is_within {
            return Err(Error::corrupt(format!(
                "cluster for {offset:#x} is at {entry:#x}, expected a cluster within the file of \
                 {} bytes",
                self.file.size()
            )));
        }
        Ok(())
    }

    /// The piece of the table at `l2` that has the entry for byte `offset` of the disk, and
    /// the number of that entry in it.
    fn piece_at(&self, l2: u64, offset: u64) -> Result<(Arc<Piece>, usize)> {
        let shift = self.header.cluster_size.trailing_zeros();
        let number = offset.checked_shr(shift).unwrap_or(0);
        let index = number & self.header.entries().saturating_sub(1);
        let first = (index / PIECE).saturating_mul(PIECE);
        let len = self.header.entries().saturating_sub(first).min(PIECE);
        let at = l2.saturating_add(first.saturating_mul(8));
        let piece = self.cache.get(&self.file, at, len)?;
        Ok((piece, usize::try_from(index.saturating_sub(first)).unwrap_or(usize::MAX)))
    }

    /// What the entry of the cluster at byte `offset` of the disk means.
    fn place(&self, entry: u64, offset: u64) -> Result<Place> {
        match (entry, self.check_data(entry, offset)) {
            (0, _) => Ok(Place::Below),
            (ZERO, _) => Ok(Place::Zero),
            (_, Ok(())) => Ok(Place::Stored(entry)),
            (_, Err(_)) if self.salvage => Ok(Place::Zero),
            (_, Err(error)) => Err(error),
        }
    }

    /// Where byte `offset` is, and for how many bytes, at most `most`, the answer holds.
    fn locate(&self, offset: u64, most: u64) -> Result<(Place, u64)> {
        let cluster = u64::from(self.header.cluster_size);
        let within = offset & cluster.saturating_sub(1);
        let start = offset.saturating_sub(within);
        let mut end = start;
        let wanted = offset.saturating_add(most);
        let mut answer: Option<Place> = None;
        let mut pieces = 0_u32;
        'search: while end < wanted && pieces < PIECES_PER_QUERY {
            let coverage = self.header.covered_by_l2().max(1);
            let index = end.checked_div(coverage).unwrap_or(0);
            let index = usize::try_from(index).unwrap_or(usize::MAX);
            let l2 = self.l1.get(index).copied().unwrap_or(0);
            let is_lost = l2 != 0 && self.salvage && self.check_l2(l2, end).is_err();
            if l2 == 0 || is_lost {
                let place = if is_lost { Place::Zero } else { Place::Below };
                if *answer.get_or_insert(place) != place {
                    break;
                }
                let into = end.checked_rem(coverage).unwrap_or(0);
                end = end.saturating_add(coverage.saturating_sub(into));
                continue;
            }
            self.check_l2(l2, end)?;
            pieces = pieces.saturating_add(1);
            let (piece, skip) = self.piece_at(l2, end)?;
            for entry in piece.entries.iter().skip(skip) {
                if end >= wanted {
                    break;
                }
                let expected = match answer {
                    None => None,
                    Some(Place::Stored(first)) => {
                        Some(Place::Stored(first.saturating_add(end.saturating_sub(start))))
                    }
                    same => same,
                };
                match self.place(*entry, end) {
                    Ok(place) if expected.is_none_or(|expected| expected == place) => {
                        answer.get_or_insert(place);
                    }
                    // What is wrong further on is for the query that gets there.
                    Err(error) if answer.is_none() => return Err(error),
                    _ => break 'search,
                }
                end = end.saturating_add(cluster);
            }
        }
        let len = end.saturating_sub(offset).min(most);
        Ok(match answer.unwrap_or(Place::Below) {
            Place::Stored(at) => (Place::Stored(at.saturating_add(within)), len),
            place => (place, len),
        })
    }
}

impl BlockDevice for Qed {
    fn size(&self) -> u64 {
        self.header.image_size
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn preferred_block(&self) -> u32 {
        self.header.cluster_size
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        let wanted = |buf: &[u8]| u64::try_from(buf.len()).unwrap_or(u64::MAX);
        Span::new(offset, wanted(buf)).check_within(self.size())?;
        while !buf.is_empty() {
            let (place, len) = self.locate(offset, wanted(buf))?;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
            let (now, rest) = buf.split_at_mut(len);
            match place {
                Place::Below => self.backing.read_at(now, offset)?,
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
        let (place, len) = self.locate(offset, self.size().saturating_sub(offset))?;
        match place {
            Place::Below => self.backing.extent_at(offset, len),
            Place::Zero => Ok(Extent::new(ExtentKind::Zero, len)),
            Place::Stored(at) => Ok(Extent::new(ExtentKind::Data, len).mapped_to(at)),
        }
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
