// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image compact`: gives the space back that an image takes and does not need.

mod trim;

use super::console::{Console, Progress};
use super::metering::Metering;
use super::pieces::{self, PIECE};
use super::sizes;
use super::source::{self, Opening, Source};
use crate::args::image::CompactArgs;
use crate::failure::Failure;
use crate::{signals, stdout};
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use tranship_appliance::CancelToken;
use tranship_block::{BlockDevice, ExtentKind, Span, Storage, Zeroing, is_zero};
use tranship_formats::{Disk, Format};

/// Bytes of a block in `st_blocks`.
const STAT_BLOCK: u64 = 512;

/// Compacts an image.
pub(crate) fn run(
    args: &CompactArgs,
    console: Console,
    metering: &Metering,
) -> Result<u8, Failure> {
    let name = source::one(&args.names, "compact", console)?;
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let opening =
        Opening::writing(&args.naming, args.format.format.as_deref()).counted(metering, "image");
    let source = opening.open_file(name, console)?;
    let format = source.opened.format;
    if !matches!(format, Format::Raw | Format::Qcow2 | Format::Vpc | Format::Vhdx) {
        return Err(Failure::usage(format!("images of format {format} cannot be compacted"))
            .hint("`convert` to a new image leaves out what is not needed"));
    }
    let path = source.opened.path.clone();
    let before = Space::of(&path)?;
    // Nothing is guessed twice, and no warning is given twice.
    let opening = Opening { format: (!args.naming.image_opts).then_some(format.name()), ..opening };
    let mut trimmed = None;
    if args.trim {
        drop(source.opened);
        trimmed = Some(trim::trim(opening.open(name, console)?, &cancel, console)?);
    } else {
        drop(source);
    }
    let progress = Progress::start(args.progress && !args.quiet);
    let outcome = match format {
        Format::Vhdx => opening.open_file(name, console).and_then(vhdx),
        _ => compact(&opening, name, console, (&progress, &cancel)),
    };
    match outcome {
        Ok(()) => progress.finish(),
        Err(failure) => {
            progress.end();
            return Err(failure);
        }
    }
    if args.quiet {
        return Ok(0);
    }
    if let Some(bytes) = trimmed {
        stdout::print(&format!("trimmed: {} of the filesystems\n", sizes::display(bytes)))?;
    }
    let after = Space::of(&path)?;
    for (what, before, after) in
        [("file length", before.len, after.len), ("disk size", before.allocated, after.allocated)]
    {
        let (shown, now) = (sizes::display(before), sizes::display(after));
        stdout::print(&format!("{what}: {shown} before, {now} after\n"))?;
    }
    Ok(0)
}

/// What a file takes.
#[derive(Clone, Copy, Debug)]
struct Space {
    len: u64,
    allocated: u64,
}

impl Space {
    fn of(path: &Path) -> Result<Self, Failure> {
        let facts = std::fs::metadata(path)
            .map_err(|error| Failure::io(&format!("looking at {}", path.display()), &error))?;
        Ok(Self { len: facts.len(), allocated: facts.blocks() * STAT_BLOCK })
    }
}

fn storage_of(source: Source) -> Result<Arc<dyn Storage>, Failure> {
    let layer = source.opened.layers.into_iter().next();
    layer
        .and_then(|layer| layer.storage)
        .ok_or_else(|| Failure::usage("the image cannot be written"))
}

fn vhdx(source: Source) -> Result<(), Failure> {
    let storage = storage_of(source)?;
    tranship_vhdx::compact(&storage)?;
    Ok(())
}

/// Frees what holds zeroes only, and then what is free.
fn compact(
    opening: &Opening<'_>,
    name: &OsStr,
    console: Console,
    (progress, cancel): (&Progress, &CancelToken),
) -> Result<(), Failure> {
    let source = opening.open(name, console)?;
    free_zeroes(&*source.opened.device, source.opened.format, progress, cancel)?;
    source.opened.device.flush()?;
    let mut layers = source.opened.layers.into_iter();
    drop(source.opened.device);
    let Some(layer) = layers.next() else { return Ok(()) };
    let Disk::Qcow2(disk) = layer.disk else { return Ok(()) };
    if let Some(disk) = Arc::into_inner(disk) {
        disk.finish()?;
    }
    if let Some(storage) = layer.storage {
        tranship_qcow2::give_back(&*storage)?;
    }
    Ok(())
}

/// Unmaps every block of the image itself that has storage and holds only zeroes.
fn free_zeroes(
    disk: &dyn BlockDevice,
    format: Format,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<(), Failure> {
    let size = disk.size();
    let block = u64::from(disk.preferred_block());
    let whole = PIECE.max(block) / block * block;
    let mut at = 0;
    pieces::each(
        || {
            while at < size {
                progress.set(at, size);
                let extent = pieces::extent_at(disk, at)?;
                if extent.kind == ExtentKind::Data && extent.depth == 0 {
                    let start = at / block * block;
                    let span = Span::new(start, whole.min(size - start));
                    at = span.end();
                    return Ok(Some(span));
                }
                at += extent.len;
            }
            Ok(None)
        },
        cancel,
        |span, buf: &mut Vec<u8>| {
            buf.resize(usize::try_from(span.len).unwrap_or(usize::MAX), 0);
            disk.read_at(buf, span.start)?;
            for (number, bytes) in buf.chunks(usize::try_from(block).unwrap_or(1)).enumerate() {
                let start = span.start + number as u64 * block;
                let span = Span::new(start, bytes.len() as u64);
                if is_zero(bytes) && has_data(disk, span)? {
                    unmap(disk, span, format)?;
                }
            }
            Ok(())
        },
    )
}

/// Whether the image itself stores anything in `span`.
fn has_data(disk: &dyn BlockDevice, span: Span) -> Result<bool, Failure> {
    let mut at = span.start;
    while at < span.end() {
        let extent = pieces::extent_at(disk, at)?;
        if extent.kind == ExtentKind::Data && extent.depth == 0 {
            return Ok(true);
        }
        at += extent.len;
    }
    Ok(false)
}

fn unmap(disk: &dyn BlockDevice, span: Span, format: Format) -> Result<(), Failure> {
    if format == Format::Vpc {
        // The place of a block that is given up stays in the file as it is, unless it is at
        // its end; parts of a block become holes. So it is zeroed in two parts first.
        let half = span.len / 2;
        for part in [Span::new(span.start, half), Span::new(span.start + half, span.len - half)] {
            disk.write_zeroes(part, Zeroing::MayUnmap)?;
        }
    }
    Ok(disk.write_zeroes(span, Zeroing::MayUnmap)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tranship_block::MemoryDevice;
    use tranship_qcow2::{CreateOptions, OpenOptions, Qcow2, create};

    #[test]
    fn only_blocks_of_zeroes_are_freed() {
        let image = Arc::new(MemoryDevice::new(Vec::new()));
        create(&*image, &CreateOptions::new(10 << 20)).unwrap();
        let disk = Qcow2::open(image, OpenOptions::default()).unwrap();
        disk.write_at(&vec![0; 4 << 20], 1 << 20).unwrap();
        disk.write_at(&[9], 2 << 20).unwrap();
        disk.write_at(&[0; 512], (10 << 20) - 512).unwrap();
        let progress = Progress::start(false);
        free_zeroes(&disk, Format::Qcow2, &progress, &CancelToken::default()).unwrap();
        let own = |at: u64| has_data(&disk, Span::new(at, 512)).unwrap();
        assert!(own(2 << 20));
        assert!(!own(1 << 20) && !own((2 << 20) + 65_536) && !own((10 << 20) - 512));
        let mut byte = [0];
        disk.read_at(&mut byte, 2 << 20).unwrap();
        assert_eq!(byte, [9]);
    }
}
