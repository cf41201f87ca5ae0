// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image convert`: copies images to a new one of any format.

mod hash;
mod plan;
mod resume;
mod watch;

use super::bitmap;
use super::console::{Console, Progress};
use super::create::{self, Wish};
use super::metering::Metering;
use super::source::{self, Opening, Source};
use crate::args::image::{ConvertArgs, Naming};
use crate::failure::Failure;
use crate::signals;
pub(crate) use hash::write_hashes;
use plan::Plan;
use resume::State;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use tranship_appliance::CancelToken;
use tranship_block::{
    BlockDevice, Concat, Copied, CopyOptions, DiskMeter, Slice, Span, copy, copy_packed,
};
use tranship_formats::{Compressing, FillOptions, Filling, Place, Staged, fill};
use watch::Watch;

/// Bytes between two places from which a copy can go on after a kill.
const CHECKPOINT: u64 = 256 << 20;

/// Copies what the options say.
pub(crate) fn run(
    args: &ConvertArgs,
    console: Console,
    metering: &Metering,
) -> Result<u8, Failure> {
    let plan = Plan::new(args)?;
    let format = args.target_format.as_deref().unwrap_or("raw");
    if plan.wants_help {
        return create::print_help(format, !args.names.is_empty());
    }
    create::creatable(format, false)?;
    let known = source::format_named(format)?;
    let Some((target, names)) = args.names.split_last().filter(|(_, rest)| !rest.is_empty()) else {
        return Err(source::usage(console, "convert", "Must specify image file name"));
    };
    if names.len() > 1 && args.backing.is_some() {
        return Err(Failure::usage(
            "Having a backing file for the target makes no sense when concatenating multiple \
             input images",
        ));
    }
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let sources = open_sources(args, names, console, metering)?;
    let device = joined(&sources, args)?;
    let job =
        Job { args, plan: &plan, sources: &sources, device: &device, cancel, console, metering };
    let progress = Progress::start(args.progress && !args.quiet);
    let outcome = if args.no_create {
        job.onto(target, &progress)
    } else {
        job.anew(target, known, &progress)
    };
    match outcome {
        Ok(()) => progress.finish(),
        Err(failure) => {
            progress.end();
            return Err(failure);
        }
    }
    Ok(0)
}

fn open_sources(
    args: &ConvertArgs,
    names: &[OsString],
    console: Console,
    metering: &Metering,
) -> Result<Vec<Source>, Failure> {
    let naming = Naming {
        image_opts: args.source_image_opts,
        object: args.object.clone(),
        allow_path: args.allow_path.clone(),
    };
    let opening = Opening {
        force_share: args.reading.force_share,
        salvage: args.reading.salvage,
        direct: matches!(args.source_cache.as_deref(), Some("none" | "off" | "directsync")),
        ..Opening::reading(&naming, args.source_format.as_deref()).counted(metering, "source")
    };
    names.iter().map(|name| opening.open(name, console)).collect()
}

/// The sources as one disk.
fn joined(sources: &[Source], args: &ConvertArgs) -> Result<Arc<dyn BlockDevice>, Failure> {
    let snapshot = args.source_snapshot.as_deref();
    match sources {
        [source] => source.device(snapshot),
        _ if snapshot.is_some() => {
            Err(Failure::usage("No support for concatenating multiple snapshot"))
        }
        several => {
            let devices = several.iter().map(|source| Arc::clone(&source.opened.device));
            Ok(Arc::new(Concat::new(devices)?))
        }
    }
}

/// What is copied, and how.
struct Job<'a> {
    args: &'a ConvertArgs,
    plan: &'a Plan,
    sources: &'a [Source],
    device: &'a Arc<dyn BlockDevice>,
    cancel: CancelToken,
    console: Console,
    metering: &'a Metering,
}

impl Job<'_> {
    fn failed(&self, error: tranship_block::Error) -> Failure {
        let name = self.sources.first().map_or("", |source| source.name.as_str());
        Failure::from(error).within(format!("error while converting {name}"))
    }

    /// Copies onto an image that exists.
    fn onto(&self, target: &OsStr, progress: &Progress) -> Result<(), Failure> {
        let args = self.args;
        let naming = Naming {
            image_opts: args.target_image_opts,
            object: args.object.clone(),
            allow_path: args.allow_path.clone(),
        };
        let format = args.target_format.as_deref().unwrap_or("raw");
        let format = (!args.target_image_opts).then_some(format);
        let opening = Opening {
            direct: self.plan.direct,
            ..Opening::writing(&naming, format).counted(self.metering, "target")
        };
        let Source { opened, meter, .. } = opening.open(target, self.console)?;
        let device: Arc<dyn BlockDevice> = match (args.compress, opened.qcow2()) {
            (false, _) => Arc::clone(&opened.device),
            (true, Some(image)) => meter.device(Arc::new(Compressing(Arc::clone(image)))),
            (true, None) => {
                return Err(Failure::usage("Compression not supported for this file format"));
            }
        };
        // What a longer target has past the source's end stays.
        let len = device.size().min(self.device.size().next_multiple_of(512));
        let device: Arc<dyn BlockDevice> = Arc::new(Slice::new(device, Span::new(0, len))?);
        let options = CopyOptions { target_is_zero: args.target_is_zero, ..self.plan.copying };
        let hash = args.hash.as_deref();
        let watch = Watch::new(progress, &self.cancel, hash, self.device.size(), None)?;
        let copied = copy(self.device, &device, &options, &watch)
            .map_err(|error| watch.failure().unwrap_or_else(|| self.failed(error)))?;
        self.note(copied, &meter, args.target_is_zero);
        drop((device, opened));
        if args.bitmaps {
            let file = opening.open_file(target, self.console)?;
            bitmap::copy_all(self.sources, &file, args.skip_broken_bitmaps, self.console)?;
        }
        watch.finish(copied, self.console)
    }

    /// Copies into a new image, which has its name only when it is complete.
    fn anew(
        &self,
        target: &OsString,
        format: tranship_formats::Format,
        progress: &Progress,
    ) -> Result<(), Failure> {
        let args = self.args;
        let shown = target.to_string_lossy();
        let named =
            |failure: Failure| failure.within(format!("{shown}: error while converting {format}"));
        let naming = Naming { allow_path: args.allow_path.clone(), ..Naming::default() };
        let wish = Wish {
            name: target,
            format: format.name(),
            lists: self.plan.list.as_deref(),
            size: Some(self.device.size()),
            backing: args.backing.as_deref(),
            backing_format: args.backing_format.as_deref(),
            is_unsafe: false,
            naming: &naming,
        };
        let wished = wish.plan_for_copy(self.console).map_err(named)?;
        let Place::File(path) = wished.spec.place.clone() else {
            if args.resume {
                return Err(named(Failure::usage("only a copy into a file can be resumed")));
            }
            // An export is there already, and only becomes an image.
            wished.carry_out(self.console).map_err(named)?;
            return self.onto(target, progress);
        };
        for source in self.sources {
            source.refuse_as_target(&path).map_err(named)?;
        }
        let staged = Staged::begin(&path, args.resume).map_err(|error| named(error.into()))?;
        let what = wished.what().map_err(named)?;
        let backing = self.backing(&path)?;
        let state = State::open(args, &staged, self.sources, self.device.size())?;
        let start = state.as_ref().map_or(0, State::start);
        if start == 0 {
            wished.prepare(&staged.path(), self.console).map_err(named)?;
        }
        let meter = self.metering.meter().disk("target", &shown);
        let options = FillOptions {
            // Compressed clusters over a backing file: zeroes have to be written as such.
            compressed: args.compress && backing.is_none(),
            restartable: args.resume,
            resume: start > 0,
            durable: self.plan.durable || args.resume,
            direct: self.plan.direct,
            meter: meter.clone(),
        };
        let filling = fill(&staged.path(), &what, &options, backing.clone()).map_err(|error| {
            // What the format cannot do has nothing to do with the file.
            if args.compress && format != tranship_formats::Format::Qcow2 {
                return Failure::usage("Compression not supported for this file format");
            }
            named(error.into())
        })?;
        let hash = args.hash.as_deref();
        let watch = Watch::new(progress, &self.cancel, hash, self.device.size(), state)?;
        let mut copying = CopyOptions { start, ..self.plan.copying };
        let copied = match (&filling, filling.device()) {
            (Filling::Packed(target), _) => {
                copy_packed(self.device, &*meter.packed(Arc::clone(target)), &copying, &watch)
            }
            (_, Some(device)) => {
                copying.target_is_zero = backing.is_none();
                copying.deepest = self.deepest(backing.is_some());
                copying.checkpoint_every = if args.resume { CHECKPOINT } else { 0 };
                let device = match (&filling, args.compress) {
                    (Filling::Qcow2(image), true) => Arc::new(Compressing(Arc::clone(image))),
                    _ => device,
                };
                copy(self.device, &meter.device(device), &copying, &watch)
            }
            (_, None) => return Err(Failure::usage("the new image cannot be written")),
        }
        .map_err(|error| watch.failure().unwrap_or_else(|| self.failed(error)))?;
        self.note(copied, &meter, backing.is_none());
        filling.finish().map_err(|error| self.failed(error))?;
        if args.bitmaps {
            let file = Opening::writing(&Naming::default(), Some(format.name()))
                .open_file(staged.path().as_os_str(), self.console)?;
            bitmap::copy_all(self.sources, &file, args.skip_broken_bitmaps, self.console)?;
        }
        let part = staged.path();
        staged.publish()?;
        if let (Some(from), Some(to)) = (part.parent(), path.parent()) {
            meter.moved(from, to);
        }
        watch.finish(copied, self.console)
    }

    /// Writes down what the copy did; `skipped` says that zeroes were not written.
    fn note(&self, copied: Copied, target: &DiskMeter, skipped: bool) {
        if skipped {
            target.note_zeroes_skipped(copied.bytes_zero);
        }
        self.metering.note_copy(copied);
    }

    /// What the new image is based on, for reading.
    fn backing(&self, target: &std::path::Path) -> Result<Option<Arc<dyn BlockDevice>>, Failure> {
        let Some(name) = &self.args.backing else { return Ok(None) };
        let path = source::beside(target, name);
        let naming = Naming { object: self.args.object.clone(), ..Naming::default() };
        let opened = Opening::reading(&naming, self.args.backing_format.as_deref())
            .counted(self.metering, "base")
            .open(path.as_os_str(), self.console)?;
        Ok(Some(opened.opened.device))
    }

    /// The deepest layer of the source that the target does not have from its own backing
    /// image: if that is a layer of the source's chain, what lies below needs no copying.
    fn deepest(&self, has_backing: bool) -> Option<u32> {
        let ([source], true) = (self.sources, has_backing) else { return None };
        let base = self.args.backing.as_deref()?;
        let base = std::path::Path::new(base).canonicalize().ok()?;
        let chain = &source.opened.chain;
        let depth = chain
            .iter()
            .position(|(path, _)| path.canonicalize().is_ok_and(|path| path == base))?;
        u32::try_from(depth).ok()?.checked_sub(1)
    }
}
