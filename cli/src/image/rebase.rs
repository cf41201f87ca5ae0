// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image rebase`: another image below the same disk.

use super::console::{Console, Progress};
use super::metering::Metering;
use super::pieces::{self, PIECE};
use super::source::{self, Opening, Source};
use crate::args::image::{Naming, RebaseArgs};
use crate::failure::Failure;
use crate::signals;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use tranship_appliance::CancelToken;
use tranship_block::{BlockDevice, ExtentKind, MemoryDevice, Span, Storage, Zeroing};
use tranship_formats::{Below, Compressing, Disk, Format, Layer};
use tranship_qcow2::{Backing, Qcow2};

/// Changes what an image is based on.
pub(crate) fn run(args: &RebaseArgs, console: Console, metering: &Metering) -> Result<u8, Failure> {
    let name = source::one(&args.names, "rebase", console)?;
    if args.backing.is_none() && !args.backing_unsafe {
        let text = "Must specify backing file (-b) or use unsafe mode (-u)";
        return Err(source::usage(console, "rebase", text));
    }
    let direct = source::cache(args.cache.as_deref(), "")?;
    let below = source::cache(args.backing_cache.as_deref(), "source ")?;
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let opening = Opening {
        direct,
        direct_below: Some(below),
        ..Opening::writing(&args.naming, args.format.format.as_deref()).counted(metering, "image")
    };
    let job = Job { args, name, opening, below, console, metering };
    let progress = Progress::start(args.progress && !args.quiet);
    let outcome = if args.backing_unsafe { job.rename() } else { job.safely(&progress, &cancel) };
    match outcome {
        Ok(()) => progress.finish(),
        Err(failure) => {
            progress.end();
            return Err(failure);
        }
    }
    Ok(0)
}

struct Job<'a> {
    args: &'a RebaseArgs,
    name: &'a OsStr,
    /// For the image.
    opening: Opening<'a>,
    /// What the image is based on goes past the page cache.
    below: bool,
    console: Console,
    metering: &'a Metering,
}

impl Job<'_> {
    /// Changes the name alone.
    fn rename(&self) -> Result<(), Failure> {
        let source = self.opening.open_file(self.name, self.console)?;
        let layer = self.first(&source)?;
        let backing = self.wanted()?;
        let storage = layer.storage.as_ref().ok_or_else(|| self.cannot("Operation not supported"));
        self.store(&**storage?, backing)
    }

    /// Writes what the new base does not have into the image, and then changes the name.
    fn safely(&self, progress: &Progress, cancel: &CancelToken) -> Result<(), Failure> {
        // What it was based on stays open, the image itself does not.
        let reading = Opening { writable: false, ..self.opening };
        let before = reading.open(self.name, self.console)?;
        let path = self.first(&before)?.path.clone();
        let wanted = self.wanted()?;
        let Source { name, mut spec, opened, .. } = before;
        let mut layers = opened.layers.into_iter();
        drop((opened.device, layers.next()));
        let layers: Vec<Layer> = layers.collect();
        let old = match layers.first() {
            Some(layer) => {
                self.metering.meter().disk("base", &layer.name).device(layer.disk.device())
            }
            None => Arc::new(MemoryDevice::read_only(Vec::new())),
        };

        let shared = match &wanted {
            None => {
                spec.backing = Below::Nothing;
                None
            }
            Some(backing) => {
                let found = self.look_at(&path, backing)?;
                let (place, format) = (found.opened.path.canonicalize().ok(), found.opened.format);
                let is_same = |layer: &Layer| {
                    layer.format == format
                        && place.is_some()
                        && place == layer.path.canonicalize().ok()
                };
                spec.backing = Below::Given(Box::new(found.spec));
                layers.iter().position(is_same)
            }
        };
        // An image that is written is only guessed to be raw if its user is told.
        spec.format = Some(Format::Qcow2);
        let image =
            Opening { format: None, ..self.opening }.open_spec(name, spec, None, self.console)?;
        let mut layers = image.opened.layers.into_iter();
        let layer = layers.next();
        drop(image.opened.device);
        let Some(Layer { disk: Disk::Qcow2(disk), storage: Some(storage), .. }) = layer else {
            return Err(self.cannot("Operation not supported"));
        };
        let moving = Moving {
            old: &*old,
            disk: image.meter.device(Arc::<Qcow2>::clone(&disk)),
            target: image.meter.device(if self.args.compress {
                Arc::new(Compressing(Arc::clone(&disk)))
            } else {
                Arc::<Qcow2>::clone(&disk)
            }),
            shared: shared.and_then(|depth| u32::try_from(depth).ok()),
        };
        moving.run(progress, cancel)?;
        drop(moving);
        match Arc::into_inner(disk) {
            Some(disk) => disk.finish()?,
            None => return Err(Failure::usage("the image is still in use")),
        }
        self.store(&*storage, wanted)
    }

    /// The image, if it is one that can have another base.
    fn first<'s>(&self, source: &'s Source) -> Result<&'s Layer, Failure> {
        match source.opened.layers.first().filter(|layer| layer.format == Format::Qcow2) {
            Some(layer) => Ok(layer),
            None if self.args.compress => {
                Err(Failure::usage("Compression not supported for this file format"))
            }
            None => Err(self.cannot("Operation not supported")),
        }
    }

    /// What the header is to say.
    fn wanted(&self) -> Result<Option<Backing>, Failure> {
        let format = self.args.backing_format.as_deref();
        if let Some(format) = format
            && source::format_named(format).is_err()
        {
            return Err(Failure::usage(format!("Invalid format name: '{format}'")));
        }
        match self.args.backing.as_deref() {
            None | Some("") => Ok(None),
            Some(_) if format.is_none() => Err(self.cannot("backing format must be specified")),
            Some(name) => {
                Ok(Some(Backing { name: name.to_owned(), format: format.map(ToOwned::to_owned) }))
            }
        }
    }

    /// Opens the new base, so that what is wrong with it is told as such.
    fn look_at(&self, image: &Path, backing: &Backing) -> Result<Source, Failure> {
        let path = source::beside(image, &backing.name);
        let naming = Naming { image_opts: false, ..self.args.naming.clone() };
        let opening = Opening {
            force_share: self.args.force_share,
            direct: self.below,
            ..Opening::reading(&naming, backing.format.as_deref())
        };
        let mut found = opening.open(path.as_os_str(), self.console).map_err(|failure| {
            failure.within(format!("Could not open new backing file '{}'", backing.name))
        })?;
        found.spec.format = Some(found.opened.format);
        Ok(found)
    }

    fn store(&self, storage: &dyn Storage, backing: Option<Backing>) -> Result<(), Failure> {
        tranship_qcow2::change_backing(storage, backing).map_err(|error| {
            let name = self.args.backing.as_deref().unwrap_or_default();
            Failure::from(error).within(format!("Could not change the backing file to '{name}'"))
        })
    }

    fn cannot(&self, why: &str) -> Failure {
        let name = self.args.backing.as_deref().unwrap_or_default();
        Failure::usage(format!("Could not change the backing file to '{name}': {why}"))
    }
}

/// What the image has not and its old base has is going to be in the image, unless the new
/// base has the same.
struct Moving<'a> {
    /// What is below now.
    old: &'a dyn BlockDevice,
    /// The image, over its new base: whatever is written next to old bytes in a cluster
    /// must not be filled up with the new base's.
    disk: Arc<dyn BlockDevice>,
    /// The same, for writing.
    target: Arc<dyn BlockDevice>,
    /// The layer of the old base, 0 being the first, that is the new one.
    shared: Option<u32>,
}

#[derive(Default)]
struct Scratch {
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Moving<'_> {
    fn run(&self, progress: &Progress, cancel: &CancelToken) -> Result<(), Failure> {
        let mut at = 0;
        let size = self.disk.size();
        pieces::each(
            || {
                at = self.skip(at)?;
                progress.set(at, size);
                if at >= size {
                    return Ok(None);
                }
                let cluster = u64::from(self.disk.preferred_block());
                let span = Span::new(at, PIECE.max(cluster).min(size - at));
                at = span.end();
                Ok(Some(span))
            },
            cancel,
            |span, scratch| self.piece(span, scratch),
        )
    }

    /// The first cluster from `at` on that has to be looked at.
    fn skip(&self, mut at: u64) -> Result<u64, Failure> {
        let size = self.disk.size();
        let cluster = u64::from(self.disk.preferred_block());
        while at < size {
            let new = pieces::extent_at(&*self.disk, at)?;
            let len = if is_own(new.kind, new.depth) {
                new.len
            } else {
                let old = pieces::extent_at(self.old, at)?;
                let is_same = new.kind.reads_zero() && old.kind.reads_zero()
                    || self.is_shared(old.kind, old.depth);
                if is_same { new.len.min(old.len) } else { 0 }
            };
            // Nothing is decided about a part of a cluster.
            let end = at.saturating_add(len);
            let end = if end >= size { size } else { end / cluster * cluster };
            if end <= at {
                break;
            }
            at = end;
        }
        Ok(at)
    }

    /// Whether a layer of the old base that is in the new one as well answers.
    fn is_shared(&self, kind: ExtentKind, depth: u32) -> bool {
        kind == ExtentKind::Data && self.shared.is_some_and(|shared| depth >= shared)
    }

    /// Looks at whole clusters.
    fn piece(&self, piece: Span, scratch: &mut Scratch) -> Result<(), Failure> {
        // All of it before anything is written: a cluster is its own from then on.
        let mut missing: Vec<Span> = Vec::new();
        let mut at = piece.start;
        while at < piece.end() {
            let extent = pieces::extent_at(&*self.disk, at)?.limited_to(piece.end() - at);
            let end = at + extent.len;
            if !is_own(extent.kind, extent.depth) {
                match missing.last_mut() {
                    Some(last) if last.end() == at => last.len += extent.len,
                    _ => missing.push(Span::new(at, extent.len)),
                }
            }
            at = end;
        }
        let cluster = u64::from(self.disk.preferred_block());
        for span in missing {
            let len = usize::try_from(span.len).unwrap_or(usize::MAX);
            scratch.old.resize(len, 0);
            scratch.new.resize(len, 0);
            pieces::read(self.old, &mut scratch.old, span.start)?;
            self.disk.read_at(&mut scratch.new, span.start)?;
            // As many clusters as possible at once.
            let mut from = None;
            let mut at = span.start;
            while at < span.end() {
                let end = (at / cluster + 1).saturating_mul(cluster).min(span.end());
                let within = part(span, at, end);
                if scratch.old[within.clone()] == scratch.new[within] {
                    self.write(&scratch.old, span, from.take(), at)?;
                } else {
                    from.get_or_insert(at);
                }
                at = end;
            }
            self.write(&scratch.old, span, from, span.end())?;
        }
        Ok(())
    }

    fn write(&self, old: &[u8], span: Span, from: Option<u64>, end: u64) -> Result<(), Failure> {
        let Some(from) = from else { return Ok(()) };
        let bytes = &old[part(span, from, end)];
        if tranship_block::is_zero(bytes) {
            let span = Span::new(from, end - from);
            self.target.write_zeroes(span, Zeroing::MayUnmap)?;
        } else {
            self.target.write_at(bytes, from)?;
        }
        Ok(())
    }
}

/// Whether the image itself, and not its base, says what is there.
fn is_own(kind: ExtentKind, depth: u32) -> bool {
    depth == 0 && kind != ExtentKind::Hole
}

/// Where the bytes from `start` to `end` are in those of `span`.
fn part(span: Span, start: u64, end: u64) -> std::ops::Range<usize> {
    let at = |offset: u64| usize::try_from(offset - span.start).unwrap_or(usize::MAX);
    at(start)..at(end)
}
