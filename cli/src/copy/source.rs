// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening what is copied.

use super::how::How;
use super::program::Program;
use super::server;
use super::word::{Side, Where};
use crate::failure::Failure;
use crate::image::metering::Metering;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error};
use tranship_formats::{Format, Locking, OpenOptions, Opened, Spec, Trust};

/// What is copied.
#[derive(Debug)]
pub(super) struct Source {
    /// The name as it was given.
    pub(super) name: String,
    /// What it is: `file`, `server`, `program`, `image` or `stream`.
    pub(super) kind: &'static str,
    pub(super) bytes: Bytes,
    /// Connections to its server, if it has one.
    pub(super) connections: Option<usize>,
    /// The files that it consists of.
    pub(super) files: Vec<PathBuf>,
    /// Ends after everything above has left it.
    pub(super) program: Option<Program>,
}

/// How its bytes come.
#[derive(Debug)]
pub(super) enum Bytes {
    /// In any order.
    Disk(Arc<dyn BlockDevice>),
    /// From front to back.
    Stream(File),
}

impl Source {
    pub(super) fn open(side: Side, how: &How, metering: &Metering) -> Result<Self, Failure> {
        let name = side.name.clone();
        let opened = Self::open_side(side, how, metering);
        opened.map_err(|failure| Side::named(&name, failure))
    }

    fn open_side(side: Side, how: &How, metering: &Metering) -> Result<Self, Failure> {
        let Side { name, place, format } = side;
        let meter = metering.meter().disk("source", &name);
        let source = |kind, bytes| Self {
            name: name.clone(),
            kind,
            bytes,
            connections: None,
            files: Vec::new(),
            program: None,
        };
        let opening = || OpenOptions {
            meter: meter.clone(),
            secrets: how.secrets.clone(),
            ..options(format, true)
        };
        match place {
            Where::Standard => {
                let input = std::io::stdin().as_fd().try_clone_to_owned();
                let input = input.map_err(|error| Failure::io("opening standard input", &error))?;
                refuse_format(format)?;
                Ok(source("stream", Bytes::Stream(File::from(input))))
            }
            Where::File(path) if is_stream(&path) => {
                refuse_format(format)?;
                let input = File::open(&path).map_err(|error| Error::io("cannot open", error))?;
                Ok(source("stream", Bytes::Stream(input)))
            }
            Where::File(path) => {
                let spec = Spec::from_path(&path).or_format(format.or(Some(Format::Raw)));
                let opened = tranship_formats::open_spec(&spec, &opening())?;
                let kind = if format.is_some() { "image" } else { "file" };
                let files = files(&opened);
                Ok(Self { files, ..source(kind, Bytes::Disk(opened.device)) })
            }
            Where::Image(spec) => {
                let opened = tranship_formats::open_spec(&spec.or_format(format), &opening())?;
                let files = files(&opened);
                Ok(Self { files, ..source("image", Bytes::Disk(opened.device)) })
            }
            Where::Server(spec) => {
                let opened = server::open(&spec, how, &opening())?;
                let connections = Some(opened.connections);
                Ok(Self { connections, ..source("server", Bytes::Disk(opened.device)) })
            }
            Where::Program(words) => {
                let mut program = Program::start(&words)?;
                let opened = server::open(&server::at(program.socket()), how, &opening())
                    .map_err(|failure| program.explain(failure))?;
                Ok(Self {
                    connections: Some(opened.connections),
                    program: Some(program),
                    ..source("program", Bytes::Disk(opened.device))
                })
            }
            Where::Null => Err(Failure::usage("there is nothing to be read")),
        }
    }

    /// Bytes of it, if that is known.
    pub(super) fn size(&self) -> Option<u64> {
        match &self.bytes {
            Bytes::Disk(disk) => Some(disk.size()),
            Bytes::Stream(_) => None,
        }
    }

    /// Whether it consists of the file at `path`, among others.
    pub(super) fn has_file(&self, path: &Path) -> bool {
        let identity = |path: &Path| path.metadata().ok().map(|file| (file.dev(), file.ino()));
        let wanted = identity(path);
        wanted.is_some() && self.files.iter().any(|file| identity(file) == wanted)
    }
}

/// How a side is opened that is in an image.
pub(super) fn options(format: Option<Format>, read_only: bool) -> OpenOptions {
    OpenOptions {
        format,
        read_only,
        trust: Trust::Parents,
        guess_backing: true,
        locking: Locking::On,
        ..OpenOptions::default()
    }
}

/// The files of an image and of what it is based on.
fn files(opened: &Opened) -> Vec<PathBuf> {
    opened.chain.iter().map(|(path, _)| path.clone()).filter(|path| path.exists()).collect()
}

/// Whether what is at `path` has bytes in one order only.
pub(super) fn is_stream(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| {
        let kind = metadata.file_type();
        kind.is_fifo() || kind.is_char_device() || kind.is_socket()
    })
}

/// Images have their bytes in any order.
pub(super) fn refuse_format(format: Option<Format>) -> Result<(), Failure> {
    match format {
        None | Some(Format::Raw) => Ok(()),
        Some(format) => Err(Failure::usage(format!(
            "a disk of format {format} cannot be read or written from front to back"
        ))),
    }
}
