// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making the disk larger.

use super::ResizeOptions;
use super::tail::blank_tail;
use crate::bitmaps;
use crate::bitmaps::tracking::DATA_FILE_RAW;
use crate::create::Preallocation;
use crate::editor::Editor;
use crate::first_cluster::field;
use crate::geometry::{COPIED, ZERO, to_u64, to_usize};
use crate::header::Header;
use crate::refcounts::to_bytes;
use crate::shape::{Shape, read_sparse};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Span, Storage, Zeroing};

/// Zeroes that are written at once.
const PIECE: u64 = 1 << 20;
/// All subclusters of a cluster, as allocated ones.
const ALL: u64 = 0xffff_ffff;

pub(super) fn grow(storage: &Arc<dyn Storage>, size: u64, options: &ResizeOptions) -> Result<()> {
    let header = Header::read(storage)?;
    if let (Some(backing), None) = (&header.backing, &options.backing) {
        return Err(Error::new(
            ErrorKind::Denied,
            format!("the image needs backing file {:?}, which was not given", backing.name),
        ));
    }
    if header.crypt_method != 0 && options.preallocation != Preallocation::Off {
        return Err(Error::unsupported("preallocation for an encrypted disk"));
    }
    let below = options.backing.as_ref().map_or(0, BlockDevice::size);
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
    let mut is_changed = hide_subclusters(&mut editor, &mut l1, header.size, below)?;
    is_changed |= if let Some(data) = &options.data_file {
        let is_raw = header.autoclear_features & DATA_FILE_RAW != 0;
        lengthen(&**data, Span::new(header.size, size.saturating_sub(header.size)), options)?;
        // A raw disk has no holes that another layer could fill.
        let mapped = if is_raw || options.preallocation != Preallocation::Off {
            first..end
        } else {
            first..first
        };
        map(&mut editor, &mut l1, mapped, |number, _| [geometry.offset(number) | COPIED, ALL])?
    } else if options.preallocation == Preallocation::Off {
        let hidden = geometry.clusters_for(below.min(size));
        if hidden > first && header.version < 3 {
            return Err(Error::unsupported(
                "growing an image of version 2 over a backing image that is longer",
            ));
        }
        let blank = blank(shape);
        map(&mut editor, &mut l1, first..hidden.max(first), |_, _| blank)?
    } else {
        let host = reserve(&mut editor, end.saturating_sub(first), options.preallocation)?;
        map(&mut editor, &mut l1, first..end, |number, _| {
            let at = geometry.offset(number.saturating_sub(first));
            [host.saturating_add(at) | COPIED, ALL]
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
    if shape.is_extended { [0, ALL << 32] } else { [ZERO, 0] }
}

/// In the cluster at the end of the disk, subclusters that lie past `size` as a whole get
/// the zero bit where a backing image of `below` bytes would show through.
fn hide_subclusters(
    editor: &mut Editor<'_>,
    l1: &mut [u64],
    size: u64,
    below: u64,
) -> Result<bool> {
    let geometry = editor.geometry();
    let within = geometry.within(size);
    if !editor.shape().is_extended || within == 0 || below <= size {
        return Ok(false);
    }
    let kept = within.div_ceil(geometry.cluster() / 32).min(32);
    let past = ALL & !1_u64.wrapping_shl(u32::try_from(kept).unwrap_or(32)).wrapping_sub(1);
    let cluster = geometry.index(size);
    map(editor, l1, cluster..cluster.saturating_add(1), |_, [entry, bitmap]| {
        [entry, bitmap | (past & !bitmap).wrapping_shl(32)]
    })
}

/// Makes the data file reach to the end of `grown`, with zeroes in it.
fn lengthen(data: &dyn Storage, grown: Span, options: &ResizeOptions) -> Result<()> {
    let old = data.size().min(grown.end());
    if old > grown.start {
        let stale = Span::new(grown.start, old.saturating_sub(grown.start));
        data.write_zeroes(stale, Zeroing::MayUnmap)?;
    }
    if data.size() < grown.end() {
        data.set_len(grown.end())?;
    }
    fill(data, grown, options.preallocation)?;
    data.flush()
}

/// Takes clusters that have never been used, so that they read as zero.
fn reserve(editor: &mut Editor<'_>, count: u64, how: Preallocation) -> Result<u64> {
    let start = editor.append(count)?;
    editor.reach()?;
    fill(editor.storage, Span::new(start, editor.geometry().offset(count)), how)?;
    Ok(start)
}

/// Reserves space for `span`, which reads as zero.
fn fill(storage: &dyn Storage, span: Span, how: Preallocation) -> Result<()> {
    match how {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => storage.write_zeroes(span, Zeroing::KeepAllocated),
        Preallocation::Full => {
            let zeroes = vec![0; to_usize(PIECE.min(span.len))?];
            let mut at = span.start;
            while at < span.end() {
                let len = to_usize(span.end().saturating_sub(at))?.min(zeroes.len());
                storage.write_at(zeroes.get(..len).unwrap_or_default(), at)?;
                at = at.saturating_add(to_u64(len));
            }
            Ok(())
        }
    }
}

/// Gives guest clusters the entries that `entry` makes of their numbers and old entries.
/// Tables are replaced, since they may be shared. Returns whether `l1` has changed.
fn map(
    editor: &mut Editor<'_>,
    l1: &mut [u64],
    clusters: std::ops::Range<u64>,
    entry: impl Fn(u64, [u64; 2]) -> [u64; 2],
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
            let word = |at: usize| slot.get(at).copied().unwrap_or(0);
            let new = entry(number, [word(0), word(1)]);
            for (word, value) in slot.iter_mut().zip(new) {
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
