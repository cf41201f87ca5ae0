// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image compare`: whether the guests of two images see the same disk.

mod search;

use super::console::{Console, Progress};
use super::source::{self, Opening};
use crate::args::image::CompareArgs;
use crate::failure::Failure;
use crate::stdout;
use search::Side;

/// Exit codes of what went wrong, which are all different from 1: "not equal".
const CANNOT_OPEN: u8 = 2;

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
    let sides = [
        Side { device: &*first.opened.device, name: &first.name },
        Side { device: &*second.opened.device, name: &second.name },
    ];
    let say = |text: &str| if args.quiet { Ok(()) } else { stdout::print(text) };
    let both = sides.map(|side| side.size());
    let [common, end] = [both[0].min(both[1]), both[0].max(both[1])];
    if common != end && args.strict {
        say("Strict mode: Image size mismatch!\n")?;
        progress.end();
        return Ok(1);
    }
    let search = |start, end| search::first_difference(sides, start..end, &progress);
    // Strictly, what is stored counts as well; whichever comes first is told.
    let status = if args.strict { search::first_status_difference(sides, common)? } else { None };
    let mut found = search(0, status.unwrap_or(common))?;
    if let (None, Some(offset)) = (found, status) {
        say(&format!("Strict mode: Offset {offset} block status mismatch!\n"))?;
        progress.end();
        return Ok(1);
    }
    if found.is_none() && common != end {
        say("Warning: Image size mismatch!\n")?;
        found = search(common, end)?;
    }
    if let Some(offset) = found {
        say(&format!("Content mismatch at offset {offset}!\n"))?;
    } else {
        progress.set(1, 1);
        say("Images are identical.\n")?;
    }
    progress.end();
    Ok(u8::from(found.is_some()))
}
