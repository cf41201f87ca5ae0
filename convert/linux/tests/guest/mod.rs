// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tree that looks like Debian 12 on VMware, and the real `cpio` to check archives.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use tranship_inspect::folder::FolderTree;
use tranship_linux::{Disk, Firmware, MachineFacts, Nic, Volume};

pub(crate) const KERNEL: &str = "6.1.0-21-amd64";
pub(crate) const MAC: &str = "00:50:56:aa:bb:01";
pub(crate) const BOOT_UUID: &str = "11111111-2222-3333-4444-555555555555";
pub(crate) const SWAP_UUID: &str = "66666666-7777-8888-9999-000000000000";

const MODULES: &[(&str, &str)] = &[
    ("virtio", "virtio_ring"),
    ("virtio_ring", ""),
    ("virtio_pci", "virtio_pci_modern_dev virtio_pci_legacy_dev virtio virtio_ring"),
    ("virtio_pci_modern_dev", ""),
    ("virtio_pci_legacy_dev", ""),
    ("virtio-blk", "virtio virtio_ring"),
    ("virtio_scsi", "virtio virtio_ring"),
    ("virtio_net", "virtio virtio_ring"),
    ("sd_mod", ""),
    ("vmw_pvscsi", ""),
];

/// The guest's folder, removed when it is dropped.
pub(crate) struct Guest {
    pub(crate) dir: tempfile::TempDir,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let guest = Self { dir: tempfile::tempdir().unwrap() };
        let root = guest.root();
        for directory in ["usr/bin", "usr/sbin", "usr/lib", "etc"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        for name in ["bin", "sbin", "lib"] {
            symlink(format!("usr/{name}"), root.join(name)).unwrap();
        }
        symlink("/lib/systemd/systemd", root.join("usr/sbin/init")).unwrap();
        let grub = format!(
            "set root='hd0,msdos1'\nmenuentry 'Debian' {{\n\tlinux\t/boot/vmlinuz-{KERNEL} \
             root=/dev/sda1 ro  quiet\n\tinitrd\t/boot/initrd.img-{KERNEL}\n}}\n"
        );
        let status = "Package: open-vm-tools\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2:12.2.0-1\n\n\
                      Package: grub-pc\nStatus: install ok installed\nVersion: 2.06\n\n\
                      Package: systemd\nStatus: install ok installed\nVersion: 252\n";
        let fstab = "# /etc/fstab\n/dev/sr0  /media/cdrom0 udf,iso9660 user,noauto 0 0\n\
                     /dev/sda1 / ext4 errors=remount-ro 0 1\n/dev/sda5\tnone\tswap\tsw\t0\t0\n";
        let files: &[(&str, &str)] = &[
            ("etc/os-release", "ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n"),
            ("etc/debian_version", "12.5\n"),
            ("etc/hostname", "web01\n"),
            ("etc/fstab", fstab),
            ("etc/blkid.tab", "old"),
            (
                "etc/network/interfaces",
                "auto ens192\niface ens192 inet static\n address 10.0.0.5/24\n",
            ),
            (
                "etc/default/grub",
                "GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX=\"\"\n\
                 GRUB_DISABLE_LINUX_UUID=true\n",
            ),
            ("etc/initramfs-tools/modules", "# comment\n"),
            ("etc/initramfs-tools/conf.d/resume", "RESUME=/dev/sda5\n"),
            ("boot/grub/grub.cfg", &grub),
            ("boot/grub/device.map", "(hd0)\t/dev/sda\n"),
            ("usr/lib/systemd/systemd", ""),
            ("usr/lib/systemd/libsystemd-shared-252.so", ""),
            ("usr/lib/systemd/system/open-vm-tools.service", "[Unit]\n"),
            ("usr/lib/systemd/system/vgauth.service", "[Unit]\n"),
            ("usr/lib/systemd/system/ssh.service", "[Unit]\n"),
            ("var/lib/dpkg/status", status),
        ];
        for (path, content) in files {
            guest.write(path, content.as_bytes());
        }
        guest.write(&format!("boot/vmlinuz-{KERNEL}"), b"kernel");
        guest.write(&format!("boot/config-{KERNEL}"), b"CONFIG_VIRTIO_BLK=m\n");
        guest.write(&format!("boot/initrd.img-{KERNEL}"), &initramfs(true, true, &[]));
        let modules = format!("usr/lib/modules/{KERNEL}");
        let mut dep = Vec::new();
        for (name, needs) in MODULES {
            guest.write(&format!("{modules}/kernel/{name}.ko"), name.repeat(300).as_bytes());
            let needs: Vec<String> =
                needs.split_whitespace().map(|need| format!("kernel/{need}.ko")).collect();
            dep.push(format!("kernel/{name}.ko: {}\n", needs.join(" ")));
        }
        guest.write(&format!("{modules}/modules.dep"), dep.concat().as_bytes());
        guest.write(&format!("{modules}/modules.alias.bin"), b"\x01alias\0");
        guest.write(&format!("{modules}/modules.builtin"), b"kernel/drivers/ata/libata.ko\n");
        guest
    }

    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("root")
    }

    pub(crate) fn tree(&self) -> FolderTree {
        FolderTree::new(self.root())
    }

    pub(crate) fn write(&self, path: &str, content: &[u8]) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub(crate) fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    pub(crate) fn remove(&self, path: &str) {
        fs::remove_file(self.root().join(path)).unwrap();
    }

    /// Every file with its contents, and every link with its target.
    pub(crate) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut pending = vec![self.root()];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let entry = entry.unwrap();
                let kind = entry.file_type().unwrap();
                let name = entry.path().display().to_string();
                if kind.is_symlink() {
                    let target = fs::read_link(entry.path()).unwrap();
                    files.insert(name, target.display().to_string().into_bytes());
                } else if kind.is_dir() {
                    pending.push(entry.path());
                } else {
                    files.insert(name, fs::read(entry.path()).unwrap());
                }
            }
        }
        files
    }
}

pub(crate) fn machine() -> MachineFacts {
    let volume = |partition, uuid: &str| Volume {
        partition: Some(partition),
        uuid: Some(uuid.to_owned()),
        ..Volume::default()
    };
    MachineFacts {
        disks: vec![Disk {
            source_name: "sda".to_owned(),
            target_name: "vda".to_owned(),
            volumes: vec![volume(1, BOOT_UUID), volume(5, SWAP_UUID)],
        }],
        nics: vec![Nic { mac: MAC.to_uppercase(), slot: Some(192) }],
        firmware: Firmware::Bios,
    }
}

/// An archive of its own making, so that the crate's writer is not checked against itself.
fn archive(entries: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let trailer: &[(&str, u32, &[u8])] = &[("TRAILER!!!", 0, b"")];
    for (inode, (name, mode, content)) in entries.iter().chain(trailer).enumerate() {
        let size = content.len();
        let name_len = name.len() + 1;
        bytes.extend(
            format!(
                "070701{inode:08X}{mode:08X}00000000000000000000000100000000{size:08X}\
                 00000000000000000000000000000000{name_len:08X}00000000{name}\0"
            )
            .into_bytes(),
        );
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// An initramfs as initramfs-tools makes it, gzip-compressed, with only VMware's driver and
/// the modules `inside`.
pub(crate) fn initramfs(linked_lib: bool, microcode: bool, inside: &[&str]) -> Vec<u8> {
    const DIRECTORY: u32 = 0o040_755;
    const FILE: u32 = 0o100_644;
    let lib = if linked_lib { "usr/lib" } else { "lib" };
    let modules = format!("{lib}/modules/{KERNEL}/kernel");
    let mut directories = vec!["conf".to_owned(), "conf/conf.d".to_owned(), "usr".to_owned()];
    let mut path = String::new();
    for part in modules.split('/') {
        path = if path.is_empty() { part.to_owned() } else { format!("{path}/{part}") };
        if path != "usr" {
            directories.push(path.clone());
        }
    }
    let paths: Vec<String> = inside.iter().map(|name| format!("{modules}/{name}.ko")).collect();
    let own = format!("{modules}/vmw_pvscsi.ko");
    let mut entries: Vec<(&str, u32, &[u8])> =
        directories.iter().map(|name| (name.as_str(), DIRECTORY, &b""[..])).collect();
    if linked_lib {
        entries.push(("lib", 0o120_777, b"usr/lib"));
    }
    entries.push(("init", 0o100_755, b"#!/bin/sh\n"));
    entries.push(("conf/conf.d/resume", FILE, b"RESUME=/dev/sda5\n"));
    entries.push((&own, FILE, b"pvscsi"));
    entries.extend(paths.iter().map(|path| (path.as_str(), FILE, &b"module"[..])));
    let mut bytes = if microcode { early() } else { Vec::new() };
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&archive(&entries)).unwrap();
    bytes.extend(encoder.finish().unwrap());
    bytes
}

fn early() -> Vec<u8> {
    archive(&[("kernel", 0o040_755, b""), ("kernel/GenuineIntel.bin", 0o100_644, b"microcode")])
}

/// Bytes of the uncompressed part in front.
pub(crate) fn early_parts(microcode: bool) -> usize {
    if microcode { early().len() } else { 0 }
}

/// Unpacks all gzip parts after `skip` bytes with the real `cpio`, one over the other, as
/// the kernel does; `None` with a visible word if there is no `cpio`.
pub(crate) fn unpacked(bytes: &[u8], skip: usize) -> Option<tempfile::TempDir> {
    if Command::new("cpio").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("skipped: cpio is not installed");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut rest = &bytes[skip..];
    let mut parts = 0;
    while !rest.is_empty() {
        if rest[0] == 0 {
            rest = &rest[1..];
            continue;
        }
        assert_eq!((bytes.len() - rest.len()) % 4, 0, "a part begins at a multiple of four");
        let mut plain = Vec::new();
        let mut decoder = flate2::bufread::GzDecoder::new(rest);
        std::io::Read::read_to_end(&mut decoder, &mut plain).unwrap();
        rest = decoder.into_inner();
        extract(&plain, dir.path());
        parts += 1;
    }
    assert_eq!(parts, 2);
    Some(dir)
}

fn extract(archive: &[u8], into: &Path) {
    let mut child = Command::new("cpio")
        .args(["--extract", "--unconditional", "--quiet", "--no-absolute-filenames"])
        .current_dir(into)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(archive).unwrap();
    assert!(child.wait().unwrap().success());
}
