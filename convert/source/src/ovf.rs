// SPDX-License-Identifier: Apache-2.0 OR MIT
//! OVF descriptions (DSP0243), versions 1 and 2.
//!
//! Elements and attributes are recognised by their local names: products disagree about
//! namespaces, and none uses the same name for two things.

use crate::hardware::{DiskItem, Hardware};
use crate::{Error, Result, genid};
use roxmltree::{Document, Node, ParsingOptions};
use std::collections::HashMap;

/// Largest description; real ones have some 20 KiB.
pub(crate) const MAX_TEXT: u64 = 4 << 20;
const MAX_NODES: u32 = 200_000;

/// What a description says.
#[derive(Debug)]
pub(crate) struct Description {
    /// Name of the guest, if it has one.
    pub(crate) name: Option<String>,
    /// Everything of the virtual hardware section.
    pub(crate) hardware: Hardware,
    /// The disks of the hardware with their files.
    pub(crate) disks: Vec<DiskFile>,
    /// Operating system in the words of the product.
    pub(crate) guest_os: Option<String>,
    /// VM generation id.
    pub(crate) genid: Option<String>,
}

/// A disk and the file that it is in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DiskFile {
    /// Its `diskId`.
    pub(crate) id: String,
    /// The file; hostile.
    pub(crate) href: String,
    /// The `format` attribute, a URI.
    pub(crate) format: String,
}

/// A file of the `References` section.
#[derive(Debug)]
struct File<'a> {
    href: &'a str,
    compression: &'a str,
    chunked: bool,
}

/// Parses the bytes of an `.ovf` file.
pub(crate) fn parse(bytes: &[u8]) -> Result<Description> {
    let text = decode(bytes)?;
    let options = ParsingOptions { nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(&text, options)
        .map_err(|error| Error::corrupt(format!("the description is not valid XML: {error}")))?;
    let envelope = document.root_element();
    if !is(envelope, "Envelope") {
        return Err(Error::corrupt(format!(
            "the description's root element is {:?}, expected \"Envelope\"",
            envelope.tag_name().name()
        )));
    }
    let system = only_system(envelope)?;
    let sections: Vec<_> = children(system, "VirtualHardwareSection").collect();
    let section = sections
        .first()
        .ok_or_else(|| Error::corrupt("the virtual system has no VirtualHardwareSection"))?;
    let mut hardware = Hardware::parse(*section, default_configuration(envelope))?;
    if sections.len() > 1 {
        let warning = format!("{} hardware sections; the first is used", sections.len());
        hardware.warnings.push(warning);
    }
    if let Some(machine) = child(system, "Machine") {
        hardware.read_virtualbox(machine);
    }
    let files = files(envelope);
    let disks = hardware.disks.iter().map(|disk| resolve(envelope, &files, disk));
    let disks = disks.collect::<Result<_>>()?;
    let os = child(system, "OperatingSystemSection");
    let vendor_os = os.and_then(|os| attribute(os, "osType"));
    let config = |key| hardware.extra.get(key).map(String::as_str);
    let genid = config("vm.genid").zip(config("vm.genidX"));
    Ok(Description {
        name: child_text(system, "Name")
            .or_else(|| child_text(child(*section, "System")?, "VirtualSystemIdentifier"))
            .or_else(|| attribute(system, "id").map(str::to_owned)),
        disks,
        guest_os: vendor_os
            .map(str::to_owned)
            .or_else(|| child_text(os?, "OSType"))
            .or_else(|| child_text(os?, "Description")),
        genid: genid.and_then(|(first, second)| genid::from_vmware(first, second)),
        hardware,
    })
}

/// The text of a description: UTF-8, or Latin-1 if it says so.
fn decode(bytes: &[u8]) -> Result<String> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        return Ok(text.to_owned());
    }
    let declaration = bytes.split(|byte| *byte == b'>').next().unwrap_or_default();
    let declaration = String::from_utf8_lossy(declaration).to_ascii_lowercase();
    if declaration.contains("iso-8859-1") || declaration.contains("windows-1252") {
        return Ok(bytes.iter().map(|byte| char::from(*byte)).collect());
    }
    Err(Error::corrupt("the description is not UTF-8 and declares no encoding that is known"))
}

fn only_system<'a, 'input>(envelope: Node<'a, 'input>) -> Result<Node<'a, 'input>> {
    let systems: Vec<_> =
        envelope.descendants().filter(|node| is(*node, "VirtualSystem")).collect();
    match systems.as_slice() {
        [system] => Ok(*system),
        [] if child(envelope, "Content").is_some() => {
            Err(Error::unsupported("the description is OVF 0.9, expected 1.0 or newer"))
        }
        [] => Err(Error::corrupt("the description has no VirtualSystem")),
        several => {
            let names: Vec<_> = several
                .iter()
                .take(20)
                .map(|system| attribute(*system, "id").unwrap_or("(no id)"))
                .collect();
            Err(Error::unsupported(format!(
                "the package holds {} virtual systems, expected one: {}",
                several.len(),
                names.join(", ")
            )))
        }
    }
}

/// The id of the deployment configuration that applies if nobody chooses.
fn default_configuration<'a>(envelope: Node<'a, '_>) -> Option<&'a str> {
    let section = child(envelope, "DeploymentOptionSection")?;
    let marked = children(section, "Configuration").find(|node| {
        attribute(*node, "default").is_some_and(|value| matches!(value, "true" | "1"))
    });
    attribute(marked.or_else(|| child(section, "Configuration"))?, "id")
}

fn files<'a>(envelope: Node<'a, '_>) -> HashMap<&'a str, File<'a>> {
    let references = children(envelope, "References").flat_map(|node| children(node, "File"));
    references
        .filter_map(|node| {
            let file = File {
                href: attribute(node, "href")?,
                compression: attribute(node, "compression").unwrap_or_default(),
                chunked: attribute(node, "chunkSize").is_some(),
            };
            Some((attribute(node, "id")?, file))
        })
        .collect()
}

/// Follows a disk of the hardware to its file.
fn resolve(
    envelope: Node<'_, '_>,
    files: &HashMap<&str, File<'_>>,
    item: &DiskItem,
) -> Result<DiskFile> {
    let host = item.host_resource.trim();
    let host = host.strip_prefix("ovf:").unwrap_or(host).trim_start_matches('/');
    let (id, file, format) = if let Some(id) = host.strip_prefix("file/") {
        (id, id, "")
    } else if let Some(id) = host.strip_prefix("disk/") {
        let mut disks = children(envelope, "DiskSection")
            .chain(children(envelope, "SharedDiskSection"))
            .flat_map(|section| children(section, "Disk"));
        let disk = disks.find(|disk| attribute(*disk, "diskId") == Some(id)).ok_or_else(|| {
            Error::corrupt(format!("disk {id:?} of the hardware is not in the disk section"))
        })?;
        if attribute(disk, "parentRef").is_some_and(|parent| !parent.is_empty()) {
            return Err(Error::unsupported(format!("disk {id:?} is a delta of another disk")));
        }
        let file = attribute(disk, "fileRef").filter(|file| !file.is_empty()).ok_or_else(|| {
            Error::unsupported(format!(
                "disk {id:?} has no file: it would be a new empty disk, which is not made here"
            ))
        })?;
        (id, file, attribute(disk, "format").unwrap_or_default())
    } else {
        return Err(Error::corrupt(format!(
            "HostResource of a disk is {:?}, expected \"ovf:/disk/ID\"",
            item.host_resource
        )));
    };
    let file = files.get(file).ok_or_else(|| {
        Error::corrupt(format!("disk {id:?} is in file {file:?}, which References does not list"))
    })?;
    if !matches!(file.compression, "" | "identity") {
        return Err(Error::unsupported(format!(
            "file {:?} of disk {id:?} is compressed with {}: unpack the package, uncompress the \
             file and remove the compression attribute",
            file.href, file.compression
        )));
    }
    if file.chunked {
        return Err(Error::unsupported(format!(
            "file {:?} of disk {id:?} is split into chunks: join them first",
            file.href
        )));
    }
    Ok(DiskFile { id: id.to_owned(), href: file.href.to_owned(), format: format.to_owned() })
}

/// Whether `node` is an element of this local name.
pub(crate) fn is(node: Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().name() == name
}

/// The children of this local name.
pub(crate) fn children<'a, 'input>(
    node: Node<'a, 'input>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| is(*child, name))
}

/// The first child of this local name.
pub(crate) fn child<'a, 'input>(
    node: Node<'a, 'input>,
    name: &'static str,
) -> Option<Node<'a, 'input>> {
    children(node, name).next()
}

/// The text of the first child of this local name, unless it is empty.
pub(crate) fn child_text(node: Node<'_, '_>, name: &'static str) -> Option<String> {
    let text = child(node, name)?.text()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// The attribute of this local name, in whatever namespace.
pub(crate) fn attribute<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    node.attributes().find(|attribute| attribute.name() == name).map(|found| found.value())
}
