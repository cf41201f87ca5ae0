// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Taking snapshots, going back to them and deleting them.

use super::{Snapshot, find, l1_entries, list};
use crate::editor::Editor;
use crate::first_cluster::field;
use crate::geometry::to_usize;
use crate::header::{DATA_FILE, LARGEST_L1, MOST_SNAPSHOTS};
use crate::refcounts::to_bytes;
use crate::repair::mend_flags;
use std::time::{SystemTime, UNIX_EPOCH};
use tranship_block::{Error, ErrorKind, Result, Storage};

/// Keeps the present state of the disk in the image in `storage` under `name`, as taken at
/// `time`; returns the new snapshot's identifier. Nobody else may have it open.
///
/// # Errors
///
/// [`ErrorKind::Usage`] for a name that is too long, [`ErrorKind::Unsupported`] for an image
/// with a data file, whose clusters cannot be shared, and where reference counts are too
/// narrow for one more; [`ErrorKind::Corrupt`] for an image that needs a repair.
pub fn create_snapshot(storage: &dyn Storage, name: &str, time: SystemTime) -> Result<String> {
    let mut editor = open(storage)?;
    let (mut snapshots, old_size) = list(storage, &editor.header)?;
    if u16::try_from(name.len()).is_err() {
        return Err(Error::usage(format!("name of {} bytes is too long", name.len())));
    }
    if editor.header.nb_snapshots >= MOST_SNAPSHOTS {
        return Err(Error::usage(format!("image has {MOST_SNAPSHOTS} snapshots, the most it can")));
    }
    let numbers = snapshots.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok());
    let id = numbers.max().unwrap_or(0).saturating_add(1).to_string();

    let mut l1 = editor.l1()?;
    editor.check_raise(&l1)?;
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    // Flags first: a cluster that does not claim to be alone is only ever copied.
    let before = l1.clone();
    editor.share(&mut l1)?;
    if l1 != before {
        storage.write_at(&to_bytes(&l1), editor.header.l1_table_offset)?;
    }
    storage.flush()?;
    editor.raise(&l1)?;
    let mut snapshot = Snapshot {
        id: id.clone(),
        name: name.to_owned(),
        date_seconds: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
        date_nanoseconds: since.subsec_nanos(),
        vm_clock_nanoseconds: 0,
        vm_state_size: 0,
        disk_size: Some(editor.header.size),
        // What qemu-img records for a disk without a machine.
        icount: Some(0),
        l1_table_offset: editor.store(&to_bytes(&l1))?,
        l1_size: editor.header.l1_size,
        raw: Vec::new(),
    };
    snapshot.raw = snapshot.encode(editor.header.size);
    snapshots.push(snapshot);
    replace_table(&mut editor, &snapshots, old_size)?;
    editor.commit()?;
    Ok(id)
}

/// Makes the disk in `storage` what it was when the snapshot with the identifier or name
/// `wanted` was taken, its size included. What it holds now is lost.
///
/// Enabled bitmaps say afterwards that everything has changed.
///
/// # Errors
///
/// [`ErrorKind::NotFound`] without such a snapshot; [`ErrorKind::Unsupported`] if the size
/// changes while there are bitmaps; as [`create_snapshot`].
pub fn apply_snapshot(storage: &dyn Storage, wanted: &str) -> Result<()> {
    let mut editor = open(storage)?;
    let (snapshots, _) = list(storage, &editor.header)?;
    let snapshot = find(&snapshots, wanted).ok_or_else(|| no_snapshot(wanted))?;
    let size = snapshot.disk_size.unwrap_or(editor.header.size);
    let mut new = l1_entries(storage, snapshot.place())?;
    let needed = editor.shape().l1_entries(size);
    if needed.saturating_mul(8) > LARGEST_L1 {
        return Err(Error::corrupt(format!(
            "disk size of the snapshot is {size}, more than the largest L1 table maps"
        )));
    }
    new.resize(new.len().max(to_usize(needed)?), 0);
    editor.check_raise(&new)?;
    crate::bitmaps::forget(&mut editor, size)?;
    let old = editor.l1()?;
    editor.share(&mut new)?;
    storage.flush()?;
    editor.raise(&new)?;
    let offset = editor.store(&to_bytes(&new))?;
    let old_bytes = u64::from(editor.header.l1_size).saturating_mul(8);
    editor.free(editor.header.l1_table_offset, old_bytes);
    editor.first.set_u64(field::L1_TABLE_OFFSET, offset);
    editor.first.set_u32(field::L1_SIZE, u32::try_from(new.len()).unwrap_or(u32::MAX));
    editor.first.set_u64(field::SIZE, size);
    editor.commit()?;
    editor.lower(&old)?;
    mend_flags(storage, &editor.header)
}

/// Deletes the snapshot with the identifier or name `wanted` from the image in `storage`,
/// and gives back what it alone had.
///
/// # Errors
///
/// As [`apply_snapshot`].
pub fn delete_snapshot(storage: &dyn Storage, wanted: &str) -> Result<()> {
    let mut editor = open(storage)?;
    let (mut snapshots, old_size) = list(storage, &editor.header)?;
    let snapshot = find(&snapshots, wanted).ok_or_else(|| no_snapshot(wanted))?.clone();
    let l1 = l1_entries(storage, snapshot.place())?;
    snapshots.retain(|other| other.id != snapshot.id || other.raw != snapshot.raw);
    replace_table(&mut editor, &snapshots, old_size)?;
    editor.free(snapshot.l1_table_offset, u64::from(snapshot.l1_size).saturating_mul(8));
    editor.commit()?;
    editor.lower(&l1)?;
    // What only the snapshot shared may be written in place again.
    mend_flags(storage, &editor.header)
}

fn open(storage: &dyn Storage) -> Result<Editor<'_>> {
    let editor = Editor::open(storage)?;
    if editor.header.incompatible_features & DATA_FILE != 0 {
        return Err(Error::unsupported("snapshots of an image with an external data file"));
    }
    Ok(editor)
}

fn no_snapshot(wanted: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("image has no snapshot {wanted:?}"))
}

/// Writes a table of `snapshots` that the header refers to from the next commit on.
fn replace_table(editor: &mut Editor<'_>, snapshots: &[Snapshot], old_size: u64) -> Result<()> {
    let table: Vec<u8> = snapshots.iter().flat_map(|snapshot| snapshot.raw.clone()).collect();
    let offset = editor.store(&table)?;
    editor.free(editor.header.snapshots_offset, old_size);
    let number = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
    editor.first.set_u32(field::NB_SNAPSHOTS, number);
    editor.first.set_u64(field::SNAPSHOTS_OFFSET, offset);
    Ok(())
}
