// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hosted sparse extent: guest bytes by way of directory, tables and grains.

use crate::SECTOR;
use crate::compressed::{self, GrainCache, MARKER, max_stored, needed_len};
use crate::directory;
use crate::header::Header;
use crate::table::{Table, Tables};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result, Span};

/// Compressed bytes that are read in one piece.
const COMPRESSED_RUN: u64 = 4 << 20;
/// Grains that one extent query looks at one by one, so that a caller who asks again and
/// again from nearby offsets stays linear.
const GRAINS_PER_QUERY: u32 = 16 << 10;
/// Tables that one extent query passes over as a whole.
const TABLES_PER_QUERY: u32 = 64 << 10;

/// Where a grain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// This extent says nothing about it.
    Absent,
    /// It is declared to be zero.
    Zero,
    /// It is at this byte of the file: data, or a marker in front of a compressed grain.
    Stored(u64),
}

/// One file of grains.
#[derive(Debug)]
pub(crate) struct SparseExtent {
    file: Arc<dyn BlockDevice>,
    header: Header,
    tables: Tables,
    grains: GrainCache,
}

/// Fills a part of a read that the extent says nothing about; the offset is the extent's.
pub(crate) type Below<'a> = dyn Fn(&mut [u8], u64) -> Result<()> + 'a;

impl SparseExtent {
    /// Reads the directory of the extent in `file`, whose header is `header`.
    pub(crate) fn open(
        file: Arc<dyn BlockDevice>,
        header: Header,
    ) -> Result<(Self, Option<String>)> {
        let (directory, warning) = directory::read(&file, &header)?;
        let tables = Tables::new(directory);
        Ok((Self { file, header, tables, grains: GrainCache::default() }, warning))
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Fills `buf` from byte `offset` of the extent.
    pub(crate) fn read(
        &self,
        mut buf: &mut [u8],
        mut offset: u64,
        below: &Below<'_>,
    ) -> Result<()> {
        let grain_len = self.header.grain;
        let mut walk = Walk::new(self);
        while !buf.is_empty() {
            let index = offset / grain_len;
            let within = offset % grain_len;
            let wanted = length(buf);
            let in_grain = grain_len.get().saturating_sub(within).min(wanted);
            let done = match walk.place(index)? {
                Place::Absent => {
                    below(head(buf, in_grain), offset)?;
                    in_grain
                }
                Place::Zero => {
                    head(buf, in_grain).fill(0);
                    in_grain
                }
                Place::Stored(at) if self.header.compressed => {
                    if within == 0 && wanted >= grain_len.get() {
                        self.read_compressed(&mut walk, buf, index, at)?
                    } else {
                        let grain = self.whole_grain(index, at)?;
                        let from = usize::try_from(within).unwrap_or(usize::MAX);
                        let target = head(buf, in_grain);
                        let source = grain.get(from..).and_then(|tail| tail.get(..target.len()));
                        target.copy_from_slice(source.ok_or_else(|| {
                            Error::usage("read past the end of a grain").at(offset)
                        })?);
                        in_grain
                    }
                }
                Place::Stored(at) => {
                    let mut len = in_grain;
                    let start = at.saturating_add(within);
                    while len < wanted {
                        let next = offset.saturating_add(len) / grain_len;
                        if walk.place(next)? != Place::Stored(start.saturating_add(len)) {
                            break;
                        }
                        len = len.saturating_add(grain_len.get()).min(wanted);
                    }
                    self.file.read_at(head(buf, len), start)?;
                    len
                }
            };
            offset = offset.saturating_add(done);
            buf = buf.get_mut(usize::try_from(done).unwrap_or(usize::MAX)..).unwrap_or_default();
        }
        Ok(())
    }

    /// Inflates grain `index` and those that are wanted whole and stored right behind it,
    /// with one read of the file; returns how many bytes of `buf` are filled.
    fn read_compressed(
        &self,
        walk: &mut Walk<'_>,
        buf: &mut [u8],
        index: u64,
        at: u64,
    ) -> Result<u64> {
        let grain_len = self.header.grain.get();
        let most = length(buf) / self.header.grain;
        let mut starts = vec![at];
        let mut last = at;
        // The bytes up to the next grain bound the size of the last one that is wanted.
        let mut bound = None;
        let mut next = index.saturating_add(1);
        while let Place::Stored(start) = walk.place(next)? {
            let gap = start.checked_sub(last).filter(|gap| *gap > 0 && *gap <= self.max_gap());
            let Some(gap) = gap else { break };
            if length_of(&starts) >= most || start.saturating_sub(at) > COMPRESSED_RUN {
                bound = Some(gap);
                break;
            }
            starts.push(start);
            last = start;
            next = next.saturating_add(1);
        }
        let bound = bound.unwrap_or_else(|| grain_len.saturating_add(SECTOR));
        let end = last.saturating_add(bound).min(self.file.size());
        let mut stored = vec![0; usize::try_from(end.saturating_sub(at)).unwrap_or(0)];
        self.file.read_at(&mut stored, at)?;
        let pieces = buf.chunks_exact_mut(usize::try_from(grain_len).unwrap_or(usize::MAX));
        for ((number, start), piece) in (index..).zip(&starts).zip(pieces) {
            let from = usize::try_from(start.saturating_sub(at)).unwrap_or(usize::MAX);
            let stored = stored.get(from..).unwrap_or_default();
            compressed::inflate(&self.file, &self.header, (number, *start), stored, piece)?;
        }
        Ok(length_of(&starts).saturating_mul(grain_len))
    }

    /// Furthest that the next grain can be away if the two are neighbours: padding and a
    /// grain table with its marker may lie between them.
    fn max_gap(&self) -> u64 {
        let table = self.header.table_len().saturating_add(2 * SECTOR);
        max_stored(&self.header).saturating_add(table).saturating_add(SECTOR)
    }

    /// Grain `index` at byte `at`, inflated, out of the cache if it is there.
    fn whole_grain(&self, index: u64, at: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(grain) = self.grains.get(index) {
            return Ok(grain);
        }
        let grain_len = self.header.grain.get();
        let left = self.file.size().saturating_sub(at);
        let guess = grain_len.saturating_add(SECTOR).min(left);
        let mut stored = vec![0; usize::try_from(guess).unwrap_or(0)];
        self.file.read_at(&mut stored, at)?;
        let mut grain = vec![0; usize::try_from(grain_len).unwrap_or(0)];
        compressed::inflate(&self.file, &self.header, (index, at), &stored, &mut grain)?;
        let grain = Arc::new(grain);
        self.grains.put(index, Arc::clone(&grain));
        Ok(grain)
    }

    /// What byte `offset` belongs to, and for how many bytes the same is true. A stored
    /// place is that of the byte itself; compressed neighbours count as the same.
    pub(crate) fn extent(&self, offset: u64) -> Result<(Place, u64)> {
        let grain_len = self.header.grain;
        let index = offset / grain_len;
        let within = offset % grain_len;
        let mut walk = Walk::new(self);
        let first = walk.place(index)?;
        let mut next = index.saturating_add(1);
        let (mut grains, mut tables) = (0, 0);
        while next < self.header.grains() && grains < GRAINS_PER_QUERY && tables < TABLES_PER_QUERY
        {
            let table = next / self.header.table_entries;
            let at_start = next % self.header.table_entries == 0;
            // A broken table further on is the business of whoever asks about that part.
            if at_start && let Ok(Some(all)) = walk.uniform(table) {
                if all != first {
                    break;
                }
                next = next.saturating_add(self.header.table_entries.get());
                tables = tables.saturating_add(1);
                continue;
            }
            let Ok(place) = walk.place(next) else { break };
            let passed = next.saturating_sub(index).saturating_mul(grain_len.get());
            let same = match (first, place) {
                (Place::Stored(_), Place::Stored(_)) if self.header.compressed => true,
                (Place::Stored(at), Place::Stored(start)) => at.saturating_add(passed) == start,
                (first, place) => first == place,
            };
            if !same {
                break;
            }
            next = next.saturating_add(1);
            grains = grains.saturating_add(1);
        }
        let end = next.saturating_mul(grain_len.get()).min(self.header.capacity);
        let place = match first {
            Place::Stored(at) => Place::Stored(at.saturating_add(within)),
            other => other,
        };
        Ok((place, end.saturating_sub(offset)))
    }
}

/// Looks grains up one after the other and keeps the table at hand.
struct Walk<'a> {
    extent: &'a SparseExtent,
    current: Option<(u64, Option<Arc<Table>>)>,
}

impl<'a> Walk<'a> {
    fn new(extent: &'a SparseExtent) -> Self {
        Self { extent, current: None }
    }

    fn table(&mut self, index: u64) -> Result<Option<&Table>> {
        let held = self.current.take().filter(|(number, _)| *number == index);
        let held = if let Some(held) = held {
            held
        } else {
            let extent = self.extent;
            (index, extent.tables.get(&extent.file, &extent.header, index)?)
        };
        Ok(self.current.insert(held).1.as_deref())
    }

    fn place(&mut self, grain: u64) -> Result<Place> {
        let header = &self.extent.header;
        if grain >= header.grains() {
            return Ok(Place::Absent);
        }
        let Some(table) = self.table(grain / header.table_entries)? else {
            return Ok(Place::Absent);
        };
        let sector = table.entry(grain % header.table_entries);
        if let Some(place) = self.special(sector) {
            return Ok(place);
        }
        let at = u64::from(sector).saturating_mul(SECTOR);
        let len = if header.compressed { MARKER } else { needed_len(header, grain) };
        let size = self.extent.file.size();
        if Span::new(at, len).check_within(size).is_err() {
            return Err(Error::corrupt(format!(
                "grain {grain} ends past the file's size of {size} bytes: the file is truncated"
            ))
            .at(at));
        }
        Ok(Place::Stored(at))
    }

    /// The state of all grains of a table if none of them is stored.
    fn uniform(&mut self, table: u64) -> Result<Option<Place>> {
        let Some(table) = self.table(table)? else { return Ok(Some(Place::Absent)) };
        let value = table.uniform();
        Ok(value.and_then(|sector| self.special(sector)))
    }

    fn special(&self, sector: u32) -> Option<Place> {
        match sector {
            0 => Some(Place::Absent),
            1 if self.extent.header.zeroed_grains => Some(Place::Zero),
            _ => None,
        }
    }
}

fn length(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

fn length_of(starts: &[u64]) -> u64 {
    u64::try_from(starts.len()).unwrap_or(u64::MAX)
}

fn head(buf: &mut [u8], len: u64) -> &mut [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
    buf.get_mut(..len).unwrap_or_default()
}
