// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image commit`: what a disk's upper images hold goes into one below.

use super::console::{Console, Progress};
use super::metering::Metering;
use super::pieces::{self, PIECE};
use super::resize::{self, Change};
use super::source::{self, Opening, Source};
use crate::args::image::{CommitArgs, Naming};
use crate::failure::Failure;
use crate::{signals, stdout};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_appliance::CancelToken;
use tranship_block::{BlockDevice, ExtentKind, Span, Zeroing};
use tranship_formats::{Below, Disk, Format, Layer, Spec};

/// Commits an image.
pub(crate) fn run(args: &CommitArgs, console: Console, metering: &Metering) -> Result<u8, Failure> {
    let direct = source::cache(args.cache.as_deref(), "");
    let name = source::one(&args.names, "commit", console)?;
    let direct = direct?;
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let format = args.format.format.as_deref();
    let opening =
        Opening { direct, ..Opening::writing(&args.naming, format).counted(metering, "image") };
    let plan = plan(args, name, opening, console)?;
    let progress = Progress::start(args.progress && !args.quiet);
    // Only what has just been committed into the next image may be taken from this one:
    // the images between this one and a lower base do not change.
    let empties = !args.drop && args.base.is_none();
    let job = Job { args, plan, opening, empties, console, metering };
    match job.run(&progress, &cancel) {
        Ok(()) => progress.finish(),
        Err(failure) => {
            progress.end();
            return Err(failure);
        }
    }
    if !args.quiet {
        stdout::print("Image committed.\n")?;
    }
    Ok(0)
}

/// What is committed into what.
struct Plan {
    name: String,
    /// The image, in a chain that ends above the base.
    upper: Spec,
    base: PathBuf,
    base_format: Format,
}

/// Looks at the chain, and closes it again: the base is open for reading there.
fn plan(
    args: &CommitArgs,
    name: &OsStr,
    opening: Opening<'_>,
    console: Console,
) -> Result<Plan, Failure> {
    if args.format.format.is_none() {
        // Says what writing to a guessed format means.
        drop(opening.open_file(name, console)?);
    }
    let Source { name, spec, opened, .. } =
        Opening { writable: false, ..opening }.open(name, console)?;
    let layers = &opened.layers;
    if layers.len() < 2 {
        return Err(Failure::usage("Image does not have a backing file"));
    }
    let depth = match &args.base {
        None => 1,
        Some(base) => depth_of(base, layers).ok_or_else(|| {
            Failure::usage(format!("Did not find '{base}' in the backing chain of '{name}'"))
        })?,
    };
    let mut below = Below::Nothing;
    for layer in layers.iter().take(depth).skip(1).rev() {
        let format = Some(layer.format);
        let spec = Spec { format, backing: below, ..Spec::from_path(&layer.path) };
        below = Below::Given(Box::new(spec));
    }
    let (base, base_format) = (layers[depth].path.clone(), layers[depth].format);
    let upper = Spec { format: Some(layers[0].format), backing: below, ..spec };
    Ok(Plan { name, upper, base, base_format })
}

/// The layer below the first one that is called `base`.
fn depth_of(base: &str, layers: &[Layer]) -> Option<usize> {
    let path = Path::new(base).canonicalize().ok();
    let beside = source::beside(&layers.first()?.path, base).canonicalize().ok();
    let is_it = |layer: &Layer| {
        let place = layer.path.canonicalize().ok();
        layer.name == base || place.is_some() && (place == path || place == beside)
    };
    layers.iter().skip(1).position(is_it).map(|depth| depth + 1)
}

struct Job<'a> {
    args: &'a CommitArgs,
    plan: Plan,
    /// For the image.
    opening: Opening<'a>,
    /// The image shows its base again afterwards.
    empties: bool,
    console: Console,
    metering: &'a Metering,
}

impl Job<'_> {
    fn run(&self, progress: &Progress, cancel: &CancelToken) -> Result<(), Failure> {
        let opening = Opening { format: None, writable: self.empties, ..self.opening };
        let upper = opening.open_spec(
            self.plan.name.clone(),
            self.plan.upper.clone(),
            None,
            self.console,
        )?;
        self.commit(&upper.opened.device, progress, cancel)?;
        if !self.empties {
            return Ok(());
        }
        // The base has everything, on stable storage.
        let mut layers = upper.opened.layers.into_iter();
        drop(upper.opened.device);
        let Some(Layer { disk: Disk::Qcow2(disk), storage: Some(storage), .. }) = layers.next()
        else {
            self.console.warn(&format!(
                "{} is not emptied: what it holds is in the image that it was based on now, and \
                 its format may not let it be read any more",
                self.plan.name
            ));
            return Ok(());
        };
        if let Some(disk) = Arc::into_inner(disk) {
            disk.finish()?;
        }
        tranship_qcow2::empty(&*storage)
            .map_err(|error| Failure::from(error).within("Could not empty the image"))
    }

    fn commit(
        &self,
        upper: &Arc<dyn BlockDevice>,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<(), Failure> {
        let naming = Naming { image_opts: false, ..self.args.naming.clone() };
        let opening = Opening {
            direct: self.opening.direct,
            ..Opening::writing(&naming, Some(self.plan.base_format.name()))
                .counted(self.metering, "base")
        };
        self.grow(&opening, upper.size())?;
        let base = opening.open(self.plan.base.as_os_str(), self.console)?;
        let target = Arc::clone(&base.opened.device);
        let failed = |error: tranship_block::Error| {
            Failure::from(error).within("Error while committing image")
        };
        let mut at = 0;
        let size = upper.size();
        pieces::each(
            || {
                while at < size {
                    progress.set(at, size);
                    let extent = pieces::extent_at(&**upper, at)?;
                    let most = match extent.kind {
                        ExtentKind::Data => PIECE - at % PIECE,
                        ExtentKind::Zero | ExtentKind::Hole => u64::MAX,
                    };
                    let span = Span::new(at, extent.len.min(most));
                    at = span.end();
                    if extent.kind != ExtentKind::Hole {
                        return Ok(Some((span, extent.kind)));
                    }
                }
                Ok(None)
            },
            cancel,
            |(span, kind), buf: &mut Vec<u8>| {
                if kind == ExtentKind::Zero {
                    return target.write_zeroes(span, Zeroing::MayUnmap).map_err(failed);
                }
                buf.resize(usize::try_from(span.len).unwrap_or(usize::MAX), 0);
                upper.read_at(buf, span.start).map_err(failed)?;
                target.write_at(buf, span.start).map_err(failed)
            },
        )?;
        target.flush().map_err(failed)?;
        let qcow2 = base.opened.layers.into_iter().next().map(|layer| layer.disk);
        drop((target, base.opened.device));
        if let Some(Disk::Qcow2(disk)) = qcow2
            && let Some(disk) = Arc::into_inner(disk)
        {
            disk.finish()?;
        }
        Ok(())
    }

    /// Makes the base as large as the disk, if it is smaller.
    fn grow(&self, opening: &Opening<'_>, new: u64) -> Result<(), Failure> {
        let name = self.plan.base.as_os_str();
        let mut base = opening.open_file(name, self.console)?;
        if !matches!(base.opened.format, Format::Raw | Format::Qcow2) {
            // Its lock would be in the way.
            drop(base);
            base = opening.open(name, self.console)?;
        }
        let old = resize::size_of(&base)?;
        if old >= new {
            return Ok(());
        }
        resize::resize(&base, opening.naming, Change { old, new, mode: "off" }, self.console)
            .map_err(|failure| {
                failure.within(format!("Could not resize '{}'", self.plan.base.display()))
            })
    }
}
