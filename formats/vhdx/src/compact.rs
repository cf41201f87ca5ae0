// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making the file smaller: dropping blocks that hold nothing but zeroes, and moving the
//! last ones into the gaps.
//!
//! A block is copied, and the copy is durable before the BAT refers to it; its old place
//! is not used again before the BAT is durable; the file is cut after the log is empty.
//! So a power cut at any point leaves a valid image with the same contents.

use crate::bat::{Entry, State, Subject};
use crate::bytes::{MIB, to_usize};
use crate::image::{OpenOptions, Table, Vhdx};
use std::collections::BTreeSet;
use std::sync::Arc;
use tranship_block::{BlockDevice, Extents, Result, Span, Storage, Zeroing, is_zero};

/// What compacting has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes of the file before.
    pub before: u64,
    /// Bytes of the file afterwards.
    pub after: u64,
}

/// Makes the file of a dynamic or differencing image as short as its contents allow.
///
/// What the guest sees does not change, and neither does the data-write GUID, so children
/// of the image stay valid; no parent is needed. Fixed images stay as they are.
///
/// # Errors
///
/// As [`Vhdx::open`] for writing, and I/O errors. The image is valid in any case.
pub fn compact(storage: &Arc<dyn Storage>) -> Result<Compacted> {
    let image = Vhdx::open_for_writing(Arc::clone(storage), OpenOptions::default(), false)?;
    let before = storage.size();
    if !image.is_fixed() {
        image.start_moving()?;
        drop_zeroes(&image, storage)?;
        while move_last(&image, storage)? {}
        image.close()?;
    }
    Ok(Compacted { before, after: storage.size() })
}

/// Drops what reads as zero, and sector bitmaps that nobody needs.
fn drop_zeroes(image: &Vhdx, storage: &Arc<dyn Storage>) -> Result<()> {
    let geometry = image.geometry;
    let nothing = if geometry.has_parent { State::Zero } else { State::NotPresent };
    let entries = all_entries(image);
    let is_partial = |(index, entry): &(u64, Entry)| match geometry.subject(*index) {
        Subject::Block(block) if entry.state() == State::Partial => Some(geometry.chunk(block)),
        _ => None,
    };
    let partial: BTreeSet<u64> = entries.iter().filter_map(is_partial).collect();
    let mut buf = vec![0; to_usize(MIB)?];
    for (index, entry) in &entries {
        match (geometry.subject(*index), entry.state()) {
            (Subject::Block(block), State::Full) => {
                let left = image.size().saturating_sub(geometry.offset(block));
                let place = Span::new(entry.offset(), left.min(geometry.block()));
                if is_all_zero(storage, place, &mut buf)? {
                    image.lock().drop_block(image, block, nothing);
                }
            }
            (Subject::Block(block), State::Unmapped | State::Undefined) => {
                image.lock().drop_block(image, block, nothing);
            }
            (Subject::Bitmap(chunk), State::Full) if !partial.contains(&chunk) => {
                let place = Span::new(entry.offset(), MIB);
                let mut table = image.lock();
                table.bitmaps.forget(place);
                table.freed.push(place);
                table.bat.set(*index, Entry::new(State::NotPresent, 0));
            }
            _ => {}
        }
    }
    commit(image, storage)
}

/// Moves blocks from the end into free runs; returns whether there were any.
fn move_last(image: &Vhdx, storage: &Arc<dyn Storage>) -> Result<bool> {
    let mut stored: Vec<(u64, Entry)> = all_entries(image);
    stored.retain(|(_, entry)| entry.is_stored());
    stored.sort_unstable_by_key(|(_, entry)| std::cmp::Reverse(entry.offset()));
    let mut buf = vec![0; to_usize(MIB)?];
    let mut has_moved = false;
    for (index, entry) in stored {
        let len = match image.geometry.subject(index) {
            Subject::Block(_) => image.geometry.block(),
            Subject::Bitmap(_) => MIB,
        };
        let Some(to) = free_below(&mut image.lock(), entry.offset(), len) else { continue };
        let from = Span::new(entry.offset(), len);
        copy(storage, from, to, &mut buf)?;
        let mut table = image.lock();
        table.bitmaps.forget(from);
        table.freed.push(from);
        table.bat.set(index, Entry::new(entry.state(), to));
        has_moved = true;
    }
    commit(image, storage)?;
    Ok(has_moved)
}

/// Takes `len` bytes that lie before `place`.
fn free_below(table: &mut Table, place: u64, len: u64) -> Option<u64> {
    let to = table.space.lowest(len).filter(|to| *to < place)?;
    table.space.claim(Span::new(to, len)).then_some(to)
}

fn all_entries(image: &Vhdx) -> Vec<(u64, Entry)> {
    image.lock().bat.entries(image.geometry.entries(image.size())).collect()
}

fn commit(image: &Vhdx, storage: &Arc<dyn Storage>) -> Result<()> {
    let freed = image.write_back(&**storage, Vec::new())?;
    image.release(&**storage, freed);
    Ok(())
}

fn is_all_zero(storage: &Arc<dyn Storage>, span: Span, buf: &mut [u8]) -> Result<bool> {
    for extent in Extents::new(storage, span) {
        let (span, kind) = extent?;
        if kind.reads_zero() {
            continue;
        }
        for (at, len) in pieces(span, buf.len())? {
            let piece = buf.get_mut(..len).unwrap_or_default();
            storage.read_at(piece, at)?;
            if !is_zero(piece) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Copies a part of the file to another place of it.
fn copy(storage: &Arc<dyn Storage>, from: Span, to: u64, buf: &mut [u8]) -> Result<()> {
    // A block that the file's end cuts has zeroes behind it.
    let missing = from.end().saturating_sub(storage.size());
    let there = Span::new(from.start, from.len.saturating_sub(missing));
    let target = |at: u64| to.saturating_add(at.saturating_sub(from.start));
    for extent in Extents::new(storage, there) {
        let (span, kind) = extent?;
        if kind.reads_zero() {
            let zeroes = Span::new(target(span.start), span.len);
            storage.write_zeroes(zeroes, Zeroing::MayUnmap)?;
            continue;
        }
        for (at, len) in pieces(span, buf.len())? {
            let piece = buf.get_mut(..len).unwrap_or_default();
            storage.read_at(piece, at)?;
            storage.write_at(piece, target(at))?;
        }
    }
    storage.write_zeroes(Span::new(target(there.end()), missing), Zeroing::MayUnmap)
}

/// `span` in pieces of at most `most` bytes.
fn pieces(span: Span, most: usize) -> Result<Vec<(u64, usize)>> {
    let mut pieces = Vec::new();
    let mut at = span.start;
    while at < span.end() {
        let len = to_usize(span.end().saturating_sub(at))?.min(most.max(1));
        pieces.push((at, len));
        at = at.saturating_add(crate::bytes::to_u64(len));
    }
    Ok(pieces)
}
