// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An export as a block device.

use super::extents::Known;
use super::queue::Queue;
use super::{Remote, length, pieces, request, size_of_span};
use crate::wire::{allocation, command, command_flag};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use tranship_block::{
    BlockDevice, Error, ErrorKind, Extent, ExtentKind, ReadQueue, Result, Span, Storage, Zeroing,
};

impl BlockDevice for Remote {
    fn size(&self) -> u64 {
        self.facts.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn preferred_block(&self) -> u32 {
        self.facts.preferred_block.max(4096)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let span = Span::new(offset, length(buf));
        span.check_within(self.facts.size)?;
        let whole = self.aligned(span)?;
        if whole == span {
            return self.read_aligned(buf, offset);
        }
        let mut bounce = vec![0; size_of_span(whole)?];
        self.read_aligned(&mut bounce, whole.start)?;
        let skip = usize::try_from(span.start.saturating_sub(whole.start)).unwrap_or(usize::MAX);
        let end = skip.saturating_add(buf.len());
        let wanted = bounce.get(skip..end).ok_or_else(|| Error::usage("read past its blocks"))?;
        buf.copy_from_slice(wanted);
        Ok(())
    }

    fn read_queues(&self) -> Vec<Box<dyn ReadQueue + '_>> {
        let queue = |line| -> Box<dyn ReadQueue + '_> {
            let number = self.queues.fetch_add(1, Ordering::Relaxed);
            Box::new(Queue::new(self, line, number))
        };
        self.lines.iter().map(queue).collect()
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let span = Span::new(offset, length(buf));
        self.start_writing(span)?;
        let whole = self.aligned(span)?;
        if whole == span {
            return self.write_aligned(buf, offset);
        }
        let _alone = self.unaligned.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bounce = vec![0; size_of_span(whole)?];
        self.read_aligned(&mut bounce, whole.start)?;
        let skip = usize::try_from(span.start.saturating_sub(whole.start)).unwrap_or(usize::MAX);
        let end = skip.saturating_add(buf.len());
        bounce
            .get_mut(skip..end)
            .ok_or_else(|| Error::usage("write past its blocks"))?
            .copy_from_slice(buf);
        self.write_aligned(&bounce, whole.start)
    }

    fn write_zeroes(&self, span: Span, mode: Zeroing) -> Result<()> {
        self.start_writing(span)?;
        let is_aligned = self.aligned(span).is_ok_and(|whole| whole == span);
        if !self.facts.can_zero() || !is_aligned {
            let zeroes = vec![0; usize::try_from(span.len.min(1 << 20)).unwrap_or(0)];
            for piece in pieces(span, 1 << 20) {
                let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
                self.write_at(zeroes.get(..len).unwrap_or(&zeroes), piece.start)?;
            }
            return Ok(());
        }
        let flags = match mode {
            Zeroing::MayUnmap => 0,
            Zeroing::KeepAllocated => command_flag::NO_HOLE,
        };
        for piece in pieces(span, self.longest()) {
            self.send(request(command::WRITE_ZEROES, flags, piece), &[])?;
            self.unflushed().wrote(piece);
        }
        Ok(())
    }

    fn discard(&self, span: Span) -> Result<()> {
        self.start_writing(span)?;
        let is_aligned = self.aligned(span).is_ok_and(|whole| whole == span);
        if !self.facts.can_trim() || !is_aligned {
            return Ok(());
        }
        for piece in pieces(span, self.longest()) {
            self.send(request(command::TRIM, 0, piece), &[])?;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        Span::new(offset, 1).check_within(self.facts.size)?;
        let left = self.facts.size.saturating_sub(offset);
        let has_allocation = self.facts.contexts.iter().any(|name| name == allocation::NAME);
        if !has_allocation {
            return Ok(Extent::new(ExtentKind::Data, left));
        }
        if let Some(extent) = self.known().at(offset) {
            return Ok(extent.limited_to(left));
        }
        let generation = self.known().generation();
        let runs = match self.status(allocation::NAME, offset, left) {
            Ok(runs) => runs,
            // The odd tail of a disk in blocks.
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                return Ok(Extent::new(ExtentKind::Data, left));
            }
            Err(error) => return Err(error),
        };
        let mut known = Known::new(offset);
        for (len, flags) in runs {
            let is = |flag: u32| flags & u64::from(flag) != 0;
            let kind = match (is(allocation::ZERO), is(allocation::HOLE)) {
                (true, true) => ExtentKind::Hole,
                (true, false) => ExtentKind::Zero,
                (false, _) => ExtentKind::Data,
            };
            known.push(len, kind);
        }
        let found = known.at(offset).ok_or_else(|| {
            Error::corrupt("the server's block status has nothing about the start of its range")
                .at(offset)
        })?;
        self.known().replace(known, generation);
        Ok(found.limited_to(left))
    }

    fn flush(&self) -> Result<()> {
        if self.read_only || !self.facts.can_flush() {
            return Ok(());
        }
        let _alone = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        self.unflushed().start_flush();
        // With several connections, the server promised that one flush covers them all.
        let result = self.send(request(command::FLUSH, 0, Span::new(0, 0)), &[]);
        self.unflushed().end_flush(result)
    }
}

impl Storage for Remote {
    fn set_len(&self, len: u64) -> Result<()> {
        if len <= self.facts.size {
            return Ok(());
        }
        let size = self.facts.size;
        Err(Error::new(
            ErrorKind::NoSpace,
            format!("NBD export has {size} bytes and cannot grow, {len} are needed"),
        ))
    }
}
