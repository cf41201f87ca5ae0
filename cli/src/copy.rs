// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `copy`: bytes from one place to another, with nbdcopy's options.
//!
//! A side is a file, a device, an image, an export of an NBD server, a server to be
//! started, or a stream. All but streams are disks to the copy engine; of a stream it gets
//! one window after the other.

mod how;
mod journal;
mod program;
mod progress;
mod server;
mod source;
mod stream;
mod target;
mod watch;
mod word;

use crate::args::{CopyArgs, Talk};
use crate::failure::Failure;
use crate::image::console::Console;
use crate::image::metering::Metering;
use crate::personality::Personality;
use crate::{logging, signals, stdout};
use how::{How, Sides};
use journal::{Asked, Journal};
use progress::Progress;
use source::{Bytes, Source};
use std::error::Error as _;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use target::{Kind, Target, Wanted};
use tranship_appliance::CancelToken;
use tranship_block::{
    BlockDevice, Copied, CopyOptions, ManifestSummary, Slice, Span, Storage, copy,
};
use tranship_convert::ErrorKind;
use tranship_formats::Staged;
use watch::Watch;
use word::{Side, Where};

/// Times that a copy goes back to where it was the last time.
const MOST_SETBACKS: u32 = 8;

/// Bytes between two places from which a copy can go on after a kill.
const CHECKPOINT: u64 = 256 << 20;

/// Copies what the options say. As with nbdcopy, the exit code of every failure is 1.
pub(crate) fn run(personality: Personality, args: &CopyArgs) -> Result<u8, Failure> {
    logging::start(&Talk { verbose: args.verbose, trace: false });
    let wrong = |failure: Failure| failure.exiting_with(1);
    let metering = Metering::start(&args.metering).map_err(wrong)?;
    let outcome = carry_out(args, Console::new(personality), &metering);
    let told = metering.finish("copy").map_err(wrong);
    outcome.map_err(wrong).and(told).map(|()| 0)
}

fn carry_out(args: &CopyArgs, console: Console, metering: &Metering) -> Result<(), Failure> {
    let [from, to] = args.names.as_slice() else {
        return Err(Failure::usage("expected two names: a source and a destination")
            .hint("see --help for everything that can be given"));
    };
    let how = How::new(args)?;
    let from = Side::parse(from, args.source_format.as_deref(), false)?;
    let to = Side::parse(to, args.target_format.as_deref(), true)?;
    if args.json && matches!(to.place, Where::Standard) {
        return Err(Failure::usage("--json prints where the disk is written: standard output"));
    }
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let progress = Progress::start(args.progress.as_deref())?;
    let begun = Instant::now();
    let source = Source::open(from, &how, metering)?;
    let wanted = Wanted { side: to, args, how: &how, metering, console };
    let job = Job { args, how: &how, metering, cancel, progress, begun };
    let outcome = job.run(source, wanted);
    if outcome.is_err() {
        job.progress.end();
    }
    outcome
}

/// A copy.
struct Job<'a> {
    args: &'a CopyArgs,
    how: &'a How,
    metering: &'a Metering,
    cancel: CancelToken,
    progress: Progress,
    begun: Instant,
}

impl Job<'_> {
    fn run(&self, mut source: Source, wanted: Wanted<'_>) -> Result<(), Failure> {
        let kind = wanted.kind();
        if let Kind::InPlace(path) | Kind::New(path) = &kind
            && source.has_file(path)
        {
            return Err(Failure::usage("source and destination are the same file"));
        }
        let size = source.size();
        if self.args.resume && size.is_none() {
            return Err(Failure::usage("--resume: what a stream has given cannot be read again"));
        }
        let staged = match &kind {
            Kind::New(path) => Some(Staged::begin(path, self.args.resume)?),
            _ => None,
        };
        let name = wanted.side.name.clone();
        // How far it is decides whether a file begins anew.
        let early = matches!(kind, Kind::InPlace(_) | Kind::New(_));
        let mut journal = None;
        if early {
            let is_there = match &kind {
                Kind::InPlace(path) => is_as_long(path, size),
                _ => staged.as_ref().is_some_and(|staged| staged.path().exists()),
            };
            journal = self.journal(&source, &name, None, (staged.as_ref(), is_there))?;
        }
        let start = journal.as_ref().map_or(0, Journal::start);
        let mut target = wanted.open(size, start, staged)?;
        if !early {
            if self.args.resume && matches!(target.kind, "stream" | "null") {
                return Err(Failure::usage("--resume: nothing is kept there to go on with"));
            }
            let target_size = Some(target.device.size());
            journal = self.journal(&source, &name, target_size, (None, true))?;
        }
        let start = journal.as_ref().map_or(0, Journal::start);
        let sides = Sides {
            connections: [source.connections, target.connections].into_iter().flatten().min(),
            from_server: source.connections.is_some(),
            to_server: target.connections.is_some(),
            ordered: target.is_ordered(),
            nowhere: target.kind == "null",
        };
        let options = CopyOptions {
            start,
            target_is_zero: target.is_zero,
            offload: !sides.ordered && !sides.nowhere,
            flush: target.needs_flush,
            checkpoint_every: if self.args.resume || self.repeats(&target) {
                CHECKPOINT
            } else {
                0
            },
            ..self.how.options(self.args, sides)
        };
        self.tell(&source, &target, &options);
        let hash = self.args.hash.as_deref();
        let watch = Watch::new((&self.progress, &self.cancel), size, hash, journal)?;
        let moved = match &source.bytes {
            Bytes::Disk(disk) => self.disk(disk, &target, &options, &watch),
            Bytes::Stream(input) => self.stream(input, &target, &options, &watch),
        };
        let (copied, size) = match moved {
            Ok(moved) => moved,
            Err(failure) => return Err(self.explain(failure, &mut source, &mut target)),
        };
        if target.is_zero {
            target.meter.note_zeroes_skipped(copied.bytes_zero);
        }
        self.metering.note_copy(copied);
        let kind = target.kind;
        let connections = target.connections;
        target.finish()?;
        let manifest = watch.finish(size)?;
        self.progress.finish();
        if !self.args.json {
            return Ok(());
        }
        stdout::json(&serde_json::json!({
            "source": side(&source.name, source.kind, source.connections),
            "destination": side(&name, kind, connections),
            "bytes": size,
            "resumed_from": start,
            "seconds": self.begun.elapsed().as_secs_f64(),
            "copied": {
                "bytes_read": copied.bytes_read,
                "bytes_written": copied.bytes_written,
                "bytes_zero": copied.bytes_zero,
                "bytes_offloaded": copied.bytes_offloaded,
            },
            "manifest": manifest.map(|summary| self.manifest(summary)),
        }))
    }

    fn manifest(&self, ManifestSummary { chunks, digest }: ManifestSummary) -> serde_json::Value {
        serde_json::json!({ "file": self.args.hash, "chunks": chunks, "digest": digest })
    }

    /// Where it is written down how far the copy is, if it is to be restartable.
    fn journal(
        &self,
        source: &Source,
        target: &str,
        target_size: Option<u64>,
        (staged, is_there): (Option<&Staged>, bool),
    ) -> Result<Option<Journal>, Failure> {
        if !self.args.resume {
            return Ok(None);
        }
        let hash = self.args.hash.as_deref();
        let path = match (staged.and_then(|staged| staged.note("state")), hash) {
            (Some(note), _) => note,
            (None, Some(hash)) => journal::beside(hash),
            (None, None) => {
                return Err(Failure::usage(
                    "--resume into what is there already needs --hash FILE: how far the copy \
                     is lies beside that file",
                ));
            }
        };
        let asked = Asked {
            source: source.name.clone(),
            files: journal::identities(&source.files)?,
            size: source.size(),
            target: target.to_owned(),
            target_size,
            format: self.args.target_format.clone(),
            hashed: hash.is_some(),
        };
        Ok(Some(Journal::open(path, asked, hash, is_there)))
    }

    /// Whether what a server has lost is written again.
    fn repeats(&self, target: &Target) -> bool {
        target.is_bytes_of_server && !self.how.retry.is_zero()
    }

    /// Copies from a disk; also returns its size. What a server had acknowledged before it
    /// went away and came back is written again, from the last flush on.
    fn disk(
        &self,
        disk: &Arc<dyn BlockDevice>,
        target: &Target,
        options: &CopyOptions,
        watch: &Watch<'_>,
    ) -> Result<(Copied, u64), Failure> {
        let size = disk.size();
        let device = front(&target.device, size)?;
        let mut options = *options;
        let mut setbacks = 0;
        loop {
            let error = match copy(disk, &device, &options, watch) {
                Ok(copied) => return Ok((copied, size)),
                Err(error) => error,
            };
            if let Some(failure) = watch.failure() {
                return Err(failure);
            }
            setbacks = if watch.reached() > options.start { 1 } else { setbacks + 1 };
            let is_lost = error.kind() == tranship_block::ErrorKind::Lost;
            if !is_lost || !self.repeats(target) || setbacks > MOST_SETBACKS {
                return Err(error.into());
            }
            options.start = watch.reached();
            let from = options.start;
            let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            tracing::warn!(from, cause, "copying again what may be lost");
            if self.args.verbose {
                stdout::complain(&format!("copying again from byte {from}: {cause}"));
            }
        }
    }

    /// Copies what comes out of `input`; also returns how many bytes that were.
    fn stream(
        &self,
        input: &File,
        target: &Target,
        options: &CopyOptions,
        watch: &Watch<'_>,
    ) -> Result<(Copied, u64), Failure> {
        let mut sum = Copied::default();
        let is_cancelled = || self.cancel.is_cancelled();
        let size = stream::windows(input, is_cancelled, |window| {
            let end = window.size();
            if let Some(file) = &target.growing {
                file.set_len(end)?;
            }
            if target.device.size() < end {
                let facts = format!("{} has {} bytes", target.name, target.device.size());
                return Err(
                    Failure::usage("destination size is smaller than source size").hint(facts)
                );
            }
            let device = front(&target.device, end)?;
            let options = CopyOptions { start: window.start(), flush: false, ..*options };
            let copied = copy(window, &device, &options, watch);
            sum.add(copied.map_err(|error| watch.failure().unwrap_or_else(|| error.into()))?);
            Ok(())
        });
        if self.cancel.is_cancelled() {
            return Err(Failure::new(ErrorKind::Interrupted, "copy was cancelled"));
        }
        let size = size?;
        if options.flush {
            target.device.flush()?;
        }
        Ok((sum, size))
    }

    /// A failure of the copy with its sides, and what it means for the destination.
    fn explain(&self, failure: Failure, source: &mut Source, target: &mut Target) -> Failure {
        let text = format!("copying {} to {} failed", source.name, target.name);
        let mut failure = failure.within(text);
        for program in [&mut source.program, &mut target.program].into_iter().flatten() {
            failure = program.explain(failure);
        }
        if self.args.resume {
            return failure.hint("the same command goes on where this one has ended");
        }
        if target.is_spoilt_by_failure() {
            return failure.hint(format!("{} holds a part of the copy alone", target.name));
        }
        failure
    }

    /// Says what is going to happen, if somebody wants to know.
    fn tell(&self, source: &Source, target: &Target, options: &CopyOptions) {
        if !self.args.verbose {
            return;
        }
        let told = |connections: Option<usize>| match connections {
            None => String::new(),
            Some(count) => format!(", connections: {count}"),
        };
        let size = source.size().map_or("unknown".to_owned(), |size| size.to_string());
        let from = format!("{} ({}, bytes: {size}", source.name, source.kind);
        stdout::complain(&format!("source: {from}{})", told(source.connections)));
        let to = format!("{} ({}, reads as zero: {}", target.name, target.kind, target.is_zero);
        stdout::complain(&format!("destination: {to}{})", told(target.connections)));
        let CopyOptions { threads, in_flight, step, zero_block, .. } = *options;
        let in_flight = in_flight.max(threads);
        stdout::complain(&format!(
            "in flight: {in_flight} of {step} bytes; threads: {threads}; looks for zeroes of: {zero_block} bytes"
        ));
    }
}

/// The first `size` bytes of a device.
fn front(device: &Arc<dyn BlockDevice>, size: u64) -> Result<Arc<dyn BlockDevice>, Failure> {
    if device.size() == size {
        return Ok(Arc::clone(device));
    }
    Ok(Arc::new(Slice::new(Arc::clone(device), Span::new(0, size))?))
}

/// Whether what is at `path` is a device, or a file of so many bytes.
fn is_as_long(path: &Path, size: Option<u64>) -> bool {
    path.metadata().is_ok_and(|metadata| !metadata.is_file() || Some(metadata.len()) == size)
}

fn side(name: &str, kind: &str, connections: Option<usize>) -> serde_json::Value {
    serde_json::json!({ "name": name, "kind": kind, "connections": connections })
}
