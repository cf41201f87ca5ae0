// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making new images, empty or to be filled.

use crate::chain::connect;
use crate::files::Beside;
use crate::replacing::{Replacing, WhenEmpty};
use crate::unflushed::Unflushed;
use crate::{FolderGate, Format, NbdAddress, Place, Secrets, Spec};
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, DiskMeter, Error, PackedTarget, Result, Span, Storage, Zeroing};
use tranship_qcow2::Qcow2;
use tranship_raw::{Access, ImageLock, Preallocation, RawFile};
use tranship_vhdx::Vhdx;
use tranship_vmdk::{Subformat, Vmdk};
use tranship_vpc::Vpc;

/// A new image, with what its format lets one choose.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Create {
    /// Bytes that read as zero.
    Raw {
        /// Bytes.
        size: u64,
        /// Space that is reserved for them.
        preallocation: Preallocation,
    },
    /// A QCOW2 image.
    Qcow2(tranship_qcow2::CreateOptions),
    /// A VHD image.
    Vpc(tranship_vpc::CreateOptions),
    /// A VHDX image.
    Vhdx(tranship_vhdx::CreateOptions),
    /// A VMDK disk, with all its files.
    Vmdk(tranship_vmdk::CreateOptions),
}

impl Create {
    /// The format of the image.
    pub fn format(&self) -> Format {
        match self {
            Self::Raw { .. } => Format::Raw,
            Self::Qcow2(_) => Format::Qcow2,
            Self::Vpc(_) => Format::Vpc,
            Self::Vhdx(_) => Format::Vhdx,
            Self::Vmdk(_) => Format::Vmdk,
        }
    }
}

/// Makes an image in the file that `spec` names, or on its export; what was there is lost. A
/// regular file is shown to `when_empty` before anything is in it.
///
/// # Errors
///
/// [`tranship_block::ErrorKind::Usage`] for what no image can be: the file keeps what it
/// holds then. What writing reports: what is there then cannot be opened. A file that was
/// not there before is removed.
pub fn create(spec: &Spec, what: &Create, when_empty: Option<WhenEmpty>) -> Result<()> {
    let path = match &spec.place {
        Place::File(path) => path,
        Place::Nbd(address) => {
            return create_on_export(address, what).map_err(|error| error.in_file(&spec.name));
        }
        Place::Null { .. } => {
            let name = &spec.name;
            return Err(Error::unsupported(format!("{name} is no file to make an image in")));
        }
    };
    let file = Arc::new(Replacing::begin(path, when_empty)?);
    let made = if let Create::Raw { size, preallocation } = what {
        file.grow(*size, *preallocation)
    } else {
        let storage: Arc<dyn Storage> = Arc::<Replacing>::clone(&file);
        create_in(&storage, path, what)
    };
    if made.is_err() {
        file.give_up();
    }
    made.map_err(|error| error.in_file(path))
}

/// Makes an image on an export, which has to be long enough: it keeps its size, and what it
/// has where the image has nothing.
fn create_on_export(address: &NbdAddress, what: &Create) -> Result<()> {
    if !matches!(what, Create::Raw { .. } | Create::Qcow2(_)) {
        let format = what.format();
        return Err(Error::unsupported(format!("{format} images are made in files alone")));
    }
    let storage: Arc<dyn Storage> = Arc::new(connect(address, false, &Secrets::default())?);
    if storage.is_read_only() {
        return Err(Error::usage("the NBD export is read-only"));
    }
    if matches!(what, Create::Raw { .. }) {
        // As QEMU does it: the disk is not to be taken for the image that was there before.
        let start = Span::new(0, storage.size().min(512));
        storage.write_zeroes(start, Zeroing::KeepAllocated)?;
    }
    create_in(&storage, Path::new(""), what)?;
    storage.flush()
}

fn create_in(storage: &Arc<dyn Storage>, path: &Path, what: &Create) -> Result<()> {
    match what {
        // Its space was reserved with its file.
        Create::Raw { size, .. } => storage.set_len(*size),
        Create::Qcow2(options) => tranship_qcow2::create(&**storage, options),
        Create::Vpc(options) => tranship_vpc::create(&**storage, options),
        Create::Vhdx(options) => tranship_vhdx::create(&**storage, options),
        Create::Vmdk(options) => {
            tranship_vmdk::create(&**storage, &beside(path, &FillOptions::default()), options)
        }
    }
}

/// How a new image is filled.
#[allow(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
#[derive(Clone, Debug, Default)]
pub struct FillOptions {
    /// Compress its units.
    pub compressed: bool,
    /// What was written and flushed survives a kill, so that filling can go on; slower.
    pub restartable: bool,
    /// Go on with an image that an earlier run has begun with the same options.
    pub resume: bool,
    /// A flush waits for the disk.
    pub durable: bool,
    /// Go past the page cache.
    pub direct: bool,
    /// What counts the files.
    pub meter: DiskMeter,
}

/// A new image that is being filled: until [`Self::finish`] it is none.
#[derive(Debug)]
pub enum Filling {
    /// Written like any disk; reads as zero, or from what it is based on, until then.
    Device(Arc<dyn BlockDevice>),
    /// The same, but its tables are kept back.
    Qcow2(Arc<Qcow2>),
    /// Written in units that are compressed.
    Packed(Arc<dyn PackedTarget>),
}

impl Filling {
    /// What the guest sees, if it can be written in any order.
    pub fn device(&self) -> Option<Arc<dyn BlockDevice>> {
        match self {
            Self::Device(device) => Some(Arc::clone(device)),
            Self::Qcow2(disk) => Some(Arc::<Qcow2>::clone(disk)),
            Self::Packed(_) => None,
        }
    }

    /// Makes it an image.
    ///
    /// # Errors
    ///
    /// I/O errors.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::Device(device) => device.flush(),
            Self::Qcow2(disk) => disk.finish(),
            // Whoever packs finishes as well.
            Self::Packed(_) => Ok(()),
        }
    }
}

/// Begins the image `what` in the file `path`. What it is based on is read from `backing`.
/// The meter counts the files: the disk goes through [`DiskMeter::device`] of whoever fills
/// it.
///
/// # Errors
///
/// As [`create`]; [`tranship_block::ErrorKind::Unsupported`] if images of the format cannot
/// be compressed, or not in a restartable way.
pub fn fill(
    path: &Path,
    what: &Create,
    options: &FillOptions,
    backing: Option<Arc<dyn BlockDevice>>,
) -> Result<Filling> {
    let storage =
        if options.resume { existing(path, options)? } else { emptied(path, what, options)? };
    begin(storage, path, what, options, backing).map_err(|error| error.in_file(path))
}

fn begin(
    storage: Arc<dyn Storage>,
    path: &Path,
    what: &Create,
    options: &FillOptions,
    backing: Option<Arc<dyn BlockDevice>>,
) -> Result<Filling> {
    let is_stream =
        matches!(what, Create::Vmdk(disk) if disk.subformat == Subformat::StreamOptimized);
    let is_packed = options.compressed || is_stream;
    if is_packed && options.restartable {
        return Err(Error::unsupported(
            "a compressed image is written in one go: such a copy cannot be resumed",
        ));
    }
    if is_packed {
        return match what {
            Create::Vmdk(what) if is_stream => {
                let packed = tranship_vmdk::StreamTarget::create(storage, what)?;
                Ok(Filling::Packed(Arc::new(packed)))
            }
            Create::Qcow2(what) => {
                let packed = tranship_qcow2::create_packed(storage, what)?;
                Ok(Filling::Packed(Arc::new(packed)))
            }
            _ => Err(Error::unsupported("Compression not supported for this file format")),
        };
    }
    if let (Create::Qcow2(what), false) = (what, options.restartable) {
        let disk = tranship_qcow2::create_over(storage, what, backing)?;
        return Ok(Filling::Qcow2(Arc::new(disk)));
    }
    if !options.resume {
        create_in(&storage, path, what)?;
    }
    let device: Arc<dyn BlockDevice> = match what {
        Create::Raw { .. } => storage,
        Create::Qcow2(what) => {
            if options.resume {
                // What the interrupted run had allocated and not yet put to use.
                tranship_qcow2::repair_leaks(&*storage)?;
            }
            let data_file = what.data_file.as_ref().map(|file| Arc::clone(&file.storage));
            let options = tranship_qcow2::OpenOptions { backing, data_file, ..Default::default() };
            Arc::new(Qcow2::open(storage, options)?)
        }
        Create::Vpc(what) => {
            let parent = what.parent.as_ref().zip(backing).map(|(parent, device)| {
                tranship_vpc::Parent { device, unique_id: parent.unique_id }
            });
            let options = tranship_vpc::OpenOptions { parent, ..Default::default() };
            Arc::new(Vpc::open(storage, options)?)
        }
        Create::Vhdx(what) => {
            let linkage = what.parent.as_ref().and_then(|parent| parent.linkage.first());
            let parent = linkage.zip(backing).map(|(linkage, device)| tranship_vhdx::Parent {
                device,
                data_write_guid: *linkage,
            });
            let options = tranship_vhdx::OpenOptions { parent, ..Default::default() };
            Arc::new(Vhdx::open(storage, options)?)
        }
        Create::Vmdk(_) => {
            // The new disk names it by the content id that it was given for it.
            let parent = backing.map(|device| tranship_vmdk::Parent { device, cid: None });
            let files = beside(path, options);
            let options = tranship_vmdk::OpenOptions { parent, ..Default::default() };
            Arc::new(Vmdk::open_writable(storage, &files, options)?)
        }
    };
    Ok(Filling::Device(device))
}

/// The file at `path` without its contents; it is made if it is not there.
fn emptied(path: &Path, what: &Create, options: &FillOptions) -> Result<Arc<dyn Storage>> {
    let (size, space) = match what {
        Create::Raw { size, preallocation } => (*size, *preallocation),
        _ => (0, Preallocation::Off),
    };
    stored(RawFile::create_or_replace(path, size, space)?, options)
}

fn existing(path: &Path, options: &FillOptions) -> Result<Arc<dyn Storage>> {
    let file = RawFile::open(path, Access::ReadWrite)?;
    file.lock(ImageLock::Write)?;
    stored(file, options)
}

fn stored(file: RawFile, options: &FillOptions) -> Result<Arc<dyn Storage>> {
    let meter = options.meter.file(file.path());
    let file = if options.direct { file.into_direct()? } else { file };
    let file = meter.storage(Arc::new(file));
    Ok(if options.durable { file } else { Arc::new(Unflushed(file)) })
}

/// The files beside the one at `path`.
fn beside(path: &Path, options: &FillOptions) -> Beside {
    let FillOptions { meter, direct, .. } = options;
    let gate = FolderGate::beside(path, &[]);
    Beside { gate, replace: true, meter: meter.clone(), direct: *direct }
}
