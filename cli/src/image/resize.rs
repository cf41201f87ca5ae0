// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image resize`: a larger or smaller disk in the same image.

use super::console::Console;
use super::create::preallocation;
use super::options::{NO_SIZE, SUFFIXES};
use super::sizes;
use super::source::{self, Opening, Source};
use crate::args::image::ResizeArgs;
use crate::failure::Failure;
use crate::stdout;
use tranship_block::{Span, Zeroing};
use tranship_formats::{Disk, Layer};

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
    let source = opening.open(name, console)?;
    let old = source.opened.device.size().next_multiple_of(512);
    let new = match size {
        Size::To(size) => Some(size),
        Size::By(more) => old.checked_add(more),
        Size::Less(less) => old.checked_sub(less),
    };
    let new = new
        .filter(|size| (1..=i64::MAX as u64).contains(size))
        .ok_or_else(|| Failure::usage("New image size must be positive"))?;
    if new <= old && mode != "off" {
        return Err(Failure::usage("Preallocation can only be used for growing images"));
    }
    if new < old && !args.shrink {
        console.warn(LOSS);
        return Err(Failure::usage("Use the --shrink option to perform a shrink operation."));
    }
    resize(&source, Span::new(old, new.saturating_sub(old)), new, mode)?;
    if !args.quiet {
        stdout::print("Image resized.\n")?;
    }
    Ok(0)
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

fn resize(source: &Source, added: Span, new: u64, mode: &str) -> Result<(), Failure> {
    let cannot = || Failure::usage("Image format driver does not support resize");
    let Some(Layer { disk, storage: Some(storage), .. }) = source.opened.layers.first() else {
        return Err(cannot());
    };
    match disk {
        Disk::Raw(_) => {
            if mode == "metadata" {
                return Err(Failure::usage("Unsupported preallocation mode: metadata"));
            }
            storage.set_len(new)?;
            if mode != "off" {
                storage.write_zeroes(added, Zeroing::KeepAllocated)?;
            }
            storage.flush()?;
            Ok(())
        }
        _ => Err(cannot()),
    }
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
