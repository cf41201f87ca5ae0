// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changing the virtual size.

mod grow;
mod tail;

use crate::bitmaps;
use crate::create::Preallocation;
use crate::editor::Editor;
use crate::first_cluster::field;
use crate::geometry::{COPIED, to_usize};
use crate::header::LARGEST_L1;
use crate::metadata::Run;
use crate::refcounts::to_bytes;
use crate::shape::read_sparse;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Result, Storage};

/// How a disk is resized.
#[derive(Clone, Debug, Default)]
pub struct ResizeOptions {
    /// The disk may become smaller, and what lies beyond is lost.
    pub allow_shrink: bool,
    /// What is reserved where it becomes larger.
    pub preallocation: Preallocation,
    /// The backing image; required to grow an image whose header names one, since what it
    /// has past the old end must not appear.
    pub backing: Option<Arc<dyn BlockDevice>>,
    /// The external data file; required for an image that has one. It gets the disk's size.
    pub data_file: Option<Arc<dyn Storage>>,
}

/// Gives the disk in the image in `storage` a size of `size` bytes, rounded up to a multiple
/// of 512. Nobody else may have it open. New bytes read as zero.
///
/// # Errors
///
/// [`ErrorKind::Usage`] for a smaller size that was not allowed or one past the format's
/// limits, [`ErrorKind::Denied`] without the backing image or the data file where it is
/// needed, [`ErrorKind::Unsupported`] for images of version 2 with snapshots, which do not
/// record their sizes, and where new bytes of an encrypted disk would not be zero;
/// [`ErrorKind::Corrupt`] for an image that needs a repair or has inconsistent bitmaps.
pub fn resize(storage: &Arc<dyn Storage>, size: u64, options: &ResizeOptions) -> Result<()> {
    let size = size
        .checked_next_multiple_of(512)
        .ok_or_else(|| Error::usage(format!("a size of {size} bytes is too large")))?;
    let editor = Editor::open(&**storage)?;
    let old = editor.header.size;
    if editor.header.version < 3 && editor.header.nb_snapshots > 0 {
        return Err(Error::unsupported("resizing an image of version 2 that has snapshots"));
    }
    if editor.shape().has_data_file && options.data_file.is_none() {
        return Err(Error::new(
            ErrorKind::Denied,
            format!(
                "the image keeps its data in another file, {:?}, which was not given",
                editor.header.data_file.as_deref().unwrap_or("without a name")
            ),
        ));
    }
    if editor.shape().l1_entries(size).saturating_mul(8) > LARGEST_L1 {
        return Err(Error::usage(format!(
            "a size of {size} bytes is too large for clusters of {} bytes",
            editor.geometry().cluster()
        )));
    }
    if size == old {
        return Ok(());
    }
    if size < old {
        if !options.allow_shrink {
            return Err(Error::usage(format!(
                "shrinking the disk from {old} to {size} bytes loses data, which was not allowed"
            )));
        }
        if options.preallocation != Preallocation::Off {
            return Err(Error::usage("preallocation for a disk that becomes smaller"));
        }
        cut(editor, size)?;
        return match &options.data_file {
            // A block device has the size that it has.
            Some(data) if data.size() > size => data.set_len(size).or(Ok(())),
            _ => Ok(()),
        };
    }
    // What an interrupted writer or another program left past the end would appear.
    cut(editor, old)?;
    grow::grow(storage, size, options)
}

/// Makes `size` the size, then takes away everything that is mapped past it. If it is
/// interrupted in between, the next change of the size goes on with that.
fn cut(mut editor: Editor<'_>, size: u64) -> Result<()> {
    let storage = editor.storage;
    let shape = editor.shape();
    if size != editor.header.size {
        bitmaps::resize(&mut editor, size)?;
        editor.first.set_u64(field::SIZE, size);
        editor.commit()?;
    }
    let mut l1 = editor.l1()?;
    let kept = to_usize(shape.l1_entries(size))?;
    let mut dropped = l1.clone();
    dropped.iter_mut().take(kept).for_each(|entry| *entry = 0);
    let mut runs = editor.runs(&dropped)?;
    if let Some(last) = kept.checked_sub(1).and_then(|last| l1.get_mut(last)) {
        runs.extend(cut_table(&mut editor, last, size)?);
    }
    if runs.is_empty() {
        return Ok(());
    }
    l1.iter_mut().skip(kept).for_each(|entry| *entry = 0);
    storage.write_at(&to_bytes(&l1), editor.header.l1_table_offset)?;
    storage.flush()?;
    editor.release_all(runs)?;
    editor.trim()?;
    storage.flush()
}

/// Clears what the table of L1 entry `entry`, which maps the end of the disk, maps past
/// `size`; returns what is free when the new entry is on disk.
fn cut_table(editor: &mut Editor<'_>, entry: &mut u64, size: u64) -> Result<Vec<Run>> {
    let (shape, geometry) = (editor.shape(), editor.geometry());
    let Some(table) = geometry.l2_offset(*entry, size)? else { return Ok(Vec::new()) };
    let last = shape.l1_entries(size).saturating_sub(1);
    let kept = geometry.clusters_for(size);
    let from = kept.saturating_sub(last.saturating_mul(shape.entries()));
    let mut words = read_sparse(editor.storage, table.offset, geometry.cluster() / 8)?;
    let rest = words.get_mut(to_usize(from)?.saturating_mul(shape.words())..).unwrap_or_default();
    if rest.iter().all(|word| *word == 0) {
        return Ok(Vec::new());
    }
    let mut freed = Vec::new();
    for (number, words) in (kept..).zip(rest.chunks(shape.words())) {
        let reference = shape.reference(words, geometry.offset(number))?;
        if let Some((first, count)) = shape.touched(reference, editor.storage.size()) {
            freed.push(Run { first, count });
        }
    }
    rest.fill(0);
    let own = Run { first: geometry.index(table.offset), count: 1 };
    if editor.count(own.first)? == 1 {
        editor.storage.write_at(&to_bytes(&words), table.offset)?;
    } else {
        // A snapshot has the same table.
        *entry = editor.store(&to_bytes(&words))? | COPIED;
        editor.settle()?;
        freed.push(own);
    }
    Ok(freed)
}
