// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `info` tells about an image, gathered from its format.

use super::luks;
use super::name::by_kind;
use crate::failure::Failure;
use crate::image::json::{Json, Object};
use crate::image::snapshot::{self, Shown};
use crate::image::source::{beside, shown};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use tranship_block::{BlockDevice, Slice, Span};
use tranship_formats::{Disk, Format, Layer};
use tranship_qcow2::{Bitmap, Compression, Encryption, Header};
use tranship_vmdk::{ExtentType, NO_PARENT, Vmdk};
use tranship_vpc::ParentRequest;

/// The smallest step of a disk's size.
const SECTOR: u64 = 512;

/// An image.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) name: String,
    pub(super) format: &'static str,
    pub(super) virtual_size: u64,
    /// Bytes that it takes on the host's disk, with all its files.
    pub(super) actual_size: Option<u64>,
    pub(super) cluster_size: Option<u64>,
    pub(super) is_encrypted: bool,
    /// Whether its last writer did not finish, for formats that can tell.
    pub(super) is_dirty: Option<bool>,
    pub(super) backing: Option<BackingFacts>,
    pub(super) snapshots: Vec<Shown>,
    pub(super) specific: Option<Object>,
    pub(super) children: Vec<Child>,
}

/// What an image is based on.
#[derive(Debug)]
pub(super) struct BackingFacts {
    pub(super) name: String,
    pub(super) full_name: String,
    pub(super) format: Option<String>,
}

/// A file that an image consists of.
#[derive(Debug)]
pub(super) struct Child {
    /// What the image needs it for.
    pub(super) role: String,
    pub(super) name: String,
    pub(super) protocol: &'static str,
    /// Bytes, in whole sectors.
    pub(super) length: u64,
    pub(super) actual_size: Option<u64>,
}

impl Facts {
    /// The facts about `layer`, which is shown as `name`.
    pub(super) fn of(layer: &Layer, name: String) -> Result<Self, Failure> {
        // The disk may be a part of the file only.
        let length = std::fs::metadata(&layer.path)
            .ok()
            .filter(std::fs::Metadata::is_file)
            .map_or(layer.file.size(), |facts| facts.len());
        let file = Child::file("file", &shown(layer), length);
        let mut facts = Self {
            name,
            format: layer.format.name(),
            virtual_size: layer.disk.device().size().next_multiple_of(SECTOR),
            actual_size: None,
            cluster_size: None,
            is_encrypted: layer.format == Format::Luks,
            is_dirty: Some(false),
            backing: None,
            snapshots: snapshot::list(layer)?,
            specific: None,
            children: vec![file],
        };
        match layer.format {
            Format::Vdi | Format::Qed => {
                facts.cluster_size = Some(layer.disk.device().preferred_block().into());
            }
            Format::Parallels => facts.is_dirty = None,
            _ => {}
        }
        match &layer.disk {
            _ if layer.format == Format::Qcow2 => facts.add_qcow2(layer)?,
            _ if layer.format == Format::Luks => facts.add_luks(layer)?,
            Disk::Vmdk(disk) => facts.add_vmdk(disk, layer)?,
            Disk::Vhdx(disk) => {
                facts.cluster_size = Some(disk.block_size().into());
                let parent = disk.parent_locator().and_then(|locator| locator.names.first());
                facts.backing = parent.map(|name| BackingFacts::new(layer, name.path()));
            }
            Disk::Vpc(disk) => {
                facts.cluster_size = disk.block_size().map(u64::from);
                let parent = ParentRequest::read(&layer.file)?;
                let name = parent.and_then(|parent| parent.names.into_iter().next());
                facts.backing = name.map(|name| BackingFacts::new(layer, name.name));
            }
            _ => {}
        }
        let sizes = facts.children.iter().map(|child| child.actual_size);
        facts.actual_size = sizes.into_iter().sum();
        Ok(facts)
    }

    /// All from the file itself: the disk may need a passphrase or a parent to be opened.
    fn add_qcow2(&mut self, layer: &Layer) -> Result<(), Failure> {
        let header = Header::read(&layer.file)?;
        self.virtual_size = header.size.next_multiple_of(SECTOR);
        self.cluster_size = Some(1 << header.cluster_bits);
        self.is_encrypted = header.crypt_method != 0;
        self.is_dirty = Some(header.is_dirty());
        self.backing = header.backing.as_ref().map(|backing| BackingFacts {
            name: backing.name.clone(),
            full_name: beside(&shown(layer), &backing.name).display().to_string(),
            format: backing.format.clone(),
        });
        let mut data = Object::default();
        let is_v3 = header.version >= 3;
        data.set("compat", if is_v3 { "1.1" } else { "0.10" })
            .set(
                "compression-type",
                match header.compression {
                    Compression::Zstd => "zstd",
                    Compression::Deflate => "zlib",
                },
            )
            .set("refcount-bits", 1_u32 << header.refcount_order);
        if is_v3 {
            data.set("lazy-refcounts", header.has_lazy_refcounts())
                .set_some("data-file", header.data_file.as_deref())
                .set("corrupt", header.is_marked_corrupt())
                .set("extended-l2", header.has_extended_l2());
        }
        let bitmaps = tranship_qcow2::bitmaps(&layer.file)?;
        if !bitmaps.is_empty() {
            data.set("bitmaps", bitmaps.iter().map(bitmap).collect::<Vec<_>>());
        }
        match header.encryption() {
            Some(Encryption::Luks { offset, len }) => {
                let area: Arc<dyn BlockDevice> =
                    Arc::new(Slice::new(Arc::clone(&layer.file), Span::new(offset, len))?);
                let mut encrypt = luks::described(&tranship_luks::Header::read(&area)?);
                encrypt.set("format", "luks");
                data.set("encrypt", encrypt);
            }
            Some(Encryption::Aes) => {
                let mut encrypt = Object::default();
                encrypt.set("format", "aes");
                data.set("encrypt", encrypt);
            }
            _ => {}
        }
        if header.has_data_file() {
            data.set("data-file-raw", header.is_data_file_raw());
        }
        self.specific = Some(data);
        Ok(())
    }

    fn add_luks(&mut self, layer: &Layer) -> Result<(), Failure> {
        let header = tranship_luks::Header::read(&layer.file)?;
        let rest = layer.file.size().saturating_sub(header.payload_offset);
        self.virtual_size = header.payload_len.unwrap_or(rest);
        self.specific = Some(luks::described(&header));
        Ok(())
    }

    fn add_vmdk(&mut self, disk: &Vmdk, layer: &Layer) -> Result<(), Failure> {
        let descriptor = tranship_vmdk::read_descriptor(&layer.file)?;
        self.backing = descriptor
            .filter(|descriptor| descriptor.parent_cid.is_some_and(|cid| cid != NO_PARENT))
            .and_then(|descriptor| descriptor.parent_hint)
            .map(|hint| BackingFacts::new(layer, hint));
        let extents = disk.extents();
        self.cluster_size = extents.iter().find_map(|extent| extent.grain);
        let listed = extents.iter().map(|extent| {
            let file = extent.name.as_deref().map(|name| beside(&shown(layer), name));
            let file = file.unwrap_or_else(|| shown(layer)).display().to_string();
            let kind = if extent.name.is_some() { extent_type(extent.kind) } else { "" };
            let mut object = Object::default();
            object
                .set("virtual-size", extent.len)
                .set("filename", file)
                .set_some("cluster-size", extent.grain)
                .set("format", kind);
            if extent.compressed {
                object.set("compressed", true);
            }
            Json::from(object)
        });
        let mut data = Object::default();
        data.set("cid", disk.cid().unwrap_or(0))
            .set("parent-cid", disk.parent_cid().unwrap_or(u32::MAX))
            .set("create-type", disk.create_type())
            .set("extents", listed.collect::<Vec<_>>());
        self.specific = Some(data);
        for (at, extent) in extents.iter().enumerate() {
            if let Some(name) = &extent.name {
                let path = beside(&shown(layer), name);
                let length = std::fs::metadata(&path).map_or(0, |facts| facts.len());
                self.children.insert(0, Child::file(&format!("extents.{at}"), &path, length));
            }
        }
        Ok(())
    }
}

impl BackingFacts {
    /// A parent of the same format.
    fn new(layer: &Layer, name: String) -> Self {
        let full_name = beside(&shown(layer), &name).display().to_string();
        Self { name, full_name, format: Some(layer.format.name().to_owned()) }
    }
}

impl Child {
    fn file(role: &str, path: &Path, length: u64) -> Self {
        Self {
            role: role.to_owned(),
            name: path.display().to_string(),
            protocol: by_kind(path),
            length: length.next_multiple_of(SECTOR),
            actual_size: std::fs::metadata(path).ok().map(|facts| facts.blocks() * 512),
        }
    }
}

fn bitmap(bitmap: &Bitmap) -> Json {
    let flags = [(bitmap.is_in_use, "in-use"), (bitmap.is_enabled, "auto")];
    let flags = flags.iter().filter(|(is_set, _)| *is_set).map(|(_, name)| Json::from(*name));
    let mut object = Object::default();
    object
        .set("name", bitmap.name.as_str())
        .set("granularity", bitmap.granularity)
        .set("flags", flags.collect::<Vec<_>>());
    object.into()
}

fn extent_type(kind: ExtentType) -> &'static str {
    match kind {
        ExtentType::Flat => "FLAT",
        ExtentType::Sparse => "SPARSE",
        ExtentType::Zero => "ZERO",
        ExtentType::Vmfs => "VMFS",
        ExtentType::VmfsSparse => "VMFSSPARSE",
        _ => "SESPARSE",
    }
}
