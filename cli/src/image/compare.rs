// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image compare`: whether the guests of two images see the same disk.

use super::console::{Console, Progress};
use super::metering::Metering;
use super::source::{self, Opening};
use crate::args::image::CompareArgs;
use crate::failure::Failure;
use crate::{signals, stdout};
use tranship_appliance::CancelToken;
use tranship_block::{
    BlockDevice, CompareError, CompareOptions, Comparison, CopyObserver, Error, Extent, Result,
    Span, Zeroing,
};

/// Exit codes of what went wrong, which are all different from 1: "not equal".
const CANNOT_OPEN: u8 = 2;
/// An image cannot tell what is allocated.
const CANNOT_TELL: u8 = 3;
/// An image cannot be read.
const CANNOT_READ: u8 = 4;

/// What sizes and differences are reported in.
const SECTOR: u64 = 512;

/// Compares two images.
pub(crate) fn run(
    args: &CompareArgs,
    console: Console,
    metering: &Metering,
) -> std::result::Result<u8, Failure> {
    let [first, second] = args.names.as_slice() else {
        return Err(source::usage(console, "compare", "Expecting two image file names"));
    };
    let cannot = |failure: Failure| failure.exiting_with(CANNOT_OPEN);
    let direct = source::cache(args.cache.as_deref(), "source ").map_err(cannot)?;
    let progress = Progress::start(args.progress && !args.quiet);
    let open = |name, format: &Option<String>, role| {
        let opening = Opening {
            force_share: args.reading.force_share,
            salvage: args.reading.salvage,
            direct,
            ..Opening::reading(&args.naming, format.as_deref()).counted(metering, role)
        };
        opening.open(name, console).map_err(cannot)
    };
    let first = open(first, &args.a_format, "first")?;
    let second = open(second, &args.b_format, "second")?;
    let [left, right] = [&first, &second].map(|source| InSectors(&*source.opened.device));
    let say = |text: &str| if args.quiet { Ok(()) } else { stdout::print(text) };
    let [one, other] = [left.size(), right.size()];
    if one != other && args.strict {
        say("Strict mode: Image size mismatch!\n")?;
        progress.end();
        return Ok(1);
    }
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let options = CompareOptions { strict: args.strict, ..CompareOptions::default() };
    let watch = Watch { progress: &progress, cancel: &cancel };
    let found = tranship_block::compare(&left, &right, &options, &watch);
    let place = match &found {
        Ok(Comparison::DiffersAt(at) | Comparison::AllocationDiffersAt(at)) => Some(*at),
        Ok(_) => None,
        Err(CompareError::Extents(error) | CompareError::Read(error)) => error.offset(),
        Err(CompareError::Cancelled) => Some(0),
    };
    if one != other && place.is_none_or(|at| at >= one.min(other)) {
        say("Warning: Image size mismatch!\n")?;
    }
    let (text, code) = match found {
        Ok(Comparison::Identical) => {
            progress.set(1, 1);
            ("Images are identical.\n".to_owned(), 0)
        }
        Ok(Comparison::DiffersAt(at)) => {
            (format!("Content mismatch at offset {}!\n", at / SECTOR * SECTOR), 1)
        }
        Ok(Comparison::AllocationDiffersAt(at)) => {
            (format!("Strict mode: Offset {at} block status mismatch!\n"), 1)
        }
        Ok(Comparison::SizesDiffer) => ("Strict mode: Image size mismatch!\n".to_owned(), 1),
        Err(error) => {
            progress.end();
            let code = match error {
                CompareError::Extents(_) => CANNOT_TELL,
                _ => CANNOT_READ,
            };
            return Err(Failure::from(tranship_block::Error::from(error)).exiting_with(code));
        }
    };
    say(&text)?;
    progress.end();
    Ok(code)
}

/// The disk up to the end of its last sector, as its guest sees it.
#[derive(Debug)]
struct InSectors<'a>(&'a dyn BlockDevice);

impl BlockDevice for InSectors<'_> {
    fn size(&self) -> u64 {
        self.0.size().next_multiple_of(SECTOR)
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let there = usize::try_from(self.0.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let (there, behind) = buf.split_at_mut(there.min(buf.len()));
        behind.fill(0);
        self.0.read_at(there, offset)
    }

    fn write_zeroes(&self, span: Span, _: Zeroing) -> Result<()> {
        Err(Error::usage("device is read-only").at(span.start))
    }

    fn extent_at(&self, offset: u64) -> Result<Extent> {
        let last = self.0.size().saturating_sub(1);
        let extent = self.0.extent_at(offset.min(last))?;
        let is_last = offset.saturating_add(extent.len) >= self.0.size();
        Ok(if is_last { Extent { len: self.size() - offset, ..extent } } else { extent })
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// Shows how far the comparison is.
struct Watch<'a> {
    progress: &'a Progress,
    cancel: &'a CancelToken,
}

impl CopyObserver for Watch<'_> {
    fn progress(&self, done: u64, total: u64) {
        self.progress.set(done, total);
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }
}
