// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image info`: what an image is.

mod facts;
mod luks;
mod name;

use super::console::Console;
use super::json::{Json, Object};
use super::sizes;
use super::snapshot;
use super::source::{self, Opening, Output, Source};
use crate::args::image::InfoArgs;
use crate::failure::Failure;
use crate::stdout;
use facts::{Child, Facts};
use std::fmt::Write;
use tranship_formats::Format;

/// Shows what the image is.
pub(crate) fn run(args: &InfoArgs, console: Console) -> Result<u8, Failure> {
    let output = source::output(args.output.output.as_deref(), "info", console)?;
    let name = source::one(&args.names, "info", console)?;
    let opening = Opening {
        alone: !args.backing_chain,
        force_share: args.reading.force_share,
        salvage: args.reading.salvage,
        ..Opening::reading(&args.naming, args.format.format.as_deref())
    };
    let source = opening.open_file(name, console)?;
    // What these are can be told without the passphrase or parent that their disks need.
    let source = match source.opened.format {
        Format::Raw | Format::Qcow2 | Format::Luks if !args.backing_chain => source,
        _ => {
            drop(source);
            opening.open(name, console)?
        }
    };
    let layers = if args.backing_chain { source.opened.layers.len() } else { 1 };
    let facts = gather(&source, layers)?;
    let text = match output {
        Output::Human => facts.iter().map(human).collect::<Vec<_>>().join("\n"),
        Output::Json => {
            let mut all: Vec<Json> = facts.iter().map(|facts| Json::from(json(facts))).collect();
            match all.pop() {
                Some(only) if !args.backing_chain => only.pretty(),
                last => {
                    all.extend(last);
                    Json::List(all).pretty()
                }
            }
        }
    };
    stdout::print(&text)?;
    Ok(0)
}

fn gather(source: &Source, layers: usize) -> Result<Vec<Facts>, Failure> {
    let failed = |failure: Failure| failure.within(format!("Could not open '{}'", source.name));
    let layers = source.opened.layers.iter().take(layers);
    let first = name::shown(&source.spec, source.opened.format);
    layers
        .enumerate()
        .map(|(at, layer)| {
            let name =
                if at == 0 { first.clone() } else { source::shown(layer).display().to_string() };
            Facts::of(layer, name).map_err(failed)
        })
        .collect()
}

fn disk_size(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unavailable".to_owned(), sizes::display)
}

fn human(facts: &Facts) -> String {
    let mut text = String::new();
    let size = sizes::display(facts.virtual_size);
    let _ = writeln!(text, "image: {}", facts.name);
    let _ = writeln!(text, "file format: {}", facts.format);
    let _ = writeln!(text, "virtual size: {size} ({} bytes)", facts.virtual_size);
    let _ = writeln!(text, "disk size: {}", disk_size(facts.actual_size));
    if facts.is_encrypted {
        text.push_str("encrypted: yes\n");
    }
    if let Some(size) = facts.cluster_size {
        let _ = writeln!(text, "cluster_size: {size}");
    }
    if facts.is_dirty == Some(true) {
        text.push_str("cleanly shut down: no\n");
    }
    if let Some(backing) = &facts.backing {
        let _ = write!(text, "backing file: {}", backing.name);
        if backing.full_name != backing.name {
            let _ = write!(text, " (actual path: {})", backing.full_name);
        }
        text.push('\n');
        if let Some(format) = &backing.format {
            let _ = writeln!(text, "backing file format: {format}");
        }
    }
    if !facts.snapshots.is_empty() {
        text.push_str(&snapshot::table(&facts.snapshots));
    }
    if let Some(specific) = &facts.specific {
        text.push_str("Format specific information:\n");
        Json::from(specific.clone()).describe(&mut text, 1);
    }
    for child in &facts.children {
        let _ = writeln!(text, "Child node '/{}':", child.role);
        let _ = writeln!(text, "    filename: {}", child.name);
        let _ = writeln!(text, "    protocol type: {}", child.protocol);
        let _ = writeln!(
            text,
            "    file length: {} ({} bytes)",
            sizes::display(child.length),
            child.length
        );
        let _ = writeln!(text, "    disk size: {}", disk_size(child.actual_size));
    }
    text
}

fn json(facts: &Facts) -> Object {
    let mut object = Object::default();
    let children: Vec<Json> = facts.children.iter().map(|child| child_json(child).into()).collect();
    object
        .set("children", children)
        .set("filename", facts.name.as_str())
        .set("format", facts.format)
        .set("virtual-size", facts.virtual_size)
        .set_some("actual-size", facts.actual_size)
        .set_some("cluster-size", facts.cluster_size)
        .set_some("dirty-flag", facts.is_dirty);
    if facts.is_encrypted {
        object.set("encrypted", true);
    }
    if let Some(backing) = &facts.backing {
        object
            .set("backing-filename", backing.name.as_str())
            .set("full-backing-filename", backing.full_name.as_str())
            .set_some("backing-filename-format", backing.format.clone());
    }
    if !facts.snapshots.is_empty() {
        let snapshots: Vec<Json> = facts.snapshots.iter().map(snapshot::json).collect();
        object.set("snapshots", snapshots);
    }
    if let Some(specific) = &facts.specific {
        let mut typed = Object::default();
        typed.set("type", facts.format).set("data", specific.clone());
        object.set("format-specific", typed);
    }
    object
}

fn child_json(child: &Child) -> Object {
    let mut info = Object::default();
    info.set("children", Vec::new())
        .set("virtual-size", child.length)
        .set("filename", child.name.as_str())
        .set("format", child.protocol)
        .set_some("actual-size", child.actual_size)
        .set("dirty-flag", false);
    if child.protocol == "file" {
        let mut specific = Object::default();
        specific.set("type", "file").set("data", Object::default());
        info.set("format-specific", specific);
    }
    let mut object = Object::default();
    object.set("name", child.role.as_str()).set("info", info);
    object
}
