// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writing stream-optimized disks the way VMware does: grains in the order of the guest,
//! each table behind its grains, the directory behind all of them, and a footer that
//! knows where it is. What is already written is never changed, except for the front,
//! which is left out until all else is on stable storage.

use crate::SECTOR;
use crate::compose::compose;
use crate::create::{
    DESCRIPTOR_SECTORS, GRAIN, HeaderFields, TABLE_ENTRIES, check_descriptor, invalidate,
};
use crate::footer::{END_OF_STREAM, FOOTER, GRAIN_DIRECTORY, GRAIN_TABLE};
use crate::header::{
    DIRECTORY_AT_END, FLAG_COMPRESSED, FLAG_MARKERS, FLAG_NEWLINE_TEST, MAX_DIRECTORY_ENTRIES,
};
use crate::identity::random_cid;
use crate::options::{CreateOptions, Subformat};
use libdeflater::{CompressionLvl, Compressor};
use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tranship_block::{
    Encoding, Error, ErrorKind, PackedTarget, PackedUnit, Result, Span, Storage, Zeroing, is_zero,
};

/// Bytes that are collected before they are written.
const WRITE: usize = 2 << 20;
/// Sectors in front of the first grain.
const OVERHEAD: u64 = 128;

thread_local! {
    /// The compressor of this thread, and its level.
    static COMPRESSOR: RefCell<Option<(i32, Compressor)>> = const { RefCell::new(None) };
}

/// A new stream-optimized disk: every core compresses, one thread stores.
#[derive(Debug)]
pub struct StreamTarget {
    storage: Arc<dyn Storage>,
    size: u64,
    level: CompressionLevel,
    stream: Mutex<Stream>,
}

#[derive(Clone, Copy, Debug)]
struct CompressionLevel(i32);

impl StreamTarget {
    /// Starts a disk in `storage`, whose contents are lost.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Usage`] for options that make no stream-optimized disk or an unknown
    /// compression level, and what `storage` reports.
    pub fn create(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<Self> {
        options.check()?;
        if options.subformat != Subformat::StreamOptimized {
            return Err(Error::usage(format!(
                "subformat is {}, expected streamOptimized",
                options.subformat.word()
            )));
        }
        let level = options.compression_level;
        if CompressionLvl::new(level).is_err() || level == 0 {
            return Err(Error::usage(format!("compression level is {level}, expected 1 to 12")));
        }
        let cid = options.cid.unwrap_or_else(random_cid);
        let text = compose(options, cid, &options.extents()?);
        let stream = Mutex::new(Stream::new(&*storage, options, &text)?);
        let size = options.capacity();
        Ok(Self { storage, size, level: CompressionLevel(level), stream })
    }

    fn lock(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PackedTarget for StreamTarget {
    fn size(&self) -> u64 {
        self.size
    }

    fn unit(&self) -> u32 {
        u32::try_from(GRAIN).unwrap_or(0)
    }

    /// A grain of zeroes becomes no bytes at all.
    fn pack(&self, bytes: &[u8], arena: &mut Vec<u8>) -> Result<Encoding> {
        let grain = usize::try_from(GRAIN).unwrap_or(0);
        if bytes.len() > grain {
            return Err(Error::usage(format!(
                "grain of {} bytes, expected at most {GRAIN}",
                bytes.len()
            )));
        }
        if is_zero(bytes) {
            return Ok(Encoding::Plain);
        }
        if bytes.len() == grain {
            self.level.compress(bytes, arena)?;
        } else {
            let mut whole = bytes.to_vec();
            whole.resize(grain, 0);
            self.level.compress(&whole, arena)?;
        }
        Ok(Encoding::Compressed)
    }

    fn store(&self, arena: &[u8], units: &[PackedUnit]) -> Result<()> {
        let mut stream = self.lock();
        let mut rest = arena;
        for unit in units {
            let (data, behind) = rest.split_at_checked(unit.len).ok_or_else(|| {
                Error::usage("the arena is shorter than its units").at(unit.offset)
            })?;
            rest = behind;
            if unit.encoding == Encoding::Plain && unit.len > 0 {
                return Err(Error::usage("a stream takes compressed grains alone").at(unit.offset));
            }
            stream.append(&*self.storage, unit.offset, data)?;
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.lock().finish(&*self.storage)
    }
}

impl CompressionLevel {
    fn compress(self, bytes: &[u8], arena: &mut Vec<u8>) -> Result<()> {
        COMPRESSOR.with_borrow_mut(|held| {
            let fitting = held.take().filter(|(level, _)| *level == self.0);
            let (_, compressor) = held.insert(if let Some(fitting) = fitting {
                fitting
            } else {
                let level = CompressionLvl::new(self.0)
                    .map_err(|_| Error::usage("compression level is out of range"))?;
                (self.0, Compressor::new(level))
            });
            let start = arena.len();
            let bound = compressor.zlib_compress_bound(bytes.len());
            arena.resize(start.saturating_add(bound), 0);
            let room = arena.get_mut(start..).unwrap_or_default();
            let len = compressor
                .zlib_compress(bytes, room)
                .map_err(|error| Error::new(ErrorKind::Io, "cannot compress").because(error))?;
            arena.truncate(start.saturating_add(len));
            Ok(())
        })
    }
}

/// What has been written of a stream, and what is waiting.
#[derive(Debug)]
pub(crate) struct Stream {
    /// Bytes that follow those in the file.
    waiting: Vec<u8>,
    /// Where they go.
    at: u64,
    /// The entries of the table that is being filled.
    table: Vec<u32>,
    /// Number of that table.
    table_index: u64,
    directory: Vec<u32>,
    /// The grain that may come next.
    next: u64,
    capacity: u64,
    descriptor: String,
    finished: bool,
}

impl Stream {
    /// Makes room for the front of a stream; what was in `storage` is lost.
    pub(crate) fn new(
        storage: &dyn Storage,
        options: &CreateOptions,
        descriptor: &str,
    ) -> Result<Self> {
        let capacity = options.capacity();
        let tables = capacity.div_ceil(GRAIN * TABLE_ENTRIES);
        if tables > MAX_DIRECTORY_ENTRIES {
            return Err(Error::unsupported(format!(
                "{capacity} bytes need {tables} grain tables, expected at most \
                 {MAX_DIRECTORY_ENTRIES}"
            )));
        }
        check_descriptor(descriptor)?;
        invalidate(storage)?;
        let start = OVERHEAD * SECTOR;
        storage.set_len(start)?;
        // The file is no disk until its header is there.
        storage.write_zeroes(Span::new(0, start), Zeroing::MayUnmap)?;
        Ok(Self {
            waiting: Vec::new(),
            at: start,
            table: Vec::new(),
            table_index: 0,
            directory: vec![0; usize::try_from(tables).unwrap_or(0)],
            next: 0,
            capacity,
            descriptor: descriptor.to_owned(),
            finished: false,
        })
    }

    /// The sector at which the next bytes will be.
    fn sector(&self) -> Result<u32> {
        let waiting = u64::try_from(self.waiting.len()).unwrap_or(u64::MAX);
        u32::try_from(self.at.saturating_add(waiting) / SECTOR).map_err(|_| {
            Error::new(
                ErrorKind::NoSpace,
                "the stream has more than 2 TiB, which its tables cannot express",
            )
        })
    }

    /// Appends the grain at `offset`, compressed; no bytes are a grain of zeroes.
    fn append(&mut self, storage: &dyn Storage, offset: u64, data: &[u8]) -> Result<()> {
        let index = offset / GRAIN;
        if self.finished
            || !offset.is_multiple_of(GRAIN)
            || index < self.next
            || offset >= self.capacity
        {
            return Err(Error::usage(format!(
                "a grain that is the start of no grain, out of order or past the end; expected \
                 one from {} on",
                self.next.saturating_mul(GRAIN)
            ))
            .at(offset));
        }
        self.next = index.saturating_add(1);
        if data.is_empty() {
            return Ok(());
        }
        if index / TABLE_ENTRIES != self.table_index {
            self.end_table()?;
            self.table_index = index / TABLE_ENTRIES;
        }
        let sector = self.sector()?;
        self.table.resize(usize::try_from(TABLE_ENTRIES).unwrap_or(0), 0);
        let slot = usize::try_from(index % TABLE_ENTRIES).unwrap_or(usize::MAX);
        if let Some(slot) = self.table.get_mut(slot) {
            *slot = sector;
        }
        let size = u32::try_from(data.len())
            .map_err(|_| Error::usage("compressed grain of 4 GiB and more").at(offset))?;
        self.waiting.extend((offset / SECTOR).to_le_bytes());
        self.waiting.extend(size.to_le_bytes());
        self.waiting.extend(data);
        self.pad();
        if self.waiting.len() >= WRITE { self.write_out(storage) } else { Ok(()) }
    }

    fn pad(&mut self) {
        let sector = usize::try_from(SECTOR).unwrap_or(1);
        self.waiting.resize(self.waiting.len().next_multiple_of(sector), 0);
    }

    fn write_out(&mut self, storage: &dyn Storage) -> Result<()> {
        let end = self.at.saturating_add(u64::try_from(self.waiting.len()).unwrap_or(u64::MAX));
        if end > storage.size() {
            storage.set_len(end)?;
        }
        storage.write_at(&self.waiting, self.at)?;
        self.at = end;
        self.waiting.clear();
        Ok(())
    }

    /// Appends a metadata marker for `sectors` of the given kind.
    fn marker(&mut self, sectors: u64, kind: u32) {
        self.waiting.extend(sectors.to_le_bytes());
        self.waiting.extend(0_u32.to_le_bytes());
        self.waiting.extend(kind.to_le_bytes());
        self.pad();
    }

    /// Appends a marker and `entries`; returns the sector of the entries.
    fn entries(&mut self, entries: &[u32], kind: u32) -> Result<u32> {
        let bytes = u64::try_from(entries.len()).unwrap_or(u64::MAX).saturating_mul(4);
        self.marker(bytes.div_ceil(SECTOR), kind);
        let sector = self.sector()?;
        for entry in entries {
            self.waiting.extend(entry.to_le_bytes());
        }
        self.pad();
        Ok(sector)
    }

    /// Appends the table behind its grains, if it has any.
    fn end_table(&mut self) -> Result<()> {
        if self.table.is_empty() {
            return Ok(());
        }
        let table = std::mem::take(&mut self.table);
        let sector = self.entries(&table, GRAIN_TABLE)?;
        let slot = usize::try_from(self.table_index).unwrap_or(usize::MAX);
        if let Some(slot) = self.directory.get_mut(slot) {
            *slot = sector;
        }
        Ok(())
    }

    fn header(&self, directory: u64) -> Vec<u8> {
        let header = HeaderFields {
            version: 3,
            flags: FLAG_NEWLINE_TEST | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity: self.capacity / SECTOR,
            descriptor: DESCRIPTOR_SECTORS,
            redundant: 0,
            directory,
            overhead: OVERHEAD,
            compression: 1,
        };
        header.bytes()
    }

    /// Writes what is left, and at last the front.
    pub(crate) fn finish(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.finished {
            return Err(Error::usage("the stream is finished already"));
        }
        self.finished = true;
        self.end_table()?;
        let directory = std::mem::take(&mut self.directory);
        let sector = self.entries(&directory, GRAIN_DIRECTORY)?;
        self.marker(1, FOOTER);
        let footer = self.header(u64::from(sector));
        self.waiting.extend(footer);
        self.marker(0, END_OF_STREAM);
        self.write_out(storage)?;
        storage.set_len(self.at)?;
        storage.flush()?;
        storage.write_at(self.descriptor.as_bytes(), SECTOR)?;
        storage.write_at(&self.header(DIRECTORY_AT_END), 0)?;
        storage.flush()
    }
}
