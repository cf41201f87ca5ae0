// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header: bytes in, a value that keeps the format's limits out.

use crate::extensions::{Extensions, text};
use crate::geometry::{Geometry, to_usize};
use tranship_block::{BigEndian, BlockDevice, Error, ErrorKind, Result};

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Largest L1 table: covers 2 EiB with clusters of 2 MiB.
pub(crate) const LARGEST_L1: u64 = 32 << 20;
/// Largest refcount table: covers 2 EiB with clusters of 64 KiB.
pub(crate) const LARGEST_REFCOUNT_TABLE: u64 = 8 << 20;
const LONGEST_BACKING_NAME: u32 = 1023;
pub(crate) const MOST_SNAPSHOTS: u32 = 65_536;

pub(crate) const DIRTY: u64 = 1;
pub(crate) const CORRUPT: u64 = 1 << 1;
pub(crate) const DATA_FILE: u64 = 1 << 2;
pub(crate) const COMPRESSION_TYPE: u64 = 1 << 3;
pub(crate) const EXTENDED_L2: u64 = 1 << 4;
/// Compatible: reference counts may be written late, after the dirty bit was set.
pub(crate) const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear: the data file is the guest's disk, byte for byte.
pub(crate) const DATA_FILE_RAW: u64 = 1 << 1;
const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate; the header calls it zlib.
    Deflate,
    /// One zstd frame per cluster.
    Zstd,
}

/// The backing file that an image asks for; a request, nothing has been opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name exactly as the image has it; hostile until proven otherwise.
    pub name: String,
    /// The format that the image gives for it, as QEMU spells it.
    pub format: Option<String>,
}

/// How the payload is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// AES-128 in CBC mode with the guest's sector number; weak, and only to be read.
    Aes,
    /// LUKS, with the host's sector number.
    Luks {
        /// Where the LUKS header starts in the file.
        offset: u64,
        /// Bytes of the LUKS header and its key material.
        len: u64,
    },
}

/// What the header says; offsets and sizes are bytes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Virtual size.
    pub size: u64,
    /// The backing file that the image asks for.
    pub backing: Option<Backing>,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Number of L1 entries.
    pub l1_size: u32,
    /// Where the active L1 table starts.
    pub l1_table_offset: u64,
    /// Where the refcount table starts.
    pub refcount_table_offset: u64,
    /// Size of the refcount table in clusters.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Where the snapshot table starts.
    pub snapshots_offset: u64,
    /// Incompatible feature bits; only known ones are left.
    pub incompatible_features: u64,
    /// Compatible feature bits.
    pub compatible_features: u64,
    /// Autoclear feature bits.
    pub autoclear_features: u64,
    /// log2 of the width of a reference count in bits, 0 to 6.
    pub refcount_order: u32,
    /// Length of the header's fields.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The external data file that the image asks for.
    pub data_file: Option<String>,
    /// Offset and length of the LUKS header.
    pub(crate) luks: Option<(u64, u64)>,
}

impl Header {
    /// Reads the header of the image in `device`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] if it contradicts the format or its limits,
    /// [`ErrorKind::Unsupported`] for another version and for unknown incompatible
    /// features, which are named.
    pub fn read(device: &dyn BlockDevice) -> Result<Self> {
        let mut start = [0; 112];
        let len = to_usize(device.size().min(112))?;
        let start = start.get_mut(..len).unwrap_or_default();
        device.read_at(start, 0)?;
        let fields = BigEndian(start, "qcow2 header");
        let magic = fields.bytes("magic", 0, 4)?;
        if magic != MAGIC {
            return Err(Error::corrupt(format!("magic is {magic:02x?}, expected {MAGIC:02x?}")));
        }
        let version = fields.u32("version", 4)?;
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!("qcow version is {version}, expected 2 or 3")));
        }
        let mut header = Self::fields(fields, version)?;
        header.check_fields()?;

        let cluster_len = device.size().min(header.geometry().cluster());
        let mut cluster = vec![0; to_usize(cluster_len)?];
        device.read_at(&mut cluster, 0)?;
        header.names(&cluster)?;
        header.check_tables(device.size())?;
        Ok(header)
    }

    fn fields(fields: BigEndian<'_>, version: u32) -> Result<Self> {
        let v3 = version >= 3;
        let header_length = if v3 { fields.u32("header_length", 100)? } else { 72 };
        let wide = |name, at| if v3 { fields.u64(name, at) } else { Ok(0) };
        let incompatible_features = wide("incompatible_features", 72)?;
        let compression_type =
            if header_length > 104 { fields.u8("compression_type", 104)? } else { 0 };
        let compression = match (compression_type, incompatible_features & COMPRESSION_TYPE != 0) {
            (0, false) => Compression::Deflate,
            (1, true) => Compression::Zstd,
            (number, set) => {
                return Err(Error::unsupported(format!(
                    "compression_type is {number} with its feature bit {}, expected 0 without \
                     or 1 with it",
                    if set { "set" } else { "clear" }
                ))
                .at(104));
            }
        };
        Ok(Self {
            version,
            cluster_bits: fields.u32("cluster_bits", 20)?,
            size: fields.u64("size", 24)?,
            backing: None,
            crypt_method: fields.u32("crypt_method", 32)?,
            l1_size: fields.u32("l1_size", 36)?,
            l1_table_offset: fields.u64("l1_table_offset", 40)?,
            refcount_table_offset: fields.u64("refcount_table_offset", 48)?,
            refcount_table_clusters: fields.u32("refcount_table_clusters", 56)?,
            nb_snapshots: fields.u32("nb_snapshots", 60)?,
            snapshots_offset: fields.u64("snapshots_offset", 64)?,
            incompatible_features,
            compatible_features: wide("compatible_features", 80)?,
            autoclear_features: wide("autoclear_features", 88)?,
            refcount_order: if v3 { fields.u32("refcount_order", 96)? } else { 4 },
            header_length,
            compression,
            data_file: None,
            luks: None,
        })
    }

    /// Limits that need no more than the fields.
    fn check_fields(&self) -> Result<()> {
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(Error::corrupt(format!(
                "cluster_bits is {}, expected 9 to 21",
                self.cluster_bits
            ))
            .at(20));
        }
        if self.refcount_order > 6 {
            return Err(Error::corrupt(format!(
                "refcount_order is {}, expected 0 to 6",
                self.refcount_order
            ))
            .at(96));
        }
        let shortest = if self.version >= 3 { 104 } else { 72 };
        let cluster = self.geometry().cluster();
        if self.header_length < shortest || u64::from(self.header_length) > cluster {
            return Err(Error::corrupt(format!(
                "header_length is {}, expected {shortest} to {cluster}",
                self.header_length
            ))
            .at(100));
        }
        if self.crypt_method > 2 {
            return Err(Error::corrupt(format!(
                "crypt_method is {}, expected 0 to 2",
                self.crypt_method
            ))
            .at(32));
        }
        if self.incompatible_features & EXTENDED_L2 != 0 && self.cluster_bits < 14 {
            return Err(Error::corrupt(format!(
                "cluster_bits is {}, expected at least 14 with extended L2 entries",
                self.cluster_bits
            ))
            .at(20));
        }
        Ok(())
    }

    /// Reads what the header's cluster holds besides the fields.
    fn names(&mut self, cluster: &[u8]) -> Result<()> {
        let fields = BigEndian(cluster, "qcow2 header");
        let offset = fields.u64("backing_file_offset", 8)?;
        let len = fields.u32("backing_file_size", 16)?;
        let mut end = cluster.len();
        let mut name = None;
        // An offset without a length is what removing a backing file leaves behind.
        if offset != 0 && len != 0 {
            if len > LONGEST_BACKING_NAME {
                return Err(Error::corrupt(format!(
                    "backing_file_size is {len}, expected at most {LONGEST_BACKING_NAME}"
                ))
                .at(16));
            }
            let at = to_usize(offset)?;
            let bytes = fields.bytes("backing file name", at, to_usize(u64::from(len))?)?;
            name = Some(text(bytes, "backing file")?);
            end = end.min(at);
        }
        let at = to_usize(u64::from(self.header_length))?;
        let extensions = Extensions::read(cluster, at, end)?;
        let unknown = self.incompatible_features & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            let bit = unknown.trailing_zeros();
            let name = extensions.incompatible_name(bit).unwrap_or("without a name");
            return Err(Error::unsupported(format!(
                "image needs incompatible feature {bit} ({name}), which is not known"
            ))
            .at(72));
        }
        self.backing = name.map(|name| Backing { name, format: extensions.backing_format });
        self.data_file = extensions.data_file;
        self.luks = extensions.luks;
        Ok(())
    }

    /// Checks that the tables are aligned, within their limits, and inside the file.
    fn check_tables(&self, file_size: u64) -> Result<()> {
        let geometry = self.geometry();
        let l1_bytes = u64::from(self.l1_size).saturating_mul(8);
        let table = |name: &str, offset: u64, bytes: u64, limit: u64, field: u64| {
            let fault = if geometry.within(offset) != 0 {
                format!("starts at {offset:#x}, which is no multiple of the cluster size")
            } else if bytes > limit {
                format!("has {bytes} bytes, expected at most {limit}")
            } else if offset.checked_add(bytes).is_none_or(|end| end > file_size) {
                format!("of {bytes} bytes at {offset:#x} ends past the file's {file_size} bytes")
            } else {
                return Ok(());
            };
            Err(Error::corrupt(format!("{name} {fault}")).at(field))
        };
        // More than the largest L1 table can map: checked first, since it explains more.
        let needed = geometry.l1_entries(self.size);
        if needed.saturating_mul(8) > LARGEST_L1 {
            return Err(Error::corrupt(format!(
                "virtual size of {} bytes needs an L1 table of {needed} entries, expected at \
                 most {}",
                self.size,
                LARGEST_L1 / 8
            ))
            .at(24));
        }
        table("L1 table", self.l1_table_offset, l1_bytes, LARGEST_L1, 40)?;
        if u64::from(self.l1_size) < needed {
            return Err(Error::corrupt(format!(
                "l1_size is {}, expected at least {needed} for {} bytes",
                self.l1_size, self.size
            ))
            .at(36));
        }
        let clusters = u64::from(self.refcount_table_clusters);
        let limit = LARGEST_REFCOUNT_TABLE;
        let bytes = geometry.offset(clusters);
        table("refcount table", self.refcount_table_offset, bytes, limit, 48)?;
        if self.nb_snapshots > MOST_SNAPSHOTS {
            return Err(Error::corrupt(format!(
                "nb_snapshots is {}, expected at most {MOST_SNAPSHOTS}",
                self.nb_snapshots
            ))
            .at(60));
        }
        if let Some((offset, len)) = self.luks {
            table("LUKS header", offset, len, u64::MAX, 32)?;
        }
        if self.nb_snapshots > 0 {
            table("snapshot table", self.snapshots_offset, 0, u64::MAX, 64)?;
        }
        Ok(())
    }

    /// How the payload is encrypted; `None` if it is not, or if the image has lost where
    /// its LUKS header is.
    pub fn encryption(&self) -> Option<Encryption> {
        match (self.crypt_method, self.luks) {
            (1, _) => Some(Encryption::Aes),
            (2, Some((offset, len))) => Some(Encryption::Luks { offset, len }),
            _ => None,
        }
    }

    /// Whether the payload is in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible_features & DATA_FILE != 0
    }

    /// Whether that other file is the guest's disk, byte for byte.
    pub fn is_data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear_features & DATA_FILE_RAW != 0
    }

    /// Whether L2 entries map subclusters.
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible_features & EXTENDED_L2 != 0
    }

    /// Whether writers may leave reference counts to whoever opens the image next.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible_features & LAZY_REFCOUNTS != 0
    }

    /// Refuses what cannot be opened without help, if that help is missing.
    pub(crate) fn check_openable(&self, has_cipher: bool, has_data_file: bool) -> Result<()> {
        if self.crypt_method != 0 && !has_cipher {
            let method = if self.crypt_method == 1 { "AES" } else { "LUKS" };
            return Err(Error::unsupported(format!("image is encrypted with {method}")).at(32));
        }
        if self.crypt_method == 2 && self.luks.is_none() {
            return Err(Error::corrupt("image is encrypted, but has no LUKS header").at(32));
        }
        if self.has_data_file() && !has_data_file {
            return Err(Error::new(
                ErrorKind::Denied,
                format!(
                    "the image keeps its data in another file, {:?}, which was not given",
                    self.data_file.as_deref().unwrap_or("without a name")
                ),
            )
            .at(72));
        }
        if has_data_file && !self.has_data_file() {
            return Err(Error::usage("image has no data file, but one was given"));
        }
        Ok(())
    }
    /// Whether its last writer died before its reference counts were written.
    pub fn is_dirty(&self) -> bool {
        self.incompatible_features & DIRTY != 0
    }

    /// Whether a writer found it corrupt; it can only be read.
    pub fn is_marked_corrupt(&self) -> bool {
        self.incompatible_features & CORRUPT != 0
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            version: self.version,
            extended: self.incompatible_features & EXTENDED_L2 != 0,
            external: self.incompatible_features & DATA_FILE != 0,
        }
    }
}
