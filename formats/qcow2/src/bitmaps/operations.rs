// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Adding, removing and changing bitmaps of an image that nobody else has open.

use super::content::Chunk;
use super::directory::{
    self, AUTO, Directory, ENTRY_OFFSET, EXTENSION, Entry, IN_USE, LONGEST_NAME, MOST_BITMAPS,
    UP_TO_DATE,
};
use super::{BitmapContent, no_bitmap, refuse_in_use};
use crate::editor::Editor;
use crate::first_cluster::field;
use crate::geometry::to_u64;
use crate::refcounts::to_bytes;
use crate::shape::each_entry;
use tranship_block::{Error, ErrorKind, Result, Storage};

/// Adds an enabled, empty bitmap of `granularity` bytes a bit (a power of two from 512 to
/// 2 GiB; by default the cluster size, within 4 and 64 KiB) to the image in `storage`.
///
/// # Errors
///
/// [`ErrorKind::Usage`] for a name that is taken, empty or too long, another granularity,
/// or an image of version 2; as [`crate::create_snapshot`].
pub fn add_bitmap(storage: &dyn Storage, name: &str, granularity: Option<u64>) -> Result<()> {
    change(storage, |editor, directory| {
        if directory.entries.iter().any(|entry| entry.name == name) {
            return Err(Error::usage(format!("image has a bitmap {name:?} already")));
        }
        if name.is_empty() || name.len() > LONGEST_NAME {
            return Err(Error::usage(format!(
                "name of a bitmap has {} bytes, expected 1 to {LONGEST_NAME}",
                name.len()
            )));
        }
        if directory.entries.len() >= usize::try_from(MOST_BITMAPS).unwrap_or(usize::MAX) {
            return Err(Error::usage(format!("image has {MOST_BITMAPS} bitmaps, the most it can")));
        }
        let usual = editor.geometry().cluster().clamp(4096, 65_536);
        let granularity = granularity.unwrap_or(usual);
        if !granularity.is_power_of_two() || !(1 << 9..=1 << 31).contains(&granularity) {
            return Err(Error::usage(format!(
                "granularity is {granularity}, expected a power of two from 512 to 2 GiB"
            )));
        }
        let bits = granularity.trailing_zeros();
        let mut entry = Entry::new(name, u8::try_from(bits).unwrap_or(u8::MAX), AUTO);
        let content = BitmapContent::new(&editor.header, editor.header.size, bits)?;
        store(editor, &mut entry, &content)?;
        directory.entries.push(entry);
        Ok(())
    })
}

/// Removes bitmap `name`, also an inconsistent one.
///
/// # Errors
///
/// [`ErrorKind::NotFound`] without such a bitmap; as [`add_bitmap`].
pub fn remove_bitmap(storage: &dyn Storage, name: &str) -> Result<()> {
    change(storage, |editor, directory| {
        let entry = entry_mut(directory, name)?.clone();
        free(editor, &entry)?;
        directory.entries.retain(|entry| entry.name != name);
        Ok(())
    })
}

/// Takes all marks away from bitmap `name`.
///
/// # Errors
///
/// As [`remove_bitmap`]; [`ErrorKind::Corrupt`] for an inconsistent one.
pub fn clear_bitmap(storage: &dyn Storage, name: &str) -> Result<()> {
    change(storage, |editor, directory| {
        let entry = usable(directory, name)?;
        let bits = u32::from(entry.granularity_bits);
        let content = BitmapContent::new(&editor.header, editor.header.size, bits)?;
        free(editor, entry)?;
        store(editor, entry, &content)
    })
}

/// From now on, writes to the disk set marks in bitmap `name`.
///
/// # Errors
///
/// As [`clear_bitmap`].
pub fn enable_bitmap(storage: &dyn Storage, name: &str) -> Result<()> {
    change(storage, |_, directory| {
        usable(directory, name)?.flags |= AUTO;
        Ok(())
    })
}

/// From now on, bitmap `name` stays as it is.
///
/// # Errors
///
/// As [`clear_bitmap`].
pub fn disable_bitmap(storage: &dyn Storage, name: &str) -> Result<()> {
    change(storage, |_, directory| {
        usable(directory, name)?.flags &= !AUTO;
        Ok(())
    })
}

/// Marks in bitmap `name` all that `source` has marked, a bitmap of this image or of
/// another one of the same virtual size.
///
/// # Errors
///
/// As [`clear_bitmap`]; [`ErrorKind::Usage`] for another virtual size.
pub fn merge_bitmap(storage: &dyn Storage, name: &str, source: &BitmapContent) -> Result<()> {
    change(storage, |editor, directory| {
        let entry = usable(directory, name)?;
        let (mut content, _) = BitmapContent::load(storage, &editor.header, entry)?;
        content.merge(source)?;
        free(editor, entry)?;
        store(editor, entry, &content)
    })
}

fn entry_mut<'a>(directory: &'a mut Directory, name: &str) -> Result<&'a mut Entry> {
    directory.entries.iter_mut().find(|entry| entry.name == name).ok_or_else(|| no_bitmap(name))
}

fn usable<'a>(directory: &'a mut Directory, name: &str) -> Result<&'a mut Entry> {
    let entry = entry_mut(directory, name)?;
    refuse_in_use(entry)?;
    Ok(entry)
}

fn change(
    storage: &dyn Storage,
    work: impl FnOnce(&mut Editor<'_>, &mut Directory) -> Result<()>,
) -> Result<()> {
    let mut editor = Editor::open(storage)?;
    if editor.header.version < 3 {
        return Err(Error::usage("image is of version 2, which has no bitmaps"));
    }
    let mut directory = read(&editor)?;
    work(&mut editor, &mut directory)?;
    replace(&mut editor, &directory)?;
    editor.commit()
}

fn read(editor: &Editor<'_>) -> Result<Directory> {
    let found = Directory::read(editor.storage, &editor.first, editor.geometry())?;
    Ok(found.unwrap_or_default())
}

/// Writes the directory anew; it is in force from the next commit on.
fn replace(editor: &mut Editor<'_>, directory: &Directory) -> Result<()> {
    let bytes = directory::encode(&directory.entries);
    let offset = editor.store(&bytes)?;
    editor.free(directory.offset, directory.size);
    let number = directory.entries.len();
    let content = directory::extension_content(number, to_u64(bytes.len()), offset);
    editor.first.set_extension(EXTENSION, (number > 0).then_some(content));
    let autoclear = editor.first.u64(field::AUTOCLEAR) & !UP_TO_DATE;
    editor.first.set_u64(field::AUTOCLEAR, autoclear | u64::from(number > 0));
    Ok(())
}

/// Writes the bits and their table into new clusters.
fn store(editor: &mut Editor<'_>, entry: &mut Entry, content: &BitmapContent) -> Result<()> {
    let mut table = Vec::with_capacity(content.chunks.len());
    for chunk in &content.chunks {
        table.push(match chunk {
            Chunk::Clear => 0,
            Chunk::Set => 1,
            Chunk::Bits(bits) if tranship_block::is_zero(bits) => 0,
            Chunk::Bits(bits) => editor.store(bits)?,
        });
    }
    entry.table_size = u32::try_from(table.len()).unwrap_or(u32::MAX);
    entry.table_offset = editor.store(&to_bytes(&table))?;
    Ok(())
}

/// Gives back what an entry has, when the change is in force.
fn free(editor: &mut Editor<'_>, entry: &Entry) -> Result<()> {
    let entries = u64::from(entry.table_size);
    each_entry(editor.storage, entry.table_offset, entries, |word| {
        editor.free(word & ENTRY_OFFSET, 1);
        Ok(())
    })?;
    editor.free(entry.table_offset, entries.saturating_mul(8));
    Ok(())
}

/// The disk gets other contents and a size of `size` bytes with the next commit: enabled
/// bitmaps mark everything.
pub(crate) fn forget(editor: &mut Editor<'_>, size: u64) -> Result<()> {
    let mut directory = read(editor)?;
    if directory.entries.is_empty() {
        return Ok(());
    }
    if size != editor.header.size {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the snapshot has another disk size, which the image's bitmaps do not fit",
        ));
    }
    for entry in &mut directory.entries {
        if entry.flags & AUTO == 0 || entry.flags & IN_USE != 0 {
            continue;
        }
        let (mut content, _) = BitmapContent::load(editor.storage, &editor.header, entry)?;
        content.fill(&Chunk::Set);
        free(editor, entry)?;
        store(editor, entry, &content)?;
    }
    replace(editor, &directory)
}

/// Fits all bitmaps to a disk of `size` bytes with the next commit.
pub(crate) fn resize(editor: &mut Editor<'_>, size: u64) -> Result<()> {
    let mut directory = read(editor)?;
    if directory.entries.is_empty() {
        return Ok(());
    }
    for entry in &mut directory.entries {
        refuse_in_use(entry)?;
        let (content, _) = BitmapContent::load(editor.storage, &editor.header, entry)?;
        let content = content.resized(&editor.header, size)?;
        free(editor, entry)?;
        store(editor, entry, &content)?;
    }
    replace(editor, &directory)
}
