// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening what is copied to.

use super::how::How;
use super::program::Program;
use super::server;
use super::source::{is_stream, options, refuse_format};
use super::stream::{ENDLESS, Sink};
use super::word::{Side, Where};
use crate::args::CopyArgs;
use crate::args::image::Naming;
use crate::failure::Failure;
use crate::image::console::Console;
use crate::image::create::Wish;
use crate::image::metering::Metering;
use std::ffi::OsString;
use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, DiskMeter, Extents, Span, Storage};
use tranship_formats::{
    Create, FillOptions, Filling, Format, OpenOptions, Place, RawPreallocation, Spec, Staged, fill,
};
use tranship_raw::{Access, ImageLock, RawFile};

/// What is copied to.
#[derive(Debug)]
pub(super) struct Target {
    /// The name as it was given.
    pub(super) name: String,
    /// What it is: `file`, `block device`, `server`, `program`, `image`, `stream` or `null`.
    pub(super) kind: &'static str,
    pub(super) device: Arc<dyn BlockDevice>,
    /// It reads as zero everywhere.
    pub(super) is_zero: bool,
    /// Nothing is on stable storage before a flush, and somebody relies on that.
    pub(super) needs_flush: bool,
    /// Connections to its server, if it has one.
    pub(super) connections: Option<usize>,
    /// It is the bytes of a server's export, and nothing else has to fit what is in them.
    pub(super) is_bytes_of_server: bool,
    pub(super) meter: DiskMeter,
    /// A file that gets as long as what is copied into it.
    pub(super) growing: Option<Arc<RawFile>>,
    /// An image that has its name when it is complete.
    new: Option<New>,
    /// Ends after everything above has left it.
    pub(super) program: Option<Program>,
}

#[derive(Debug)]
struct New {
    filling: Option<Filling>,
    staged: Staged,
    path: PathBuf,
}

/// A destination that is not open yet.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub(super) side: Side,
    pub(super) args: &'a CopyArgs,
    pub(super) how: &'a How,
    pub(super) metering: &'a Metering,
    pub(super) console: Console,
}

/// What is made of a file.
#[derive(Debug)]
pub(super) enum Kind {
    /// It is there, and written where it is.
    InPlace(PathBuf),
    /// It is made anew, in another place until it is complete.
    New(PathBuf),
    /// It is no file.
    Other,
}

impl Wanted<'_> {
    /// What becomes of the file, if it is one.
    pub(super) fn kind(&self) -> Kind {
        let Where::File(path) = &self.side.place else { return Kind::Other };
        let is_image = self.side.format.is_some_and(|format| format != Format::Raw);
        match path.metadata() {
            _ if is_stream(path) => Kind::Other,
            Ok(metadata) if metadata.is_file() && is_image => Kind::New(path.clone()),
            Ok(_) => Kind::InPlace(path.clone()),
            Err(_) => Kind::New(path.clone()),
        }
    }

    /// Opens it for a copy of `size` bytes, or of nobody knows how many, that begins at
    /// `start`. A new file is made in `staged`.
    pub(super) fn open(
        self,
        size: Option<u64>,
        start: u64,
        staged: Option<Staged>,
    ) -> Result<Target, Failure> {
        let name = self.side.name.clone();
        let target = self.open_side(size, start, staged);
        let target = target.map_err(|failure| Side::named(&name, failure))?;
        if target.device.is_read_only() {
            return Err(
                Failure::usage("the destination is read-only, cannot write to it").about(&name)
            );
        }
        if size.is_some_and(|size| target.device.size() < size) {
            let facts = format!(
                "{name} has {} bytes, the source has {}",
                target.device.size(),
                size.unwrap_or(0)
            );
            return Err(Failure::usage("destination size is smaller than source size").hint(facts));
        }
        Ok(target)
    }

    fn open_side(
        mut self,
        size: Option<u64>,
        start: u64,
        staged: Option<Staged>,
    ) -> Result<Target, Failure> {
        let format = self.side.format;
        let meter = self.metering.meter().disk("target", &self.side.name);
        let opening = OpenOptions {
            meter: meter.clone(),
            secrets: self.how.secrets.clone(),
            ..options(format, false)
        };
        let kind = self.kind();
        let place = std::mem::replace(&mut self.side.place, Where::Null);
        let target = |kind, device| self.target(kind, device, &meter);
        match (place, kind) {
            (_, Kind::New(path)) => {
                let Some(staged) = staged else {
                    return Err(Failure::usage("there is no place for a new file"));
                };
                self.anew(path, size, start, staged, &meter)
            }
            (Where::File(path), Kind::InPlace(_)) => {
                let file = RawFile::open(&path, Access::ReadWrite)?;
                file.lock(ImageLock::Write)?;
                let is_device = file.is_block_device();
                let file = Arc::new(file);
                if !is_device && start == 0 {
                    // Whatever was there is gone: all of it reads as zero now.
                    file.set_len(0)?;
                    file.set_len(size.unwrap_or(0))?;
                }
                let device = meter.device(Arc::<RawFile>::clone(&file));
                let found = target(if is_device { "block device" } else { "file" }, device);
                Ok(Target {
                    is_zero: found.is_zero || !is_device && start == 0,
                    needs_flush: is_device || self.args.flush || self.args.resume,
                    growing: (!is_device).then_some(file),
                    ..found
                })
            }
            (Where::File(path), _) => {
                refuse_format(format)?;
                let file = File::options().write(true).open(&path);
                let file = file.map_err(|error| Failure::io("opening it", &error))?;
                Ok(sink(target("stream", meter.device(Arc::new(Sink::new(file))))))
            }
            (Where::Standard, _) => {
                refuse_format(format)?;
                let out = std::io::stdout();
                if out.is_terminal() {
                    return Err(Failure::usage("a disk is not written to a terminal"));
                }
                let file = out.as_fd().try_clone_to_owned();
                let file = file.map_err(|error| Failure::io("opening standard output", &error))?;
                let device = meter.device(Arc::new(Sink::new(File::from(file))));
                Ok(sink(target("stream", device)))
            }
            (Where::Null, _) => {
                let place = Place::Null { size: size.unwrap_or(ENDLESS) };
                let spec = Spec { place, ..Spec::from_path(Path::new("null:")) };
                let raw = OpenOptions { format: Some(Format::Raw), ..opening };
                let device = tranship_formats::open_spec(&spec, &raw)?.device;
                Ok(Target { is_zero: true, needs_flush: false, ..target("null", device) })
            }
            (Where::Image(spec), _) => {
                let opened = tranship_formats::open_spec(&spec.or_format(format), &opening)?;
                let is_zero = self.reads_zero(&*opened.device)?;
                Ok(Target { is_zero, ..target("image", opened.device) })
            }
            (Where::Server(spec), _) => {
                let server::Export { device, connections } =
                    server::open(&spec, self.how, &opening)?;
                let is_zero = self.reads_zero(&*device)?;
                let connections = Some(connections);
                let is_bytes_of_server = matches!(format, None | Some(Format::Raw));
                let found = target("server", device);
                Ok(Target { is_zero, connections, is_bytes_of_server, ..found })
            }
            (Where::Program(words), _) => {
                let mut program = Program::start(&words)?;
                let server::Export { device, connections } =
                    server::open(&server::at(program.socket()), self.how, &opening)
                        .map_err(|failure| program.explain(failure))?;
                let is_zero = self.reads_zero(&*device)?;
                Ok(Target {
                    is_zero,
                    connections: Some(connections),
                    program: Some(program),
                    ..target("program", device)
                })
            }
        }
    }

    /// A destination of which nothing is known but that it can be written.
    fn target(
        &self,
        kind: &'static str,
        device: Arc<dyn BlockDevice>,
        meter: &DiskMeter,
    ) -> Target {
        Target {
            name: self.side.name.clone(),
            kind,
            device,
            is_zero: self.args.destination_is_zero,
            needs_flush: true,
            connections: None,
            is_bytes_of_server: false,
            meter: meter.clone(),
            growing: None,
            new: None,
            program: None,
        }
    }

    /// Whether zeroes need not be written: the user says so, or the destination does.
    fn reads_zero(&self, device: &dyn BlockDevice) -> Result<bool, Failure> {
        if self.args.destination_is_zero {
            return Ok(true);
        }
        for extent in Extents::new(device, Span::new(0, device.size())) {
            let (_, kind) = extent?;
            if !kind.reads_zero() {
                return Ok(false);
            }
        }
        Ok(device.size() > 0)
    }

    /// Makes a new image, or goes on with one that an earlier try has begun.
    fn anew(
        &self,
        path: PathBuf,
        size: Option<u64>,
        start: u64,
        staged: Staged,
        meter: &DiskMeter,
    ) -> Result<Target, Failure> {
        let place = staged.path();
        let Some(size) = size else {
            refuse_format(self.side.format)?;
            let made = RawFile::create_or_replace(&place, 0, RawPreallocation::Off)?;
            let file = Arc::new(made);
            let device = meter.device(Arc::<RawFile>::clone(&file));
            return Ok(Target {
                is_zero: true,
                needs_flush: self.args.flush,
                growing: Some(file),
                new: Some(New { filling: None, staged, path }),
                ..self.target("file", device, meter)
            });
        };
        let what = self.what(&path, size)?;
        let kind = if matches!(what, Create::Raw { .. }) { "file" } else { "image" };
        let filling = FillOptions {
            restartable: self.args.resume,
            resume: start > 0,
            durable: self.args.flush || self.args.resume,
            meter: meter.clone(),
            ..FillOptions::default()
        };
        let filling = fill(&place, &what, &filling, None)?;
        let device = filling.device();
        let device = device.ok_or_else(|| Failure::usage("the new image cannot be written"))?;
        let new = Some(New { filling: Some(filling), staged, path });
        Ok(Target { is_zero: true, new, ..self.target(kind, meter.device(device), meter) })
    }

    /// The image that is to be made.
    fn what(&self, path: &Path, size: u64) -> Result<Create, Failure> {
        let format = self.side.format.unwrap_or(Format::Raw);
        if format == Format::Raw {
            return Ok(Create::Raw { size, preallocation: RawPreallocation::Off });
        }
        let name = OsString::from(path);
        let wish = Wish {
            name: &name,
            format: format.name(),
            lists: None,
            size: Some(size),
            backing: None,
            backing_format: None,
            is_unsafe: false,
            naming: &Naming::default(),
        };
        wish.plan_for_copy(self.console)?.what()
    }
}

/// A target that takes bytes from front to back.
fn sink(target: Target) -> Target {
    Target { is_zero: false, needs_flush: false, ..target }
}

impl Target {
    /// Whether bytes have to come in ascending order.
    pub(super) fn is_ordered(&self) -> bool {
        self.kind == "stream"
    }

    /// Whether a copy that fails leaves something behind that looks like a disk.
    pub(super) fn is_spoilt_by_failure(&self) -> bool {
        self.new.is_none() && !matches!(self.kind, "null" | "stream")
    }

    /// Everything is written: flushes what has to be, and gives a new image its name.
    pub(super) fn finish(mut self) -> Result<(), Failure> {
        let Some(New { filling, staged, path }) = self.new.take() else { return Ok(()) };
        if let Some(filling) = filling {
            filling.finish()?;
        }
        let part = staged.path();
        staged.publish()?;
        if let (Some(from), Some(to)) = (part.parent(), path.parent()) {
            self.meter.moved(from, to);
        }
        Ok(())
    }
}
