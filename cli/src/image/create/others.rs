// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From options to images of the formats of other hypervisors.

use crate::args::image::Naming;
use crate::failure::Failure;
use crate::image::console::Console;
use crate::image::options::Options;
use crate::image::source::{self, Opening, Source};
use crate::personality::Personality;
use std::path::Path;
use tranship_formats::{Disk, Spec};
use tranship_vhdx::ParentLocator;
use tranship_vmdk::{Adapter, ParentLink, Subformat};
use tranship_vpc::{Kind, NewParent, Sizing};

/// A VHD.
pub(super) fn vpc(
    size: u64,
    options: &Options,
    spec: &Spec,
) -> Result<tranship_vpc::CreateOptions, Failure> {
    no_preallocation(options)?;
    if let Some(name) = options.text("backing_file") {
        if ["subformat", "azure", "force_size"].iter().any(|name| options.get(name).is_some()) {
            return Err(Failure::usage("a differencing VHD has no other options"));
        }
        let parent = parent(spec, name, options, "vpc")?;
        let Some(Disk::Vpc(disk)) = parent.opened.layers.first().map(|layer| &layer.disk) else {
            return Err(Failure::usage("the parent of a VHD has to be a VHD"));
        };
        let parent = NewParent {
            unique_id: disk.unique_id(),
            timestamp: disk.footer().timestamp,
            relative: relative(name),
            absolute: absolute(&parent.opened.path),
        };
        return Ok(tranship_vpc::CreateOptions::differencing(size, parent));
    }
    let mut create = tranship_vpc::CreateOptions::new(size);
    create.kind = match options.text("subformat") {
        None | Some("dynamic") => Kind::Dynamic,
        Some("fixed") => Kind::Fixed,
        Some(other) => {
            return Err(Failure::usage(format!(
                "Parameter 'subformat' does not accept value '{other}'"
            )));
        }
    };
    let is_azure = options.switch("azure") == Some(true);
    if is_azure && options.text("subformat") == Some("dynamic") {
        return Err(Failure::usage("Azure takes fixed disks only: leave subformat out"));
    }
    if is_azure {
        create.kind = Kind::Fixed;
        create.sizing = Sizing::Azure;
    } else if options.switch("force_size") == Some(true) {
        create.sizing = Sizing::Exact;
    }
    Ok(create)
}

/// A VHDX.
pub(super) fn vhdx(
    size: u64,
    options: &Options,
    spec: &Spec,
) -> Result<tranship_vhdx::CreateOptions, Failure> {
    no_preallocation(options)?;
    let mut create = tranship_vhdx::CreateOptions::new(size);
    let narrow = |name: &str, value: u64| {
        u32::try_from(value)
            .map_err(|_| Failure::usage(format!("{name} of {value} bytes is too large")))
    };
    if let Some(log) = options.number("log_size") {
        create.log_size = narrow("log_size", log)?;
    }
    if let Some(block) = options.number("block_size").filter(|block| *block > 0) {
        create.block_size = Some(narrow("block_size", block)?);
    }
    create.fixed = match options.text("subformat") {
        None | Some("dynamic") => false,
        Some("fixed") => true,
        Some(other) => {
            return Err(Failure::usage(format!(
                "Parameter 'subformat' does not accept value '{other}'"
            )));
        }
    };
    if let Some(name) = options.text("backing_file") {
        let parent = parent(spec, name, options, "vhdx")?;
        let Some(Disk::Vhdx(disk)) = parent.opened.layers.first().map(|layer| &layer.disk) else {
            return Err(Failure::usage("the parent of a VHDX has to be a VHDX"));
        };
        create.parent = Some(ParentLocator::new(
            disk.data_write_guid(),
            relative(name).as_deref(),
            absolute(&parent.opened.path).as_deref(),
        ));
    }
    create.block_state_zero = options.switch("block_state_zero") != Some(false);
    Ok(create)
}

/// A VMDK.
pub(super) fn vmdk(
    size: u64,
    options: &Options,
    spec: &Spec,
) -> Result<tranship_vmdk::CreateOptions, Failure> {
    no_preallocation(options)?;
    let subformat: Subformat = match options.text("subformat") {
        None => Subformat::MonolithicSparse,
        Some(word) => word.parse()?,
    };
    let path = spec.path().unwrap_or(Path::new(""));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut create = tranship_vmdk::CreateOptions::new(size, subformat, name);
    if let Some(word) = options.text("adapter_type") {
        create.adapter = word.parse::<Adapter>()?;
    }
    let number = |name: &str, text: &str| {
        text.parse::<u32>()
            .map_err(|_| Failure::usage(format!("{name} is {text:?}, expected a number")))
    };
    match (options.switch("compat6"), options.text("hwversion")) {
        (Some(true), None | Some("undefined")) => create.hardware_version = 6,
        (Some(true), Some(_)) => {
            return Err(Failure::usage("compat6 cannot be enabled with hwversion set"));
        }
        (_, None | Some("undefined")) => {}
        (_, Some(text)) => create.hardware_version = number("hwversion", text)?,
    }
    if let Some(text) = options.text("toolsversion") {
        create.tools_version = number("toolsversion", text)?;
    }
    create.zeroed_grain = options.switch("zeroed_grain") == Some(true);
    if let Some(parent) = options.text("backing_file") {
        create.parent = Some(parent_link(path, parent)?);
    }
    Ok(create)
}

/// The disk that a differencing one is based on.
fn parent(spec: &Spec, name: &str, options: &Options, format: &str) -> Result<Source, Failure> {
    if let Some(other) = options.text("backing_fmt").filter(|given| *given != format) {
        return Err(Failure::usage(format!("backing format is {other}, it can only be {format}")));
    }
    let naming = Naming::default();
    let at = source::beside(spec.path().unwrap_or(Path::new("")), name);
    Opening { alone: true, ..Opening::reading(&naming, Some(format)) }
        .open(at.as_os_str(), Console::new(Personality::Tranship))
}

fn relative(name: &str) -> Option<String> {
    (!name.starts_with('/')).then(|| name.to_owned())
}

fn absolute(path: &Path) -> Option<String> {
    path.canonicalize().ok().map(|path| path.display().to_string())
}

/// What a child says about the disk that it is based on.
fn parent_link(path: &Path, name: &str) -> Result<ParentLink, Failure> {
    let naming = Naming::default();
    let at = source::beside(path, name);
    let parent = Opening { alone: true, ..Opening::reading(&naming, Some("vmdk")) }
        .open(at.as_os_str(), Console::new(Personality::Tranship))?;
    let cid = match parent.opened.layers.first().map(|layer| &layer.disk) {
        Some(Disk::Vmdk(disk)) => disk.cid(),
        _ => None,
    };
    let cid = cid.ok_or_else(|| Failure::usage(format!("{name} has no content id")))?;
    Ok(ParentLink { name: name.to_owned(), cid })
}

fn no_preallocation(options: &Options) -> Result<(), Failure> {
    match options.text("preallocation") {
        None | Some("off") => Ok(()),
        Some(other) => Err(Failure::usage(format!("Unsupported preallocation mode: {other}"))),
    }
}
