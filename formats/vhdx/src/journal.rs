// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writing metadata so that it changes at once or not at all.
//!
//! 1. Payload is flushed; so is the metadata that the entry before has put in place.
//! 2. The log gets an entry with the new sectors, and is flushed. The first time, the
//!    headers are told that there is a log.
//! 3. The sectors are written in place, to be flushed by step 1 of the next entry.
//!
//! Step 1 makes every earlier entry needless, so each entry is its own tail, and a replay
//! is the last entry alone. An entry takes at most half of the ring: while one is
//! written, the one before it stays whole. The file is never cut while the log is in use.

use crate::Guid;
use crate::bytes::{SECTOR_BYTES, mib_down, mib_up, to_u64};
use crate::header::Headers;
use crate::image::Vhdx;
use crate::log::{NewEntry, Sector, most_sectors, new_entry, pieces};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use tranship_block::{Error, ErrorKind, Result, Span, Storage};

/// Headers and log.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) headers: Headers,
    /// Number of the last entry.
    sequence: u64,
    /// Where the next entry goes, in bytes of the ring.
    next: u64,
    /// The headers name the log.
    in_use: bool,
}

/// What the file looks like to a replay.
#[derive(Clone, Copy, Debug)]
struct Lengths {
    flushed: u64,
    last: u64,
}

impl Journal {
    pub(crate) fn new(headers: Headers) -> Self {
        Self { headers, sequence: 0, next: 0, in_use: false }
    }

    /// Steps 2 and 3 for as many sectors as an entry takes.
    fn commit(
        &mut self,
        storage: &dyn Storage,
        lengths: Lengths,
        sectors: &[Sector],
    ) -> Result<()> {
        let ring = self.headers.current.log;
        let log_guid = if self.in_use { self.headers.current.log_guid } else { Guid::random()? };
        self.sequence = self.sequence.saturating_add(1);
        let entry = new_entry(
            &NewEntry {
                log_guid,
                sequence: self.sequence,
                tail: u32::try_from(self.next).unwrap_or(0),
                flushed: lengths.flushed,
                last: lengths.last,
            },
            sectors,
        );
        for (at, range) in pieces(self.next, entry.len(), u64::from(ring.length)) {
            let bytes = entry.get(range).unwrap_or_default();
            if !bytes.is_empty() {
                storage.write_at(bytes, ring.offset.saturating_add(at))?;
            }
        }
        storage.flush()?;
        let after = self.next.saturating_add(to_u64(entry.len()));
        self.next = after.checked_rem(u64::from(ring.length)).unwrap_or(0);
        if !self.in_use {
            self.headers.update(storage, |header| header.log_guid = log_guid)?;
            self.in_use = true;
        }
        let mut sectors: Vec<&Sector> = sectors.iter().collect();
        sectors.sort_unstable_by_key(|sector| sector.at);
        for run in sectors.chunk_by(|one, next| one.at.saturating_add(SECTOR_BYTES) == next.at) {
            let bytes: Vec<u8> =
                run.iter().flat_map(|sector| sector.bytes.iter().copied()).collect();
            storage.write_at(&bytes, run.first().map_or(0, |sector| sector.at))?;
        }
        Ok(())
    }

    /// Tells the headers that everything is in place, after it is.
    fn empty(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.in_use {
            storage.flush()?;
            self.headers.update(storage, |header| header.log_guid = Guid::NIL)?;
            self.in_use = false;
            (self.sequence, self.next) = (0, 0);
        }
        Ok(())
    }
}

impl Vhdx {
    /// Before the first change of what the guest sees: both GUIDs that tell others.
    pub(crate) fn start_writing(&self, at: u64) -> Result<()> {
        self.prepare(at, true)
    }

    /// Before blocks move: children may go on to rely on what the guest sees.
    pub(crate) fn start_moving(&self) -> Result<()> {
        self.prepare(0, false)
    }

    fn prepare(&self, at: u64, changes_data: bool) -> Result<()> {
        let storage = self.writable(at)?;
        self.check_alive()?;
        if self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut journal = self.journal();
        if !self.prepared.load(Ordering::Acquire) {
            let (file_write, data_write) = (Guid::random()?, Guid::random()?);
            journal
                .headers
                .update(storage, |header| {
                    header.file_write = file_write;
                    if changes_data {
                        header.data_write = data_write;
                    }
                })
                .inspect_err(|_| self.failed.store(true, Ordering::Release))?;
            self.prepared.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn check_alive(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Io,
                "an earlier change of the image's metadata failed; it has to be opened again",
            ));
        }
        Ok(())
    }

    pub(crate) fn flush_all(&self) -> Result<()> {
        let Some(storage) = self.storage.as_deref() else { return Ok(()) };
        self.check_alive()?;
        if !self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let freed = self.write_back(storage, Vec::new())?;
        self.release(storage, freed);
        Ok(())
    }

    /// Makes payload, all changes of the metadata and `others` durable. Returns the space
    /// that nothing refers to any more.
    pub(crate) fn write_back(
        &self,
        storage: &dyn Storage,
        others: Vec<Sector>,
    ) -> Result<Vec<Span>> {
        let mut journal = self.journal();
        self.check_alive()?;
        let mut table = self.lock();
        // Bits first, then the entries that need them.
        let mut sectors = table.bitmaps.take_changed();
        sectors.extend(table.bat.take_changed());
        sectors.extend(others);
        let freed = std::mem::take(&mut table.freed);
        let lengths =
            Lengths { flushed: mib_down(storage.size()), last: mib_up(table.space.end()) };
        drop(table);
        let most = most_sectors(u64::from(journal.headers.current.log.length));
        let write = || {
            storage.flush()?;
            for (number, group) in sectors.chunks(most).enumerate() {
                if number > 0 {
                    storage.flush()?;
                }
                journal.commit(storage, lengths, group)?;
            }
            Ok(())
        };
        run(write).inspect_err(|_| self.failed.store(true, Ordering::Release))?;
        Ok(freed)
    }

    /// Waits for those who may still use the space, then lets others have it.
    pub(crate) fn release(&self, storage: &dyn Storage, freed: Vec<Span>) {
        if freed.is_empty() {
            return;
        }
        let _nobody = self.in_use.write().unwrap_or_else(PoisonError::into_inner);
        self.release_unused(storage, freed);
    }

    /// The same for a caller that holds `in_use` alone.
    pub(crate) fn release_unused(&self, storage: &dyn Storage, freed: Vec<Span>) {
        let mut table = self.lock();
        for span in freed {
            let end = span.end().min(storage.size());
            // A hint that fails costs space on the host, nothing else.
            let _ = storage.discard(Span::new(span.start, end.saturating_sub(span.start)));
            table.space.release(span);
        }
    }

    /// Everything durable, the log empty, and no growth in advance left.
    pub(crate) fn close(&self) -> Result<()> {
        let Some(storage) = self.storage.as_deref() else { return Ok(()) };
        if !self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        self.flush_all()?;
        self.empty_log()?;
        let end = self.lock().space.end();
        let keep = if self.is_fixed() { self.original_len } else { 0 };
        if storage.size() > end.max(keep) {
            storage.set_len(end.max(keep))?;
        }
        Ok(())
    }

    /// Makes the file valid without its log, so that it may be cut.
    pub(crate) fn empty_log(&self) -> Result<()> {
        let storage = self.writable(0)?;
        self.journal().empty(storage).inspect_err(|_| self.failed.store(true, Ordering::Release))
    }
}

/// Calls `work`; lets `?` end a closure early.
fn run(work: impl FnOnce() -> Result<()>) -> Result<()> {
    work()
}
