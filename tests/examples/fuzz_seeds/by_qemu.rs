// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that qemu-img makes, if it is there.

use crate::Seeds;
use std::path::Path;
use tranship_format_testing::{has_tool, pattern, qemu_img_status};

/// Target, format and options.
const VARIANTS: [(&str, &str, &str); 26] = [
    ("qcow2", "qcow2", ""),
    ("qcow2", "qcow2", "-o compat=0.10,cluster_size=4096"),
    ("qcow2", "qcow2", "-o cluster_size=512,refcount_bits=1"),
    ("qcow2", "qcow2", "-c -o cluster_size=4096"),
    ("qcow2", "qcow2", "-c -o cluster_size=4096,compression_type=zstd"),
    ("qcow2", "qcow2", "-o extended_l2=on,cluster_size=16384"),
    ("qcow2", "qcow2", "-o encrypt.format=aes,encrypt.key-secret=s,cluster_size=4096"),
    ("qcow2", "qcow2", "-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
    ("vhdx", "vhdx", "-o block_size=1M,log_size=1M"),
    ("vhdx", "vhdx", "-o subformat=fixed,block_size=1M,log_size=1M"),
    ("vpc", "vpc", ""),
    ("vpc", "vpc", "-o subformat=fixed"),
    ("vpc", "vpc", "-o force_size=on"),
    ("vmdk", "vmdk", ""),
    ("vmdk", "vmdk", "-o zeroed_grain=on,compat6=on"),
    ("vmdk", "vmdk", "-o subformat=streamOptimized"),
    ("vmdk", "vmdk", "-o subformat=monolithicFlat"),
    ("vmdk", "vmdk", "-o subformat=twoGbMaxExtentSparse"),
    ("vmdk", "vmdk", "-o subformat=twoGbMaxExtentFlat"),
    ("vdi", "vdi", ""),
    ("vdi", "vdi", "-o static=on"),
    ("qed", "qed", ""),
    ("qed", "qed", "-o cluster_size=4096,table_size=1"),
    ("parallels", "parallels", ""),
    ("parallels", "parallels", "-o cluster_size=4096"),
    ("luks", "luks", "-o key-secret=s,iter-time=10"),
];

pub(crate) fn make(seeds: &Seeds) {
    if !has_tool("qemu-img") {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let raw = scratch.path().join("raw");
    let mut disk = vec![0; 1 << 20];
    for (number, at) in [0, 5000, 300_000, 700_000].into_iter().enumerate() {
        disk[at..at + 900].copy_from_slice(&pattern(900, number as u64));
    }
    std::fs::write(&raw, disk).unwrap();
    for (target, format, options) in VARIANTS {
        let folder = tempfile::tempdir_in(scratch.path()).unwrap();
        let image = folder.path().join("disk");
        let mut arguments = vec!["convert", "--object", "secret,id=s,data=fuzz", "-f", "raw"];
        arguments.extend(["-O", format]);
        arguments.extend(options.split_whitespace());
        if !qemu_img_status(&arguments, &[&raw, &image]).status.success() {
            eprintln!("skipped: qemu-img does not make {format} with {options}");
            continue;
        }
        let first = std::fs::read(&image).unwrap();
        let second = neighbour(folder.path(), &image);
        seeds.add(target, &[&first, &second]);
    }
}

/// The other file in the folder, if there is one.
fn neighbour(folder: &Path, image: &Path) -> Vec<u8> {
    let mut others = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let other = others.find(|path| path != image);
    other.map(|path| std::fs::read(path).unwrap()).unwrap_or_default()
}
