// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From options to what the formats make images of.

use super::others;
use crate::failure::Failure;
use crate::image::options::Options;
use crate::image::source;
use std::path::Path;
use std::sync::Arc;
use tranship_block::Storage;
use tranship_formats::{Create, Format, RawPreallocation, Replacing, Spec};
use tranship_qcow2::{Backing, Compression, DataFile, Preallocation};

/// The image that these options describe.
pub(super) fn build(format: Format, options: &Options, spec: &Spec) -> Result<Create, Failure> {
    let size = options.number("size").unwrap_or(0);
    match format {
        Format::Raw => Ok(Create::Raw { size, preallocation: reserved(options)? }),
        Format::Qcow2 => {
            qcow2(size, options, spec.path().unwrap_or(Path::new(""))).map(Create::Qcow2)
        }
        Format::Vpc => others::vpc(size, options, spec).map(Create::Vpc),
        Format::Vhdx => others::vhdx(size, options, spec).map(Create::Vhdx),
        Format::Vmdk => others::vmdk(size, options, spec).map(Create::Vmdk),
        other => Err(Failure::usage(format!("images of format {other} cannot be made"))),
    }
}

/// Names of the ways to reserve space.
pub(crate) fn preallocation(mode: &str) -> bool {
    matches!(mode, "off" | "metadata" | "falloc" | "full")
}

/// What is reserved for a raw disk.
fn reserved(options: &Options) -> Result<RawPreallocation, Failure> {
    match options.text("preallocation") {
        None | Some("off") => Ok(RawPreallocation::Off),
        Some("falloc") => Ok(RawPreallocation::Falloc),
        Some("full") => Ok(RawPreallocation::Full),
        Some("metadata") => Err(Failure::usage("Unsupported preallocation mode: metadata")),
        Some(other) => Err(Failure::usage(format!("invalid parameter value: {other}"))),
    }
}

fn qcow2(
    size: u64,
    options: &Options,
    path: &Path,
) -> Result<tranship_qcow2::CreateOptions, Failure> {
    let mut create = tranship_qcow2::CreateOptions::new(size);
    let shape = qcow2_shape(options)?;
    create.cluster_bits = shape.cluster_bits;
    create.refcount_order = shape.refcount_order;
    create.version = shape.version;
    create.extended_l2 = shape.extended_l2;
    create.lazy_refcounts = options.switch("lazy_refcounts") == Some(true);
    let too_new = |what: &str| {
        Failure::usage(format!(
            "{what} only supported with compatibility level 1.1 and above (use version=v3 or \
             greater)"
        ))
    };
    if create.version < 3 && create.lazy_refcounts {
        return Err(too_new("Lazy refcounts"));
    }
    create.compression = match options.text("compression_type") {
        None | Some("zlib") => Compression::Deflate,
        Some("zstd") if create.version < 3 => {
            return Err(too_new("Non-zlib compression type is"));
        }
        Some("zstd") => Compression::Zstd,
        Some(other) => return Err(not_accepted("compression-type", other)),
    };
    create.preallocation = qcow2_preallocation(options)?;
    create.backing = match (options.text("backing_file"), options.text("backing_fmt")) {
        (Some(name), format) => {
            Some(Backing { name: name.to_owned(), format: format.map(ToOwned::to_owned) })
        }
        (None, None) => None,
        (None, Some(_)) => {
            return Err(Failure::usage("Backing format cannot be used without backing file"));
        }
    };
    if create.backing.is_some() && create.preallocation != Preallocation::Off && !create.extended_l2
    {
        return Err(Failure::usage(
            "Backing file and preallocation can only be used at the same time if extended_l2 is \
             enabled",
        ));
    }
    let raw = options.switch("data_file_raw") == Some(true);
    create.data_file = match options.text("data_file") {
        None if raw => return Err(Failure::usage("data-file-raw requires data-file")),
        None => None,
        Some(_) if create.version < 3 => return Err(too_new("External data files are")),
        Some(_) if raw && create.backing.is_some() => {
            return Err(Failure::usage(
                "Backing file and data-file-raw cannot be used at the same time",
            ));
        }
        Some(name) => {
            Some(DataFile { name: name.to_owned(), storage: data_file(path, name)?, raw })
        }
    };
    Ok(create)
}

fn not_accepted(parameter: &str, value: &str) -> Failure {
    Failure::usage(format!("Parameter '{parameter}' does not accept value '{value}'"))
}

/// What decides how much space a QCOW2 image takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// 2 or 3.
    pub(crate) version: u32,
    /// log2 of the cluster size.
    pub(crate) cluster_bits: u32,
    /// log2 of the width of a reference count.
    pub(crate) refcount_order: u32,
    /// Clusters have subclusters.
    pub(crate) extended_l2: bool,
}

/// The shape that the options ask for.
pub(crate) fn qcow2_shape(options: &Options) -> Result<Shape, Failure> {
    let version = match options.text("compat") {
        None | Some("v3" | "1.1") => 3,
        Some("v2" | "0.10") => 2,
        Some(other) => return Err(not_accepted("version", other)),
    };
    if options.names().any(|name| name.starts_with("encrypt")) {
        if options.text("encrypt.key-secret").is_none() {
            return Err(Failure::usage("Parameter 'encrypt.key-secret' is required for cipher"));
        }
        return Err(Failure::usage("encrypted images can be read, but not made"));
    }
    let cluster = options.number("cluster_size").unwrap_or(65_536);
    if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
        return Err(Failure::usage("Cluster size must be a power of two between 512 and 2048k"));
    }
    let extended_l2 = options.switch("extended_l2") == Some(true);
    if extended_l2 && version < 3 {
        return Err(Failure::usage(
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use \
             version=v3 or greater)",
        ));
    }
    if extended_l2 && cluster < 16_384 {
        return Err(Failure::usage(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ));
    }
    let bits = options.number("refcount_bits").unwrap_or(16);
    if !bits.is_power_of_two() || bits > 64 {
        return Err(Failure::usage(
            "Refcount width must be a power of two and may not exceed 64 bits",
        ));
    }
    if version < 3 && bits != 16 {
        return Err(Failure::usage(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above \
             (use version=v3 or greater)",
        ));
    }
    Ok(Shape {
        version,
        cluster_bits: cluster.trailing_zeros(),
        refcount_order: bits.trailing_zeros(),
        extended_l2,
    })
}

/// What is allocated from the start.
pub(crate) fn qcow2_preallocation(options: &Options) -> Result<Preallocation, Failure> {
    match options.text("preallocation") {
        None | Some("off") => Ok(Preallocation::Off),
        Some("metadata") => Ok(Preallocation::Metadata),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some(other) => Err(not_accepted("preallocation", other)),
    }
}

/// The file that the new image keeps its data in; it gets its size with the image.
fn data_file(image: &Path, name: &str) -> Result<Arc<dyn Storage>, Failure> {
    Ok(Arc::new(Replacing::begin(&source::beside(image, name), None)?))
}
