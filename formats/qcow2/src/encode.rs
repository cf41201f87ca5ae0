// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header of a new image: a value in, bytes out.

use crate::extensions::{BACKING_FORMAT, DATA_FILE, FEATURE_NAMES};
use crate::geometry::to_u64;
use crate::header::{Compression, Header, MAGIC};
use tranship_block::{Error, Result};

/// Length of the fields with `compression_type` and its padding.
pub(crate) const HEADER_LENGTH: u32 = 112;
/// Length of the fields of version 2.
pub(crate) const HEADER_LENGTH_2: u32 = 72;
const LONGEST_NAME: usize = 1023;

/// What a reader that does not know a feature calls it: type, bit, name.
const NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// The header with its extensions and the backing file's name, as they are on disk.
pub(crate) fn encode(header: &Header) -> Result<Vec<u8>> {
    let name = header.backing.as_ref().map(|backing| backing.name.as_bytes()).unwrap_or_default();
    let fixed = u64::from(header.header_length);
    let mut names = names(header);
    if header.version >= 3 {
        let table = feature_names();
        // Tiny clusters may have no room for more than is needed.
        let len = fixed.saturating_add(to_u64(names.len().saturating_add(table.len())));
        let rest = to_u64(name.len()).saturating_add(8);
        if len.saturating_add(rest) <= header.geometry().cluster() {
            names.extend(table);
        }
    }
    // The end of the extensions.
    names.extend([0; 8]);
    let name_offset = fixed.saturating_add(to_u64(names.len()));
    names.extend(name);
    let end = fixed.saturating_add(to_u64(names.len()));
    if name.len() > LONGEST_NAME || end > header.geometry().cluster() {
        return Err(Error::usage(format!(
            "name of the backing file has {} bytes, and the header needs {end}: that does not \
             fit into its cluster",
            name.len()
        )));
    }
    let mut bytes = Vec::new();
    bytes.extend(MAGIC);
    bytes.extend(header.version.to_be_bytes());
    bytes.extend(if name.is_empty() { 0 } else { name_offset }.to_be_bytes());
    bytes.extend(narrow(name.len()));
    bytes.extend(header.cluster_bits.to_be_bytes());
    bytes.extend(header.size.to_be_bytes());
    bytes.extend(header.crypt_method.to_be_bytes());
    bytes.extend(header.l1_size.to_be_bytes());
    bytes.extend(header.l1_table_offset.to_be_bytes());
    bytes.extend(header.refcount_table_offset.to_be_bytes());
    bytes.extend(header.refcount_table_clusters.to_be_bytes());
    bytes.extend(header.nb_snapshots.to_be_bytes());
    bytes.extend(header.snapshots_offset.to_be_bytes());
    if header.version >= 3 {
        bytes.extend(header.incompatible_features.to_be_bytes());
        bytes.extend(header.compatible_features.to_be_bytes());
        bytes.extend(header.autoclear_features.to_be_bytes());
        bytes.extend(header.refcount_order.to_be_bytes());
        bytes.extend(header.header_length.to_be_bytes());
        bytes.push(u8::from(header.compression == Compression::Zstd));
        bytes.extend([0; 7]);
    }
    bytes.extend(names);
    Ok(bytes)
}

fn names(header: &Header) -> Vec<u8> {
    let format = header.backing.as_ref().and_then(|backing| backing.format.as_ref());
    let mut bytes = Vec::new();
    for (kind, text) in [(BACKING_FORMAT, format), (DATA_FILE, header.data_file.as_ref())] {
        if let Some(text) = text {
            bytes.extend(extension(kind, text.as_bytes()));
        }
    }
    bytes
}

fn feature_names() -> Vec<u8> {
    let mut table = Vec::new();
    for (kind, bit, name) in NAMES {
        let end = table.len().saturating_add(48);
        table.extend([kind, bit]);
        table.extend(name.as_bytes());
        table.resize(end, 0);
    }
    extension(FEATURE_NAMES, &table)
}

fn extension(kind: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_be_bytes().to_vec();
    bytes.extend(narrow(content.len()));
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// A length that is far below the limit of its field: the cluster's size is checked later.
fn narrow(len: usize) -> [u8; 4] {
    u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes()
}
