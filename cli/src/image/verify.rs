// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image verify`: whether an image still holds what its hashes were made of.

use super::console::{Console, Progress};
use super::convert;
use super::metering::Metering;
use super::source::{self, Opening};
use crate::args::image::VerifyArgs;
use crate::failure::Failure;
use crate::{signals, stdout};
use std::fs::File;
use std::io::BufReader;
use std::sync::{Mutex, PoisonError};
use tranship_appliance::CancelToken;
use tranship_block::{CopyObserver, ManifestReader, Span, VerifyOptions};

/// Exit code of what went wrong: 1 is "not the same".
const CANNOT: u8 = 2;

/// Chunks that are listed.
const MOST_LISTED: usize = 1000;

/// Compares an image with its hashes.
pub(crate) fn run(args: &VerifyArgs, console: Console, metering: &Metering) -> Result<u8, Failure> {
    verify(args, console, metering).map_err(|failure| failure.exiting_with(CANNOT))
}

fn verify(args: &VerifyArgs, console: Console, metering: &Metering) -> Result<u8, Failure> {
    let name = source::one(&args.names, "verify", console)?;
    let Some(path) = &args.hash else {
        return Err(source::usage(console, "verify", "Expecting the file of hashes (--hash)"));
    };
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let opening = Opening {
        force_share: args.reading.force_share,
        salvage: args.reading.salvage,
        ..Opening::reading(&args.naming, args.format.format.as_deref()).counted(metering, "image")
    };
    let opened = opening.open(name, console)?.opened;
    if args.write {
        let progress = Progress::start(args.progress && !args.quiet);
        let watch = (&progress, &cancel);
        let salvage = args.reading.salvage;
        let outcome = convert::write_hashes(&opened.device, path, salvage, watch, console);
        match outcome {
            Ok(()) => progress.finish(),
            Err(_) => progress.end(),
        }
        return outcome.map(|()| 0);
    }
    let named = |failure: Failure| failure.about(&path.display().to_string());
    let file = File::open(path)
        .map_err(|error| Failure::io(&format!("opening {}", path.display()), &error))?;
    let manifest =
        ManifestReader::new(BufReader::new(file)).map_err(|error| named(error.into()))?;
    let say = |text: &str| if args.quiet { Ok(()) } else { stdout::print(text) };
    let (expected, found) = (manifest.header().size, opened.device.size());
    if expected != found {
        say(&format!("Image size mismatch: {found} bytes, expected {expected}!\n"))?;
        return Ok(1);
    }
    let progress = Progress::start(args.progress && !args.quiet);
    let watch = Watch { progress: &progress, cancel: &cancel, wrong: Mutex::default() };
    let outcome =
        tranship_block::verify(&opened.device, manifest, &VerifyOptions::default(), &watch);
    let mut wrong = watch.wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    match &outcome {
        Ok(_) => progress.finish(),
        Err(_) => progress.end(),
    }
    wrong.sort_unstable_by_key(|span| span.start);
    for span in wrong.iter().take(MOST_LISTED) {
        say(&format!("Content mismatch at offset {} ({} bytes)!\n", span.start, span.len))?;
    }
    let verified = outcome?;
    if verified.mismatches == 0 {
        say(&format!("Image matches its hashes: {} chunks.\n", verified.chunks))?;
        return Ok(0);
    }
    say(&format!("{} of {} chunks differ.\n", verified.mismatches, verified.chunks))?;
    Ok(1)
}

/// Shows how far it is and keeps what differs.
struct Watch<'a> {
    progress: &'a Progress,
    cancel: &'a CancelToken,
    wrong: Mutex<Vec<Span>>,
}

impl CopyObserver for Watch<'_> {
    fn progress(&self, done: u64, total: u64) {
        self.progress.set(done, total);
    }

    fn mismatch(&self, span: Span) {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        // A little more than is listed, since they come in any order.
        if wrong.len() < 2 * MOST_LISTED {
            wrong.push(span);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }
}
