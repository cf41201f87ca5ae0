// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header's cluster as bytes: changing some of it while the rest stays as it is.
//!
//! Fields and extensions that this crate does not know are kept. A change is one write,
//! so that a crash leaves the old header or the new one.

use crate::geometry::{to_u64, to_usize};
use crate::header::Header;
use tranship_block::{BigEndian, BlockDevice, Error, Result, Storage};

/// Length of the header's fields in version 2, and where its extensions start.
const SHORT: usize = 72;
/// Length of the fields that this crate writes in version 3.
const LONG: usize = 112;
/// The longest name of a backing file.
const LONGEST_NAME: usize = 1023;

/// Type of the extension with the names of features.
const FEATURE_NAMES: u32 = 0x6803_f857;

/// Offsets of fields in the header.
pub(crate) mod field {
    pub(crate) const VERSION: usize = 4;
    pub(crate) const SIZE: usize = 24;
    pub(crate) const L1_SIZE: usize = 36;
    pub(crate) const L1_TABLE_OFFSET: usize = 40;
    pub(crate) const REFCOUNT_TABLE_OFFSET: usize = 48;
    pub(crate) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(crate) const NB_SNAPSHOTS: usize = 60;
    pub(crate) const SNAPSHOTS_OFFSET: usize = 64;
    pub(crate) const INCOMPATIBLE: usize = 72;
    pub(crate) const COMPATIBLE: usize = 80;
    pub(crate) const AUTOCLEAR: usize = 88;
    pub(crate) const REFCOUNT_ORDER: usize = 96;
    pub(crate) const HEADER_LENGTH: usize = 100;
}

/// The parts of the header's cluster.
#[derive(Clone, Debug)]
pub(crate) struct FirstCluster {
    /// The fields, `header_length` bytes.
    fields: Vec<u8>,
    /// Type and content, in the order of the file.
    extensions: Vec<(u32, Vec<u8>)>,
    /// Name of the backing file.
    backing: Vec<u8>,
    /// Bytes up to the end of the last thing in the cluster.
    used: usize,
    cluster: usize,
}

impl FirstCluster {
    /// Takes the cluster in `file` apart, whose header is `header`.
    pub(crate) fn read(file: &dyn BlockDevice, header: &Header) -> Result<Self> {
        let cluster = header.geometry().cluster_len();
        let mut bytes = vec![0; to_usize(file.size().min(to_u64(cluster)))?];
        file.read_at(&mut bytes, 0)?;
        let reader = BigEndian(&bytes, "qcow2 header");
        let length = to_usize(u64::from(header.header_length))?;
        let fields = reader.bytes("header", 0, length)?.to_vec();
        let offset = to_usize(reader.u64("backing_file_offset", 8)?)?;
        let len = to_usize(u64::from(reader.u32("backing_file_size", 16)?))?;
        let mut used = length;
        let mut end = bytes.len();
        let mut backing = Vec::new();
        if offset != 0 && len != 0 {
            backing = reader.bytes("backing file name", offset, len)?.to_vec();
            used = offset.saturating_add(len);
            end = offset;
        }
        let area = BigEndian(bytes.get(..end).unwrap_or(&bytes), "qcow2 header extensions");
        let mut extensions = Vec::new();
        let mut at = length;
        while at.saturating_add(8) <= end {
            let kind = area.u32("type", at)?;
            let len = to_usize(u64::from(area.u32("length", at.saturating_add(4))?))?;
            at = at.saturating_add(8);
            used = used.max(at);
            if kind == 0 {
                break;
            }
            extensions.push((kind, area.bytes("extension", at, len)?.to_vec()));
            at = at.saturating_add(len.next_multiple_of(8));
            used = used.max(at);
        }
        Ok(Self { fields, extensions, backing, used, cluster })
    }

    pub(crate) fn set_u32(&mut self, at: usize, value: u32) {
        self.set(at, &value.to_be_bytes());
    }

    pub(crate) fn set_u64(&mut self, at: usize, value: u64) {
        self.set(at, &value.to_be_bytes());
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        let end = at.saturating_add(bytes.len());
        if let Some(field) = self.fields.get_mut(at..end) {
            field.copy_from_slice(bytes);
        }
    }

    /// The 64-bit field at `at`, 0 where the header is too short to have it.
    pub(crate) fn u64(&self, at: usize) -> u64 {
        BigEndian(&self.fields, "qcow2 header").u64("field", at).unwrap_or(0)
    }

    /// Gives the header the fields of `version`, 2 or 3; new ones are zero.
    pub(crate) fn set_version(&mut self, version: u32, refcount_order: u32) {
        let length = if version >= 3 { self.fields.len().max(LONG) } else { SHORT };
        self.fields.resize(length, 0);
        self.set_u32(field::VERSION, version);
        if version >= 3 {
            self.set_u32(field::REFCOUNT_ORDER, refcount_order);
            self.set_u32(field::HEADER_LENGTH, u32::try_from(length).unwrap_or(u32::MAX));
        }
    }

    /// The content of the extension of this type.
    pub(crate) fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.extensions.iter().find(|(found, _)| *found == kind).map(|(_, content)| &**content)
    }

    /// Replaces the extension of this type, or takes it away.
    pub(crate) fn set_extension(&mut self, kind: u32, content: Option<Vec<u8>>) {
        let place = self.extensions.iter().position(|(found, _)| *found == kind);
        match (place, content) {
            (Some(index), Some(content)) => {
                if let Some(slot) = self.extensions.get_mut(index) {
                    slot.1 = content;
                }
            }
            (Some(_), None) => self.extensions.retain(|(found, _)| *found != kind),
            (None, Some(content)) => self.extensions.push((kind, content)),
            (None, None) => {}
        }
    }

    /// Replaces the name of the backing file; empty for none.
    pub(crate) fn set_backing(&mut self, name: &str) {
        self.backing = name.as_bytes().to_vec();
    }

    /// The bytes of the cluster up to the end of the last thing in it. Names of features,
    /// which only explain, go where a small cluster has no place for them.
    fn encode(&self) -> Result<Vec<u8>> {
        let whole = self.encode_without(None);
        let bytes = if whole.len() > self.cluster {
            self.encode_without(Some(FEATURE_NAMES))
        } else {
            whole
        };
        if self.backing.len() > LONGEST_NAME || bytes.len() > self.cluster {
            return Err(Error::usage(format!(
                "header would have {} bytes with a name of {} bytes, expected at most {} with \
                 {LONGEST_NAME}",
                bytes.len(),
                self.backing.len(),
                self.cluster
            )));
        }
        Ok(bytes)
    }

    fn encode_without(&self, left_out: Option<u32>) -> Vec<u8> {
        let narrow = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
        let mut bytes = self.fields.clone();
        let kept = self.extensions.iter().filter(|(kind, _)| Some(*kind) != left_out);
        for (kind, content) in kept {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(narrow(content.len()));
            bytes.extend(content);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        let offset = if self.backing.is_empty() { 0 } else { to_u64(bytes.len()) };
        let mut put = |at: usize, value: &[u8]| {
            if let Some(field) = bytes.get_mut(at..at.saturating_add(value.len())) {
                field.copy_from_slice(value);
            }
        };
        put(8, &offset.to_be_bytes());
        put(16, &narrow(self.backing.len()));
        bytes.extend(&self.backing);
        bytes
    }

    /// Writes the cluster, durably when this returns.
    pub(crate) fn write(&mut self, storage: &dyn Storage) -> Result<()> {
        let mut bytes = self.encode()?;
        let used = bytes.len();
        // What was longer before must not stay behind as a part of something.
        let len = used.max(self.used).next_multiple_of(512).min(self.cluster);
        bytes.resize(len, 0);
        storage.write_at(&bytes, 0)?;
        storage.flush()?;
        self.used = used;
        Ok(())
    }
}
