// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What each format needs to be opened: its parent, its other files, its passphrase.

use super::{Base, Image, Place, Walk, Wanted};
use crate::Format;
use crate::files::Beside;
use crate::layer::Disk;
use crate::spec::{Below, VpcSize};
use std::path::Path;
use std::sync::Arc;
use tranship_block::{
    BlockDevice, DiskMeter, Error, ErrorKind, Gate, Request, Result, SectorCipher, Storage,
};
use tranship_cloop::Cloop;
use tranship_dmg::Dmg;
use tranship_qcow2::{Encryption, Qcow2};
use tranship_qed::Qed;
use tranship_vdi::Vdi;
use tranship_vhdx::Vhdx;
use tranship_vmdk::{NO_PARENT, Vmdk};
use tranship_vpc::{ParentRequest, SizeSource, Vpc};

/// What gives an image its other files, which are counted and cached as the image is.
#[derive(Debug)]
struct Counted<'a> {
    place: &'a Place<'a>,
    /// The image that asks for them.
    image: &'a Path,
    direct: bool,
    meter: &'a DiskMeter,
}

impl Gate for Counted<'_> {
    fn open(&self, request: Request<'_>) -> Result<Arc<dyn BlockDevice>> {
        let (path, file): (_, Arc<dyn BlockDevice>) = match self.place {
            Place::Folder(gate) => {
                let file = super::cached(gate.open_file(request)?, self.direct)?;
                (file.path().to_owned(), Arc::new(file))
            }
            Place::Elsewhere(gate) => {
                (self.image.with_file_name(request.name), gate.open(request)?)
            }
        };
        Ok(self.meter.file(&path).device(file))
    }
}

impl Walk<'_> {
    pub(super) fn disk(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Disk> {
        match image.format {
            Format::Raw => Ok(Disk::Raw(image.file)),
            Format::Qcow2 => self.qcow2(image, place),
            Format::Vmdk => self.vmdk(image, place),
            Format::Vpc => self.vpc(image, place),
            Format::Vhdx => self.vhdx(image, place),
            Format::Vdi => self.vdi(image, place),
            Format::Qed => self.qed(image, place),
            Format::Dmg => Ok(Disk::Other(Arc::new(Dmg::open_read_only(image.file)?))),
            Format::Cloop => Ok(Disk::Other(Arc::new(Cloop::open_read_only(image.file)?))),
            Format::Luks => self.luks(image),
            Format::Parallels => self.parallels(image, place),
            Format::Gzip | Format::Xz | Format::Zstd | Format::Bzip2 => self.packed(image),
            other => Err(Error::unsupported(format!("disks of format {other} cannot be opened"))),
        }
    }

    fn warn(&mut self, image: &str, warnings: &[String]) {
        self.warnings.extend(warnings.iter().map(|text| format!("{image}: {text}")));
    }

    fn qcow2(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Disk> {
        let header = tranship_qcow2::Header::read(&image.file)?;
        let wanted = match &header.backing {
            None => None,
            Some(backing) => {
                let format = backing.format.as_deref().map(str::parse).transpose()?;
                let names = vec![backing.name.clone()];
                Some(Wanted { names, role: "backing file", format, anywhere: true })
            }
        };
        let options = tranship_qcow2::OpenOptions {
            read_only: image.storage.is_none(),
            backing: self.base(&image, place, wanted.as_ref())?.map(|base| base.device()),
            data_file: self.data_file(&header, &image, place)?,
            cipher: self.cipher(&header, &image)?,
        };
        let disk = match image.storage {
            Some(storage) => Qcow2::open(storage, options)?,
            None => Qcow2::open_read_only_with(image.file, options)?,
        };
        Ok(Disk::Qcow2(Arc::new(disk)))
    }

    /// The file that has an image's payload: never outside of the folders that are allowed.
    fn data_file(
        &self,
        header: &tranship_qcow2::Header,
        image: &Image<'_>,
        place: &Place<'_>,
    ) -> Result<Option<Arc<dyn Storage>>> {
        if !header.has_data_file() {
            return Ok(None);
        }
        let Some(name) = &header.data_file else {
            return Err(Error::corrupt("the image keeps its data in a file that it does not name"));
        };
        let Place::Folder(gate) = place else {
            return Err(Error::new(
                ErrorKind::Denied,
                format!("the image keeps its data in another file {name:?}, which is not opened"),
            ));
        };
        // Unlike a parent, it can be made to name any file of the host as its own bytes:
        // only a user who says where such files are may have it opened.
        if self.options.allowed.is_empty() {
            return Err(Error::new(
                ErrorKind::Denied,
                format!(
                    "the image keeps its data in another file {name:?}, which is opened only \
                     below a folder that is allowed for that"
                ),
            ));
        }
        let request =
            Request { name, role: "external data file", writable: image.storage.is_some() };
        let file = super::cached(gate.open_file(request)?, image.direct)?;
        let meter = self.options.meter.file(file.path());
        Ok(Some(meter.storage(Arc::new(file))))
    }

    /// The cipher of an encrypted image, if there is a passphrase for it.
    fn cipher(
        &self,
        header: &tranship_qcow2::Header,
        image: &Image<'_>,
    ) -> Result<Option<Arc<dyn SectorCipher>>> {
        let Some(encryption) = header.encryption() else { return Ok(None) };
        let Some(passphrase) = self.passphrase(image)? else { return Ok(None) };
        match encryption {
            Encryption::Aes => tranship_luks::legacy_aes_cipher(passphrase).map(Some),
            Encryption::Luks { offset, len } => {
                let span = tranship_block::Span::new(offset, len);
                let area: Arc<dyn BlockDevice> =
                    Arc::new(tranship_block::Slice::new(Arc::clone(&image.file), span)?);
                let limits = tranship_luks::Limits::default();
                tranship_luks::unlock_cipher(&area, passphrase, &limits).map(Some)
            }
        }
    }

    /// The passphrase that the user has for `image`.
    fn passphrase(&self, image: &Image<'_>) -> Result<Option<&[u8]>> {
        match image.spec.and_then(|spec| spec.key_secret.as_deref()) {
            Some(id) => self.options.secrets.get(id).map(Some),
            None => Ok(self.options.secrets.only()),
        }
    }

    fn vmdk(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Disk> {
        let descriptor = tranship_vmdk::read_descriptor(&image.file)?;
        let is_child = |cid: &u32| *cid != NO_PARENT;
        let wanted = descriptor
            .filter(|descriptor| descriptor.parent_cid.as_ref().is_some_and(is_child))
            .and_then(|descriptor| descriptor.parent_hint)
            .map(|hint| Wanted {
                // ESXi writes absolute paths of its own: the file is beside its child.
                names: with_file_name(hint),
                role: "parent disk",
                format: Some(Format::Vmdk),
                anywhere: false,
            });
        let parent = self.base(&image, place, wanted.as_ref())?.map(|base| {
            let cid = match &base {
                Base::Disk(Disk::Vmdk(disk)) => disk.cid(),
                _ => None,
            };
            tranship_vmdk::Parent { device: base.device(), cid }
        });
        let options = tranship_vmdk::OpenOptions {
            parent,
            salvage: self.options.salvage,
            ..tranship_vmdk::OpenOptions::default()
        };
        let direct = image.direct;
        let disk = match (image.storage, place) {
            (Some(storage), Place::Folder(gate)) => {
                let (gate, meter) = (gate.clone(), self.options.meter.clone());
                let files = Beside { gate, replace: false, meter, direct };
                Vmdk::open_writable(storage, &files, options)?
            }
            _ => Vmdk::open(image.file, &self.counted(image.path, direct, place), options)?,
        };
        self.warn(image.name, disk.warnings());
        Ok(Disk::Vmdk(Arc::new(disk)))
    }

    /// The gate for the other files of the image at `path`.
    fn counted<'g>(&'g self, path: &'g Path, direct: bool, place: &'g Place<'_>) -> Counted<'g> {
        Counted { place, image: path, direct, meter: &self.options.meter }
    }

    fn vpc(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Disk> {
        let request = ParentRequest::read(&image.file)?;
        let wanted = request.as_ref().map(|request| Wanted {
            names: request.names.iter().map(|name| name.name.clone()).collect(),
            role: "parent disk",
            format: Some(Format::Vpc),
            anywhere: true,
        });
        let parent = match (self.base(&image, place, wanted.as_ref())?, &request) {
            (Some(base), Some(request)) => {
                let unique_id = match &base {
                    Base::Disk(Disk::Vpc(disk)) => disk.unique_id(),
                    // What nobody opens, or what the user gives, is what was asked for.
                    _ => request.unique_id,
                };
                Some(tranship_vpc::Parent { device: base.device(), unique_id })
            }
            _ => None,
        };
        let size = image.spec.and_then(|spec| spec.vpc_size).map(|size| match size {
            VpcSize::Chs => SizeSource::Chs,
            VpcSize::CurrentSize => SizeSource::CurrentSize,
        });
        let options = tranship_vpc::OpenOptions {
            read_only: image.storage.is_none(),
            salvage: self.options.salvage,
            force_size_calc: size,
            parent,
            ..tranship_vpc::OpenOptions::default()
        };
        let disk = match image.storage {
            Some(storage) => Vpc::open(storage, options)?,
            None => Vpc::open_read_only(image.file, options)?,
        };
        self.warn(image.name, disk.warnings());
        Ok(Disk::Vpc(Arc::new(disk)))
    }

    fn vhdx(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Disk> {
        let locator = tranship_vhdx::read_parent(&image.file)?;
        let wanted = locator.as_ref().map(|locator| Wanted {
            names: locator.names.iter().flat_map(|name| with_file_name(name.path())).collect(),
            role: "parent disk",
            format: Some(Format::Vhdx),
            anywhere: true,
        });
        let parent = match (self.base(&image, place, wanted.as_ref())?, &locator) {
            (Some(base), Some(locator)) => {
                let data_write_guid = match (&base, locator.linkage.first()) {
                    (Base::Disk(Disk::Vhdx(disk)), _) => disk.data_write_guid(),
                    (_, Some(linkage)) => *linkage,
                    (_, None) => return Err(Error::corrupt("parent locator has no linkage")),
                };
                Some(tranship_vhdx::Parent { device: base.device(), data_write_guid })
            }
            _ => None,
        };
        let options = tranship_vhdx::OpenOptions {
            read_only: image.storage.is_none(),
            salvage: self.options.salvage,
            parent,
        };
        let disk = match image.storage {
            Some(storage) => Vhdx::open(storage, options)?,
            None => Vhdx::open_read_only(image.file, options)?,
        };
        self.warn(image.name, disk.warnings());
        Ok(Disk::Vhdx(Arc::new(disk)))
    }

    fn luks(&mut self, image: Image<'_>) -> Result<Disk> {
        let passphrase = self.passphrase(&image)?.ok_or_else(|| {
            Error::usage("the disk is encrypted with LUKS, and there is no passphrase for it")
        })?;
        let limits = tranship_luks::Limits::default();
        let disk = tranship_luks::Luks::unlock(image.file, passphrase, &limits)?;
        self.warn(image.name, disk.warnings());
        Ok(Disk::Other(Arc::new(disk)))
    }

    fn parallels(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Disk> {
        if crate::probe::is_parallels_descriptor(&image.file)? {
            let text = text_of(&*image.file)?;
            let options = tranship_parallels::BundleOptions {
                salvage: self.options.salvage,
                ..Default::default()
            };
            let gate = self.counted(image.path, image.direct, place);
            let disk = tranship_parallels::Bundle::open(&text, &gate, &options)?;
            self.warn(image.name, disk.warnings());
            return Ok(Disk::Other(Arc::new(disk)));
        }
        let options =
            tranship_parallels::OpenOptions { salvage: self.options.salvage, ..Default::default() };
        let disk = tranship_parallels::Image::open_read_only(image.file, options)?;
        self.warn(image.name, disk.warnings());
        Ok(Disk::Other(Arc::new(disk)))
    }

    fn vdi(&mut self, image: Image<'_>, _place: &Place<'_>) -> Result<Disk> {
        // A child names its parent by a UUID alone, which only its user can know a file for.
        let header = tranship_vdi::Header::read(&image.file)?;
        let given = match image.spec.map(|spec| &spec.backing) {
            Some(Below::Given(base)) => Some(self.named(base, true, None)?),
            _ => None,
        };
        let parent = match given {
            Some(disk) => {
                let ids = match &disk {
                    Disk::Vdi(disk) => (disk.header().uuid, disk.header().modification),
                    _ => (header.parent, header.parent_modification),
                };
                let device = disk.device();
                Some(tranship_vdi::Parent { device, uuid: ids.0, modification: ids.1 })
            }
            None if self.options.without_backing && header.parent != [0; 16] => {
                Some(tranship_vdi::Parent {
                    device: Base::Nothing.device(),
                    uuid: header.parent,
                    modification: header.parent_modification,
                })
            }
            None => None,
        };
        let options = tranship_vdi::OpenOptions { salvage: self.options.salvage, parent };
        let disk = Vdi::open_read_only(image.file, options)?;
        self.warn(image.name, disk.warnings());
        Ok(Disk::Vdi(Arc::new(disk)))
    }

    fn qed(&mut self, image: Image<'_>, place: &Place<'_>) -> Result<Disk> {
        let header = tranship_qed::Header::read(&image.file)?;
        let wanted = match &header.backing {
            None => None,
            Some(backing) => Some(Wanted {
                names: vec![backing.name.clone()],
                role: "backing file",
                format: backing.format.map(str::parse).transpose()?,
                anywhere: true,
            }),
        };
        let backing = self.base(&image, place, wanted.as_ref())?.map(|base| base.device());
        let options = tranship_qed::OpenOptions { salvage: self.options.salvage, backing };
        let disk = Qed::open_read_only(image.file, options)?;
        self.warn(image.name, disk.warnings());
        Ok(Disk::Other(Arc::new(disk)))
    }

    fn packed(&mut self, image: Image<'_>) -> Result<Disk> {
        let options =
            tranship_packed::OpenOptions { salvage: self.options.salvage, ..Default::default() };
        let disk = tranship_packed::Packed::open(image.file, options)?;
        self.warn(image.name, disk.warnings());
        Ok(Disk::Other(Arc::new(disk)))
    }
}

/// A name, and after it the name of the file alone: paths of other systems lead nowhere,
/// but whoever copied the images has kept them together.
fn with_file_name(name: String) -> Vec<String> {
    let file = name.rsplit(['/', '\\']).next().unwrap_or_default().to_owned();
    if file == name || file.is_empty() { vec![name] } else { vec![name, file] }
}

/// The whole of a small text file.
fn text_of(file: &dyn BlockDevice) -> Result<String> {
    const MOST: u64 = 4 << 20;
    let len = usize::try_from(file.size().min(MOST)).unwrap_or(0);
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, 0)?;
    String::from_utf8(bytes)
        .map_err(|error| Error::corrupt("descriptor is not UTF-8").because(error))
}
