// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening an image together with what it is based on.

use crate::{FolderGate, Format, probe};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, ErrorKind, Gate, Request, Result, Storage};
use tranship_qcow2::{Header, Qcow2};
use tranship_raw::{Access, RawFile};
use tranship_vmdk::{NO_PARENT, Parent, Vmdk};

/// Images in a chain: QEMU has no limit, and overflows its stack instead.
const DEEPEST: usize = 64;

/// How a disk is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// The format of the first image; guessed if it is not given.
    pub format: Option<Format>,
    /// Refuse writes. Images below the first, and VMDK disks, are never written.
    pub read_only: bool,
    /// Folders, besides the image's own, in which images may ask for files.
    pub allowed: Vec<PathBuf>,
    /// Guess the format of a backing file for which the image gives none. A guess of raw
    /// is refused even so, since it may be wrong in both directions.
    pub guess_backing: bool,
}

/// An open disk.
#[derive(Debug)]
pub struct Opened {
    /// What the guest sees.
    pub device: Arc<dyn BlockDevice>,
    /// The format of the first image.
    pub format: Format,
    /// The first image.
    pub path: PathBuf,
    /// All images that contribute, the first one first.
    pub chain: Vec<(PathBuf, Format)>,
    /// What the user should know, each a sentence without a full stop.
    pub warnings: Vec<String>,
}

/// Opens the disk at `path` with its backing chain.
///
/// # Errors
///
/// [`ErrorKind::Denied`] if an image asks for a file that it may not have,
/// [`ErrorKind::Corrupt`] for a chain that is a loop or too long,
/// [`ErrorKind::Unsupported`] for a format that cannot be opened, and what opening each
/// image reports.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Opened> {
    let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let file = RawFile::open(path, access)?;
    let mut walk = Walk::new(options);
    walk.remember(&file)?;
    let file = Arc::new(file);
    let format = walk.first_format(&file, path)?;
    let storage: Option<Arc<dyn Storage>> =
        if options.read_only { None } else { Some(file.clone()) };
    let place = Place::Folder(FolderGate::beside(path, &options.allowed));
    let device = walk.image(Image { file, storage, path, format }, &place)?;
    Ok(walk.opened(device, format, path))
}

/// Opens the disk in `device`, which is called `name`, for reading: a member of an
/// archive, for example. What it asks for comes through `gate`.
///
/// # Errors
///
/// As [`open`].
pub fn open_device(
    device: Arc<dyn BlockDevice>,
    name: &Path,
    options: &OpenOptions,
    gate: &dyn Gate,
) -> Result<Opened> {
    let mut walk = Walk::new(options);
    let format = walk.first_format(&*device, name)?;
    let image = Image { file: device, storage: None, path: name, format };
    let device = walk.image(image, &Place::Elsewhere(gate))?;
    Ok(walk.opened(device, format, name))
}

/// A file, and what it is to be opened as.
struct Image<'a> {
    file: Arc<dyn BlockDevice>,
    /// The same file, if the image may be written.
    storage: Option<Arc<dyn Storage>>,
    path: &'a Path,
    format: Format,
}

/// Where an image's requests go.
enum Place<'a> {
    Folder(FolderGate),
    Elsewhere(&'a dyn Gate),
}

impl Place<'_> {
    fn gate(&self) -> &dyn Gate {
        match self {
            Self::Folder(gate) => gate,
            Self::Elsewhere(gate) => *gate,
        }
    }
}

struct Walk<'a> {
    options: &'a OpenOptions,
    chain: Vec<(PathBuf, Format)>,
    /// Content id of the VMDK disk that was opened last: of the parent, to its child.
    cid: Option<u32>,
    /// Device and inode of every file of the chain.
    seen: Vec<(u64, u64)>,
    warnings: Vec<String>,
}

impl<'a> Walk<'a> {
    fn new(options: &'a OpenOptions) -> Self {
        Self { options, chain: Vec::new(), cid: None, seen: Vec::new(), warnings: Vec::new() }
    }

    fn opened(self, device: Arc<dyn BlockDevice>, format: Format, path: &Path) -> Opened {
        Opened { device, format, path: path.to_owned(), chain: self.chain, warnings: self.warnings }
    }

    fn first_format(&mut self, file: &dyn BlockDevice, path: &Path) -> Result<Format> {
        if let Some(format) = self.options.format {
            return Ok(format);
        }
        let format = probe(file, path)?;
        if format == Format::Raw {
            self.warnings.push(format!(
                "the format of {} was not given and nothing was recognised: it is taken as raw",
                path.display()
            ));
        }
        Ok(format)
    }

    /// Notes the identity of a file before anything in it is followed.
    fn remember(&mut self, file: &RawFile) -> Result<()> {
        let facts = file.file().metadata().map_err(|error| {
            Error::io("cannot get the file's identity", error).in_file(file.path())
        })?;
        let identity = (facts.dev(), facts.ino());
        if self.seen.contains(&identity) {
            return Err(Error::corrupt("backing chain leads back to this file: it is a loop")
                .in_file(file.path()));
        }
        self.seen.push(identity);
        Ok(())
    }

    fn image(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Arc<dyn BlockDevice>> {
        if self.chain.len() >= DEEPEST {
            return Err(Error::corrupt(format!("backing chain has more than {DEEPEST} images"))
                .in_file(image.path));
        }
        self.chain.push((image.path.to_owned(), image.format));
        let path = image.path;
        match image.format {
            Format::Raw => Ok(image.file),
            Format::Qcow2 => self.qcow2(image, place),
            Format::Vmdk => self.vmdk(image, place),
            other => Err(Error::unsupported(format!("disks of format {other} cannot be opened"))),
        }
        .map_err(|error| error.in_file(path))
    }

    fn qcow2(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Arc<dyn BlockDevice>> {
        let header = Header::read(&image.file)?;
        let backing = match &header.backing {
            None => None,
            Some(backing) => {
                let format = backing.format.as_deref().map(str::parse).transpose()?;
                Some(self.below(image.path, &backing.name, "backing file", format, place)?)
            }
        };
        let disk = match image.storage {
            Some(storage) => {
                let options = tranship_qcow2::OpenOptions { read_only: false, backing };
                Qcow2::open(storage, options)?
            }
            None => Qcow2::open_read_only(image.file, backing)?,
        };
        Ok(Arc::new(disk))
    }

    fn vmdk(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Arc<dyn BlockDevice>> {
        let mut options = tranship_vmdk::OpenOptions::default();
        let descriptor = tranship_vmdk::read_descriptor(&image.file)?;
        let is_child = |cid: &u32| *cid != NO_PARENT;
        if let Some(descriptor) = descriptor
            && descriptor.parent_cid.as_ref().is_some_and(is_child)
            && let Some(hint) = &descriptor.parent_hint
        {
            let device = self.below(image.path, hint, "parent disk", Some(Format::Vmdk), place)?;
            options.parent = Some(Parent { device, cid: self.cid });
        }
        let disk = Vmdk::open(image.file, place.gate(), options)?;
        self.cid = disk.cid();
        let warnings = disk.warnings().iter();
        self.warnings.extend(warnings.map(|text| format!("{}: {text}", image.path.display())));
        Ok(Arc::new(disk))
    }

    /// Opens the image that the one at `path` is based on, for reading.
    fn below(
        &mut self,
        path: &Path,
        name: &str,
        role: &str,
        format: Option<Format>,
        place: &Place<'_>,
    ) -> Result<Arc<dyn BlockDevice>> {
        if format.is_none() && !self.options.guess_backing {
            return Err(no_format(name, "it has to be given, since guessing it is unsafe"));
        }
        let request = Request { name, role, writable: false };
        match place {
            Place::Folder(gate) => {
                let file = gate.open_file(request)?;
                self.remember(&file)?;
                let path = file.path().to_owned();
                let file: Arc<dyn BlockDevice> = Arc::new(file);
                let format = below_format(&*file, &path, name, format)?;
                let place = Place::Folder(FolderGate::beside(&path, &self.options.allowed));
                self.image(Image { file, storage: None, path: &path, format }, &place)
            }
            Place::Elsewhere(gate) => {
                let file = gate.open(request)?;
                let path = path.with_file_name(name);
                let format = below_format(&*file, &path, name, format)?;
                self.image(Image { file, storage: None, path: &path, format }, place)
            }
        }
    }
}

fn no_format(name: &str, hint: &str) -> Error {
    Error::new(
        ErrorKind::Denied,
        format!("the image does not say which format its backing file {name:?} has: {hint}"),
    )
}

fn below_format(
    file: &dyn BlockDevice,
    path: &Path,
    name: &str,
    given: Option<Format>,
) -> Result<Format> {
    match given {
        Some(format) => Ok(format),
        None => match probe(file, path)? {
            Format::Raw => Err(no_format(name, "nothing was recognised, and raw is never guessed")),
            format => Ok(format),
        },
    }
}
