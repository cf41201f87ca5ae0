// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Entries of the log (MS-VHDX 2.3): finding those that have to be replayed, and making
//! new ones.

use crate::Guid;
use crate::bytes::{SECTOR, SECTOR_BYTES, checksum, put, seal, to_u64};
use crate::header::guid;
use std::collections::BTreeMap;
use tranship_block::{LittleEndian, Span};

/// Bytes of an entry's header, and of a descriptor.
const HEADER: usize = 64;
const DESCRIPTOR: usize = 32;

/// A sector of metadata, and where it lies in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sector {
    /// Multiple of 4096.
    pub(crate) at: u64,
    pub(crate) bytes: Box<[u8; SECTOR]>,
}

/// What an entry does to the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Data(Sector),
    Zero(Span),
}

/// A valid entry, not yet taken apart.
#[derive(Clone, Copy, Debug)]
struct Entry {
    sequence: u64,
    len: usize,
    tail: usize,
    count: usize,
    /// The file is at least this long.
    flushed: u64,
    /// The file has to be at least this long after the replay.
    last: u64,
}

/// What has to be done to bring the file up to date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Replay {
    /// The file was at least this long when the log was written.
    pub(crate) flushed: u64,
    /// What it has to be long afterwards.
    pub(crate) last: u64,
    /// In the order in which they apply.
    pub(crate) changes: Vec<Change>,
}

/// The log as a ring.
#[derive(Clone, Copy)]
struct Ring<'a>(&'a [u8]);

impl<'a> Ring<'a> {
    fn wrap(self, at: usize) -> usize {
        at.checked_rem(self.0.len()).unwrap_or(0)
    }

    /// The sector at `at`, a multiple of 4096.
    fn sector(self, at: usize) -> Option<&'a [u8]> {
        self.0.get(self.wrap(at)..)?.get(..SECTOR)
    }

    /// Descriptor `number` of the entry at `at`; 4096 is a multiple of its size.
    fn descriptor(self, at: usize, number: usize) -> Option<&'a [u8]> {
        let within = HEADER.checked_add(number.checked_mul(DESCRIPTOR)?)?;
        let sector = self.sector(at.checked_add(within & !SECTOR.wrapping_sub(1))?)?;
        sector.get(within & SECTOR.wrapping_sub(1)..)?.get(..DESCRIPTOR)
    }

    /// The entry at `at`, if everything about it is right.
    ///
    /// The structure is checked before the checksum, so that only entries that share no
    /// sector reach the latter: time grows with the length of the log and not faster.
    fn entry(self, at: usize, log_guid: Guid) -> Option<Entry> {
        let bytes = self.sector(at)?;
        if !bytes.starts_with(b"loge") {
            return None;
        }
        let fields = LittleEndian(bytes, "log entry");
        let len = usize::try_from(fields.u32("entry length", 8).ok()?).ok()?;
        let tail = usize::try_from(fields.u32("tail", 12).ok()?).ok()?;
        let sequence = fields.u64("sequence number", 16).ok()?;
        let count = usize::try_from(fields.u32("descriptor count", 24).ok()?).ok()?;
        let is_aligned = |at: usize| at & SECTOR.wrapping_sub(1) == 0;
        if len == 0
            || len > self.0.len()
            || tail >= self.0.len()
            || !is_aligned(len)
            || !is_aligned(tail)
            || sequence == 0
            || guid(&fields, "log GUID", 32).ok()? != log_guid
        {
            return None;
        }
        let descriptors = descriptor_sectors(count)?;
        if descriptors.checked_mul(SECTOR)? > len {
            return None;
        }
        let mut data = 0_usize;
        for number in 0..count {
            let descriptor = self.descriptor(at, number)?;
            let own = LittleEndian(descriptor, "log descriptor").u64("sequence", 24).ok()?;
            data = match descriptor.first_chunk()? {
                b"desc" => data.checked_add(1)?,
                b"zero" => data,
                _ => return None,
            };
            if own != sequence {
                return None;
            }
        }
        if descriptors.checked_add(data)?.checked_mul(SECTOR)? != len {
            return None;
        }
        for number in descriptors..descriptors.checked_add(data)? {
            let sector = self.sector(at.checked_add(number.checked_mul(SECTOR)?)?)?;
            let fields = LittleEndian(sector, "log data");
            let high = u64::from(fields.u32("sequence high", 4).ok()?);
            let low = u64::from(fields.u32("sequence low", SECTOR.wrapping_sub(4)).ok()?);
            if !sector.starts_with(b"data") || high.wrapping_shl(32) | low != sequence {
                return None;
            }
        }
        let whole = self.bytes(at, len)?;
        (checksum(&whole) == fields.u32("checksum", 4).ok()?).then_some(Entry {
            sequence,
            len,
            tail,
            count,
            flushed: fields.u64("flushed file offset", 48).ok()?,
            last: fields.u64("last file offset", 56).ok()?,
        })
    }

    fn bytes(self, at: usize, len: usize) -> Option<Vec<u8>> {
        let mut whole = Vec::with_capacity(len);
        for step in (0..len).step_by(SECTOR) {
            whole.extend_from_slice(self.sector(at.checked_add(step)?)?);
        }
        Some(whole)
    }

    /// Appends what the valid `entry` at `at` does.
    fn changes(self, at: usize, entry: Entry, changes: &mut Vec<Change>) -> Option<()> {
        let mut next = at.checked_add(descriptor_sectors(entry.count)?.checked_mul(SECTOR)?)?;
        for number in 0..entry.count {
            let descriptor = self.descriptor(at, number)?;
            let fields = LittleEndian(descriptor, "log descriptor");
            let offset = fields.u64("file offset", 16).ok()?;
            if descriptor.starts_with(b"zero") {
                changes.push(Change::Zero(Span::new(offset, fields.u64("length", 8).ok()?)));
                continue;
            }
            let mut bytes: Box<[u8; SECTOR]> = Box::new(self.sector(next)?.first_chunk().copied()?);
            // What the signature and the sequence number have replaced.
            put(bytes.as_mut_slice(), 0, fields.bytes("leading bytes", 8, 8).ok()?);
            let trailing = fields.bytes("trailing bytes", 4, 4).ok()?;
            put(bytes.as_mut_slice(), SECTOR.wrapping_sub(4), trailing);
            changes.push(Change::Data(Sector { at: offset, bytes }));
            next = next.checked_add(SECTOR)?;
        }
        Some(())
    }
}

fn descriptor_sectors(count: usize) -> Option<usize> {
    Some(HEADER.checked_add(count.checked_mul(DESCRIPTOR)?)?.div_ceil(SECTOR))
}

/// The changes of the active sequence of `log`: of all runs of valid entries with
/// consecutive numbers whose last entry's tail is one of them, the one that ends with
/// the highest number (2.3.3).
pub(crate) fn active(log: &[u8], log_guid: Guid) -> Option<Replay> {
    let ring = Ring(log);
    let entries: BTreeMap<usize, Entry> = (0..log.len())
        .step_by(SECTOR)
        .filter_map(|at| ring.entry(at, log_guid).map(|entry| (at, entry)))
        .collect();
    let after = |at: usize, entry: &Entry| {
        let next = ring.wrap(at.checked_add(entry.len)?);
        let follows = |next: &&Entry| Some(next.sequence) == entry.sequence.checked_add(1);
        entries.get(&next).filter(follows).map(|_| next)
    };
    let continued: std::collections::BTreeSet<usize> =
        entries.iter().filter_map(|(at, entry)| after(*at, entry)).collect();
    let mut best: Option<(u64, Vec<usize>)> = None;
    // Numbers rise along a run, so that no run is endless; each entry is in one run.
    for start in entries.keys().filter(|at| !continued.contains(at)) {
        let mut run = vec![*start];
        let mut head = entries.get(start)?;
        while let Some(next) = run.last().and_then(|at| after(*at, head)) {
            run.push(next);
            head = entries.get(&next)?;
        }
        let Some(tail) = run.iter().position(|at| *at == head.tail) else { continue };
        if best.as_ref().is_none_or(|(sequence, _)| head.sequence > *sequence) {
            best = Some((head.sequence, run.split_off(tail)));
        }
    }
    let (_, run) = best?;
    let head = run.last().and_then(|at| entries.get(at))?;
    let mut replay = Replay { flushed: head.flushed, last: head.last, changes: Vec::new() };
    for at in run {
        ring.changes(at, *entries.get(&at)?, &mut replay.changes)?;
    }
    Some(replay)
}

/// What goes into the header of a new entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewEntry {
    pub(crate) log_guid: Guid,
    pub(crate) sequence: u64,
    /// Where the oldest entry lies that is still needed, in bytes of the ring.
    pub(crate) tail: u32,
    pub(crate) flushed: u64,
    pub(crate) last: u64,
}

/// The entry that changes `sectors`; a multiple of 4096 bytes.
pub(crate) fn new_entry(new: &NewEntry, sectors: &[Sector]) -> Vec<u8> {
    let first = descriptor_sectors(sectors.len()).unwrap_or(1).saturating_mul(SECTOR);
    let mut entry = vec![0; first];
    let narrow = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
    let (low, high) = entry_len(sectors.len());
    let sequence = new.sequence.to_le_bytes();
    let (sequence_low, sequence_high) = sequence.split_at(4);
    put(&mut entry, 0, b"loge");
    put(&mut entry, 8, &narrow(low.saturating_add(high)));
    put(&mut entry, 12, &new.tail.to_le_bytes());
    put(&mut entry, 16, &sequence);
    put(&mut entry, 24, &narrow(sectors.len()));
    put(&mut entry, 32, &new.log_guid.to_bytes());
    put(&mut entry, 48, &new.flushed.to_le_bytes());
    put(&mut entry, 56, &new.last.to_le_bytes());
    for (at, sector) in (HEADER..).step_by(DESCRIPTOR).zip(sectors) {
        let bytes = sector.bytes.as_slice();
        let (leading, rest) = bytes.split_at(8);
        let (middle, trailing) = rest.split_at(rest.len().saturating_sub(4));
        put(&mut entry, at, b"desc");
        put(&mut entry, at.saturating_add(4), trailing);
        put(&mut entry, at.saturating_add(8), leading);
        put(&mut entry, at.saturating_add(16), &sector.at.to_le_bytes());
        put(&mut entry, at.saturating_add(24), &sequence);
        entry.extend_from_slice(b"data");
        entry.extend_from_slice(sequence_high);
        entry.extend_from_slice(middle);
        entry.extend_from_slice(sequence_low);
    }
    seal(&mut entry);
    entry
}

/// Bytes of descriptors and of data in an entry for `sectors` sectors.
fn entry_len(sectors: usize) -> (usize, usize) {
    let first = descriptor_sectors(sectors).unwrap_or(1).saturating_mul(SECTOR);
    (first, sectors.saturating_mul(SECTOR))
}

/// How many sectors an entry may have that takes at most half of a ring of `length` bytes,
/// so that the entry before it stays whole while it is written.
pub(crate) fn most_sectors(length: u64) -> usize {
    let half = usize::try_from(length / 2 / SECTOR_BYTES).unwrap_or(usize::MAX);
    // A sector of descriptors serves 126 or more sectors of data.
    let descriptors = half.div_ceil(126);
    half.saturating_sub(descriptors).clamp(1, 4096)
}

/// The pieces of a ring of `length` bytes that `len` bytes from `at` cover: offset in the
/// ring, and range of the bytes.
pub(crate) fn pieces(at: u64, len: usize, length: u64) -> [(u64, std::ops::Range<usize>); 2] {
    let room = usize::try_from(length.saturating_sub(at)).unwrap_or(usize::MAX);
    let first = len.min(room);
    debug_assert!(to_u64(len) <= length, "an entry is never longer than the ring");
    [(at, 0..first), (0, first..len)]
}

#[cfg(test)]
mod tests;
