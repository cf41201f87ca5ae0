// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The archive of drivers that an initramfs needs to start from a virtio disk.

use crate::compression::Compression;
use crate::cpio::Writer;
use crate::draft::Draft;
use crate::initramfs::Initramfs;
use crate::machine::MachineFacts;
use crate::plan::AppendInitramfs;
use crate::tables::{crypt_devices, resume_device};
use std::collections::{BTreeMap, BTreeSet};
use tranship_inspect::{Error, ErrorKind, FileKind, GuestTree, Kernel, ModuleIndex, Result};
use tranship_protocol::GuestPath;

/// Modules that find a virtio disk. The network driver is left out on purpose: a card
/// that appears in the initramfs gets its name there, and rules of the real root come
/// too late for it.
pub(crate) const WANTED: &[&str] = &[
    "virtio",
    "virtio_ring",
    "virtio_pci",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
];

/// Indexes by which udev finds modules, in text and in binary form.
const INDEXES: &[&str] = &[
    "modules.alias",
    "modules.alias.bin",
    "modules.builtin",
    "modules.builtin.alias.bin",
    "modules.builtin.bin",
    "modules.builtin.modinfo",
    "modules.dep",
    "modules.dep.bin",
    "modules.order",
    "modules.softdep",
    "modules.symbols",
    "modules.symbols.bin",
];

/// The archive begins at a multiple of this: the kernel wants 4, tools that look for the
/// next part expect a sector.
const ALIGN: u64 = 512;
/// Largest initramfs that is read.
const MAX_INITRD: u64 = 512 << 20;
/// Largest module and index that is read.
const MAX_MODULE: u64 = 64 << 20;

/// What should be inside every initramfs beside the modules.
pub(crate) struct Wanted<'a> {
    /// The machine, for the device that holds the saved memory.
    pub(crate) machine: &'a MachineFacts,
    /// `.link` files that fix the names of network cards: path and contents.
    pub(crate) links: &'a BTreeMap<String, Vec<u8>>,
}

/// Works out what to append for one kernel; `None` if nothing is missing.
///
/// # Errors
///
/// The initramfs cannot be understood, or the kernel's modules are incomplete.
pub(crate) fn addition(
    draft: &Draft<'_>,
    kernel: &Kernel,
    initrd: &GuestPath,
    wanted: &Wanted<'_>,
) -> Result<Option<AppendInitramfs>> {
    let tree = draft.tree;
    let directory = kernel.modules.as_ref().ok_or_else(|| {
        let message = format!("kernel {} has no directory of modules", kernel.version);
        Error::new(ErrorKind::NotFound, message)
    })?;
    let bytes = tree.read(initrd, MAX_INITRD)?;
    let inside = Initramfs::read(&bytes).map_err(|error| error.on(initrd))?;
    let index = ModuleIndex::read(tree, directory)?;
    let present = inside.modules(&kernel.version);
    let closure = index.closure(WANTED.iter().copied());
    let missing: BTreeSet<&String> = closure.difference(&present).collect();
    let files = files(&inside, &present, wanted);
    if missing.is_empty() && files.is_empty() {
        return Ok(None);
    }
    let mut archive = Archive { inside: &inside, files: BTreeMap::new() };
    let base = format!("lib/modules/{}", kernel.version);
    if !missing.is_empty() {
        for name in &missing {
            let Some(path) = index.path(name) else { continue };
            archive.add_from(tree, &directory.join(path), &format!("{base}/{path}"))?;
        }
        for name in INDEXES {
            let path = directory.join(name);
            if tree.stat(&path)?.is_some_and(|stat| stat.kind == FileKind::File) {
                archive.add_from(tree, &path, &format!("{base}/{name}"))?;
            }
        }
    }
    for (path, content) in &files {
        archive.add(path, 0, content.clone())?;
    }
    let compression = inside.main.unwrap_or(Compression::None).for_addition();
    let segment = compression.pack(archive.finish()?)?;
    Ok(Some(AppendInitramfs {
        kernel: kernel.version.clone(),
        initrd: initrd.clone(),
        old_size: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        align: ALIGN,
        segment,
        compression,
        modules: missing.into_iter().cloned().collect(),
        files: files.into_keys().collect(),
        backup: None,
        why: "the root filesystem is on a virtio disk from now on".to_owned(),
    }))
}

/// Gives the devices that a file names their new names.
type Rename = fn(&[u8], &MachineFacts) -> Vec<u8>;

/// Files that have to be replaced or added inside.
fn files(
    inside: &Initramfs,
    modules: &BTreeSet<String>,
    wanted: &Wanted<'_>,
) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let tables: [(&str, Rename); 2] =
        [("conf/conf.d/resume", resume_device), ("cryptroot/crypttab", crypt_devices)];
    for (path, renamed) in tables {
        if let Some(old) = inside.content(path) {
            let new = renamed(old, wanted.machine);
            if new != old {
                files.insert(path.to_owned(), new);
            }
        }
    }
    // Where the network driver is inside already, the name is given there.
    if modules.contains("virtio_net") {
        for (path, content) in wanted.links {
            let path = path.trim_start_matches('/');
            if inside.content(path) != Some(content) {
                files.insert(path.to_owned(), content.clone());
            }
        }
    }
    files
}

/// The files of the archive under the paths they have once links inside are followed.
struct Archive<'a> {
    inside: &'a Initramfs,
    files: BTreeMap<Vec<u8>, (i64, Vec<u8>)>,
}

impl Archive<'_> {
    fn add(&mut self, path: &str, modified: i64, content: Vec<u8>) -> Result<()> {
        self.files.insert(self.inside.resolve(path)?, (modified, content));
        Ok(())
    }

    fn add_from(&mut self, tree: &dyn GuestTree, from: &GuestPath, path: &str) -> Result<()> {
        let Some(stat) = tree.stat(from)? else {
            let message = "is in the index of modules, but not there";
            return Err(Error::new(ErrorKind::NotFound, message).on(from));
        };
        self.add(path, stat.modified, tree.read(from, MAX_MODULE)?)
    }

    /// Writes the archive: sorted, each directory that is not inside yet before its files.
    fn finish(self) -> Result<Vec<u8>> {
        let mut writer = Writer::default();
        let mut made = BTreeSet::new();
        for (path, (modified, content)) in &self.files {
            for (at, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
                let parent = path.get(..at).unwrap_or_default();
                if !self.inside.has_directory(parent) && made.insert(parent.to_vec()) {
                    writer.directory(parent)?;
                }
            }
            writer.file(path, *modified, content)?;
        }
        writer.finish()
    }
}
