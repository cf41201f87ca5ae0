// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sources that are damaged or hostile, and targets that cannot be written: how the program
//! says so, what its exit code tells an orchestrator, and what is left behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{APPLIANCE, Finished, Place, SHORT, guest, host, installed, names, no_system};

/// A descriptor of one disk: `HREF` is its file.
const OVF: &str = r#"<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
 <References><File ovf:href="HREF" ovf:id="file1"/></References>
 <DiskSection><Info>d</Info><Disk ovf:capacity="67108864" ovf:diskId="vmdisk1" ovf:fileRef="file1"
   ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/></DiskSection>
 <VirtualSystem ovf:id="bad"><Info>v</Info><Name>bad</Name>
  <VirtualHardwareSection><Info>h</Info>
   <Item><rasd:ElementName>cpu</rasd:ElementName><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity></Item>
   <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ElementName>mem</rasd:ElementName><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>512</rasd:VirtualQuantity></Item>
   <Item><rasd:Address>0</rasd:Address><rasd:ElementName>scsi</rasd:ElementName><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>lsilogic</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>
   <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:ElementName>disk</rasd:ElementName><rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource><rasd:InstanceID>4</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
  </VirtualHardwareSection>
 </VirtualSystem>
</Envelope>
"#;

/// An archive with these members, whatever their names are.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn manifest(members: &[(&str, &[u8])]) -> String {
    members.iter().fold(String::new(), |mut text, (name, content)| {
        let hash = Sha256::digest(content).iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        });
        writeln!(text, "SHA256({name})= {hash}").unwrap();
        text
    })
}

/// Tries to convert; nothing but the hidden work folder may be left.
fn convert(place: &Place, source: &Path, mode: &str) -> Finished {
    let out = place.text("out");
    let words = ["convert", "-i", mode, source.to_str().unwrap(), "-os", &out, "-of", "qcow2"];
    let run = place.run(&words, APPLIANCE);
    for name in names(&place.path("out")) {
        assert!(name.starts_with('.'), "{name}\n{}", run.stderr);
    }
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    run
}

#[test]
fn archives_that_lie_are_refused_before_anything_starts() {
    let (Some(place), Some(fixture)) = (Place::new(), no_system()) else { return };
    let disk = fs::read(fixture.join("noos.vmdk")).unwrap();
    let ovf = |href: &str| OVF.replace("HREF", href).into_bytes();
    let good = ovf("disk.vmdk");
    let whole = archive(&[("bad.ovf", &good), ("disk.vmdk", &disk)]);
    let mut pointer = disk.clone();
    // Grain directory and its copy: sector numbers in the header.
    for at in [48, 56] {
        pointer[at..at + 8].copy_from_slice(&0x4000_0000_u64.to_le_bytes());
    }
    let passwd = b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
        createType=\"monolithicFlat\"\nRW 131072 FLAT \"/etc/passwd\" 0\n";
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("cut in the first header", whole[..300].to_vec(), "cut off"),
        ("cut in the descriptor", whole[..1000].to_vec(), "bad.ovf"),
        ("cut in the disk", whole[..whole.len() / 2].to_vec(), "disk.vmdk"),
        ("no disk", archive(&[("bad.ovf", &good)]), "disk.vmdk"),
        ("no descriptor", archive(&[("disk.vmdk", &disk)]), "ovf"),
        ("nothing", Vec::new(), ""),
        ("a member above", archive(&[("bad.ovf", &good), ("../disk.vmdk", &disk)]), "../disk.vmdk"),
        ("an absolute member", archive(&[("bad.ovf", &good), ("/disk.vmdk", &disk)]), "/disk.vmdk"),
        (
            "a disk above",
            archive(&[("bad.ovf", &ovf("../../etc/passwd")), ("disk.vmdk", &disk)]),
            "../../etc/passwd",
        ),
        (
            "an absolute disk",
            archive(&[("bad.ovf", &ovf("/etc/passwd")), ("disk.vmdk", &disk)]),
            "/etc/passwd",
        ),
        ("not XML", archive(&[("bad.ovf", b"<Envelope"), ("disk.vmdk", &disk)]), "not valid XML"),
        (
            "a grain directory outside",
            archive(&[("bad.ovf", &good), ("disk.vmdk", &pointer)]),
            "disk.vmdk",
        ),
        ("a disk of text", archive(&[("bad.ovf", &good), ("disk.vmdk", passwd)]), "disk.vmdk"),
    ];
    let secret = fs::read_to_string("/etc/passwd").unwrap();
    let secret = secret.lines().next().unwrap();
    for (name, bytes, said) in cases {
        let path = place.path("bad.ova");
        fs::write(&path, bytes).unwrap();
        let run = convert(&place, &path, "ova");
        assert_eq!(run.code, Some(4), "{name}: {}\n{}", run.stdout, run.stderr);
        assert!(run.stderr.contains(said), "{name}: {said:?} is missing: {}", run.stderr);
        assert!(
            run.stderr.starts_with("tranship: error: ")
                || run.stderr.contains("\ntranship: error: "),
            "{name}: {}",
            run.stderr
        );
        assert!(!(run.stdout + &run.stderr).contains(secret), "{name}");
        assert!(run.elapsed < SHORT, "{name}: {:?}", run.elapsed);
    }
}

#[test]
fn disks_that_lie_are_refused_without_reading_other_files() {
    let Some(place) = Place::new() else { return };
    let descriptor = |extent: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\n{extent}\n"
        )
    };
    let secret = fs::read_to_string("/etc/passwd").unwrap();
    let secret = secret.lines().next().unwrap();
    for extent in [
        "RW 131072 FLAT \"/etc/passwd\" 0",
        "RW 131072 FLAT \"../../../../../../etc/passwd\" 0",
        "RW 131072 FLAT \"link\" 0",
        "RW 131072 SPARSE \"/etc/passwd\"",
        "RW 131072 FLAT \"missing-flat.vmdk\" 0",
        "RW 99999999999999999999 FLAT \"x\" 0",
    ] {
        let path = place.path("bad.vmdk");
        fs::write(&path, descriptor(extent)).unwrap();
        let link = place.path("link");
        if !link.is_symlink() {
            std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        }
        let run = convert(&place, &path, "disk");
        assert_eq!(run.code, Some(4), "{extent}: {}\n{}", run.stdout, run.stderr);
        assert!(run.stderr.contains("bad.vmdk"), "{extent}: {}", run.stderr);
        assert!(!(run.stdout + &run.stderr).contains(secret), "{extent}");
    }
}

/// A streamOptimized disk whose first grain inflates to five hundred times its size.
fn bomb(place: &Place) -> PathBuf {
    // Bytes without pattern make a grain that leaves room for the bomb.
    let noise: Vec<u8> = (0_u64..1 << 14)
        .flat_map(|n| {
            let mixed = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes()
        })
        .collect();
    let (raw, disk) = (place.text("noise.raw"), place.text("bomb.vmdk"));
    fs::write(&raw, noise).unwrap();
    let format = ["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", &raw, &disk];
    host("qemu-img", &format);
    let mut bytes = fs::read(&disk).unwrap();
    let number = |bytes: &[u8], at: usize| {
        usize::try_from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())).unwrap()
    };
    // The first grain lies where the header's overhead ends: its number, its size, its data.
    let grain = number(&bytes, 64) * 512;
    let room = number(&bytes, grain + 8);
    assert!((60_000..70_000).contains(&room), "{room}");
    let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(&vec![0; 32 << 20]).unwrap();
    let packed = packed.finish().unwrap();
    assert!(packed.len() <= room, "{} of {room}", packed.len());
    let size = u32::try_from(packed.len()).unwrap().to_le_bytes();
    bytes[grain + 8..grain + 12].copy_from_slice(&size);
    bytes[grain + 12..grain + 12 + packed.len()].copy_from_slice(&packed);
    fs::write(&disk, bytes).unwrap();
    disk.into()
}

#[test]
fn a_bomb_does_not_go_off() {
    let Some(place) = Place::new() else { return };
    if !installed("qemu-img") {
        return;
    }
    let disk = bomb(&place);
    let run = convert(&place, &disk, "disk").ended_with(4);
    assert!(run.stderr.contains("reading disk sda of the source"), "{}", run.stderr);
    assert!(run.stderr.contains("grain 0 inflates to more than 65536 bytes"), "{}", run.stderr);
}

#[test]
fn checksums_that_do_not_match_end_with_5() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    let path = place.path("guest.ova");
    fs::copy(fixture.join("guest.ova"), &path).unwrap();
    let length = fs::metadata(&path).unwrap().len();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut found = tar::Archive::new(&file);
    let disk = found
        .entries_with_seek()
        .unwrap()
        .map(Result::unwrap)
        .find(|entry| entry.path().unwrap().extension().is_some_and(|ending| ending == "vmdk"));
    // The end of a sparse extent's header is padding: nobody but the checksum sees it.
    let at = disk.unwrap().raw_file_position() + 500;
    file.write_at(&[0x55], at).unwrap();
    assert_eq!(file.metadata().unwrap().len(), length);
    convert(&place, &path, "ova").ended_with(5).saying("guest-disk1.vmdk");
    assert_eq!(names(&place.path("out")), [".guest.work"]);
}

#[test]
fn a_small_archive_with_a_wrong_checksum_ends_with_5_as_well() {
    let (Some(place), Some(fixture)) = (Place::new(), no_system()) else { return };
    let disk = fs::read(fixture.join("noos.vmdk")).unwrap();
    let ovf = OVF.replace("HREF", "disk.vmdk").into_bytes();
    let good = manifest(&[("bad.ovf", &ovf), ("disk.vmdk", &disk)]);
    let last = good.trim_end().chars().next_back().unwrap();
    let wrong = good.trim_end().strip_suffix(last).unwrap().to_owned()
        + if last == '0' { "1\n" } else { "0\n" };
    let path = place.path("bad.ova");
    let members: &[(&str, &[u8])] =
        &[("bad.ovf", &ovf), ("bad.mf", wrong.as_bytes()), ("disk.vmdk", &disk)];
    fs::write(&path, archive(members)).unwrap();
    convert(&place, &path, "ova").ended_with(5).saying("disk.vmdk");
}

#[test]
fn a_disk_without_an_operating_system_is_told_by_volume() {
    let (Some(place), Some(fixture)) = (Place::new(), no_system()) else { return };
    let run = convert(&place, &fixture.join("noos.vmdk"), "disk")
        .ended_with(4)
        .saying("no operating system was found")
        .saying("/dev/sda1: ext4");
    assert!(run.stderr.contains("hint: "), "{}", run.stderr);
}

#[test]
fn what_is_wrong_with_the_command_line_ends_with_2() {
    let (Some(place), Some(fixture)) = (Place::new(), no_system()) else { return };
    let disk = fixture.join("noos.vmdk");
    let disk = disk.to_str().unwrap();
    fs::write(place.path("file"), "").unwrap();
    let (file, nowhere) = (place.text("file"), place.text("nowhere"));
    for (words, said) in [
        (&[disk, "--frobnicate"][..], "--frobnicate"),
        (&[disk], "-os DIR"),
        (&[disk, "-os", &file], "not a folder"),
        (&[disk, "-os", &nowhere], "No such file or directory"),
        (&[disk, "-os", "out", "-of", "vhdx"], "raw or qcow2"),
        (&[disk, "-os", "out", "-on", ".."], "no name for a guest"),
        (&["-i", "ova", disk, disk, "-os", "out"], "one source was expected"),
    ] {
        let words: Vec<&str> = ["convert"].iter().chain(words).copied().collect();
        place.run(&words, SHORT).ended_with(2).saying(said);
        assert!(names(&place.path("out")).is_empty(), "{words:?}");
    }
}

#[test]
fn a_guest_that_another_run_converts_is_left_alone() {
    let (Some(place), Some(fixture)) = (Place::new(), no_system()) else { return };
    let work = place.path("out/.noos.work");
    fs::create_dir(&work).unwrap();
    let mut lock = File::create(work.join("lock")).unwrap();
    lock.lock().unwrap();
    writeln!(lock, "4711").unwrap();
    convert(&place, &fixture.join("noos.vmdk"), "disk").ended_with(75).saying("process 4711");
    drop(lock);
}

#[test]
fn results_of_others_are_not_replaced_unasked() {
    let (Some(place), Some(fixture)) = (Place::new(), no_system()) else { return };
    fs::write(place.path("out/noos-sda"), "mine").unwrap();
    let disk = fixture.join("noos.vmdk");
    let words = ["convert", disk.to_str().unwrap(), "-os", &place.text("out")];
    place.run(&words, SHORT).ended_with(2).saying("--force");
    assert_eq!(fs::read(place.path("out/noos-sda")).unwrap(), b"mine");
}

/// A filesystem in memory that is unmounted at the end.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf, megabytes: u32) -> Option<Self> {
        let options = format!("size={megabytes}m");
        let words = ["-t", "tmpfs", "-o", &options, "tmpfs"];
        let mounted = Command::new("mount").args(words).arg(&path).output().unwrap();
        if !mounted.status.success() {
            eprintln!("skipped: mounting a small filesystem needs root");
            return None;
        }
        Some(Self(path))
    }

    fn resize(&self, megabytes: u32) {
        let options = format!("remount,size={megabytes}m");
        host("mount", &["-o", &options, self.0.to_str().unwrap()]);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_target_ends_with_75_and_more_room_helps() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    // Room for what the conversion changes, none for the copy.
    let Some(small) = Small::mount(place.path("out"), 256) else { return };
    let source = fixture.join("guest.ova");
    convert(&place, &source, "ova").ended_with(75).saying("MiB are needed").saying("hint: ");
    small.resize(2048);
    let out = place.text("out");
    let words = ["convert", "-i", "ova", source.to_str().unwrap(), "-os", &out, "-of", "qcow2"];
    let run = place.run(&words, SHORT * 3).ended_with(0).saying("interrupted");
    assert!(!run.stderr.contains("appliance"), "the conversion was not kept: {}", run.stderr);
    assert_eq!(names(&place.path("out")), [".guest.work", "guest-sda", "guest.xml"]);
}

#[test]
fn a_target_that_fills_up_on_the_way_ends_with_75() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    let Some(_small) = Small::mount(place.path("out"), 2) else { return };
    convert(&place, &fixture.join("guest.ova"), "ova").ended_with(75).saying("No space left");
}

#[test]
fn a_damaged_filesystem_is_not_converted() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    if !installed("debugfs") {
        return;
    }
    let disk = place.text("guest.raw");
    let original = fixture.join("guest.raw");
    host("cp", &["--sparse=always", original.to_str().unwrap(), &disk]);
    // A block far outside of the filesystem, as bad memory or a bad cable would write it.
    let damage = "set_inode_field /etc/hostname block[0] 3000000000";
    let filesystem = format!("{disk}?offset=1048576");
    host("debugfs", &["-w", "-R", damage, &filesystem]);
    // The mark that the guest's kernel leaves where it finds damage.
    host("debugfs", &["-w", "-R", "set_super_value state 2", &filesystem]);
    let run = convert(&place, disk.as_ref(), "disk").ended_with(3);
    assert!(run.stderr.contains("blocked ["), "{}", run.stderr);
    assert!(run.stderr.contains("/dev/sda1"), "{}", run.stderr);
}
