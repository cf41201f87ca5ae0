// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making the disk larger.

use super::ResizeOptions;
use crate::bitmaps;
use crate::create::Preallocation;
use crate::editor::Editor;
use crate::first_cluster::field;
use crate::geometry::{COPIED, Mapping, ZERO, to_u64, to_usize};
use crate::image::{OpenOptions, Qcow2};
use crate::refcounts::to_bytes;
use crate::shape::{Shape, read_sparse};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, MemoryDevice, Result, Span, Storage, Zeroing};

/// Zeroes that are written at once.
const PIECE: u64 = 1 << 20;

pub(super) fn grow(storage: &Arc<dyn Storage>, size: u64, options: &ResizeOptions) -> Result<()> {
    let header = crate::header::Header::read(storage)?;
    if let (Some(backing), None) = (&header.backing, &options.backing) {
        return Err(Error::new(
            ErrorKind::Denied,
            format!("the image needs backing file {:?}, which was not given", backing.name),
        ));
    }
    blank_tail(storage, header.size, options)?;
    let mut editor = Editor::open(&**storage)?;
    let (shape, geometry) = (editor.shape(), editor.geometry());
    let mut l1 = editor.l1()?;
    let l1_bytes = u64::from(editor.header.l1_size).saturating_mul(8);
    let needed = to_usize(shape.l1_entries(size))?;
    let is_moved = needed > l1.len();
    l1.resize(needed.max(l1.len()), 0);
    bitmaps::resize(&mut editor, size)?;

    let first = geometry.clusters_for(header.size);
    let end = geometry.clusters_for(size);
    let is_changed = if options.preallocation == Preallocation::Off {
        let below = options.backing.as_ref().map_or(0, BlockDevice::size);
        let hidden = geometry.clusters_for(below.min(size));
        if hidden > first && header.version < 3 {
            return Err(Error::unsupported(
                "growing an image of version 2 over a backing image that is longer",
            ));
        }
        let blank = blank(shape);
        map(&mut editor, &mut l1, first..hidden.max(first), |_| blank)?
    } else {
        let host = reserve(&mut editor, end.saturating_sub(first), options.preallocation)?;
        map(&mut editor, &mut l1, first..end, |number| {
            let at = geometry.offset(number.saturating_sub(first));
            // All subclusters are allocated.
            [host.saturating_add(at) | COPIED, 0xffff_ffff]
        })?
    };
    if is_changed || is_moved {
        let offset = editor.store(&to_bytes(&l1))?;
        editor.free(editor.header.l1_table_offset, l1_bytes);
        editor.first.set_u64(field::L1_TABLE_OFFSET, offset);
        let entries = u32::try_from(l1.len()).unwrap_or(u32::MAX);
        editor.first.set_u32(field::L1_SIZE, entries);
    }
    editor.first.set_u64(field::SIZE, size);
    editor.commit()
}

/// An entry that reads as zero whatever lies below.
fn blank(shape: Shape) -> [u64; 2] {
    if shape.is_extended { [0, 0xffff_ffff << 32] } else { [ZERO, 0] }
}

/// Makes the last cluster zero past the end of the disk at `size`.
fn blank_tail(storage: &Arc<dyn Storage>, size: u64, options: &ResizeOptions) -> Result<()> {
    let header = crate::header::Header::read(storage)?;
    let geometry = header.geometry();
    let within = geometry.within(size);
    if within == 0 {
        return Ok(());
    }
    let backing: Arc<dyn BlockDevice> = match &options.backing {
        Some(backing) => Arc::clone(backing),
        None => Arc::new(MemoryDevice::new(Vec::new())),
    };
    let open = OpenOptions { backing: Some(Arc::clone(&backing)), ..OpenOptions::default() };
    let image = Qcow2::open(Arc::clone(storage), open)?;
    let unit = geometry.unit();
    let end = geometry.index(size).saturating_add(1).saturating_mul(geometry.units_per_cluster());
    let mut next = size.checked_div(unit).unwrap_or(0);
    let mut is_hidden = true;
    while next < end {
        let (mapping, count) = image.lock().lookup(storage, next, end.saturating_sub(next))?;
        let first = next.saturating_mul(unit);
        let start = first.max(size);
        next = next.saturating_add(count.max(1));
        let len = next.saturating_mul(unit).saturating_sub(start);
        match mapping {
            Mapping::Zero { .. } => {}
            Mapping::Unallocated => is_hidden &= backing.size() <= start,
            Mapping::Data(host) if host.copied => {
                let at = host.offset.saturating_add(start.saturating_sub(first));
                let there = len.min(storage.size().saturating_sub(at));
                storage.write_zeroes(Span::new(at, there), Zeroing::MayUnmap)?;
            }
            Mapping::Data(_) | Mapping::Compressed { .. } => is_hidden = false,
        }
    }
    if !is_hidden {
        // A cluster that is copied is zero past the end of the disk.
        let last = size.saturating_sub(1);
        let mut byte = [0];
        image.read_at(&mut byte, last)?;
        image.write_at(&byte, last)?;
    }
    image.close()?;
    storage.flush()
}

/// Takes clusters that have never been used, so that they read as zero.
fn reserve(editor: &mut Editor<'_>, count: u64, how: Preallocation) -> Result<u64> {
    let start = editor.append(count)?;
    editor.reach()?;
    let span = Span::new(start, editor.geometry().offset(count));
    match how {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => {
            editor.storage.write_zeroes(span, Zeroing::KeepAllocated)?;
        }
        Preallocation::Full => {
            let zeroes = vec![0; to_usize(PIECE.min(span.len))?];
            let mut at = span.start;
            while at < span.end() {
                let len = to_usize(span.end().saturating_sub(at))?.min(zeroes.len());
                editor.storage.write_at(zeroes.get(..len).unwrap_or_default(), at)?;
                at = at.saturating_add(to_u64(len));
            }
        }
    }
    Ok(start)
}

/// Maps guest clusters past the end of the disk. The table that maps the end is replaced,
/// since it may be shared. Returns whether `l1` has changed.
fn map(
    editor: &mut Editor<'_>,
    l1: &mut [u64],
    clusters: std::ops::Range<u64>,
    entry: impl Fn(u64) -> [u64; 2],
) -> Result<bool> {
    let (shape, geometry) = (editor.shape(), editor.geometry());
    let mut next = clusters.start;
    while next < clusters.end {
        let index = next.checked_div(shape.entries()).unwrap_or(0);
        let first = index.saturating_mul(shape.entries());
        let stop = first.saturating_add(shape.entries()).min(clusters.end);
        let slot = l1
            .get_mut(to_usize(index)?)
            .ok_or_else(|| Error::usage("guest cluster past the end of the L1 table"))?;
        let old = geometry.l2_offset(*slot, geometry.offset(first))?;
        let mut words = match old {
            Some(table) => read_sparse(editor.storage, table.offset, geometry.cluster() / 8)?,
            None => vec![0; to_usize(geometry.cluster() / 8)?],
        };
        let from = to_usize(next.saturating_sub(first))?.saturating_mul(shape.words());
        let slots = words.get_mut(from..).unwrap_or_default();
        for (number, slot) in (next..stop).zip(slots.chunks_mut(shape.words())) {
            for (word, value) in slot.iter_mut().zip(entry(number)) {
                *word = value;
            }
        }
        *slot = editor.store(&to_bytes(&words))? | COPIED;
        if let Some(table) = old {
            editor.free(table.offset, 1);
        }
        next = stop;
    }
    Ok(clusters.start < clusters.end)
}
