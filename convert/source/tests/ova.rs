// SPDX-License-Identifier: Apache-2.0 OR MIT
//! OVF packages made by hand: whole, cut off, contradictory and hostile.
#![allow(clippy::unwrap_used, reason = "handmade packages are known")]

use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use tranship_block::BlockDevice;
use tranship_source::{
    Controller, ErrorKind, Firmware, Location, NetworkKind, SourceKind, open_ova,
};

const SIZE: usize = 100_000;

/// A description with `%DISK%` for the rest of the disk's hardware item.
const OVF: &str = r#"<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
    xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
    xmlns:vmw="http://www.vmware.com/schema/ovf"
    xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
  <References><File ovf:id="f1" ovf:href="disk.img"/></References>
  <DiskSection><Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="100000"/></DiskSection>
  <VirtualSystem ovf:id="vm">
    <Name>web &amp; mail</Name>
    <OperatingSystemSection ovf:id="94" vmw:osType="ubuntu64Guest"/>
    <VirtualHardwareSection>
      <Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>4</rasd:VirtualQuantity>
        <vmw:CoresPerSocket>2</vmw:CoresPerSocket></Item>
      <Item><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:VirtualQuantity>512</rasd:VirtualQuantity></Item>
      <Item><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceType>6</rasd:ResourceType>
        <rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType></Item>
      <Item><rasd:InstanceID>4</rasd:InstanceID><rasd:ResourceType>17</rasd:ResourceType>
        <rasd:HostResource>ovf:/disk/d1</rasd:HostResource>
        <rasd:Parent>3</rasd:Parent><rasd:AddressOnParent>1</rasd:AddressOnParent></Item>
      <Item><rasd:InstanceID>5</rasd:InstanceID><rasd:ResourceType>10</rasd:ResourceType>
        <rasd:Address>00:50:56:AB:CD:EF</rasd:Address><rasd:Connection>lan</rasd:Connection>
        <rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType></Item>
      <Item><rasd:InstanceID>6</rasd:InstanceID><rasd:ResourceType>10</rasd:ResourceType></Item>
      <vmw:Config vmw:key="firmware" vmw:value="efi"/>
      <vmw:ExtraConfig vmw:key="vm.genid" vmw:value="-8536691797830587195"/>
      <vmw:ExtraConfig vmw:key="vm.genidX" vmw:value="-1723453263670062919"/>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>"#;

fn disk() -> Vec<u8> {
    (0..SIZE).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

fn manifest(files: &[(&str, &[u8])]) -> String {
    let mut text = String::new();
    for (name, bytes) in files {
        write!(text, "SHA256({name})= ").unwrap();
        for byte in Sha256::digest(bytes) {
            write!(text, "{byte:02X}").unwrap();
        }
        text.push_str("\r\n");
    }
    text
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        // Written by hand, since the builder refuses the names that matter here.
        header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The error of opening an archive of these members.
fn refused(members: &[(&str, &[u8])]) -> (ErrorKind, String) {
    let folder = tempfile::tempdir().unwrap();
    let error = open_ova(&write(folder.path(), "x.ova", &tar(members))).unwrap_err();
    (error.kind(), whole(&error))
}

/// An error with its causes.
fn whole(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[test]
fn a_package_is_read_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk();
    let manifest = manifest(&[("web.ovf", OVF.as_bytes()), ("disk.img", &disk)]);
    let members: [(&str, &[u8]); 4] = [
        ("web.ovf", OVF.as_bytes()),
        ("web.mf", manifest.as_bytes()),
        ("._web.ovf", b"resource fork"),
        ("disk.img", &disk),
    ];
    let path = write(folder.path(), "x.ova", &tar(&members));
    let source = open_ova(&path).unwrap();
    assert_eq!((source.name.as_str(), source.kind), ("web & mail", SourceKind::Ova));
    assert_eq!((source.memory_bytes, source.vcpus), (512 << 20, 4));
    assert_eq!(source.cpu_topology.unwrap().sockets, 2);
    assert_eq!(source.firmware, Firmware::Uefi);
    assert_eq!(source.genid.as_deref(), Some("09512cc5-940a-8987-b950-f54f631015e8"));
    assert_eq!(source.guest_os.as_deref(), Some("ubuntu64Guest"));
    assert_eq!(source.nics[0].mac.as_deref(), Some("00:50:56:ab:cd:ef"));
    assert_eq!(source.nics[0].network, NetworkKind::Bridge("lan".into()));
    assert_eq!(source.nics[1].network, NetworkKind::Network("eth1".into()));
    let found = &source.disks[0];
    assert_eq!(found.controller, Controller::Scsi(Some("VirtualSCSI".into())));
    assert_eq!((found.unit, found.format.as_str()), (Some(1), "raw"));
    assert!(matches!(found.location, Location::Member { len: 100_000, .. }));
    let device = found.open().unwrap();
    let mut bytes = vec![0; SIZE];
    device.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == disk);
    assert!(device.is_read_only() || device.write_at(&[1], 0).is_err());
    assert!(source.warnings.is_empty(), "{:?}", source.warnings);
    let last = Cell::new((0, 0));
    let progress = |done, total| last.set((done, total));
    let verified = source.verify_manifest(&progress, &AtomicBool::new(false)).unwrap();
    assert!(verified.is_empty(), "{verified:?}");
    let total = (SIZE + OVF.len()) as u64;
    assert_eq!(last.get(), (total, total));
    let cancelled = source.verify_manifest(&progress, &AtomicBool::new(true)).unwrap_err();
    assert_eq!(cancelled.kind(), ErrorKind::Cancelled);
    let json = serde_json::to_value(&source).unwrap();
    assert_eq!(json["disks"][0]["location"]["member"]["len"], 100_000);

    for (name, bytes) in [("web.ovf", OVF.as_bytes()), ("disk.img", &disk)] {
        write(folder.path(), name, bytes);
    }
    for path in [folder.path(), &folder.path().join("web.ovf")] {
        let source = open_ova(path).unwrap();
        assert_eq!(source.kind, SourceKind::Ovf);
        assert_eq!(source.disks[0].open().unwrap().size(), SIZE as u64);
        assert!(source.warnings[0].contains("no manifest"));
    }
}

#[test]
fn wrong_checksums_are_a_mismatch_and_missing_files_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk();
    let verify = |manifest: &str| {
        let members: [(&str, &[u8]); 3] =
            [("a/x.ovf", OVF.as_bytes()), ("a/x.mf", manifest.as_bytes()), ("a/disk.img", &disk)];
        let source = open_ova(&write(folder.path(), "x.ova", &tar(&members))).unwrap();
        source.verify_manifest(&|_, _| {}, &AtomicBool::new(false))
    };
    let error = verify(&manifest(&[("disk.img", b"other")])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
    let text = manifest(&[("gone", b""), ("disk.img", &disk)]) + "rubbish\n";
    let warnings = verify(&text).unwrap();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert_eq!(verify(&manifest(&[("../x", b"")])).unwrap_err().kind(), ErrorKind::Denied);
}

#[test]
fn hostile_and_odd_packages_are_refused_by_name() {
    let disk = disk();
    let ovf = OVF.as_bytes();
    let (kind, text) = refused(&[("x.ovf", ovf), ("../disk.img", &disk)]);
    assert_eq!(kind, ErrorKind::Denied);
    assert!(text.contains("\"../disk.img\""), "{text}");
    assert_eq!(refused(&[("x.ovf", ovf), ("/etc/shadow", b"")]).0, ErrorKind::Denied);
    let (kind, text) = refused(&[("x.ovf", ovf), ("disk.img", b""), ("disk.img", b"")]);
    assert_eq!(kind, ErrorKind::Denied);
    assert!(text.contains("\"disk.img\" is there twice"), "{text}");
    let (kind, text) = refused(&[("x.ovf", ovf)]);
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(text.contains("disk \"d1\" is in file \"disk.img\""), "{text}");
    assert_eq!(refused(&[("x.ovf", ovf), ("y.ovf", ovf)]).0, ErrorKind::Unsupported);
    assert_eq!(refused(&[("disk.img", &disk)]).0, ErrorKind::NotFound);

    let changed = |from: &str, to: &str| {
        assert!(OVF.contains(from));
        refused(&[("x.ovf", OVF.replace(from, to).as_bytes()), ("disk.img", &disk)])
    };
    let hrefs = ["../../etc/passwd", "/etc/passwd", "https://example.org/d", "a\\..\\b"];
    for href in hrefs {
        let (kind, text) = changed("href=\"disk.img\"", &format!("href=\"{href}\""));
        assert_eq!(kind, ErrorKind::Denied, "{text}");
    }
    let gzip = "href=\"disk.img\" ovf:compression=\"gzip\"";
    assert_eq!(changed("href=\"disk.img\"", gzip).0, ErrorKind::Unsupported);
    assert_eq!(changed("fileRef=\"f1\"", "fileRef=\"f2\"").0, ErrorKind::Corrupt);
    assert_eq!(changed("ovf:fileRef=\"f1\"", "").0, ErrorKind::Unsupported);
    assert_eq!(changed("ovf:/disk/d1", "ovf:/disk/d2").0, ErrorKind::Corrupt);
    assert_eq!(changed("value=\"efi\"", "value=\"coreboot\"").0, ErrorKind::Corrupt);
    assert_eq!(changed("</Envelope>", "").0, ErrorKind::Corrupt);
    let (kind, text) = changed("</VirtualSystem>", "</VirtualSystem><VirtualSystem ovf:id=\"b\"/>");
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(text.contains("vm, b"), "{text}");
    let entities = "<?xml version=\"1.0\"?><!DOCTYPE x [<!ENTITY a \"aaaaaaaa\">]>";
    assert_eq!(changed("<?xml version=\"1.0\"?>", entities).0, ErrorKind::Corrupt);
    let deep = format!("<Envelope>{}", "<a>".repeat(150_000));
    assert_eq!(refused(&[("x.ovf", deep.as_bytes())]).0, ErrorKind::Corrupt);
}

#[test]
fn links_do_not_lead_out_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "x.ovf", OVF.as_bytes());
    std::os::unix::fs::symlink("/etc/passwd", folder.path().join("disk.img")).unwrap();
    assert_eq!(open_ova(folder.path()).unwrap_err().kind(), ErrorKind::Denied);
}

#[test]
fn compressed_archives_name_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    for (magic, name) in
        [(&b"\x1f\x8b\x08"[..], "gzip"), (b"\xfd7zXZ\0", "xz"), (b"PK\x03\x04", "zip")]
    {
        let mut bytes = magic.to_vec();
        bytes.resize(700, 1);
        let error = open_ova(&write(folder.path(), "x.ova", &bytes)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let text = whole(&error);
        assert!(text.contains(&format!("compressed with {name}: unpack")), "{text}");
    }
}

#[test]
fn long_names_and_sizes_of_other_dialects() {
    let folder = tempfile::tempdir().unwrap();
    let long = format!("{}/disk.img", "d".repeat(150));
    let ovf = OVF.replace("disk.img", &long);
    for gnu in [true, false] {
        let mut builder = tar::Builder::new(Vec::new());
        let mut append = |name: &str, bytes: &[u8]| {
            let mut header = if gnu { tar::Header::new_gnu() } else { tar::Header::new_ustar() };
            header.set_size(bytes.len() as u64);
            if gnu {
                builder.append_data(&mut header, name, bytes).unwrap();
            } else {
                let size = bytes.len().to_string();
                let records = [("path", name.as_bytes()), ("size", size.as_bytes())];
                builder.append_pax_extensions(records).unwrap();
                header.set_path("short").unwrap();
                header.set_cksum();
                builder.append(&header, bytes).unwrap();
            }
        };
        append("x.ovf", ovf.as_bytes());
        append(&long, &disk());
        let path = write(folder.path(), "x.ova", &builder.into_inner().unwrap());
        assert_eq!(open_ova(&path).unwrap().disks[0].open().unwrap().size(), SIZE as u64);
    }
}

#[test]
fn a_cut_archive_names_the_member_and_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk();
    let whole = tar(&[("x.ovf", OVF.as_bytes()), ("disk.img", &disk)]);
    let data = whole.len() - 1024 - SIZE.next_multiple_of(512);
    for len in (0..whole.len() - 1024).step_by(773) {
        let path = write(folder.path(), "x.ova", &whole[..len]);
        let result = open_ova(&path);
        if len >= data + SIZE {
            assert!(result.is_ok(), "only padding is missing");
            continue;
        }
        let error = self::whole(&result.unwrap_err());
        if len >= data {
            let missing = format!("{} bytes are missing", data + SIZE - len);
            assert!(error.contains("\"disk.img\"") && error.contains(&missing), "{error}");
        }
    }
}

#[test]
fn damage_anywhere_is_survived() {
    let folder = tempfile::tempdir().unwrap();
    let whole = tar(&[("x.ovf", OVF.as_bytes()), ("disk.img", b"0123456789")]);
    for at in (0..512).step_by(3).chain((512..512 + OVF.len()).step_by(7)) {
        for value in [0, b'<', b'9', 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            if let Ok(source) = open_ova(&write(folder.path(), "x.ova", &bytes)) {
                for disk in &source.disks {
                    let _ = disk.open();
                }
            }
        }
    }
}
