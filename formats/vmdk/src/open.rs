// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening a disk: from the first bytes to a checked list of extents.

use crate::disk::{Backing, Piece, Vmdk};
use crate::extents::{ExtentFiles, OpenFile, Source};
use crate::files::{Files, sparse};
use crate::header::{self, MAGIC};
use crate::identity::{DescriptorPlace, Identity};
use crate::layout::Layout;
use crate::line::{Access, ExtentLine, ExtentType, check_apart};
use crate::{Descriptor, cowd, sesparse};
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Gate, Result, Storage};

/// Largest descriptor file: 4096 extents with names of 255 bytes and more.
const MAX_DESCRIPTOR_FILE: u64 = 2 << 20;

/// How to open a disk.
#[derive(Debug, Default)]
pub struct OpenOptions {
    /// The disk that a snapshot is based on. Without it a snapshot is refused, unless it is
    /// salvaged.
    pub parent: Option<Parent>,
    /// Go on where extents, tables and grains are missing or damaged: they read as zeroes,
    /// with warnings and [`Vmdk::losses`]. For reading alone.
    pub salvage: bool,
    /// Use a parent whose content id is not the one that the snapshot was made from.
    pub ignore_cid: bool,
}

/// The disk below a snapshot.
#[derive(Debug)]
pub struct Parent {
    /// Its guest-visible bytes.
    pub device: Arc<dyn BlockDevice>,
    /// Its content id; if known it must be the one that the snapshot was made from.
    pub cid: Option<u32>,
}

/// What a file is by its first bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum File {
    /// A hosted sparse extent.
    Hosted,
    /// A delta extent of ESX.
    Cowd,
    /// A delta extent of newer ESXi.
    SeSparse,
    /// A descriptor.
    Text,
}

/// Whether `head`, the first bytes of a file, looks like a VMDK of any kind, including
/// extents that [`Vmdk::open`] refuses because they are only a part of a disk.
pub fn probe(head: &[u8]) -> bool {
    file_kind(head).is_some()
}

/// First line of the descriptors that VMware's products write, in lower case.
const SIGNATURE: &[u8] = b"# disk descriptorfile";

pub(crate) fn file_kind(head: &[u8]) -> Option<File> {
    let magics = [
        (MAGIC.as_slice(), File::Hosted),
        (cowd::MAGIC, File::Cowd),
        (sesparse::MAGIC, File::SeSparse),
    ];
    if let Some((_, kind)) = magics.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some(*kind);
    }
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    if text.get(..SIGNATURE.len()).is_some_and(|start| start.eq_ignore_ascii_case(SIGNATURE)) {
        return Some(File::Text);
    }
    // Hand-made descriptors have other comments, or none.
    let mut lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"))?;
    let (key, value) = std::str::from_utf8(first).ok()?.split_once('=')?;
    let known = matches!(value.trim(), "1" | "2" | "3");
    (known && key.trim().eq_ignore_ascii_case("version")).then_some(File::Text)
}

/// The descriptor of the disk in `device`; none if a sparse extent has no embedded one.
///
/// # Errors
///
/// Not a VMDK, or a descriptor that cannot be read.
pub fn read_descriptor(device: &dyn BlockDevice) -> Result<Option<Descriptor>> {
    match file_kind(&read_head(device)?) {
        Some(File::Hosted) => embedded(device, &header::read_front(device)?),
        Some(File::Cowd | File::SeSparse) => Ok(None),
        Some(File::Text) => read_text(device).map(Some),
        None => Err(not_a_disk()),
    }
}

pub(crate) fn read_head(device: &dyn BlockDevice) -> Result<Vec<u8>> {
    let len = device.size().min(4096);
    let mut head = vec![0; usize::try_from(len).unwrap_or(0)];
    device.read_at(&mut head, 0)?;
    Ok(head)
}

pub(crate) fn not_a_disk() -> Error {
    Error::corrupt(
        "neither a VMDK descriptor nor a VMDK sparse extent; a file called -flat.vmdk holds \
         plain bytes and belongs to a descriptor",
    )
}

pub(crate) fn embedded(device: &dyn BlockDevice, layout: &Layout) -> Result<Option<Descriptor>> {
    let Some(span) = layout.descriptor else { return Ok(None) };
    if span.check_within(device.size()).is_err() {
        return Err(
            Error::corrupt("the embedded descriptor ends past the end of the file").at(span.start)
        );
    }
    let mut text = vec![0; usize::try_from(span.len).unwrap_or(0)];
    device.read_at(&mut text, span.start)?;
    if text.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    Descriptor::parse(&text).map(Some).map_err(|error| error.at(span.start))
}

pub(crate) fn read_text(device: &dyn BlockDevice) -> Result<Descriptor> {
    let size = device.size();
    if size > MAX_DESCRIPTOR_FILE {
        return Err(Error::corrupt(format!(
            "descriptor file is {size} bytes, expected at most {MAX_DESCRIPTOR_FILE}"
        )));
    }
    let mut text = vec![0; usize::try_from(size).unwrap_or(0)];
    device.read_at(&mut text, 0)?;
    Descriptor::parse(&text)
}

impl Vmdk {
    /// Opens the disk whose first or only file is `device` for reading; its other files, if
    /// it has any, are asked of `gate` by the names that the descriptor gives them.
    ///
    /// # Errors
    ///
    /// What is damaged, truncated or beyond the format's limits is
    /// [`tranship_block::ErrorKind::Corrupt`]; mapped LUNs, delta extents without their
    /// descriptor and snapshots without [`OpenOptions::parent`] are
    /// [`tranship_block::ErrorKind::Unsupported`]; names that may not be opened are what
    /// `gate` says.
    pub fn open(
        device: Arc<dyn BlockDevice>,
        gate: &dyn Gate,
        options: OpenOptions,
    ) -> Result<Self> {
        open(OpenFile::read_only(device), Source::Gate(gate), options)
    }

    /// Opens the disk whose first or only file is `storage` for reading and writing; its
    /// other files come from `files`. The first write changes the content id, so that
    /// snapshots of the disk notice.
    ///
    /// # Errors
    ///
    /// As [`Self::open`]; besides, [`tranship_block::ErrorKind::Unsupported`] for disks
    /// with compressed grains or ESX deltas, and [`tranship_block::ErrorKind::Usage`] for
    /// read-only storage and for salvaging.
    pub fn open_writable(
        storage: Arc<dyn Storage>,
        files: &dyn ExtentFiles,
        options: OpenOptions,
    ) -> Result<Self> {
        if storage.is_read_only() {
            return Err(Error::usage("the disk's first file is read-only"));
        }
        if options.salvage {
            return Err(Error::usage("a disk that is salvaged cannot be written"));
        }
        open(OpenFile::writable(storage), Source::Files(files), options)
    }
}

/// Opens a disk, to be written if its first file can be.
pub(crate) fn open(file: OpenFile, source: Source<'_>, options: OpenOptions) -> Result<Vmdk> {
    let writable = file.storage.is_some();
    match file_kind(&read_head(&file.device)?) {
        Some(File::Text) => open_described(&file, source, options),
        Some(File::Hosted) => {
            let layout = header::read(&file.device)?;
            open_monolithic(file, layout, options)
        }
        Some(kind) if options.salvage && !writable => {
            let layout = match kind {
                File::Cowd => cowd::read(&file.device)?,
                _ => sesparse::read(&file.device, true)?,
            };
            open_monolithic(file, layout, options)
        }
        // Without the disk below, its grains would turn into zeroes.
        Some(_) => Err(Error::unsupported(
            "this is an extent of an ESX snapshot: open the descriptor that it belongs to (the \
             file without -delta or -sesparse in its name), together with the parent disk",
        )),
        None => Err(not_a_disk()),
    }
}

/// A single sparse file; the extent list of its descriptor names nothing but itself.
fn open_monolithic(file: OpenFile, layout: Layout, options: OpenOptions) -> Result<Vmdk> {
    let mut warnings = Vec::new();
    let salvage = options.salvage;
    let descriptor = match embedded(&file.device, &layout) {
        Err(error) if salvage => {
            warnings.push(format!("the descriptor is left out: {error}"));
            Descriptor::default()
        }
        found => found?.unwrap_or_else(|| {
            warnings.push("no descriptor is embedded: the disk is this extent alone".to_owned());
            Descriptor::default()
        }),
    };
    if descriptor.extents.len() > 1 {
        return Err(Error::unsupported(format!(
            "the embedded descriptor lists {} extents, expected one",
            descriptor.extents.len()
        )));
    }
    if let Some(line) = descriptor.extents.first() {
        check_line(line, salvage)?;
        if line.len != layout.capacity {
            warnings.push(format!(
                "the descriptor says {} bytes, the header {}; the header is followed",
                line.len, layout.capacity
            ));
        }
    }
    let access = descriptor.extents.first().map_or(Access::ReadWrite, |line| line.access);
    let parent = check_parent(&descriptor, options, &mut warnings)?;
    let place = match layout.descriptor {
        Some(span) => DescriptorPlace::Embedded(span),
        None => DescriptorPlace::Nowhere,
    };
    let kind = layout.kind;
    let storage = file.storage.clone();
    let extent = sparse(file, layout, salvage, &mut warnings)?;
    let len = extent.layout().capacity;
    let backing = Backing::Sparse(Box::new(extent));
    let piece = Piece { start: 0, len, kind, access, name: None, backing };
    let cid = descriptor.cid.unwrap_or(0);
    let disk = Vmdk::new(vec![piece], len, descriptor, parent, warnings);
    Ok(match storage {
        Some(storage) => disk.writable(Identity::new(storage, place, cid), Vec::new()),
        None => disk,
    })
}

fn open_described(file: &OpenFile, source: Source<'_>, options: OpenOptions) -> Result<Vmdk> {
    let descriptor = read_text(&file.device)?;
    if descriptor.extents.is_empty() {
        return Err(Error::corrupt("the descriptor lists no extents"));
    }
    // Everything that can be refused by its words is refused before any file is opened.
    for line in &descriptor.extents {
        check_line(line, options.salvage)?;
    }
    if file.storage.is_some() {
        check_apart(&descriptor.extents)?;
    }
    let mut warnings = Vec::new();
    let mut files = Files::new(source, file.storage.is_some(), options.salvage);
    let parent = check_parent(&descriptor, options, &mut warnings)?;
    let mut pieces = Vec::new();
    let mut start = 0_u64;
    for line in &descriptor.extents {
        let name = Some(line.name.clone()).filter(|name| !name.is_empty());
        for (len, backing) in files.open(line, &mut warnings)? {
            let (kind, access) = (line.kind, line.access);
            pieces.push(Piece { start, len, kind, access, name: name.clone(), backing });
            start = start
                .checked_add(len)
                .filter(|size| i64::try_from(*size).is_ok())
                .ok_or_else(|| Error::corrupt("the extents together have more than 2^63 bytes"))?;
        }
    }
    let cid = descriptor.cid.unwrap_or(0);
    let disk = Vmdk::new(pieces, start, descriptor, parent, warnings);
    Ok(match file.storage.clone() {
        Some(storage) => {
            disk.writable(Identity::new(storage, DescriptorPlace::File, cid), files.flat())
        }
        None => disk,
    })
}

fn check_line(line: &ExtentLine, salvage: bool) -> Result<()> {
    let name = &line.name;
    if line.access == Access::None && line.kind != ExtentType::Zero && !salvage {
        return Err(Error::unsupported(format!("extent {name:?} is marked NOACCESS")));
    }
    let is_device = ["/dev/", "\\\\.\\", "/vmfs/devices/"].iter().any(|at| name.starts_with(at));
    if is_device || matches!(line.kind, ExtentType::VmfsRdm | ExtentType::VmfsRaw) {
        return Err(Error::unsupported(format!(
            "extent {name:?} of type {} is a mapped LUN or device: copy the LUN itself",
            line.kind.word()
        )));
    }
    Ok(())
}

fn check_parent(
    descriptor: &Descriptor,
    options: OpenOptions,
    warnings: &mut Vec<String>,
) -> Result<Option<Parent>> {
    let Some(expected) = descriptor.parent_cid else { return Ok(None) };
    let hint = descriptor.parent_hint.as_deref().unwrap_or("a disk that it does not name");
    let Some(parent) = options.parent else {
        if options.salvage {
            warnings.push(format!(
                "the disk is a snapshot of {hint:?}: what only that has reads as zeroes"
            ));
            return Ok(None);
        }
        return Err(Error::unsupported(format!(
            "the disk is a snapshot of {hint:?} and cannot be read without it: open it together \
             with its parent, or consolidate the snapshots of the VM"
        )));
    };
    let Some(cid) = parent.cid.filter(|cid| *cid != expected) else { return Ok(Some(parent)) };
    let text = format!(
        "parentCID is {expected:08x}, but the CID of {hint:?} is {cid:08x}: the parent was \
         changed after the snapshot"
    );
    if !options.ignore_cid {
        return Err(Error::corrupt(text));
    }
    warnings.push(text);
    Ok(Some(parent))
}
