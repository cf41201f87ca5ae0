// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bringing a file up to date from its log (MS-VHDX 2.3.3), or finding that it is lost.

use crate::bytes::{MIB, SECTOR_BYTES, read, to_usize};
use crate::header::Header;
use crate::log::{Change, Replay, active};
use crate::region;
use tranship_block::{BlockDevice, Error, Result, Span, Storage, Zeroing};

/// Largest log that is replayed; Hyper-V and QEMU make logs of 1 MiB.
const LARGEST_LOG: u64 = 256 << 20;
/// How far a replay may extend a file: many times what was ever allocated at once.
const MOST_GROWTH: u64 = 64 << 30;

/// Checks where the log is.
pub(crate) fn check_place(header: &Header, file_len: u64) -> Result<()> {
    let log = header.log;
    let is_aligned = |number: u64| number.checked_rem(MIB) == Some(0);
    if log.offset < MIB || !is_aligned(log.offset) || !is_aligned(u64::from(log.length)) {
        return Err(Error::corrupt(format!(
            "log of {} bytes at {:#x}, expected multiples of 1 MiB behind the header",
            log.length, log.offset
        ))
        .at(log.offset));
    }
    if log.length == 0 || log.span().end() > file_len {
        return Err(Error::corrupt(format!(
            "log of {} bytes does not fit into the file's {file_len} bytes",
            log.length
        ))
        .at(log.offset));
    }
    Ok(())
}

/// What has to be replayed; nothing if the log is empty.
pub(crate) fn find(file: &dyn BlockDevice, header: &Header) -> Result<Option<Replay>> {
    if header.log_guid.is_nil() {
        return Ok(None);
    }
    check_place(header, file.size())?;
    let place = header.log.span();
    if place.len > LARGEST_LOG {
        return Err(Error::unsupported(format!(
            "log that has to be replayed has {} bytes, expected at most 256 MiB",
            place.len
        ))
        .at(place.start));
    }
    let log = read(file, "log", place.start, to_usize(place.len)?)?;
    let replay = active(&log, header.log_guid).ok_or_else(|| {
        Error::corrupt(format!(
            "log {} has to be replayed, but has no valid sequence of entries",
            header.log_guid
        ))
        .at(place.start)
    })?;
    drop(log);
    if replay.flushed > file.size() {
        return Err(Error::corrupt(format!(
            "file has {} bytes, but its log was written when it had {}: the image is incomplete",
            file.size(),
            replay.flushed
        )));
    }
    let end = replay.last.max(file.size());
    if end.saturating_sub(file.size()) > MOST_GROWTH {
        return Err(Error::corrupt(format!(
            "log wants the file to have {} bytes, but it has {}",
            replay.last,
            file.size()
        ))
        .at(place.start));
    }
    for change in &replay.changes {
        let span = match change {
            Change::Data(sector) => Span::new(sector.at, SECTOR_BYTES),
            Change::Zero(span) => *span,
        };
        check_change(span, place, end).map_err(|error| error.at(place.start))?;
    }
    Ok(Some(replay))
}

/// Headers and log have other ways to change.
fn check_change(span: Span, log: Span, file_len: u64) -> Result<()> {
    let is_aligned = |number: u64| number.checked_rem(SECTOR_BYTES) == Some(0);
    let [first_table, _] = region::COPIES;
    let is_allowed = span.start >= first_table
        && (span.end() <= log.start || span.start >= log.end())
        && span.len <= file_len
        && span.end() <= file_len;
    if is_allowed && is_aligned(span.start) && is_aligned(span.len) {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "log wants to change {} bytes at {:#x} of a file of {file_len} bytes",
        span.len, span.start
    )))
}

/// Does in the file what its log says; the caller marks the log as empty afterwards.
pub(crate) fn apply(storage: &dyn Storage, replay: &Replay) -> Result<()> {
    if storage.size() < replay.last {
        storage.set_len(replay.last)?;
    }
    for change in &replay.changes {
        match change {
            Change::Data(sector) => storage.write_at(sector.bytes.as_slice(), sector.at)?,
            Change::Zero(span) => storage.write_zeroes(*span, Zeroing::MayUnmap)?,
        }
    }
    storage.flush()
}
