// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One request to a disk (section 5.2.6).

use super::{Disk, MOST_RANGE_SECTORS, MOST_RANGES, SECTOR};
use crate::memory::Ram;
use crate::virtio::chain::{self, Broken, Buffer, Chain};
use crate::virtio::worker::Serve;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tranship_block::{FileRange, Span, Zeroing};
use vm_memory::Bytes;

/// Kinds of requests.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;

    /// One word for it.
    pub(super) fn name(kind: u32) -> &'static str {
        match kind {
            IN => "read",
            OUT => "write",
            FLUSH => "flush",
            GET_ID => "name",
            DISCARD => "discard",
            WRITE_ZEROES => "zero",
            _ => "unknown",
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok = 0,
    Failed = 1,
    Unsupported = 2,
}

/// Bytes of a header: kind, reserved, first sector.
const HEADER: usize = 16;
/// Bytes of the disk's serial number.
const ID: usize = 20;
/// Bytes of a range to discard: first sector, sectors, flags.
const RANGE: usize = 16;
/// Flag of a range: storage may be given back.
const UNMAP: u32 = 1;
/// Bytes that are copied at once on their way to the disk.
const PIECE: usize = 1 << 20;

/// Serves the requests of one queue.
#[derive(Debug)]
pub(super) struct Requests {
    disk: Arc<Disk>,
    /// What bytes take on their way: the guest could change its own pages while a format
    /// looks at them twice.
    piece: Vec<u8>,
}

impl Requests {
    pub(super) fn new(disk: Arc<Disk>) -> Self {
        Self { disk, piece: Vec::new() }
    }

    /// Where `len` bytes from `sector` onward are, if that is on the disk.
    fn span(&self, sector: u64, len: u64) -> Option<Span> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(len)?;
        let aligned = len.is_multiple_of(SECTOR);
        (aligned && end <= self.disk.device.size()).then(|| Span::new(start, len))
    }

    /// What lies in a file as it is goes straight into the guest's memory; the rest is made
    /// in a buffer of ours first.
    fn read(
        &mut self,
        sector: u64,
        into: &mut Vec<Buffer>,
        ram: &Ram,
    ) -> Result<(Status, u32), Broken> {
        let len = chain::total(into);
        let (Some(span), Ok(whole)) = (self.span(sector, len), u32::try_from(len)) else {
            return Ok((Status::Failed, 0));
        };
        let (mut at, mut left) = (span.start, len);
        while left > 0 {
            let mut done = 0;
            if let Some(range) = self.disk.device.file_range(at) {
                let range = FileRange { len: range.len.min(left), ..range };
                // What goes wrong here goes wrong below as well, and is explained there.
                done = chain::fill_from_file(into, ram, &range)?.unwrap_or(0);
            }
            if done == 0 {
                done = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
                self.piece.resize(done, 0);
                if let Err(error) = self.disk.device.read_at(&mut self.piece, at) {
                    return Ok((self.failed("reading", &error), 0));
                }
                if !chain::put_front(into, ram, &self.piece) {
                    return Err(Broken("a buffer lies outside of memory"));
                }
            }
            at = at.saturating_add(done as u64);
            left = left.saturating_sub(done as u64);
        }
        Ok((Status::Ok, whole))
    }

    fn write(&mut self, sector: u64, from: &mut Vec<Buffer>, ram: &Ram) -> Result<Status, Broken> {
        let len = chain::total(from);
        let Some(span) = self.span(sector, len).filter(|_| !self.disk.how.read_only) else {
            return Ok(Status::Failed);
        };
        let (mut at, mut left) = (span.start, len);
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            self.piece.resize(count, 0);
            if !chain::take_front(from, ram, &mut self.piece) {
                return Err(Broken("a buffer lies outside of memory"));
            }
            if let Err(error) = self.disk.device.write_at(&self.piece, at) {
                return Ok(self.failed("writing", &error));
            }
            at = at.saturating_add(count as u64);
            left = left.saturating_sub(count as u64);
        }
        Ok(self.after_write())
    }

    fn after_write(&self) -> Status {
        if self.disk.write_through.load(Ordering::Acquire) { self.flush() } else { Status::Ok }
    }

    fn flush(&self) -> Status {
        if !self.disk.how.durable {
            return Status::Ok;
        }
        match self.disk.device.flush() {
            Ok(()) => Status::Ok,
            Err(error) => self.failed("flushing", &error),
        }
    }

    fn ranges(&mut self, wanted: u32, from: &mut Vec<Buffer>, ram: &Ram) -> Result<Status, Broken> {
        let len = usize::try_from(chain::total(from)).unwrap_or(usize::MAX);
        let most = usize::try_from(MOST_RANGES).unwrap_or(0).saturating_mul(RANGE);
        if self.disk.how.read_only || len == 0 || len > most || !len.is_multiple_of(RANGE) {
            return Ok(Status::Failed);
        }
        let mut bytes = vec![0; len];
        if !chain::take_front(from, ram, &mut bytes) {
            return Err(Broken("a buffer lies outside of memory"));
        }
        for range in bytes.chunks_exact(RANGE) {
            let Ok(range) = <[u8; RANGE]>::try_from(range) else { continue };
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            // Section 5.2.6.2: a discard has no flags, nobody has any others.
            if flags & !UNMAP != 0 || (wanted == kind::DISCARD && flags != 0) {
                return Ok(Status::Unsupported);
            }
            let len = u64::from(sectors).saturating_mul(SECTOR);
            let Some(span) = self.span(sector, len).filter(|_| sectors <= MOST_RANGE_SECTORS)
            else {
                return Ok(Status::Failed);
            };
            let outcome = if wanted == kind::DISCARD {
                self.disk.device.discard(span)
            } else {
                let mode =
                    if flags & UNMAP == 0 { Zeroing::KeepAllocated } else { Zeroing::MayUnmap };
                self.disk.device.write_zeroes(span, mode)
            };
            if let Err(error) = outcome {
                return Ok(self.failed("zeroing", &error));
            }
        }
        Ok(self.after_write())
    }

    fn id(&self, into: &[Buffer], ram: &Ram) -> (Status, u32) {
        let mut id = [0; ID];
        for (place, byte) in id.iter_mut().zip(self.disk.how.serial.bytes()) {
            *place = byte;
        }
        let filled = chain::fill(into, ram, &id);
        (Status::Ok, u32::try_from(filled).unwrap_or(0))
    }

    fn failed(&self, what: &str, error: &tranship_block::Error) -> Status {
        tracing::warn!(serial = self.disk.how.serial, %error, "{what} a disk failed");
        Status::Failed
    }
}

impl Serve for Requests {
    fn serve(&mut self, mut chain: Chain, ram: &Ram) -> Result<u32, Broken> {
        let mut header = [0; HEADER];
        if !chain::take_front(&mut chain.readable, ram, &mut header) {
            return Err(Broken("a request is shorter than its header"));
        }
        let Some(status_at) = chain::take_last_byte(&mut chain.writable) else {
            return Err(Broken("a request has no room for its status"));
        };
        let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let wanted = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let bytes = tracing::enabled!(tracing::Level::TRACE)
            .then(|| chain::total(&chain.readable).saturating_add(chain::total(&chain.writable)));
        let (status, written) = match wanted {
            kind::IN => self.read(sector, &mut chain.writable, ram)?,
            kind::OUT => (self.write(sector, &mut chain.readable, ram)?, 0),
            kind::FLUSH => (self.flush(), 0),
            kind::GET_ID => self.id(&chain.writable, ram),
            kind::DISCARD | kind::WRITE_ZEROES => {
                (self.ranges(wanted, &mut chain.readable, ram)?, 0)
            }
            _ => (Status::Unsupported, 0),
        };
        tracing::trace!(
            serial = self.disk.how.serial,
            kind = kind::name(wanted),
            sector,
            bytes,
            ?status,
            "request"
        );
        ram.write_obj(status as u8, status_at)
            .map_err(|_| Broken("a buffer lies outside of memory"))?;
        Ok(written.saturating_add(1))
    }
}
