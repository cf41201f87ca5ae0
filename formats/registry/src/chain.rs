// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening an image together with what it is based on.

mod formats;
mod member;

use crate::layer::{Disk, Layer, Opened};
use crate::null::NullDevice;
use crate::spec::{Below, Member, NbdAddress, SliceOf, Spec};
use crate::{Files, FolderGate, Format, Secrets, probe};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tranship_block::{
    BlockDevice, DiskMeter, Error, ErrorKind, Gate, MemoryDevice, Request, Result, Slice, Span,
    Storage,
};
use tranship_nbd::{ClientOptions, Remote, Retry, Uri};
use tranship_raw::{Access, ImageLock, RawFile};
use tranship_tar::is_tar;

/// Images in a chain: QEMU has no limit, and overflows its stack instead.
const DEEPEST: usize = 64;

/// Where the parents of an image may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Whatever the image asks for, only its own folder and the allowed ones are open to
    /// it: for images that came from somebody else.
    #[default]
    Folder,
    /// The parent of a QCOW2, VHD or VHDX image may be any regular file or block device,
    /// as users of `qemu-img` expect. Extents of a VMDK and data files stay in the folder.
    Parents,
}

/// How programs that use the same files are kept away: by the locks that QEMU takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Not at all.
    #[default]
    Off,
    /// Nobody else may write what is opened here, and nobody may use what is written.
    On,
    /// The same for what is written; what is only read may be written by others.
    Shared,
}

/// How a disk is opened.
#[allow(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// The format of the first image; guessed if it is not given.
    pub format: Option<Format>,
    /// Refuse writes. Images below the first are never written.
    pub read_only: bool,
    /// Where parents may be.
    pub trust: Trust,
    /// Folders, besides the image's own, in which images may ask for files, and URIs of
    /// exports that an image may be based on.
    pub allowed: Vec<PathBuf>,
    /// Guess the format of a backing file for which the image gives none. A guess of raw
    /// is refused even so, since it may be wrong in both directions.
    pub guess_backing: bool,
    /// Open the first image alone: what it does not have itself reads as zero.
    pub without_backing: bool,
    /// How programs that use the same files are kept away.
    pub locking: Locking,
    /// Go past the page cache with the first image.
    pub direct: bool,
    /// Go past the page cache with the images below the first.
    pub direct_below: bool,
    /// Give what is there of a damaged image, with warnings, and zeroes for the rest.
    pub salvage: bool,
    /// Passphrases of encrypted images.
    pub secrets: Secrets,
    /// What counts the disk and its files, and holds the disk to a rate.
    pub meter: DiskMeter,
    /// Where the files come from.
    pub files: Files,
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
    open_spec(&Spec::from_path(path), options)
}

/// Opens the disk that `spec` names with its backing chain.
///
/// # Errors
///
/// As [`open`].
pub fn open_spec(spec: &Spec, options: &OpenOptions) -> Result<Opened> {
    let mut walk = Walk::new(options);
    let path = spec.path().unwrap_or(Path::new(&spec.name)).to_owned();
    let disk = walk.named(spec, options.read_only, options.format)?;
    let format = walk.chain.first().map_or(Format::Raw, |(_, format)| *format);
    Ok(walk.opened(disk.device(), format, &path))
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
    let shown = name.display().to_string();
    let direct = options.direct;
    let image =
        Image { file: device, storage: None, name: &shown, path: name, format, spec: None, direct };
    let disk = walk.image(image, &Place::Elsewhere(gate))?;
    Ok(walk.opened(disk.device(), format, name))
}

/// A file, and what it is to be opened as.
struct Image<'a> {
    file: Arc<dyn BlockDevice>,
    /// The same file, if the image may be written.
    storage: Option<Arc<dyn Storage>>,
    name: &'a str,
    path: &'a Path,
    format: Format,
    /// What its user said about it, if it was its user who named it.
    spec: Option<&'a Spec>,
    /// Its files are read and written past the page cache.
    direct: bool,
}

/// Where an image's requests go.
#[derive(Debug)]
enum Place<'a> {
    Folder(FolderGate),
    Elsewhere(&'a dyn Gate),
}

struct Walk<'a> {
    options: &'a OpenOptions,
    chain: Vec<(PathBuf, Format)>,
    /// Device and inode of every file of the chain.
    seen: Vec<(u64, u64)>,
    warnings: Vec<String>,
    /// The first image last: each is complete only after what it is based on.
    layers: Vec<Layer>,
}

impl<'a> Walk<'a> {
    fn new(options: &'a OpenOptions) -> Self {
        Self {
            options,
            chain: Vec::new(),
            seen: Vec::new(),
            warnings: Vec::new(),
            layers: Vec::new(),
        }
    }

    fn opened(mut self, device: Arc<dyn BlockDevice>, format: Format, path: &Path) -> Opened {
        self.layers.reverse();
        Opened {
            device: self.options.meter.device(device),
            format,
            path: path.to_owned(),
            chain: self.chain,
            warnings: self.warnings,
            layers: self.layers,
        }
    }

    /// Opens an image that the user names.
    fn named(&mut self, spec: &Spec, read_only: bool, format: Option<Format>) -> Result<Disk> {
        let is_first = self.chain.is_empty();
        let direct = if is_first { self.options.direct } else { self.options.direct_below };
        let path = spec.path().unwrap_or(Path::new(&spec.name));
        // A disk of Parallels is a folder.
        let inside = path.join("DiskDescriptor.xml");
        let path = if self.options.files.has(&inside) { &inside } else { path };
        let (file, storage): (Arc<dyn BlockDevice>, Option<Arc<dyn Storage>>) = match &spec.place {
            crate::spec::Place::File(_) => {
                let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
                let open = || RawFile::open(path, access);
                let file = self.options.files.open(path, access, open)?;
                self.remember(&file)?;
                self.lock(&file, read_only)?;
                let file = Arc::new(cached(file, direct)?);
                (file.clone(), Some(file))
            }
            crate::spec::Place::Null { size } => {
                let file = Arc::new(NullDevice { size: *size });
                (file.clone(), Some(file))
            }
            crate::spec::Place::Nbd(address) => {
                let remote = client(address, read_only, &self.options.secrets)
                    .and_then(|options| {
                        let address = &address.uri.address;
                        self.options.files.connect(&spec.name, address, &options)
                    })
                    .map_err(|error| error.in_file(&spec.name))?;
                (remote.clone(), Some(remote))
            }
        };
        let given = spec.format.or(format).or(self.options.format.filter(|_| is_first));
        let wanted = match &spec.member {
            // An archive is a package of disks, unless its user says that it is a raw disk.
            None if given.is_none() && spec.slice.is_none() && is_tar(&*file)? => {
                Some(&Member::OnlyDisk)
            }
            wanted => wanted.as_ref(),
        };
        if let Some(wanted) = wanted {
            return self.member(spec, wanted, (file, path), (read_only, direct), given);
        }
        let format = match given {
            Some(format) => format,
            None => self.first_format(&file, path)?,
        };
        let storage = storage.filter(|_| !read_only);
        let allowed = &self.options.allowed;
        let place = Place::Folder(match spec.path() {
            Some(_) => self.beside(path),
            // The folders in a URI are none of this host's.
            None => {
                FolderGate { files: self.options.files.clone(), ..FolderGate::nowhere(allowed) }
            }
        });
        let (file, storage) = match spec.slice {
            None => (file, storage),
            Some(slice) => (part_of(file, slice, path)?, None),
        };
        let name = &spec.name;
        let image = Image { file, storage, name, path, format, spec: Some(spec), direct };
        self.image(image, &place)
    }

    /// The gate for what the image at `path` asks for.
    fn beside(&self, path: &Path) -> FolderGate {
        let gate = FolderGate::beside(path, &self.options.allowed);
        FolderGate { files: self.options.files.clone(), ..gate }
    }

    /// Takes the locks by which QEMU's programs keep out of each other's way.
    fn lock(&self, file: &RawFile, read_only: bool) -> Result<()> {
        let lock = match (self.options.locking, read_only) {
            (Locking::Off, _) => return Ok(()),
            (Locking::Shared, true) => ImageLock::ReadShared,
            (_, true) => ImageLock::Read,
            (_, false) => ImageLock::Write,
        };
        file.lock(lock).map(drop)
    }

    fn first_format(&mut self, file: &dyn BlockDevice, path: &Path) -> Result<Format> {
        // What its user says holds for the first image only.
        if let Some(format) = self.options.format.filter(|_| self.chain.is_empty()) {
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

    fn image(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Disk> {
        if self.chain.len() >= DEEPEST {
            return Err(Error::corrupt(format!("backing chain has more than {DEEPEST} images"))
                .in_file(image.path));
        }
        self.chain.push((image.path.to_owned(), image.format));
        let meter = self.options.meter.file(image.path);
        let image = Image {
            file: meter.device(image.file),
            storage: image.storage.map(|storage| meter.storage(storage)),
            ..image
        };
        let (file, storage) = (Arc::clone(&image.file), image.storage.clone());
        let (name, path, format) = (image.name, image.path, image.format);
        let disk = self.disk(image, place).map_err(|error| error.in_file(path))?;
        self.layers.push(Layer {
            name: name.to_owned(),
            path: path.to_owned(),
            format,
            file,
            storage,
            disk: disk.clone(),
        });
        Ok(disk)
    }

    /// What an image is based on: what its user says, or else what itself asks for.
    fn base(
        &mut self,
        image: &Image<'_>,
        place: &Place<'_>,
        wanted: Option<&Wanted>,
    ) -> Result<Option<Base>> {
        match image.spec.map_or(&Below::AsTheImageSays, |spec| &spec.backing) {
            Below::Nothing => return Ok(wanted.map(|_| Base::Nothing)),
            Below::Given(base) => return self.named(base, true, None).map(Base::Disk).map(Some),
            Below::AsTheImageSays => {}
        }
        let Some(wanted) = wanted else { return Ok(None) };
        // Nobody asks an image that is opened alone for what it does not have.
        if self.options.without_backing {
            return Ok(Some(Base::Nothing));
        }
        match self.below(image.path, wanted, place) {
            Ok(disk) => Ok(Some(Base::Disk(disk))),
            Err(error) if self.options.salvage => {
                self.warnings.push(format!(
                    "{}: the {} cannot be opened, its part reads as zero: {error}",
                    image.name, wanted.role
                ));
                Ok(Some(Base::Nothing))
            }
            Err(error) => Err(error),
        }
    }

    /// Opens the image that the one at `path` is based on, for reading.
    fn below(&mut self, path: &Path, wanted: &Wanted, place: &Place<'_>) -> Result<Disk> {
        let mut missing = None;
        for name in &wanted.names {
            match self.below_by_name(path, name, wanted, place) {
                // Images of other systems know names that mean nothing here.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    missing.get_or_insert(error);
                }
                other => return other,
            }
        }
        Err(missing.unwrap_or_else(|| {
            Error::corrupt(format!("the image needs a {} and does not name it", wanted.role))
        }))
    }

    fn below_by_name(
        &mut self,
        path: &Path,
        name: &str,
        wanted: &Wanted,
        place: &Place<'_>,
    ) -> Result<Disk> {
        let format = wanted.format;
        // Which servers are asked, its user decides alone, who has named this one.
        if Uri::is_like(name) && self.options.allowed.iter().any(|word| word.as_os_str() == name) {
            let format = format.ok_or_else(|| no_format(name, "on a server it is not guessed"))?;
            return self.named(&Spec::from_name(name)?.or_format(Some(format)), true, None);
        }
        if format.is_none() && !self.options.guess_backing {
            return Err(no_format(name, "it has to be given, since guessing it is unsafe"));
        }
        let request = Request { name, role: wanted.role, writable: false };
        let (direct, storage, spec) = (self.options.direct_below, None, None);
        match place {
            Place::Folder(gate) => {
                let file = match self.options.trust {
                    Trust::Parents if wanted.anywhere => gate.open_parent(request)?,
                    _ => gate.open_file(request)?,
                };
                self.remember(&file)?;
                self.lock(&file, true)?;
                let path = file.path().to_owned();
                let file: Arc<dyn BlockDevice> = Arc::new(cached(file, direct)?);
                let format = below_format(&*file, &path, name, format)?;
                let place = Place::Folder(self.beside(&path));
                let image = Image { file, storage, name, path: &path, format, spec, direct };
                self.image(image, &place)
            }
            Place::Elsewhere(gate) => {
                let file = gate.open(request)?;
                let path = path.with_file_name(name);
                let format = below_format(&*file, &path, name, format)?;
                let image = Image { file, storage, name, path: &path, format, spec, direct };
                self.image(image, place)
            }
        }
    }
}

/// What an image is based on.
enum Base {
    Disk(Disk),
    /// It asks for something, and nobody wants to open that.
    Nothing,
}

impl Base {
    fn device(&self) -> Arc<dyn BlockDevice> {
        match self {
            Self::Disk(disk) => disk.device(),
            Self::Nothing => Arc::new(MemoryDevice::read_only(Vec::new())),
        }
    }
}

/// What an image asks to be based on.
struct Wanted {
    /// Its names, in the order in which they are to be tried.
    names: Vec<String>,
    role: &'static str,
    format: Option<Format>,
    /// It may be outside of the image's folder, for users who say so.
    anywhere: bool,
}

/// The file, past the page cache if that is wanted.
pub(crate) fn cached(file: RawFile, direct: bool) -> Result<RawFile> {
    if direct { file.into_direct() } else { Ok(file) }
}

/// The export at `address`.
pub(crate) fn connect(address: &NbdAddress, read_only: bool, secrets: &Secrets) -> Result<Remote> {
    Remote::connect(&address.uri.address, &client(address, read_only, secrets)?)
}

/// How the export at `address` is spoken to.
fn client(address: &NbdAddress, read_only: bool, secrets: &Secrets) -> Result<ClientOptions> {
    Ok(ClientOptions {
        export: address.uri.export.clone(),
        read_only,
        tls: secrets.tls_for(address)?,
        retry: Retry { budget: address.reconnect },
        ..ClientOptions::default()
    })
}

/// The part of a raw file that is the disk.
fn part_of(file: Arc<dyn BlockDevice>, part: SliceOf, path: &Path) -> Result<Arc<dyn BlockDevice>> {
    let rest = file.size().checked_sub(part.offset).ok_or_else(|| {
        Error::usage(format!("offset {} is past the file's {} bytes", part.offset, file.size()))
            .in_file(path)
    })?;
    let span = Span::new(part.offset, part.size.unwrap_or(rest));
    Ok(Arc::new(Slice::new(file, span).map_err(|error| error.in_file(path))?))
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
