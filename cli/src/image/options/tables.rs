// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What each format takes when an image is made or changed.

use tranship_formats::Format;

/// The type of an option's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Switch,
    /// A number.
    Number,
    /// A number of bytes, with a suffix.
    Size,
}

/// An option.
#[derive(Debug)]
pub(crate) struct Described {
    /// Its name in lists.
    pub(crate) name: &'static str,
    /// The type of its value.
    pub(crate) kind: Kind,
    /// What happens without it, if that is shown.
    pub(crate) default: Option<&'static str>,
    /// What it does.
    pub(crate) help: &'static str,
}

const fn option(name: &'static str, kind: Kind, help: &'static str) -> Described {
    Described { name, kind, default: None, help }
}

const fn shown(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    help: &'static str,
) -> Described {
    Described { name, kind, default: Some(default), help }
}

static SIZE: Described = option("size", Kind::Size, "Size of the disk that the guest sees");
static BACKING_FILE: Described =
    option("backing_file", Kind::Text, "The image that the new one is based on");
static BACKING_FORMAT: Described =
    option("backing_fmt", Kind::Text, "Format of the image that the new one is based on");

static COMPAT: Described = option("compat", Kind::Text, "Version: v2 (or 0.10), v3 (or 1.1)");
static DATA_FILE: Described =
    option("data_file", Kind::Text, "Separate file that the guest's data goes to");
static DATA_FILE_RAW: Described = option(
    "data_file_raw",
    Kind::Switch,
    "Keep the separate file readable as a raw disk at all times",
);
static LAZY_REFCOUNTS: Described = shown(
    "lazy_refcounts",
    Kind::Switch,
    "off",
    "Write reference counts late: faster, but a crash has to be repaired",
);
static REFCOUNT_BITS: Described = shown(
    "refcount_bits",
    Kind::Number,
    "16",
    "Bits of a reference count, a power of two up to 64",
);
static ITER_TIME: Described =
    option("encrypt.iter-time", Kind::Number, "Milliseconds that testing a passphrase takes");

/// In the order in which they are shown.
static QCOW2: [Described; 13] = [
    option("encryption", Kind::Switch, "Old name of encrypt.format=aes"),
    option("encrypt.format", Kind::Text, "Encryption: luks, or aes (old and weak)"),
    option("encrypt.key-secret", Kind::Text, "Id of the secret with the passphrase"),
    option("encrypt.cipher-alg", Kind::Text, "Cipher"),
    option("encrypt.cipher-mode", Kind::Text, "Mode of the cipher"),
    option("encrypt.ivgen-alg", Kind::Text, "How initial vectors are made"),
    option("encrypt.ivgen-hash-alg", Kind::Text, "Hash for making initial vectors"),
    option("encrypt.hash-alg", Kind::Text, "Hash for testing passphrases"),
    shown("cluster_size", Kind::Size, "65536", "Bytes of a cluster, a power of two from 512 to 2M"),
    shown("extended_l2", Kind::Switch, "off", "Divide clusters into 32 subclusters"),
    option("preallocation", Kind::Text, "Space that is reserved: off, metadata, falloc or full"),
    shown("compression_type", Kind::Text, "zlib", "How clusters are compressed: zlib or zstd"),
    option("encrypt.keyslot", Kind::Number, "The only slot of a passphrase to change"),
];

static VMDK: [Described; 7] = [
    option("adapter_type", Kind::Text, "Controller: ide, lsilogic, buslogic or legacyESX"),
    option("backing_fmt", Kind::Text, "Format of the parent; it can only be vmdk"),
    shown("compat6", Kind::Switch, "off", "Make the hardware version 6"),
    shown("hwversion", Kind::Text, "undefined", "Hardware version"),
    option("toolsversion", Kind::Text, "Version of the guest's tools"),
    option(
        "subformat",
        Kind::Text,
        "monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, \
         streamOptimized, vmfs or vmfsSparse",
    ),
    option("zeroed_grain", Kind::Switch, "Mark zeroes in the tables instead of storing them"),
];

static VPC: [Described; 3] = [
    option("subformat", Kind::Text, "dynamic or fixed"),
    option("force_size", Kind::Switch, "Keep the exact size instead of one that a geometry has"),
    option("azure", Kind::Switch, "As Azure takes it: fixed, in whole MiB, 20 MiB at least"),
];

static VHDX: [Described; 4] = [
    shown("log_size", Kind::Size, "1048576", "Bytes of the log, a multiple of 1M"),
    shown(
        "block_size",
        Kind::Size,
        "0",
        "Bytes of a block, 1M to 256M; 0 chooses by the disk's size",
    ),
    option("subformat", Kind::Text, "dynamic or fixed"),
    option("block_state_zero", Kind::Switch, "Mark blocks of zeroes instead of storing them"),
];

/// Of the file that the image is in.
static FILE: [Described; 3] = [
    option("nocow", Kind::Switch, "Write in place on btrfs, which does not copy then"),
    option("preallocation", Kind::Text, "Space that is reserved: off, falloc or full"),
    option(
        "extent_size_hint",
        Kind::Size,
        "Bytes that the filesystem allocates at once; 0 for none",
    ),
];

/// The options of `image`'s changeable properties.
static SECRETS: [Described; 3] = [
    option("encrypt.new-secret", Kind::Text, "Id of the secret with the new passphrase"),
    option("encrypt.old-secret", Kind::Text, "Id of the secret with the passphrase to replace"),
    option("encrypt.state", Kind::Text, "active or inactive"),
];

/// What can be chosen when an image of `format` is made, in the order in which it is shown;
/// `None` for formats that cannot be made. `with_file` adds what the file's system takes.
pub(crate) fn creatable(format: Format, with_file: bool) -> Option<Vec<&'static Described>> {
    let mut options: Vec<&'static Described> = match format {
        Format::Raw => vec![&SIZE],
        Format::Qcow2 => {
            let [first @ .., _keyslot] = &QCOW2;
            let (encryption, layout) = first.split_at(8);
            encryption
                .iter()
                .chain([&ITER_TIME])
                .chain(layout)
                .chain([&SIZE, &COMPAT, &BACKING_FILE, &BACKING_FORMAT])
                .chain([&DATA_FILE, &DATA_FILE_RAW, &LAZY_REFCOUNTS, &REFCOUNT_BITS])
                .collect()
        }
        Format::Vmdk => {
            let (adapter, rest) = VMDK.split_at(1);
            [&SIZE].into_iter().chain(adapter).chain([&BACKING_FILE]).chain(rest).collect()
        }
        Format::Vpc => [&SIZE, &BACKING_FILE, &BACKING_FORMAT].into_iter().chain(&VPC).collect(),
        Format::Vhdx => [&SIZE, &BACKING_FILE, &BACKING_FORMAT].into_iter().chain(&VHDX).collect(),
        _ => return None,
    };
    if with_file {
        let new = |option: &&Described| options.iter().all(|known| known.name != option.name);
        let more: Vec<&'static Described> = FILE.iter().filter(new).collect();
        options.extend(more);
    }
    Some(options)
}

/// What can be changed in an image of `format`; `None` for formats in which nothing can.
pub(crate) fn amendable(format: Format) -> Option<Vec<&'static Described>> {
    (format == Format::Qcow2).then(|| {
        let keyslot = QCOW2.iter().filter(|option| option.name == "encrypt.keyslot");
        keyslot
            .chain(&SECRETS)
            .chain([&ITER_TIME, &SIZE, &COMPAT, &BACKING_FILE, &BACKING_FORMAT])
            .chain([&DATA_FILE, &DATA_FILE_RAW, &LAZY_REFCOUNTS, &REFCOUNT_BITS])
            .collect()
    })
}
