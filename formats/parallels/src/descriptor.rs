// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `DiskDescriptor.xml`: the parts of a disk, their files, the snapshots.

use crate::SECTOR;
use roxmltree::{Document, Node, ParsingOptions};
use tranship_block::{Error, ErrorKind, Result, Span};

/// Largest file that is parsed: real ones have a few KiB.
const MAX_TEXT: usize = 16 << 20;
const MAX_NODES: u32 = 1_000_000;
const MAX_STORAGES: usize = 4096;
const MAX_IMAGES: usize = 64;
/// Snapshots that a file may have; a chain is at most as deep as [`MAX_IMAGES`].
const MAX_SHOTS: usize = 65_536;
/// The parent of those that have none, and the engine of disks without encryption.
const NULL_GUID: &str = "{00000000-0000-0000-0000-000000000000}";
/// The state of the disk now, where the file does not say which one it is.
const DEFAULT_TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";

/// How a file holds a part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageType {
    /// Byte by byte.
    Plain,
    /// Growing: an `.hds` with a table; nothing is compressed in spite of the name.
    Compressed,
}

/// A file of a part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// Which state of the disk it belongs to, in lower case with braces.
    pub guid: String,
    /// How it holds the bytes.
    pub kind: ImageType,
    /// Its name, as the descriptor has it: a request, not a path to open.
    pub file: String,
}

/// A part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageFiles {
    /// The bytes of the disk.
    pub span: Span,
    /// Its files, one for each state.
    pub images: Vec<ImageFile>,
}

/// A state of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shot {
    /// Name of the state.
    pub guid: String,
    /// The state that it is based on.
    pub parent: Option<String>,
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Virtual size in bytes.
    pub size: u64,
    /// Name of the disk; may be empty.
    pub name: String,
    /// The parts in the order of the disk, without gaps.
    pub storages: Vec<StorageFiles>,
    /// All states.
    pub shots: Vec<Shot>,
    /// The state that is current.
    pub top: String,
}

impl Descriptor {
    /// Parses the text of the file.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::Corrupt`] if it is no such file or contradicts itself,
    /// [`tranship_block::ErrorKind::Unsupported`] for encrypted disks and unknown types.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > MAX_TEXT {
            return Err(Error::corrupt(format!(
                "DiskDescriptor.xml has {} bytes, expected at most {MAX_TEXT}",
                text.len()
            )));
        }
        // A document type definition could define entities that grow without bound.
        let options = ParsingOptions {
            allow_dtd: false,
            nodes_limit: MAX_NODES,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(text, options).map_err(|error| {
            Error::corrupt("DiskDescriptor.xml is not valid XML").because(error)
        })?;
        let root = document.root_element();
        if !root.has_tag_name("Parallels_disk_image") {
            return Err(Error::corrupt(format!(
                "root of DiskDescriptor.xml is {:?}, expected Parallels_disk_image",
                root.tag_name().name()
            )));
        }
        let parameters = child(root, "Disk_Parameters")?;
        refuse_encryption(parameters)?;
        let size = number(parameters, "Disk_size")?.saturating_mul(SECTOR);
        let storages = storages(child(root, "StorageData")?, size)?;
        let snapshots = root.children().find(|node| node.has_tag_name("Snapshots"));
        let shots = match snapshots {
            Some(node) => shots(node)?,
            None => Vec::new(),
        };
        let top = snapshots.and_then(|node| optional(node, "TopGUID"));
        Ok(Self {
            size,
            name: optional(parameters, "Name").unwrap_or_default(),
            storages,
            shots,
            top: top.map_or_else(|| DEFAULT_TOP.to_owned(), |guid| guid.to_lowercase()),
        })
    }

    /// The states that `state` consists of, itself first, the oldest last.
    ///
    /// # Errors
    ///
    /// [`tranship_block::ErrorKind::NotFound`] for an unknown state,
    /// [`tranship_block::ErrorKind::Corrupt`] for a loop or a missing parent.
    pub fn chain(&self, state: &str) -> Result<Vec<&str>> {
        let mut chain = Vec::new();
        let mut next = Some(state.to_lowercase());
        while let Some(guid) = next.take() {
            let Some(shot) = self.shots.iter().find(|shot| shot.guid == guid) else {
                return Err(if chain.is_empty() {
                    Error::new(ErrorKind::NotFound, format!("disk has no state {guid}"))
                } else {
                    Error::corrupt(format!("snapshot {guid} is missing"))
                });
            };
            if chain.len() >= MAX_IMAGES {
                return Err(Error::corrupt(format!(
                    "chain of snapshots loops or has more than {MAX_IMAGES} members"
                )));
            }
            chain.push(shot.guid.as_str());
            next.clone_from(&shot.parent);
        }
        Ok(chain)
    }
}

fn refuse_encryption(parameters: Node) -> Result<()> {
    let encryption = parameters.children().find(|node| node.has_tag_name("Encryption"));
    match encryption.and_then(|node| optional(node, "Engine")) {
        Some(engine) if !engine.is_empty() && engine != NULL_GUID => {
            Err(Error::unsupported(format!("disk is encrypted by engine {engine}")))
        }
        _ => Ok(()),
    }
}

fn storages(data: Node, size: u64) -> Result<Vec<StorageFiles>> {
    let mut storages = Vec::new();
    for node in data.children().filter(|node| node.has_tag_name("Storage")) {
        if storages.len() >= MAX_STORAGES {
            return Err(Error::corrupt(format!("disk has more than {MAX_STORAGES} parts")));
        }
        let (start, end) = (number(node, "Start")?, number(node, "End")?);
        if end <= start {
            return Err(Error::corrupt(format!(
                "part of the disk ends at sector {end}, before its start {start}"
            )));
        }
        let images = node.children().filter(|node| node.has_tag_name("Image"));
        let images = images.map(image).collect::<Result<Vec<_>>>()?;
        let start = start.saturating_mul(SECTOR);
        let span = Span::new(start, end.saturating_mul(SECTOR).saturating_sub(start));
        storages.push(StorageFiles { span, images });
    }
    storages.sort_by_key(|storage| storage.span.start);
    let mut covered = 0;
    for storage in &storages {
        if storage.span.start != covered {
            return Err(Error::corrupt(format!(
                "part of the disk starts at byte {}, expected {covered}",
                storage.span.start
            )));
        }
        covered = storage.span.end();
    }
    if covered != size {
        return Err(Error::corrupt(format!(
            "parts of the disk have {covered} bytes, expected its size of {size}"
        )));
    }
    Ok(storages)
}

fn image(node: Node) -> Result<ImageFile> {
    let kind = match text(child(node, "Type")?) {
        "Plain" => ImageType::Plain,
        "Compressed" => ImageType::Compressed,
        other => {
            return Err(Error::unsupported(format!(
                "type of an image is {other:?}, expected Plain or Compressed"
            )));
        }
    };
    Ok(ImageFile {
        guid: text(child(node, "GUID")?).to_lowercase(),
        kind,
        file: text(child(node, "File")?).to_owned(),
    })
}

fn shots(snapshots: Node) -> Result<Vec<Shot>> {
    let mut shots = Vec::new();
    for node in snapshots.children().filter(|node| node.has_tag_name("Shot")) {
        if shots.len() >= MAX_SHOTS {
            return Err(Error::corrupt(format!("disk has more than {MAX_SHOTS} snapshots")));
        }
        let parent = text(child(node, "ParentGUID")?).to_lowercase();
        shots.push(Shot {
            guid: text(child(node, "GUID")?).to_lowercase(),
            parent: (parent != NULL_GUID).then_some(parent),
        });
    }
    Ok(shots)
}

fn child<'a, 'd>(node: Node<'a, 'd>, name: &str) -> Result<Node<'a, 'd>> {
    node.children().find(|node| node.has_tag_name(name)).ok_or_else(|| {
        Error::corrupt(format!("{} of DiskDescriptor.xml has no {name}", node.tag_name().name()))
    })
}

fn text<'a>(node: Node<'a, '_>) -> &'a str {
    node.text().unwrap_or_default().trim()
}

fn optional(node: Node, name: &str) -> Option<String> {
    node.children().find(|node| node.has_tag_name(name)).map(|node| text(node).to_owned())
}

fn number(node: Node, name: &str) -> Result<u64> {
    let value = text(child(node, name)?);
    // 2^53 sectors are more than an offset can tell in bytes.
    match value.parse::<u64>() {
        Ok(number) if number < 1 << 53 => Ok(number),
        _ => Err(Error::corrupt(format!("{name} is {value:?}, expected a number of sectors"))),
    }
}
