// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image resize`: a larger or smaller disk in the same image.

use super::console::Console;
use super::create::preallocation;
use super::options::{NO_SIZE, SUFFIXES};
use super::sizes;
use super::source::{self, Opening, Source};
use crate::args::image::{Naming, ResizeArgs};
use crate::failure::Failure;
use crate::stdout;
use std::sync::Arc;
use tranship_block::{BlockDevice, Span, Zeroing};
use tranship_formats::{Disk, Format, Layer};
use tranship_qcow2::{Preallocation, ResizeOptions};
use tranship_vhdx::Shrink;

/// What is lost by shrinking.
const LOSS: &str = "Shrinking an image will delete all data beyond the shrunken image's end. \
                    Make sure that the guest does not use it any more.";

/// A new size, or a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    To(u64),
    By(u64),
    Less(u64),
}

/// Changes the size.
pub(crate) fn run(args: &ResizeArgs, console: Console) -> Result<u8, Failure> {
    let [name, size] = args.names.as_slice() else {
        return Err(source::usage(console, "resize", "Expecting image file name and size"));
    };
    let size = parse(&size.to_string_lossy())?;
    let mode = args.preallocation.as_deref().unwrap_or("off");
    if !preallocation(mode) {
        return Err(Failure::usage(format!("Invalid preallocation mode '{mode}'")));
    }
    let opening = Opening::writing(&args.naming, args.format.format.as_deref());
    let mut source = opening.open_file(name, console)?;
    // The others are resized by their disks; an image is locked while it is open.
    if !matches!(source.opened.format, Format::Raw | Format::Qcow2) {
        drop(source);
        source = opening.open(name, console)?;
    }
    let present = size_of(&source)?.next_multiple_of(512);
    let new = match size {
        Size::To(size) => Some(size),
        Size::By(step) => present.checked_add(step),
        Size::Less(step) => present.checked_sub(step),
    };
    let new = new
        .filter(|size| (1..=i64::MAX as u64).contains(size))
        .ok_or_else(|| Failure::usage("New image size must be positive"))?;
    if new <= present && mode != "off" {
        return Err(Failure::usage("Preallocation can only be used for growing images"));
    }
    if new < present && !args.shrink {
        console.warn(LOSS);
        return Err(Failure::usage("Use the --shrink option to perform a shrink operation."));
    }
    let change = Change { old: present, new, mode };
    resize(&source, &args.naming, change, console)?;
    if !args.quiet {
        stdout::print("Image resized.\n")?;
    }
    Ok(0)
}

/// What is to become of a disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change<'a> {
    /// Bytes that it has.
    pub(crate) old: u64,
    /// Bytes that it is to have; what lies beyond is lost.
    pub(crate) new: u64,
    /// How new space is reserved.
    pub(crate) mode: &'a str,
}

/// Bytes of the disk in the image.
pub(crate) fn size_of(source: &Source) -> Result<u64, Failure> {
    match source.opened.layers.first() {
        Some(layer) if layer.format == Format::Qcow2 => {
            Ok(tranship_qcow2::Header::read(&layer.file)?.size)
        }
        _ => Ok(source.opened.device.size()),
    }
}

fn parse(text: &str) -> Result<Size, Failure> {
    let (sign, rest) = match text.as_bytes().first() {
        Some(b'+') => (1, &text[1..]),
        Some(b'-') => (-1, &text[1..]),
        _ => (0, text),
    };
    let size = sizes::parse(rest)
        .map_err(|_| Failure::usage(format!("Parameter 'size' {NO_SIZE}")).hint(SUFFIXES))?;
    Ok(match sign {
        0 => Size::To(size),
        1 => Size::By(size),
        _ => Size::Less(size),
    })
}

/// Resizes the disk in an image.
pub(crate) fn resize(
    source: &Source,
    naming: &Naming,
    change: Change<'_>,
    console: Console,
) -> Result<(), Failure> {
    let cannot = || Failure::usage("Image format driver does not support resize");
    let Some(layer) = source.opened.layers.first() else { return Err(cannot()) };
    let Some(storage) = &layer.storage else { return Err(cannot()) };
    if layer.format == Format::Qcow2 {
        let options = ResizeOptions {
            allow_shrink: true,
            preallocation: match change.mode {
                "metadata" => Preallocation::Metadata,
                "falloc" => Preallocation::Falloc,
                "full" => Preallocation::Full,
                _ => Preallocation::Off,
            },
            backing: backing(layer, naming, console)?,
            data_file: None,
        };
        return Ok(tranship_qcow2::resize(storage, change.new, &options)?);
    }
    let reserves = matches!(layer.format, Format::Raw | Format::Vmdk);
    if change.mode == "metadata" || change.mode != "off" && !reserves {
        return Err(Failure::usage(format!("Unsupported preallocation mode: {}", change.mode)));
    }
    match &layer.disk {
        Disk::Raw(_) => {
            storage.set_len(change.new)?;
            if change.mode != "off" {
                let added = Span::new(change.old, change.new.saturating_sub(change.old));
                storage.write_zeroes(added, Zeroing::KeepAllocated)?;
            }
            storage.flush()?;
        }
        Disk::Vpc(disk) => disk.resize(change.new)?,
        Disk::Vmdk(_) => {
            let options = tranship_vmdk::ResizeOptions { preallocate: change.mode != "off" };
            tranship_formats::resize_vmdk(layer, &naming.allow_path, change.new, options)?;
        }
        Disk::Vhdx(disk) => disk.resize(change.new, Shrink::LoseData)?,
        _ => return Err(cannot()),
    }
    Ok(())
}

/// What the image is based on: beyond the old end it must not appear.
fn backing(
    layer: &Layer,
    naming: &Naming,
    console: Console,
) -> Result<Option<Arc<dyn BlockDevice>>, Failure> {
    let header = tranship_qcow2::Header::read(&layer.file)?;
    let Some(backing) = &header.backing else { return Ok(None) };
    let path = source::beside(&layer.path, &backing.name);
    let naming = Naming { image_opts: false, ..naming.clone() };
    let opening = Opening::reading(&naming, backing.format.as_deref());
    Ok(Some(opening.open(path.as_os_str(), console)?.opened.device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative() {
        for (text, expected) in [
            ("1G", Size::To(1 << 30)),
            ("+1k", Size::By(1024)),
            ("-1.5M", Size::Less(1_572_864)),
            ("+0", Size::By(0)),
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
        for text in ["", "foo", "+", "-", "--1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
