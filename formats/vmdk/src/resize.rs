// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Growing disks that are not in use.

use crate::compose::extent_line;
use crate::create::{GRAIN, Plan, create_extent};
use crate::descriptor::with_extents;
use crate::directory;
use crate::extents::ExtentFiles;
use crate::header;
use crate::identity::{padded, store_text};
use crate::layout::{Layout, Place};
use crate::line::{Access, ExtentLine, ExtentType, check_apart};
use crate::open::{File, embedded, file_kind, not_a_disk, read_head, read_text};
use crate::options::{SPLIT, Subformat, extent_name};
use crate::sparse::SparseExtent;
use crate::writer::metadata;
use crate::{Descriptor, MAX_EXTENTS, SECTOR};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Result, Span, Storage, Zeroing, is_zero};

/// Bytes that are read at a time.
const PIECE: u64 = 1 << 20;

/// How a disk is resized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeOptions {
    /// Reserve space for all new bytes; for flat extents only.
    pub preallocate: bool,
}

/// Gives the disk whose first or only file is `storage` a size of `size` bytes, rounded up
/// to a multiple of 512; its other files come from `files`. New bytes read as zero. The
/// disk must not be open, or at least not be used before it is opened anew.
///
/// The last extent grows; the kinds that are split into pieces of 2 GiB get new extents
/// behind it. Whatever interrupts this leaves a disk of the old or the new size; new extents
/// that no descriptor lists may stay behind.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Unsupported`] for a smaller size, which would lose data,
/// for snapshots, which are as large as their parents, for disks that cannot be written,
/// and for sparse extents that are to be preallocated; else as
/// [`crate::Vmdk::open_writable`].
pub fn resize(
    storage: &dyn Storage,
    files: &dyn ExtentFiles,
    size: u64,
    options: ResizeOptions,
) -> Result<()> {
    let size = size
        .div_ceil(SECTOR)
        .checked_mul(SECTOR)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| Error::usage(format!("size is {size} bytes, expected less than 2^63")))?;
    match file_kind(&read_head(&storage)?) {
        Some(File::Hosted) => {
            let layout = header::read(&storage)?;
            let old = layout.capacity;
            if is_larger(old, size)? {
                let descriptor = embedded(storage, &layout)?;
                check_alone(descriptor.as_ref())?;
                check_sparse(options)?;
                let text = rewritten_embedded(storage, &layout, size)?;
                grow_sparse(storage, &layout, size)?;
                if let Some(text) = text {
                    store_text(storage, layout.descriptor, &text)?;
                    storage.flush()?;
                }
            }
            Ok(())
        }
        Some(File::Text) => {
            let descriptor = read_text(&storage)?;
            let old =
                descriptor.extents.iter().fold(0_u64, |sum, line| sum.saturating_add(line.len));
            if is_larger(old, size)? {
                check_alone(Some(&descriptor))?;
                let more = size.saturating_sub(old);
                grow_described(storage, files, &descriptor, more, options)?;
            }
            Ok(())
        }
        Some(File::Cowd | File::SeSparse) => {
            Err(Error::unsupported("delta extents of ESX cannot be resized"))
        }
        None => Err(not_a_disk()),
    }
}

fn is_larger(old: u64, new: u64) -> Result<bool> {
    if new < old {
        return Err(Error::unsupported(format!(
            "a VMDK disk of {old} bytes cannot shrink to {new}: convert a smaller disk instead"
        )));
    }
    Ok(new > old)
}

/// A snapshot has the size of what it was made from: VMware's products expect that, and a
/// larger parent would show behind the old end.
fn check_alone(descriptor: Option<&Descriptor>) -> Result<()> {
    if descriptor.is_some_and(|descriptor| descriptor.parent_cid.is_some()) {
        return Err(Error::unsupported(
            "the disk is a snapshot, which has to be as large as its parent: consolidate the \
             snapshots first, or convert the disk to a single one",
        ));
    }
    Ok(())
}

fn check_sparse(options: ResizeOptions) -> Result<()> {
    if options.preallocate {
        return Err(Error::unsupported(
            "space can be reserved in flat extents, and the disk has sparse ones",
        ));
    }
    Ok(())
}

/// Gives a sparse file directories and tables for `size` bytes. New directories go to the
/// end of the file, with the old tables and new, empty ones; the header, which is written
/// last, leads to them.
fn grow_sparse(storage: &dyn Storage, layout: &Layout, size: u64) -> Result<()> {
    if layout.compressed || layout.has_footer {
        return Err(Error::unsupported(
            "a stream-optimized disk is written once: convert it to another kind to resize it",
        ));
    }
    let mut bytes = [0; header::HEADER_LEN];
    storage.read_at(&mut bytes, 0)?;
    let directory = layout
        .directory
        .filter(|at| *at != 0)
        .ok_or_else(|| Error::corrupt("gdOffset is 0, expected the grain directory"))?;
    let primary = directory::read_at(&storage, layout, directory, "grain directory", false)?;
    let redundant = layout
        .redundant
        .map(|at| directory::read_at(&storage, layout, at, "redundant grain directory", false))
        .transpose()?;
    clear_end(storage, layout, &primary, redundant.as_deref())?;
    let tables = size.div_ceil(layout.table_span());
    let more = tables.saturating_sub(layout.directory_entries);
    let mut places = [directory, layout.redundant.unwrap_or(0)];
    if more > 0 {
        let copies = [Some(primary), redundant];
        let mut end = storage.size().div_ceil(GRAIN).saturating_mul(GRAIN);
        for (entries, place) in copies.into_iter().zip(&mut places) {
            let Some(mut entries) = entries else { continue };
            *place = end;
            let directory_len = tables.saturating_mul(4).div_ceil(SECTOR).saturating_mul(SECTOR);
            let first = end.saturating_add(directory_len);
            for number in 0..more {
                let at = number.saturating_mul(layout.table_stride()).saturating_add(first);
                entries.push(u32::try_from(at / SECTOR).map_err(|_| {
                    Error::unsupported(format!(
                        "the tables for {size} bytes would lie beyond 2 TiB of the file"
                    ))
                })?);
            }
            end = first.saturating_add(more.saturating_mul(layout.table_stride()));
            storage.set_len(end)?;
            let span = Span::new(*place, end.saturating_sub(*place));
            storage.write_zeroes(span, Zeroing::MayUnmap)?;
            Plan::write_entries(storage, *place, entries)?;
        }
        storage.flush()?;
    }
    let fields = [(12, size), (48, places[1]), (56, places[0])];
    for (at, value) in fields {
        let end = usize::saturating_add(at, 8);
        if let Some(field) = bytes.get_mut(at..end) {
            field.copy_from_slice(&(value / SECTOR).to_le_bytes());
        }
    }
    header::parse(&bytes)?;
    storage.write_at(&bytes, 0)?;
    storage.flush()
}

/// Makes sure that what lies behind the end of the disk, in its last grain and its last
/// table, reads as zero once it belongs to the disk.
fn clear_end(
    storage: &dyn Storage,
    layout: &Layout,
    primary: &[u32],
    redundant: Option<&[u32]>,
) -> Result<()> {
    let per_table = layout.table_entries;
    let grains = layout.grains();
    let in_table = grains % per_table;
    let is_cut = layout.capacity % layout.grain != 0;
    let areas = metadata(layout, primary, redundant.unwrap_or_default());
    for directory in [Some(primary), redundant] {
        let Some(entry) = directory.and_then(<[u32]>::last) else { continue };
        if *entry == 0 {
            continue;
        }
        let at = layout.table_at(*entry);
        let mut table = vec![0; usize::try_from(layout.table_len()).unwrap_or(0)];
        storage.read_at(&mut table, at)?;
        let entries: Vec<u32> =
            table.as_chunks().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect();
        let used = if in_table == 0 { per_table.get() } else { in_table };
        let used = usize::try_from(used).unwrap_or(usize::MAX);
        if entries.iter().skip(used).any(|entry| *entry != 0) {
            return Err(Error::corrupt(
                "the last grain table has entries for grains behind the end of the disk",
            )
            .at(at));
        }
        let last = used.checked_sub(1).and_then(|last| entries.get(last)).copied().unwrap_or(0);
        if let (true, Place::Stored(grain)) = (is_cut, layout.place(u64::from(last))?) {
            let start = grain.saturating_add(layout.capacity % layout.grain);
            let end = grain.saturating_add(layout.grain.get());
            let tail = Span::new(start, end.saturating_sub(start));
            if areas.iter().any(|area| area.start < tail.end() && tail.start < area.end()) {
                return Err(Error::corrupt("the last grain lies in the metadata").at(grain));
            }
            // The file may end where the disk does, but all of the grain belongs to it now.
            if start > storage.size() {
                return Err(
                    Error::corrupt("the last grain ends past the end of the file").at(grain)
                );
            }
            if end > storage.size() {
                storage.set_len(end)?;
            }
            storage.write_zeroes(tail, Zeroing::MayUnmap)?;
        }
    }
    Ok(())
}

/// The embedded descriptor, if it lists an extent, with `size` as the size of it.
fn rewritten_embedded(
    storage: &dyn Storage,
    layout: &Layout,
    size: u64,
) -> Result<Option<Vec<u8>>> {
    let Some(span) = layout.descriptor else { return Ok(None) };
    let mut text = vec![0; usize::try_from(span.len).unwrap_or(0)];
    storage.read_at(&mut text, span.start)?;
    let mut extents = Descriptor::parse(&text)?.extents;
    let [line] = extents.as_mut_slice() else { return Ok(None) };
    line.len = size;
    let text = with_extents(&text, &[extent_line(line)]);
    // The name means nothing here, and may be in any encoding.
    match Descriptor::parse(&text)?.extents.as_slice() {
        [line] if line.len == size => {}
        _ => return Err(Error::unsupported("the line of the extent cannot be replaced")),
    }
    padded(span, &text)?;
    Ok(Some(text))
}

/// The descriptor `text` with the lines of `extents` instead of its own.
fn rewritten(text: &[u8], extents: &[ExtentLine]) -> Result<Vec<u8>> {
    let lines: Vec<String> = extents.iter().map(extent_line).collect();
    let new = with_extents(text, &lines);
    if Descriptor::parse(&new).is_ok_and(|new| new.extents == extents) {
        return Ok(new);
    }
    Err(Error::unsupported(
        "the lines of the extents cannot be replaced: save the descriptor as UTF-8 with \
         encoding=\"UTF-8\" first",
    ))
}

/// Grows the last extent of a disk with a descriptor of its own by `more` bytes, or adds
/// extents behind it.
fn grow_described(
    storage: &dyn Storage,
    files: &dyn ExtentFiles,
    descriptor: &Descriptor,
    more: u64,
    options: ResizeOptions,
) -> Result<()> {
    let mut text = vec![0; usize::try_from(storage.size()).unwrap_or(0)];
    storage.read_at(&mut text, 0)?;
    let mut extents = descriptor.extents.clone();
    let split: Option<Subformat> = descriptor.create_type.parse().ok().filter(|kind| {
        matches!(kind, Subformat::TwoGbMaxExtentFlat | Subformat::TwoGbMaxExtentSparse)
    });
    let Some(last) = extents.pop() else {
        return Err(Error::corrupt("the descriptor lists no extents"));
    };
    if last.access != Access::ReadWrite {
        return Err(Error::unsupported("the last extent is marked RDONLY or NOACCESS"));
    }
    if last.kind == ExtentType::Sparse {
        check_sparse(options)?;
    }
    check_room(descriptor)?;
    // Pieces of QEMU are larger than those of VMware.
    let room = if split.is_some() { SPLIT.saturating_sub(last.len) } else { u64::MAX };
    let grown = ExtentLine { len: last.len.saturating_add(more.min(room)), ..last.clone() };
    extents.push(grown.clone());
    // Everything that can be refused is refused before anything is written.
    rewritten(&text, &extents)?;
    // QEMU takes the size of a sparse extent from its own header: the last one grows when
    // nothing else can go wrong.
    if let Some(subformat) = split {
        add_extents(files, subformat, &mut extents, more.saturating_sub(room), options)?;
    }
    if grown.len > last.len {
        grow_extent(files, &last, grown.len, options).map_err(|error| error.in_file(&last.name))?;
    }
    store_text(storage, None, &rewritten(&text, &extents)?)?;
    storage.flush()
}

/// Makes new extents of together `left` bytes behind those of a split disk.
fn add_extents(
    files: &dyn ExtentFiles,
    subformat: Subformat,
    extents: &mut Vec<ExtentLine>,
    mut left: u64,
    options: ResizeOptions,
) -> Result<()> {
    let Some(template) = extents.last().filter(|_| left > 0).cloned() else { return Ok(()) };
    let stem = stem_of(&template.name, subformat, extents.len())?;
    while left > 0 {
        let number = u64::try_from(extents.len()).unwrap_or(u64::MAX);
        if extents.len() >= MAX_EXTENTS {
            return Err(Error::unsupported(format!("more than {MAX_EXTENTS} extents")));
        }
        let len = left.min(SPLIT);
        let name = extent_name(&stem, subformat, number);
        if extents.iter().any(|line| line.name == name) {
            return Err(Error::unsupported(format!(
                "the next extent would be called {name:?}, which the descriptor lists already"
            )));
        }
        let line = ExtentLine { len, name, offset: 0, ..template.clone() };
        create_extent(files, &line, false, options.preallocate)
            .map_err(|error| error.in_file(&line.name))?;
        extents.push(line);
        left = left.saturating_sub(len);
    }
    Ok(())
}

/// What the names of a split disk's extents start with.
fn stem_of(name: &str, subformat: Subformat, count: usize) -> Result<String> {
    let number = u64::try_from(count.saturating_sub(1)).unwrap_or(u64::MAX);
    let ending = extent_name("", subformat, number);
    name.strip_suffix(ending.as_str()).map(str::to_owned).ok_or_else(|| {
        Error::unsupported(format!(
            "the last extent is called {name:?}, expected a name that ends in {ending:?}: the \
             names of further extents cannot be guessed"
        ))
    })
}

/// Refuses a last extent behind which another one lies in the same file.
fn check_room(descriptor: &Descriptor) -> Result<()> {
    check_apart(&descriptor.extents)?;
    let Some((last, others)) = descriptor.extents.split_last() else { return Ok(()) };
    let is_behind = |line: &ExtentLine| line.name == last.name && line.offset > last.offset;
    if last.kind != ExtentType::Zero && others.iter().any(is_behind) {
        return Err(Error::unsupported(format!(
            "another extent lies behind the last one in the file {:?}",
            last.name
        )));
    }
    Ok(())
}

/// Refuses a sparse extent in which something is stored from byte `start`, where it ends by
/// its descriptor, up to `end`: it would come to light. Where an earlier attempt was
/// interrupted there is nothing.
fn check_hidden(file: Arc<dyn Storage>, layout: &Layout, start: u64, end: u64) -> Result<()> {
    let end = end.min(layout.capacity);
    if start >= end {
        return Ok(());
    }
    let hidden = || {
        Error::unsupported(
            "the last extent stores bytes behind the end that the descriptor gives it: convert \
             the disk to another one to resize it",
        )
    };
    let device: Arc<dyn BlockDevice> = file;
    let (extent, _) = SparseExtent::open(Arc::clone(&device), layout.clone(), false)?;
    let mut at = start;
    while at < end {
        let (place, len) = extent.extent(at, end.saturating_sub(at))?;
        let mut len = len.min(end.saturating_sub(at));
        if let Place::Stored(stored) = place {
            // The first grain may hold bytes of the disk in front of these.
            let within = at % layout.grain;
            if within == 0 || layout.compressed {
                return Err(hidden());
            }
            len = len.min(layout.grain.get().saturating_sub(within)).min(PIECE);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            device.read_at(&mut bytes, stored)?;
            if !is_zero(&bytes) {
                return Err(hidden());
            }
        }
        at = at.saturating_add(len);
    }
    Ok(())
}

/// Gives the extent of `line` a length of `len` bytes.
fn grow_extent(
    files: &dyn ExtentFiles,
    line: &ExtentLine,
    len: u64,
    options: ResizeOptions,
) -> Result<()> {
    match line.kind {
        ExtentType::Zero => Ok(()),
        ExtentType::Sparse => {
            let file = files.open(&line.name, true)?;
            match file_kind(&read_head(&file)?) {
                Some(File::Hosted) => {}
                _ => return Err(Error::unsupported("the last extent is no hosted sparse one")),
            }
            let layout = header::read(&file)?;
            check_hidden(Arc::clone(&file), &layout, line.len, len)?;
            if layout.capacity >= len { Ok(()) } else { grow_sparse(&*file, &layout, len) }
        }
        ExtentType::Flat | ExtentType::Vmfs => {
            let file = files.open(&line.name, true)?;
            let (old, end) =
                (line.offset.saturating_add(line.len), line.offset.saturating_add(len));
            // Bytes that were behind the extent would become visible.
            let stale = file.size().min(end).saturating_sub(old);
            if stale > 0 {
                file.write_zeroes(Span::new(old, stale), Zeroing::MayUnmap)?;
            }
            if file.size() < end {
                file.set_len(end)?;
            }
            if options.preallocate {
                let more = end.saturating_sub(old);
                file.write_zeroes(Span::new(old, more), Zeroing::KeepAllocated)?;
            }
            file.flush()
        }
        _ => Err(Error::unsupported(format!(
            "extents of type {} cannot be resized",
            line.kind.word()
        ))),
    }
}
