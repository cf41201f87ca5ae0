// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A check counts as qemu-img does, and a repair leaves nothing that either complains of.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use tranship_block::{BlockDevice, CheckReport, Repair, Storage};
use tranship_format_testing::{has_tool, pattern, qemu_img, qemu_img_status, samples};
use tranship_qcow2::{check, check_read_only};
use tranship_raw::{Access, RawFile};

const SIZE: usize = 3 << 20;

fn open(path: &Path) -> RawFile {
    RawFile::open(path, Access::ReadWrite).unwrap()
}

/// The fields of qemu-img's report, with zero for those that it leaves out.
fn by_qemu(path: &Path) -> CheckReport {
    let options = format!("driver=qcow2,file.filename={}", path.display());
    let locked = format!("{options},encrypt.key-secret=s");
    let secret = ["--object", "secret,id=s,data=x", "--image-opts"];
    let source = if path.ends_with("locked") { &locked } else { &options };
    let mut args = vec!["check", "--output", "json"];
    args.extend(secret);
    let output = qemu_img_status(&args, &[Path::new(source)]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let field = |name: &str| json[name].as_u64().unwrap_or(0);
    let mut report = CheckReport::default();
    for (slot, name) in [
        (&mut report.corruptions, "corruptions"),
        (&mut report.leaks, "leaks"),
        (&mut report.check_errors, "check-errors"),
        (&mut report.total_clusters, "total-clusters"),
        (&mut report.allocated_clusters, "allocated-clusters"),
        (&mut report.fragmented_clusters, "fragmented-clusters"),
        (&mut report.compressed_clusters, "compressed-clusters"),
        (&mut report.image_end_offset, "image-end-offset"),
    ] {
        *slot = field(name);
    }
    report
}

fn agree(path: &Path, name: &str) -> CheckReport {
    let ours = check_read_only(&RawFile::open(path, Access::ReadOnly).unwrap()).unwrap();
    let theirs = by_qemu(path);
    let counted = CheckReport { details: Vec::new(), ..ours.clone() };
    assert_eq!(counted, theirs, "{name}: {:?}", ours.details);
    ours
}

fn image(folder: &Path, name: &str, args: &[&str]) -> PathBuf {
    let raw = folder.join("source.raw");
    if !raw.exists() {
        let mut disk = pattern(SIZE, 3);
        disk[300_000..900_000].fill(b'a');
        disk[1_000_000..2_000_000].fill(0);
        std::fs::write(&raw, disk).unwrap();
    }
    let path = folder.join(name);
    let mut all = vec!["convert", "-f", "raw", "-O", "qcow2"];
    all.extend(args);
    qemu_img(&all, &[&raw, &path]);
    path
}

#[test]
fn sound_images_have_the_numbers_that_qemu_gives_them() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let data_file = format!("data_file={}", folder.path().join("data").display());
    let raw_data = format!("data_file_raw=on,{data_file}2");
    let cases: [(&str, &[&str]); 15] = [
        ("plain", &[]),
        ("out-of-order", &["-W", "-m", "16"]),
        ("small", &["-o", "cluster_size=512"]),
        ("large", &["-o", "cluster_size=2M"]),
        ("old", &["-o", "compat=0.10"]),
        ("zlib", &["-c"]),
        ("zlib-small", &["-c", "-o", "cluster_size=4k"]),
        ("zstd", &["-c", "-o", "compression_type=zstd"]),
        ("narrow", &["-o", "refcount_bits=1"]),
        ("wide", &["-o", "refcount_bits=64,cluster_size=1k"]),
        ("prealloc", &["-S", "0", "-o", "preallocation=metadata"]),
        ("extended", &["-o", "extended_l2=on,cluster_size=16k"]),
        ("extended-zlib", &["-c", "-o", "extended_l2=on"]),
        ("data-file", &["-o", &data_file]),
        ("data-file-raw", &["-o", &raw_data]),
    ];
    for (name, args) in cases {
        let path = image(folder.path(), name, args);
        assert!(agree(&path, name).is_clean(), "{name}");
        if name == "out-of-order" {
            continue;
        }
        let old = name == "old" || name == "narrow" || name.starts_with("data-file");
        if name != "narrow" && !name.starts_with("data-file") {
            qemu_img(&["snapshot", "-c", "one"], &[&path]);
        }
        if !old {
            for (bitmap, granularity) in [("a", "64k"), ("b", "512")] {
                qemu_img(&["bitmap", "--add", "-g", granularity], &[&path, Path::new(bitmap)]);
            }
        }
        write_by_qemu(&path, &["write 100k 200k", "write -z 400k 300k", "write 1500k 5k"]);
        assert!(agree(&path, name).is_clean(), "{name} after changes");
    }
    let path = folder.path().join("locked");
    let secret = ["--object", "secret,id=s,data=x", "-o"];
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    create.extend(secret);
    create.push("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10");
    qemu_img(&create, &[&path, Path::new("2M")]);
    assert!(agree(&path, "encrypted").is_clean());
}

#[test]
fn images_of_other_software_have_the_numbers_that_qemu_gives_them() {
    if !has_tool("qemu-img") {
        return;
    }
    let all = samples();
    let folder = tempfile::tempdir().unwrap();
    for sample in all.iter().filter(|sample| sample.format.as_deref() == Some("qcow2")) {
        let path = sample.unpack(folder.path(), &all);
        // Nobody else can say what numbers a hostile image has; it may not be harmful.
        if sample.path.starts_with("hostile/") {
            let _ = check_read_only(&RawFile::open(&path, Access::ReadOnly).unwrap());
        } else {
            agree(&path, &sample.path);
        }
    }
}

fn write_by_qemu(path: &Path, commands: &[&str]) {
    let mut command = std::process::Command::new("qemu-io");
    command.args(["-f", "qcow2"]);
    for line in commands {
        command.args(["-c", line]);
    }
    assert!(command.arg(path).output().unwrap().status.success());
}

/// Where tables of a small image lie: L1, first L2, refcount table, first refcount block.
fn tables(file: &RawFile) -> [u64; 4] {
    let at = |at: u64| {
        let mut raw = [0; 8];
        file.read_at(&mut raw, at).unwrap();
        u64::from_be_bytes(raw) & 0x00ff_ffff_ffff_fe00
    };
    let (l1, table) = (at(40), at(48));
    [l1, at(l1), table, at(table)]
}

/// Does something bad to a file whose tables lie there.
type Damage = Box<dyn Fn(&RawFile, [u64; 4])>;

#[test]
fn broken_images_are_counted_alike_and_clean_after_a_repair() {
    if !has_tool("qemu-img") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let copied = 1_u64 << 63;
    let put = |place: fn([u64; 4]) -> u64, bytes: Vec<u8>| -> Damage {
        Box::new(move |file, tables| file.write_at(&bytes, place(tables)).unwrap())
    };
    let cases: [(&str, Damage); 9] = [
        ("leak", put(|[_, l2, ..]| l2 + 8, vec![0; 8])),
        (
            "leak-at-end",
            Box::new(|file, [.., block]| {
                file.set_len(61 << 16).unwrap();
                file.write_at(&[0, 1], block + 2 * 60).unwrap();
            }),
        ),
        ("count-too-high", put(|[.., block]| block + 2 * 9, vec![0, 2])),
        ("count-lost", put(|[.., block]| block + 2 * 9, vec![0, 0])),
        ("all-counts-lost", put(|[.., block]| block, vec![0; 512])),
        ("copied-lost", put(|[l1, ..]| l1, vec![0])),
        ("no-block", put(|[_, _, table, _]| table, vec![0; 8])),
        ("block-outside", put(|[_, _, table, _]| table, vec![0, 0, 0, 0x40, 0, 0, 0, 0])),
        ("dirty", put(|_| 72, vec![0, 0, 0, 0, 0, 0, 0, 1])),
    ];
    for (name, damage) in cases {
        let path = image(folder.path(), name, &[]);
        let before = tranship_format_testing::raw_by_qemu("qcow2", folder.path(), &path);
        let file = open(&path);
        damage(&file, tables(&file));
        let found = if name == "block-outside" {
            // qemu-img's numbers end where it fails.
            check_read_only(&file).unwrap()
        } else {
            agree(&path, name)
        };
        assert!(!found.is_clean() || name == "dirty", "{name}");
        if found.corruptions == 0 {
            let after = check(&file, Repair::Leaks).unwrap();
            assert!(after.is_clean(), "{name}: {:?}", after.details);
            assert_eq!(after.leaks_fixed, found.leaks, "{name}");
        }
        let after = check(&file, Repair::All).unwrap();
        assert!(after.is_clean(), "{name}: {:?}", after.details);
        assert_eq!(after.corruptions_fixed, found.corruptions, "{name}");
        assert!(!tranship_qcow2::Header::read(&file).unwrap().is_dirty(), "{name}");
        assert!(agree(&path, name).is_clean(), "{name}");
        let now = tranship_format_testing::raw_by_qemu("qcow2", folder.path(), &path);
        assert!(before == now || name == "leak", "{name}");
    }
    // A reference that leads nowhere: nothing is guessed, nothing is freed.
    let path = image(folder.path(), "nowhere", &[]);
    let file = open(&path);
    let [_, l2, ..] = tables(&file);
    file.write_at(&(copied | 1 << 40).to_be_bytes(), l2).unwrap();
    assert!(agree(&path, "nowhere").corruptions > 0);
    let after = check(&file, Repair::All).unwrap();
    assert_eq!((after.corruptions, after.leaks), (1, 1), "{:?}", after.details);
}

#[test]
fn details_are_worded_as_scripts_expect_them() {
    let storage = tranship_block::MemoryDevice::new(Vec::new());
    tranship_qcow2::create(&storage, &support::options(8 << 20, 16)).unwrap();
    let block = 3 << 16;
    storage.write_at(&[0, 0, 0, 1], block).unwrap();
    storage.write_at(&[0, 1], block + 2 * 5).unwrap();
    storage.set_len(8 << 16).unwrap();
    let found = check(&storage, Repair::Nothing).unwrap();
    let expected =
        ["ERROR cluster 0 refcount=0 reference=1", "Leaked cluster 5 refcount=1 reference=0"];
    assert_eq!(found.details, expected);
    let mended = check(&storage, Repair::All).unwrap();
    assert_eq!((mended.corruptions_fixed, mended.leaks_fixed), (1, 1));
    assert_eq!(
        mended.details,
        expected.map(|text| text.replacen("ERROR", "Repairing", 1)).map(|text| text.replacen(
            "Leaked",
            "Repairing",
            1
        ))
    );
}
