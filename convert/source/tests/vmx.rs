// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMX files and plain disks.
#![allow(clippy::unwrap_used, reason = "handmade files are known")]

use std::path::Path;
use std::process::Command;
use tranship_block::BlockDevice;
use tranship_source::{
    Controller, ErrorKind, Firmware, NetworkKind, RemovableKind, Source, SourceKind, open_disks,
    open_vmx,
};

const VMX: &str = r#".encoding = "UTF-8"
displayName = "old |22web|22"
memSize = "1024"
numvcpus = "4"
cpuid.coresPerSocket = "2"
firmware = "efi"
uefi.secureBoot.enabled = "TRUE"
guestOS = "debian12-64"
vm.genid = "-8536691797830587195"
vm.genidX = "-1723453263670062919"
scsi0.virtualDev = "pvscsi"
scsi0:10.present = "TRUE"
scsi0:10.fileName = "b.img"
scsi0:2.fileName = "a.img"
scsi0:3.fileName = "gone.img"
scsi0:3.present = "FALSE"
scsi0:4.fileName = "gone.iso"
scsi0:4.deviceType = "cdrom-image"
sata0:0.fileName = "c.img"
ide0:0.fileName = "d.img"
ide1:0.deviceType = "cdrom-raw"
ide1:0.fileName = "auto detect"
floppy0.present = "TRUE"
sound.virtualDev = "hdaudio"
ethernet0.present = "TRUE"
ethernet0.addressType = "static"
ethernet0.address = "00:50:56:01:02:03"
ethernet0.generatedAddress = "00:0c:29:01:02:03"
ethernet0.connectionType = "bridged"
ethernet1.present = "TRUE"
ethernet1.virtualDev = "vmxnet3"
ethernet1.networkName = "lan"
ethernet1.generatedAddress = "00:0C:29:0A:0B:0C"
ethernet2.present = "FALSE"
"#;

fn open(folder: &Path, text: &str) -> tranship_source::Result<Source> {
    for name in ["a.img", "b.img", "c.img", "d.img"] {
        std::fs::write(folder.join(name), [7; 1024]).unwrap();
    }
    std::fs::write(folder.join("x.vmx"), text).unwrap();
    open_vmx(&folder.join("x.vmx"))
}

#[test]
fn everything_that_a_vmx_file_says() {
    let folder = tempfile::tempdir().unwrap();
    let source = open(folder.path(), VMX).unwrap();
    assert_eq!((source.name.as_str(), source.kind), ("old \"web\"", SourceKind::Vmx));
    assert_eq!((source.memory_bytes, source.vcpus), (1 << 30, 4));
    assert_eq!(source.cpu_topology.unwrap().cores_per_socket, 2);
    assert_eq!((source.firmware, source.secure_boot), (Firmware::Uefi, true));
    assert_eq!(source.genid.as_deref(), Some("09512cc5-940a-8987-b950-f54f631015e8"));
    assert_eq!(source.sound.as_deref(), Some("ich6"));
    let disks: Vec<_> =
        source.disks.iter().map(|disk| (disk.index, disk.unit.unwrap(), &*disk.name)).collect();
    assert_eq!(disks, [(0, 2, "a.img"), (1, 10, "b.img"), (2, 0, "c.img"), (3, 0, "d.img")]);
    assert_eq!(source.disks[0].controller, Controller::Scsi(Some("pvscsi".into())));
    assert_eq!(source.disks[3].controller, Controller::Ide);
    assert_eq!(source.disks[0].open().unwrap().size(), 1024);
    let nics: Vec<_> = source.nics.iter().map(|nic| (nic.mac.as_deref(), &nic.network)).collect();
    assert_eq!(
        nics,
        [
            (Some("00:50:56:01:02:03"), &NetworkKind::Bridge("ethernet0".into())),
            (Some("00:0c:29:0a:0b:0c"), &NetworkKind::Network("lan".into())),
        ]
    );
    let kinds: Vec<_> = source.removables.iter().map(|drive| drive.kind).collect();
    assert_eq!(kinds, [RemovableKind::Cdrom, RemovableKind::Floppy]);
}

#[test]
fn defaults_and_errors() {
    let folder = tempfile::tempdir().unwrap();
    let open = |text: &str| open(folder.path(), text);
    let source = open("").unwrap();
    assert_eq!((source.name.as_str(), source.memory_bytes, source.vcpus), ("x", 32 << 20, 1));
    assert_eq!(source.firmware, Firmware::Bios);
    let kind = |text: &str| open(text).unwrap_err().kind();
    assert_eq!(kind("scsi0:0.fileName = \"gone.vmdk\""), ErrorKind::NotFound);
    assert_eq!(kind("scsi0:0.fileName = \"../a.img\""), ErrorKind::Denied);
    assert_eq!(kind("memSize = \"many\""), ErrorKind::Corrupt);
    assert_eq!(kind("memSize = \"18446744073709551615\""), ErrorKind::Corrupt);
    assert_eq!(kind("numvcpus = \"0\""), ErrorKind::Corrupt);
    let moved = open("scsi0:0.fileName = \"/vmfs/volumes/1/x/a.img\"").unwrap();
    assert_eq!(moved.disks[0].name, "a.img");
    assert!(moved.warnings[0].contains("beside the VMX file"));
}

#[test]
fn damage_anywhere_is_survived() {
    let folder = tempfile::tempdir().unwrap();
    for at in (0..VMX.len()).step_by(5) {
        for value in [0, b'"', b'\n', 0xff] {
            let mut text = VMX.as_bytes().to_vec();
            text[at] = value;
            std::fs::write(folder.path().join("x.vmx"), text).unwrap();
            let _ = open_vmx(&folder.path().join("x.vmx"));
        }
    }
}

#[test]
fn plain_disks_get_a_default_guest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web-sda");
    std::fs::write(&path, [7; 1024]).unwrap();
    let source = open_disks(&[path.clone(), path.clone()], None).unwrap();
    assert_eq!((source.name.as_str(), source.memory_bytes, source.vcpus), ("web", 2048 << 20, 1));
    assert_eq!(source.nics[0].network, NetworkKind::Network("default".into()));
    assert_eq!(source.disks[1].index, 1);
    assert_eq!(source.warnings.len(), 2, "{:?}", source.warnings);
    assert!(open_disks(&[path], Some("raw")).unwrap().warnings.is_empty());
    assert_eq!(open_disks(&[], None).unwrap_err().kind(), ErrorKind::Usage);
    let gone = [folder.path().join("gone")];
    assert_eq!(open_disks(&gone, None).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_plain_qcow2_disk_is_told_by_its_content() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.img");
    let create = ["create", "-q", "-f", "qcow2"];
    let made = Command::new("qemu-img").args(create).arg(&path).arg("3M").status();
    if made.is_err() {
        return eprintln!("skipped: qemu-img is not installed");
    }
    let source = open_disks(std::slice::from_ref(&path), None).unwrap();
    assert_eq!(source.disks[0].format, "qcow2");
    assert_eq!(source.disks[0].open().unwrap().size(), 3 << 20);
    assert!(source.warnings.is_empty(), "{:?}", source.warnings);
    let named = open_disks(&[path], Some("vhdx")).unwrap();
    assert_eq!(named.disks[0].open().unwrap_err().kind(), ErrorKind::Corrupt);
}
