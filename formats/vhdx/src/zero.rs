// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Zeroes and discards.

use crate::bat::{Entry, State};
use crate::image::{Table, Vhdx};
use crate::read::Mapping;
use crate::write::Payload;
use tranship_block::{Result, Span, Zeroing};

impl Vhdx {
    /// Zeroes what was checked and is protected by `in_use`.
    pub(crate) fn zero(&self, mut span: Span, mode: Zeroing) -> Result<()> {
        while !span.is_empty() {
            let done = self.zero_some(span, mode)?;
            span = behind(span, done);
        }
        Ok(())
    }

    /// Zeroes the start of `span`; returns how much.
    fn zero_some(&self, span: Span, mode: Zeroing) -> Result<u64> {
        let geometry = self.geometry;
        let storage = self.writable(span.start)?;
        let block = geometry.index(span.start);
        let mut table = self.lock_idle(block);
        let entry = table.bat.get(geometry.payload_entry(block));
        if entry.state() == State::Zero {
            return Ok(table.zero_run(self, span));
        }
        if entry.state() == State::NotPresent && !geometry.has_parent {
            return Ok(self.run(&mut table, span.start, span.len)?.1);
        }
        let in_block = span.len.min(geometry.block().saturating_sub(geometry.within(span.start)));
        let (mapping, run) = self.run(&mut table, span.start, in_block)?;
        let may_drop = !entry.is_stored() || mode == Zeroing::MayUnmap && !self.is_fixed();
        if may_drop && self.covers_block(span.start, in_block) {
            // Also what is zero for us already: others may find anything in unmapped blocks.
            table.drop_block(self, block, State::Zero);
            return Ok(in_block);
        }
        drop(table);
        if mapping == Mapping::Zero {
            return Ok(in_block);
        }
        if mapping == Mapping::Absent {
            let below = self.extent(span.start)?;
            if below.kind.reads_zero() {
                return Ok(below.len.min(run));
            }
        }
        match mapping {
            Mapping::Data(at) => storage.write_zeroes(Span::new(at, run), self.zeroing(mode))?,
            _ => self.write_payload(Payload::Zeroes(run), span.start)?,
        }
        Ok(run)
    }

    /// Drops the blocks that lie in `span` as a whole.
    pub(crate) fn discard_blocks(&self, span: Span) {
        if self.is_fixed() {
            return;
        }
        let geometry = self.geometry;
        let mut block = geometry.blocks(span.start);
        while geometry.offset(block) < span.end() {
            let start = geometry.offset(block);
            if !self.covers_block(start, span.end().saturating_sub(start)) {
                break;
            }
            let mut table = self.lock_idle(block);
            let index = table.bat.skip_empty(geometry.payload_entry(block));
            let next = geometry.block_from(index);
            if next > block {
                block = next;
                continue;
            }
            if table.bat.get(index).is_stored() {
                table.drop_block(self, block, State::Unmapped);
            }
            block = block.saturating_add(1);
        }
    }
}

impl Table {
    /// How much of `span` lies in blocks from its start on whose state is zero.
    fn zero_run(&self, image: &Vhdx, span: Span) -> u64 {
        let geometry = image.geometry;
        let mut next = geometry.index(span.start).saturating_add(1);
        let is_zero = |block| self.bat.get(geometry.payload_entry(block)).state() == State::Zero;
        while geometry.offset(next) < span.end() && is_zero(next) {
            next = next.saturating_add(1);
        }
        geometry.offset(next).min(span.end()).saturating_sub(span.start)
    }

    /// Gives up the place of a block, if it has one.
    pub(crate) fn drop_block(&mut self, image: &Vhdx, block: u64, state: State) {
        let index = image.geometry.payload_entry(block);
        let entry = self.bat.get(index);
        if entry.is_stored() {
            self.freed.push(Span::new(entry.offset(), image.geometry.block()));
        }
        self.bat.set(index, Entry::new(state, 0));
    }
}

fn behind(span: Span, len: u64) -> Span {
    Span::new(span.start.saturating_add(len), span.len.saturating_sub(len.max(1)))
}
