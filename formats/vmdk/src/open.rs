// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening a disk: from the first bytes to a checked list of extents.

use crate::disk::{Backing, Piece, Vmdk};
use crate::header::{Header, MAGIC, MAX_DIRECTORY_ENTRIES};
use crate::line::{Access, ExtentLine, ExtentType};
use crate::sparse::SparseExtent;
use crate::{Descriptor, SECTOR};
use std::collections::HashMap;
use std::sync::Arc;
use tranship_block::{BlockDevice, Error, Gate, Request, Result, Slice, Span};

/// Largest descriptor file: 4096 extents with names of 255 bytes and more.
const MAX_DESCRIPTOR_FILE: u64 = 2 << 20;

/// How to open a disk.
#[derive(Debug, Default)]
pub struct OpenOptions {
    /// The disk that a snapshot is based on. Without it a snapshot is refused.
    pub parent: Option<Parent>,
}

/// The disk below a snapshot.
#[derive(Debug)]
pub struct Parent {
    /// Its guest-visible bytes.
    pub device: Arc<dyn BlockDevice>,
    /// Its content id; if known it must be the one that the snapshot was made from.
    pub cid: Option<u32>,
}

enum Layout {
    Sparse,
    Text,
}

/// Whether `head`, the first bytes of a file, looks like a VMDK of any kind, including
/// those that [`Vmdk::open`] refuses as unsupported.
pub fn probe(head: &[u8]) -> bool {
    layout(head).is_some() || unsupported_delta(head).is_some()
}

/// First line of the descriptors that VMware's products write, in lower case.
const SIGNATURE: &[u8] = b"# disk descriptorfile";

fn layout(head: &[u8]) -> Option<Layout> {
    if head.starts_with(MAGIC) {
        return Some(Layout::Sparse);
    }
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    if text.get(..SIGNATURE.len()).is_some_and(|start| start.eq_ignore_ascii_case(SIGNATURE)) {
        return Some(Layout::Text);
    }
    // Hand-made descriptors have other comments, or none.
    let mut lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"))?;
    let (key, value) = std::str::from_utf8(first).ok()?.split_once('=')?;
    let known = matches!(value.trim(), "1" | "2" | "3");
    (known && key.trim().eq_ignore_ascii_case("version")).then_some(Layout::Text)
}

const SESPARSE: &[u8] = &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0];

fn unsupported_delta(head: &[u8]) -> Option<&'static str> {
    match head {
        _ if head.starts_with(b"COWD") => Some("a vmfsSparse (COWD)"),
        _ if head.starts_with(SESPARSE) => Some("a seSparse"),
        _ => None,
    }
}

/// The descriptor of the disk in `device`; none if a sparse extent has no embedded one.
///
/// # Errors
///
/// Not a VMDK, a kind that is not supported, or a descriptor that cannot be read.
pub fn read_descriptor(device: &dyn BlockDevice) -> Result<Option<Descriptor>> {
    match layout(&read_head(device)?) {
        Some(Layout::Sparse) => embedded(device, &Header::read(device)?),
        Some(Layout::Text) => read_text(device).map(Some),
        None => Err(not_a_disk(device)),
    }
}

fn read_head(device: &dyn BlockDevice) -> Result<Vec<u8>> {
    let len = device.size().min(4096);
    let mut head = vec![0; usize::try_from(len).unwrap_or(0)];
    device.read_at(&mut head, 0)?;
    Ok(head)
}

fn not_a_disk(device: &dyn BlockDevice) -> Error {
    match read_head(device).ok().as_deref().and_then(unsupported_delta) {
        Some(kind) => Error::unsupported(format!(
            "{kind} snapshot delta: consolidate the snapshots of the VM, or clone the disk \
             with vmkfstools -i, and open the result"
        )),
        None => Error::corrupt("neither a VMDK descriptor nor a VMDK sparse extent"),
    }
}

fn embedded(device: &dyn BlockDevice, header: &Header) -> Result<Option<Descriptor>> {
    let Some(span) = header.descriptor else { return Ok(None) };
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

fn read_text(device: &dyn BlockDevice) -> Result<Descriptor> {
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
    /// Opens the disk whose first or only file is `device`; its other files, if it has
    /// any, are asked of `gate` by the names that the descriptor gives them.
    ///
    /// # Errors
    ///
    /// What is damaged, truncated or beyond the format's limits is
    /// [`tranship_block::ErrorKind::Corrupt`]; snapshot deltas, mapped LUNs and snapshots
    /// without [`OpenOptions::parent`] are [`tranship_block::ErrorKind::Unsupported`];
    /// names that may not be opened are what `gate` says.
    pub fn open(
        device: Arc<dyn BlockDevice>,
        gate: &dyn Gate,
        options: OpenOptions,
    ) -> Result<Self> {
        match layout(&read_head(&device)?) {
            Some(Layout::Sparse) => open_monolithic(device, options),
            Some(Layout::Text) => open_described(&device, gate, options),
            None => Err(not_a_disk(&device)),
        }
    }
}

/// A single sparse file; the extent list of its descriptor names nothing but itself.
fn open_monolithic(device: Arc<dyn BlockDevice>, options: OpenOptions) -> Result<Vmdk> {
    let header = Header::read(&device)?;
    let mut warnings = Vec::new();
    let descriptor = embedded(&device, &header)?.unwrap_or_else(|| {
        warnings.push("no descriptor is embedded: the disk is this extent alone".to_owned());
        Descriptor::default()
    });
    if descriptor.extents.len() > 1 {
        return Err(Error::unsupported(format!(
            "the embedded descriptor lists {} extents, expected one",
            descriptor.extents.len()
        )));
    }
    if let Some(line) = descriptor.extents.first() {
        check_line(line)?;
        if line.len != header.capacity {
            warnings.push(format!(
                "the descriptor says {} bytes, the header {}; the header is followed",
                line.len, header.capacity
            ));
        }
    }
    let parent = check_parent(&descriptor, options)?;
    if header.unclean {
        warnings.push("the last writer did not close the disk".to_owned());
    }
    let len = header.capacity;
    let (extent, warning) = SparseExtent::open(device, header)?;
    warnings.extend(warning);
    let piece = Piece {
        start: 0,
        len,
        kind: ExtentType::Sparse,
        name: None,
        backing: Backing::Sparse(Box::new(extent)),
    };
    Ok(Vmdk::new(vec![piece], len, descriptor, parent, warnings))
}

fn open_described(
    device: &Arc<dyn BlockDevice>,
    gate: &dyn Gate,
    options: OpenOptions,
) -> Result<Vmdk> {
    let descriptor = read_text(device)?;
    if descriptor.extents.is_empty() {
        return Err(Error::corrupt("the descriptor lists no extents"));
    }
    // Everything that can be refused by its words is refused before any file is opened.
    for line in &descriptor.extents {
        check_line(line)?;
    }
    let parent = check_parent(&descriptor, options)?;
    let mut files = Files { gate, opened: HashMap::new(), directory_entries: 0 };
    let mut warnings = Vec::new();
    let mut pieces = Vec::new();
    let mut start = 0_u64;
    for line in &descriptor.extents {
        let opened = files.open(line, &mut warnings);
        let (name, backing) = (Some(line.name.clone()).filter(|n| !n.is_empty()), opened?);
        pieces.push(Piece { start, len: line.len, kind: line.kind, name, backing });
        start = start
            .checked_add(line.len)
            .filter(|size| i64::try_from(*size).is_ok())
            .ok_or_else(|| Error::corrupt("the extents together have more than 2^63 bytes"))?;
    }
    Ok(Vmdk::new(pieces, start, descriptor, parent, warnings))
}

fn check_line(line: &ExtentLine) -> Result<()> {
    let name = &line.name;
    if line.access == Access::None {
        return Err(Error::unsupported(format!("extent {name:?} is marked NOACCESS")));
    }
    match line.kind {
        ExtentType::VmfsSparse | ExtentType::SeSparse => Err(Error::unsupported(format!(
            "extent {name:?} is a {} snapshot delta: consolidate the snapshots of the VM, or \
             clone the disk with vmkfstools -i, and open the result",
            line.kind.word()
        ))),
        ExtentType::VmfsRdm | ExtentType::VmfsRaw => Err(Error::unsupported(format!(
            "extent {name:?} is {}, a mapped LUN: copy the LUN itself",
            line.kind.word()
        ))),
        _ => Ok(()),
    }
}

fn check_parent(descriptor: &Descriptor, options: OpenOptions) -> Result<Option<Parent>> {
    let Some(expected) = descriptor.parent_cid else { return Ok(None) };
    let hint = descriptor.parent_hint.as_deref().unwrap_or("a disk that it does not name");
    let Some(parent) = options.parent else {
        return Err(Error::unsupported(format!(
            "the disk is a snapshot of {hint:?} and cannot be read without it: open it together \
             with its parent, or consolidate the snapshots of the VM"
        )));
    };
    match parent.cid {
        Some(cid) if cid != expected => Err(Error::corrupt(format!(
            "parentCID is {expected:08x}, but the CID of {hint:?} is {cid:08x}: the parent was \
             changed after the snapshot"
        ))),
        _ => Ok(Some(parent)),
    }
}

/// The files of a disk, each opened once.
struct Files<'a> {
    gate: &'a dyn Gate,
    opened: HashMap<String, Arc<dyn BlockDevice>>,
    directory_entries: u64,
}

impl Files<'_> {
    fn open(&mut self, line: &ExtentLine, warnings: &mut Vec<String>) -> Result<Backing> {
        match line.kind {
            ExtentType::Zero => Ok(Backing::Zero),
            ExtentType::Sparse => {
                if self.opened.contains_key(&line.name) {
                    return Err(Error::corrupt(format!(
                        "sparse extent {:?} is listed twice",
                        line.name
                    )));
                }
                let file = self.file(&line.name)?;
                self.sparse(file, line, warnings).map_err(|error| error.in_file(&line.name))
            }
            _ => self.flat(line).map_err(|error| error.in_file(&line.name)),
        }
    }

    fn file(&mut self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        if let Some(file) = self.opened.get(name) {
            return Ok(Arc::clone(file));
        }
        let file = self.gate.open(Request { name, role: "VMDK extent", writable: false })?;
        self.opened.insert(name.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    fn flat(&mut self, line: &ExtentLine) -> Result<Backing> {
        let file = self.file(&line.name)?;
        let span = Span::new(line.offset, line.len);
        let size = file.size();
        let slice = Slice::new(file, span).map_err(|_| {
            Error::corrupt(format!(
                "flat extent of {} bytes ends past the file's size of {size} bytes",
                line.len
            ))
            .at(line.offset)
        })?;
        Ok(Backing::Flat(slice))
    }

    fn sparse(
        &mut self,
        file: Arc<dyn BlockDevice>,
        line: &ExtentLine,
        warnings: &mut Vec<String>,
    ) -> Result<Backing> {
        let head = read_head(&file)?;
        if unsupported_delta(&head).is_some() {
            return Err(not_a_disk(&file));
        }
        let header = Header::read(&file)?;
        if header.capacity < line.len {
            return Err(Error::corrupt(format!(
                "sparse extent has a capacity of {} sectors, the descriptor says {}",
                header.capacity / SECTOR,
                line.len / SECTOR
            )));
        }
        self.directory_entries = self.directory_entries.saturating_add(header.directory_entries);
        if self.directory_entries > MAX_DIRECTORY_ENTRIES {
            return Err(Error::corrupt(format!(
                "the grain directories of all extents have more than {MAX_DIRECTORY_ENTRIES} entries"
            )));
        }
        let (extent, warning) = SparseExtent::open(file, header)?;
        warnings.extend(warning.map(|warning| format!("{}: {warning}", line.name)));
        Ok(Backing::Sparse(Box::new(extent)))
    }
}
