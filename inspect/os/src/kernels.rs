// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Installed kernels, by what is on the disk rather than by what packages claim.

use crate::facts::{optional_path_text, path_text};
use crate::modules::ModuleIndex;
use crate::reader::{Reader, SMALL};
use crate::{ErrorKind, Result};
use serde::Serialize;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use tranship_protocol::GuestPath;

/// Most kernels that are looked at: more than any guest has.
const MAX_KERNELS: usize = 64;

/// One installed kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kernel {
    /// Release, as `uname -r` says.
    pub version: String,
    /// The kernel's image.
    #[serde(serialize_with = "path_text")]
    pub image: GuestPath,
    /// Its initramfs.
    #[serde(serialize_with = "optional_path_text")]
    pub initrd: Option<GuestPath>,
    /// Directory of its modules.
    #[serde(serialize_with = "optional_path_text")]
    pub modules: Option<GuestPath>,
    /// The configuration it was built with.
    #[serde(serialize_with = "optional_path_text")]
    pub config: Option<GuestPath>,
    /// Which drivers for KVM it has.
    pub virtio: Virtio,
}

/// Which drivers for KVM a kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Virtio {
    /// The PCI transport.
    pub pci: Support,
    /// Disks on virtio-blk.
    pub block: Support,
    /// Disks on virtio-scsi.
    pub scsi: Support,
    /// Network cards.
    pub network: Support,
}

/// In which form a kernel has a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Support {
    /// Part of the kernel.
    Builtin,
    /// A module beside it.
    Module,
    /// Not at all.
    Absent,
}

/// The kernels of a guest, newest first.
pub(crate) fn kernels(reader: &Reader<'_>) -> Result<Vec<Kernel>> {
    let boot = reader.names("/boot")?;
    let modules = module_directories(reader)?;
    let mut found = BTreeMap::new();
    for name in &boot {
        let Some(version) = ["vmlinuz-", "vmlinux-", "kernel-"]
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix))
            .filter(|version| is_version(version) && !version.contains("rescue"))
        else {
            // Arch names its images after the package; the directory says the version.
            continue;
        };
        found.entry(version.to_owned()).or_insert_with(|| GuestPath::of("/boot").join(name));
    }
    for (version, directory) in &modules {
        let image = directory.join("vmlinuz");
        if !found.contains_key(version) && reader.has_file(image.clone())? {
            found.insert(version.clone(), image);
        }
    }
    let mut kernels = Vec::new();
    for (version, image) in found.into_iter().take(MAX_KERNELS) {
        let config_name = format!("config-{version}");
        let config = boot.contains(&config_name).then(|| GuestPath::of("/boot").join(&config_name));
        let directory = modules.get(&version).cloned();
        let virtio = virtio(reader, directory.as_ref(), config.as_ref())?;
        let initrd = initrd(&boot, &version);
        kernels.push(Kernel { version, image, initrd, modules: directory, config, virtio });
    }
    kernels.sort_by(|a, b| compare_versions(&b.version, &a.version));
    Ok(kernels)
}

/// Versions that have a directory of modules, wherever `/lib` leads.
fn module_directories(reader: &Reader<'_>) -> Result<BTreeMap<String, GuestPath>> {
    let mut found = BTreeMap::new();
    for parent in ["/lib/modules", "/usr/lib/modules"] {
        for version in reader.names(parent)? {
            let directory = GuestPath::of(parent).join(&version);
            if is_version(&version) && reader.has_directory(directory.clone())? {
                found.entry(version).or_insert(directory);
            }
        }
    }
    Ok(found)
}

/// A release begins with a digit and holds nothing that could lead out of a directory.
fn is_version(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
        && !text.contains('/')
        && !text.ends_with(".old")
        && !text.ends_with(".dpkg-new")
        && !text.ends_with(".dpkg-bak")
}

/// The initramfs named after the version; the ones of kdump and our backups are not it.
fn initrd(boot: &[String], version: &str) -> Option<GuestPath> {
    [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
        format!("initrd-{version}.img"),
        format!("initramfs-{version}"),
    ]
    .iter()
    .find(|name| boot.contains(name))
    .map(|name| GuestPath::of("/boot").join(name))
}

fn virtio(
    reader: &Reader<'_>,
    directory: Option<&GuestPath>,
    config: Option<&GuestPath>,
) -> Result<Virtio> {
    let config = match config {
        Some(path) => reader.text(path.clone())?.unwrap_or_default(),
        None => String::new(),
    };
    let index = match directory.map(|path| ModuleIndex::read(reader.tree(), path)).transpose() {
        Ok(index) => index.unwrap_or_default(),
        Err(error) if error.kind() == ErrorKind::Appliance => return Err(error),
        Err(error) => {
            reader.note(format!("{error}"));
            ModuleIndex::default()
        }
    };
    let support = |module: &str, option: &str| {
        let built_in = config.lines().any(|line| {
            line.strip_prefix("CONFIG_").and_then(|rest| rest.strip_prefix(option)) == Some("=y")
        });
        if built_in || index.is_builtin(module) {
            Support::Builtin
        } else if index.path(module).is_some() {
            Support::Module
        } else {
            Support::Absent
        }
    };
    Ok(Virtio {
        pci: support("virtio_pci", "VIRTIO_PCI"),
        block: support("virtio_blk", "VIRTIO_BLK"),
        scsi: support("virtio_scsi", "SCSI_VIRTIO"),
        network: support("virtio_net", "VIRTIO_NET"),
    })
}

/// Orders versions by their numbers, so that 6.10 comes after 6.9.
pub(crate) fn compare_versions(a: &str, b: &str) -> Ordering {
    let parts = |text: &str| -> Vec<(u64, String)> {
        let mut parts = Vec::new();
        let mut digits = String::new();
        let mut other = String::new();
        for c in text.chars() {
            if c.is_ascii_digit() {
                digits.push(c);
            } else {
                if !digits.is_empty() {
                    parts.push((digits.parse().unwrap_or(u64::MAX), std::mem::take(&mut other)));
                    digits.clear();
                }
                other.push(c);
            }
        }
        parts.push((digits.parse().unwrap_or(0), other));
        parts
    };
    parts(a).cmp(&parts(b))
}

/// The configuration file's size limit is the one of all small files.
const _: () = assert!(SMALL >= 512 << 10, "kernel configurations hold about 300 KiB");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        let mut versions = ["6.1.0-9-amd64", "6.1.0-21-amd64", "5.10.0-8-amd64", "6.10.1"];
        versions.sort_by(|a, b| compare_versions(a, b));
        assert_eq!(versions, ["5.10.0-8-amd64", "6.1.0-9-amd64", "6.1.0-21-amd64", "6.10.1"]);
    }

    #[test]
    fn the_initramfs_is_the_one_of_this_version_and_no_backup() {
        let boot: Vec<String> = [
            "initrd.img-6.1.0-1",
            "initrd.img-6.1.0-1.pre-tranship",
            "initramfs-5.14.0.img",
            "initramfs-5.14.0kdump.img",
        ]
        .map(str::to_owned)
        .to_vec();
        for (version, want) in [
            ("6.1.0-1", Some("/boot/initrd.img-6.1.0-1")),
            ("5.14.0", Some("/boot/initramfs-5.14.0.img")),
            ("6.1.0", None),
        ] {
            assert_eq!(initrd(&boot, version), want.map(GuestPath::of));
        }
    }
}
