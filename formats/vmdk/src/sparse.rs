// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A sparse extent: guest bytes by way of directory, tables and grains.

use crate::SECTOR;
use crate::compressed::{self, GrainCache, max_stored};
use crate::directory;
use crate::disk::Below;
use crate::footer::{self, MARKER};
use crate::layout::{LOST, Layout, Place};
use crate::losses::Losses;
use crate::table::{Table, Tables};
use crate::writer::Writer;
use std::cell::Cell;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result, Span};

/// Compressed bytes that are read in one piece.
const COMPRESSED_RUN: u64 = 4 << 20;
/// Grains that one extent query looks at one by one, so that a caller who asks again and
/// again from nearby offsets stays linear.
const GRAINS_PER_QUERY: u32 = 16 << 10;
/// Tables that one extent query passes over as a whole.
const TABLES_PER_QUERY: u32 = 64 << 10;

thread_local! {
    /// What this thread read of compressed grains: a fresh buffer costs its pages anew.
    static STORED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// One file of grains.
#[derive(Debug)]
pub(crate) struct SparseExtent {
    pub(crate) file: Arc<dyn BlockDevice>,
    pub(crate) layout: Layout,
    pub(crate) tables: Tables,
    grains: GrainCache,
    /// What could not be read and became zeroes; none if that is an error.
    losses: Option<Losses>,
    /// What is needed to write, in a disk that was opened for writing.
    pub(crate) writer: Option<Writer>,
}

impl SparseExtent {
    /// Reads the directory of the extent in `file`, whose header is `layout`, and returns
    /// with it what was wrong and could be worked around.
    pub(crate) fn open(
        file: Arc<dyn BlockDevice>,
        layout: Layout,
        salvage: bool,
    ) -> Result<(Self, Vec<String>)> {
        let (tables, warnings) = open_tables(&file, &layout, salvage)?;
        let losses = salvage.then(Losses::default);
        let extent =
            Self { file, layout, tables, grains: GrainCache::default(), losses, writer: None };
        let warnings = warnings.into_iter().chain(extent.survey()?).collect();
        Ok((extent, warnings))
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What could not be read so far and became zeroes.
    pub(crate) fn losses(&self) -> Vec<String> {
        self.losses.as_ref().map(Losses::list).unwrap_or_default()
    }

    /// In a disk that is salvaged: how many tables and grains are lost, as far as tables
    /// can tell.
    fn survey(&self) -> Result<Option<String>> {
        if self.losses.is_none() {
            return Ok(None);
        }
        let (mut tables, mut grains) = (0_u64, 0_u64);
        let size = self.file.size();
        for index in 0..self.layout.directory_entries {
            let Some(table) = self.tables.get(&self.file, &self.layout, index)? else { continue };
            if table.uniform() == Some(LOST) {
                tables = tables.saturating_add(1);
            }
            if matches!(table.uniform(), Some(0 | LOST)) {
                continue;
            }
            for entry in 0..self.layout.table_entries.get() {
                let grain =
                    index.saturating_mul(self.layout.table_entries.get()).saturating_add(entry);
                let is_lost = match self.layout.place(table.entry(entry)) {
                    Ok(Place::Stored(at)) => {
                        Span::new(at, self.stored_len(grain)).check_within(size).is_err()
                    }
                    Ok(_) => false,
                    Err(_) => true,
                };
                grains = grains.saturating_add(u64::from(is_lost));
            }
        }
        Ok((tables > 0 || grains > 0).then(|| {
            format!(
                "{tables} grain tables of {} MiB are lost, and {grains} grains of {} KiB lead \
                 nowhere or past the end of the file: zeroes are read instead",
                self.layout.table_span() >> 20,
                self.layout.grain.get() >> 10
            )
        }))
    }

    /// Bytes that must be in the file at the place of grain `index`.
    fn stored_len(&self, index: u64) -> u64 {
        if self.layout.compressed { MARKER } else { self.layout.needed_len(index) }
    }

    /// Fills `buf` from byte `offset` of the extent.
    pub(crate) fn read(
        &self,
        mut buf: &mut [u8],
        mut offset: u64,
        below: &Below<'_>,
    ) -> Result<()> {
        let grain_len = self.layout.grain;
        let mut walk = Walk::new(self);
        while !buf.is_empty() {
            let index = offset / grain_len;
            let within = offset % grain_len;
            let wanted = length(buf);
            let in_grain = grain_len.get().saturating_sub(within).min(wanted);
            let done = match walk.place(index)? {
                Place::Absent => {
                    let len = walk.blank_run(offset, Place::Absent, wanted)?;
                    below.read(head(buf, len), offset)?;
                    len
                }
                Place::Zero => {
                    let len = walk.blank_run(offset, Place::Zero, wanted)?;
                    head(buf, len).fill(0);
                    len
                }
                Place::Stored(at) if self.layout.compressed => {
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
                    let start = at.saturating_add(within);
                    let len = walk.stored_run(offset, start, wanted)?;
                    self.fetch(head(buf, len), start)?;
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
        let grain_len = self.layout.grain.get();
        let most = length(buf) / self.layout.grain;
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
        let len = usize::try_from(end.saturating_sub(at)).unwrap_or(0);
        let mut own = STORED.take();
        own.resize(own.len().max(len), 0);
        let stored = own.get_mut(..len).unwrap_or_default();
        self.file.read_at(stored, at)?;
        let pieces = buf.chunks_exact_mut(usize::try_from(grain_len).unwrap_or(usize::MAX));
        for ((number, start), piece) in (index..).zip(&starts).zip(pieces) {
            let from = usize::try_from(start.saturating_sub(at)).unwrap_or(usize::MAX);
            let stored = stored.get(from..).unwrap_or_default();
            self.inflate((number, *start), stored, piece)?;
        }
        STORED.set(own);
        Ok(length_of(&starts).saturating_mul(grain_len))
    }

    fn inflate(&self, (index, at): (u64, u64), stored: &[u8], grain: &mut [u8]) -> Result<()> {
        match compressed::inflate(&self.file, &self.layout, (index, at), stored, grain) {
            Err(error) if let Some(losses) = &self.losses => {
                losses.note(&error);
                grain.fill(0);
                Ok(())
            }
            result => result,
        }
    }

    /// Reads bytes of grains that are stored as they are; in a salvaged disk they may be
    /// missing.
    fn fetch(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let Some(losses) = &self.losses else { return self.file.read_at(buf, at) };
        let there = self.file.size().saturating_sub(at);
        let there = usize::try_from(there).unwrap_or(usize::MAX).min(buf.len());
        let (part, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        match self.file.read_at(part, at) {
            Err(error) => {
                losses.note(&error.at(at));
                // Whatever can be read around a bad place is read.
                for (piece, number) in part.chunks_mut(4096).zip(0_u64..) {
                    let start = at.saturating_add(number.saturating_mul(4096));
                    if self.file.read_at(piece, start).is_err() {
                        piece.fill(0);
                    }
                }
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Furthest that the next grain can be away if the two are neighbours: padding and a
    /// grain table with its marker may lie between them.
    fn max_gap(&self) -> u64 {
        let table = self.layout.table_len().saturating_add(2 * SECTOR);
        max_stored(&self.layout).saturating_add(table).saturating_add(SECTOR)
    }

    /// Grain `index` at byte `at`, inflated, out of the cache if it is there.
    fn whole_grain(&self, index: u64, at: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(grain) = self.grains.get(index) {
            return Ok(grain);
        }
        let grain_len = self.layout.grain.get();
        let left = self.file.size().saturating_sub(at);
        let guess = grain_len.saturating_add(SECTOR).min(left);
        let mut stored = vec![0; usize::try_from(guess).unwrap_or(0)];
        self.file.read_at(&mut stored, at)?;
        let mut grain = vec![0; usize::try_from(grain_len).unwrap_or(0)];
        self.inflate((index, at), &stored, &mut grain)?;
        let grain = Arc::new(grain);
        self.grains.put(index, Arc::clone(&grain));
        Ok(grain)
    }

    /// Where the grain of byte `offset` is.
    pub(crate) fn place(&self, offset: u64) -> Result<Place> {
        Walk::new(self).place(offset / self.layout.grain)
    }

    /// What byte `offset` belongs to, and for how many bytes the same is true: `most` if
    /// that is found to be so. A stored place is that of the byte itself; compressed
    /// neighbours count as the same.
    pub(crate) fn extent(&self, offset: u64, most: u64) -> Result<(Place, u64)> {
        let grain_len = self.layout.grain;
        let index = offset / grain_len;
        let within = offset % grain_len;
        let mut walk = Walk::new(self);
        let first = walk.place(index)?;
        let mut next = index.saturating_add(1);
        let (mut grains, mut tables) = (0, 0);
        let stop = offset.saturating_add(most).div_ceil(grain_len.get()).min(self.layout.grains());
        while next < stop && grains < GRAINS_PER_QUERY && tables < TABLES_PER_QUERY {
            let table = next / self.layout.table_entries;
            let at_start = next % self.layout.table_entries == 0;
            // A broken table further on is the business of whoever asks about that part.
            if at_start && let Ok(Some(all)) = walk.uniform(table) {
                if all != first {
                    break;
                }
                next = next.saturating_add(self.layout.table_entries.get());
                tables = tables.saturating_add(1);
                continue;
            }
            let Ok(place) = walk.place(next) else { break };
            let passed = next.saturating_sub(index).saturating_mul(grain_len.get());
            let same = match (first, place) {
                (Place::Stored(_), Place::Stored(_)) if self.layout.compressed => true,
                (Place::Stored(at), Place::Stored(start)) => at.saturating_add(passed) == start,
                (first, place) => first == place,
            };
            if !same {
                break;
            }
            next = next.saturating_add(1);
            grains = grains.saturating_add(1);
        }
        let end = next.saturating_mul(grain_len.get()).min(self.layout.capacity);
        let place = match first {
            Place::Stored(at) => Place::Stored(at.saturating_add(within)),
            other => other,
        };
        Ok((place, end.saturating_sub(offset)))
    }
}

/// Looks grains up one after the other and keeps the table at hand.
pub(crate) struct Walk<'a> {
    extent: &'a SparseExtent,
    current: Option<(u64, Option<Arc<Table>>)>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(extent: &'a SparseExtent) -> Self {
        Self { extent, current: None }
    }

    fn table(&mut self, index: u64) -> Result<Option<&Table>> {
        let held = self.current.take().filter(|(number, _)| *number == index);
        let held = if let Some(held) = held {
            held
        } else {
            let extent = self.extent;
            (index, extent.tables.get(&extent.file, &extent.layout, index)?)
        };
        Ok(self.current.insert(held).1.as_deref())
    }

    /// Where grain number `grain` is; a stored one lies within the file.
    pub(crate) fn place(&mut self, grain: u64) -> Result<Place> {
        let extent = self.extent;
        let layout = &extent.layout;
        if grain >= layout.grains() {
            return Ok(Place::Absent);
        }
        let Some(table) = self.table(grain / layout.table_entries)? else {
            return Ok(Place::Absent);
        };
        let place = layout.place(table.entry(grain % layout.table_entries));
        let salvage = extent.losses.is_some();
        let at = match place {
            Ok(Place::Stored(at)) => at,
            Err(_) if salvage => return Ok(Place::Zero),
            other => return other,
        };
        let size = extent.file.size();
        if at < SECTOR || Span::new(at, extent.stored_len(grain)).check_within(size).is_err() {
            if salvage {
                let some = at >= SECTOR && at < size && !layout.compressed;
                return Ok(if some { Place::Stored(at) } else { Place::Zero });
            }
            return Err(Error::corrupt(if at < SECTOR {
                format!("grain {grain} lies in the header")
            } else {
                format!(
                    "grain {grain} ends past the file's size of {size} bytes: the file is truncated"
                )
            })
            .at(at));
        }
        Ok(Place::Stored(at))
    }

    /// How many of the `wanted` bytes from byte `offset` of the extent on, which is stored
    /// at `start`, follow each other in the file.
    pub(crate) fn stored_run(&mut self, offset: u64, start: u64, wanted: u64) -> Result<u64> {
        let grain = self.extent.layout.grain;
        let mut len = grain.get().saturating_sub(offset % grain).min(wanted);
        while len < wanted {
            let next = offset.saturating_add(len) / grain;
            if self.place(next)? != Place::Stored(start.saturating_add(len)) {
                break;
            }
            len = len.saturating_add(grain.get()).min(wanted);
        }
        Ok(len)
    }

    /// How many of the `wanted` bytes from byte `offset` of the extent on, whose grain is not
    /// stored, are in grains of the same state.
    fn blank_run(&mut self, offset: u64, state: Place, wanted: u64) -> Result<u64> {
        let grain = self.extent.layout.grain;
        let mut len = grain.get().saturating_sub(offset % grain).min(wanted);
        while len < wanted && self.place(offset.saturating_add(len) / grain)? == state {
            len = len.saturating_add(grain.get()).min(wanted);
        }
        Ok(len)
    }

    /// The state of all grains of a table if none of them is stored.
    fn uniform(&mut self, table: u64) -> Result<Option<Place>> {
        let layout = &self.extent.layout;
        let Some(table) = self.table(table)? else { return Ok(Some(Place::Absent)) };
        Ok(match table.uniform().map(|entry| layout.place(entry)) {
            Some(Ok(place @ (Place::Absent | Place::Zero))) => Some(place),
            _ => None,
        })
    }
}

/// The tables of an extent, by its directory or, if that is lost, by the markers in front
/// of its grains; and what was wrong.
fn open_tables(
    file: &dyn BlockDevice,
    layout: &Layout,
    salvage: bool,
) -> Result<(Tables, Option<String>)> {
    let read = match layout.directory {
        Some(_) => directory::read(file, layout, salvage),
        None => Err(Error::corrupt(
            "the grain directory should be named by a footer, and the file ends without one: \
             the stream is truncated",
        )
        .at(file.size())),
    };
    let error = match read {
        Ok(directory) => {
            let warning = directory.warning.clone();
            return Ok((Tables::new(layout, directory, salvage), warning));
        }
        Err(error) if layout.compressed || salvage => error,
        Err(error) => return Err(error),
    };
    if layout.compressed {
        let scan = footer::scan(file, layout, true)?;
        if scan.complete || (salvage && !scan.grains.is_empty()) {
            let warning = format!(
                "{error}; the markers of {} grains up to byte {} were followed instead",
                scan.grains.len(),
                scan.end
            );
            return Ok((Tables::scanned(layout, scan.grains), Some(warning)));
        }
    }
    if !salvage {
        return Err(error);
    }
    let count = usize::try_from(layout.directory_entries).unwrap_or(0);
    let directory =
        directory::Directory { primary: vec![0; count], redundant: Vec::new(), warning: None };
    let warning = format!("{error}: all of the extent reads as zeroes");
    Ok((Tables::new(layout, directory, salvage), Some(warning)))
}

pub(crate) fn length(buf: &[u8]) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

fn length_of(starts: &[u64]) -> u64 {
    u64::try_from(starts.len()).unwrap_or(u64::MAX)
}

fn head(buf: &mut [u8], len: u64) -> &mut [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
    buf.get_mut(..len).unwrap_or_default()
}
