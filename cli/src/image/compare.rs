// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image compare`: whether the guests of two images see the same disk.

use super::console::{Console, Progress};
use super::source::{self, Opening};
use crate::args::image::CompareArgs;
use crate::failure::Failure;
use crate::{signals, stdout};
use tranship_appliance::CancelToken;
use tranship_block::{CompareError, CompareOptions, Comparison, CopyObserver};

/// Exit codes of what went wrong, which are all different from 1: "not equal".
const CANNOT_OPEN: u8 = 2;
/// An image cannot tell what is allocated.
const CANNOT_TELL: u8 = 3;
/// An image cannot be read.
const CANNOT_READ: u8 = 4;

/// What sizes and differences are reported in.
const SECTOR: u64 = 512;

/// Compares two images.
pub(crate) fn run(args: &CompareArgs, console: Console) -> Result<u8, Failure> {
    let [first, second] = args.names.as_slice() else {
        return Err(source::usage(console, "compare", "Expecting two image file names"));
    };
    let cannot = |failure: Failure| failure.exiting_with(CANNOT_OPEN);
    let direct = source::cache(args.cache.as_deref(), "source ").map_err(cannot)?;
    let progress = Progress::start(args.progress && !args.quiet);
    let open = |name, format: &Option<String>| {
        let opening = Opening {
            force_share: args.reading.force_share,
            salvage: args.reading.salvage,
            direct,
            ..Opening::reading(&args.naming, format.as_deref())
        };
        opening.open(name, console).map_err(cannot)
    };
    let (first, second) = (open(first, &args.a_format)?, open(second, &args.b_format)?);
    let [first, second] = [&first.opened.device, &second.opened.device];
    let say = |text: &str| if args.quiet { Ok(()) } else { stdout::print(text) };
    let [one, other] = [first, second].map(|disk| disk.size().next_multiple_of(SECTOR));
    if one != other && args.strict {
        say("Strict mode: Image size mismatch!\n")?;
        progress.end();
        return Ok(1);
    }
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let options = CompareOptions {
        // Disks whose sizes differ within a sector are the same size to their guests.
        strict: args.strict && first.size() == second.size(),
        ..CompareOptions::default()
    };
    let watch = Watch { progress: &progress, cancel: &cancel };
    let found = tranship_block::compare(first, second, &options, &watch);
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
