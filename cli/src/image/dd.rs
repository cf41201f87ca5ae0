// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image dd`: copies a part of a disk to a new image, named with dd's operands.

mod operands;

use super::console::{Console, Progress};
use super::create::{self, Wish};
use super::metering::Metering;
use super::source::{Opening, Source};
use crate::args::image::{DdArgs, Naming};
use crate::failure::Failure;
use crate::signals;
use operands::Operands;
use std::sync::Arc;
use tranship_appliance::CancelToken;
use tranship_block::{
    BlockDevice, CopyObserver, CopyOptions, Error, MemoryDevice, Slice, copy, copy_packed,
};
use tranship_formats::{FillOptions, Filling, Format, Place, Staged, fill};

/// Sizes of disks are multiples of this.
const SECTOR: u64 = 512;

/// Copies what the operands say.
pub(crate) fn run(args: &DdArgs, console: Console, metering: &Metering) -> Result<u8, Failure> {
    let operands = Operands::parse(&args.operands)?;
    let format = args.output_format.as_deref().unwrap_or("raw");
    let opening = Opening {
        force_share: args.reading.force_share,
        salvage: args.reading.salvage,
        ..Opening::reading(&args.naming, args.format.format.as_deref()).counted(metering, "source")
    };
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let source = opening.open(&operands.input, console)?;
    if format.parse::<Format>().is_err() {
        return Err(Failure::usage("Unknown file format"));
    }
    create::creatable(format, false)?;
    let size = source.opened.device.size();
    let span = operands.part_of(size);
    if span.is_none() {
        console.report(&format!("{}: cannot skip to specified offset", source.name));
    }
    let part: Arc<dyn BlockDevice> = match span {
        Some(span) => Arc::new(Slice::new(Arc::clone(&source.opened.device), span)?),
        None => Arc::new(MemoryDevice::read_only(Vec::new())),
    };
    let job = Job { args, operands: &operands, format, source: &source, console, metering };
    job.copy(&part, &cancel)?;
    Ok(0)
}

struct Job<'a> {
    args: &'a DdArgs,
    operands: &'a Operands,
    format: &'a str,
    source: &'a Source,
    console: Console,
    metering: &'a Metering,
}

impl Job<'_> {
    fn copy(&self, part: &Arc<dyn BlockDevice>, cancel: &CancelToken) -> Result<(), Failure> {
        let output = &self.operands.output;
        let named = |failure: Failure| {
            let name = output.to_string_lossy();
            failure.within(format!("{name}: error while creating output image"))
        };
        let naming = Naming { image_opts: false, ..self.args.naming.clone() };
        let wish = Wish {
            name: output,
            format: self.format,
            lists: None,
            size: Some(part.size().next_multiple_of(SECTOR)),
            backing: None,
            backing_format: None,
            is_unsafe: false,
            naming: &naming,
        };
        let plan = wish.plan_for_copy(self.console).map_err(named)?;
        let Place::File(path) = plan.spec.place.clone() else {
            return Err(named(Failure::usage("a new image can only be made in a file")));
        };
        self.source.refuse_as_target(&path).map_err(named)?;
        let staged = Staged::begin(&path, false).map_err(|error| named(error.into()))?;
        let what = plan.what().map_err(named)?;
        let meter = self.metering.meter().disk("target", &output.to_string_lossy());
        let options = FillOptions { meter: meter.clone(), ..FillOptions::default() };
        let filling =
            fill(&staged.path(), &what, &options, None).map_err(|error| named(error.into()))?;
        let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
        let progress = Progress::start(false);
        let watch = Watch { progress: &progress, cancel };
        let failed = |error: Error| {
            Failure::from(error).within(format!("error while copying {}", self.source.name))
        };
        let copied = match (&filling, filling.device()) {
            (Filling::Packed(target), _) => {
                copy_packed(part, &*meter.packed(Arc::clone(target)), &options, &watch)
            }
            (_, Some(device)) => copy(part, &meter.device(device), &options, &watch),
            (_, None) => return Err(Failure::usage("the new image cannot be written")),
        }
        .map_err(failed)?;
        meter.note_zeroes_skipped(copied.bytes_zero);
        self.metering.note_copy(copied);
        filling.finish().map_err(failed)?;
        let part = staged.path();
        staged.publish()?;
        if let (Some(from), Some(to)) = (part.parent(), path.parent()) {
            meter.moved(from, to);
        }
        Ok(())
    }
}

/// Tells who asks by a signal how far it is.
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
