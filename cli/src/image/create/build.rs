// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From options to what the formats make images of.

use crate::args::image::Naming;
use crate::failure::Failure;
use crate::image::console::Console;
use crate::image::options::Options;
use std::path::Path;
use tranship_formats::{Create, Format};

/// The image that these options describe.
pub(super) fn build(
    format: Format,
    options: &Options,
    _naming: &Naming,
    console: Console,
) -> Result<Create, Failure> {
    let size = options.number("size").unwrap_or(0);
    if options.number("extent_size_hint").is_some_and(|hint| hint != 0) {
        console.warn("extent_size_hint is left to the filesystem");
    }
    match format {
        Format::Raw => Ok(Create::Raw { size, reserve: reserves(options)? }),
        Format::Qcow2 => qcow2(size, options).map(Create::Qcow2),
        other => Err(Failure::usage(format!("images of format {other} cannot be made"))),
    }
}

/// Names of the ways to reserve space.
pub(crate) fn preallocation(mode: &str) -> bool {
    matches!(mode, "off" | "metadata" | "falloc" | "full")
}

/// Whether space is reserved for all of a disk.
fn reserves(options: &Options) -> Result<bool, Failure> {
    match options.text("preallocation") {
        None | Some("off") => Ok(false),
        Some("falloc" | "full") => Ok(true),
        Some("metadata") => Err(Failure::usage("Unsupported preallocation mode: metadata")),
        Some(other) => Err(Failure::usage(format!("invalid parameter value: {other}"))),
    }
}

fn qcow2(size: u64, options: &Options) -> Result<tranship_qcow2::CreateOptions, Failure> {
    let mut create = tranship_qcow2::CreateOptions::new(size);
    let cluster = options.number("cluster_size").unwrap_or(65_536);
    if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
        return Err(Failure::usage("Cluster size must be a power of two between 512 and 2048k"));
    }
    create.cluster_bits = cluster.trailing_zeros();
    create.backing = match (options.text("backing_file"), options.text("backing_fmt")) {
        (Some(name), format) => Some(tranship_qcow2::Backing {
            name: name.to_owned(),
            format: format.map(ToOwned::to_owned),
        }),
        (None, None) => None,
        (None, Some(_)) => {
            return Err(Failure::usage("Backing format cannot be used without backing file"));
        }
    };
    Ok(create)
}

/// Makes the empty file `path` one that btrfs does not copy on writing.
pub(super) fn write_in_place(path: &Path) -> Result<(), Failure> {
    Err(Failure::usage(format!("nocow cannot be set for {}", path.display())))
}
