// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `create` and `resize` do to files, and that qemu-img reads the result.

use crate::{empty, split, support};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// An empty folder for both programs.
struct Bench {
    ours: PathBuf,
    folder: TempDir,
}

impl Bench {
    fn new() -> Option<Self> {
        let ours = support::program()?.canonicalize().unwrap();
        if !support::installed("qemu-img") {
            return None;
        }
        Some(Self { ours, folder: empty() })
    }

    /// The same in a file system that can reserve space for zeroes, as tmpfs cannot.
    fn on_disk() -> Option<Self> {
        Some(Self { folder: tempfile::tempdir().unwrap(), ..Self::new()? })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, program: &Path, words: &[String]) -> (Option<i32>, String) {
        let Output { status, stdout, stderr } = Command::new(program)
            .args(words)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let said = said.concat();
        assert!(!said.contains("panicked"), "{words:?}\n{said}");
        (status.code(), said)
    }

    /// Runs our program; its exit code and what it says.
    fn ours(&self, words: &str) -> (Option<i32>, String) {
        let words: Vec<String> = std::iter::once("image".to_owned()).chain(split(words)).collect();
        self.run(&self.ours, &words)
    }

    /// Runs our program, which has to succeed.
    #[track_caller]
    fn done(&self, words: &str) -> String {
        let (code, said) = self.ours(words);
        assert_eq!(code, Some(0), "{words}\n{said}");
        said
    }

    /// Runs qemu-img, which has to succeed.
    #[track_caller]
    fn theirs(&self, words: &str) -> String {
        let (code, said) = self.run(Path::new("qemu-img"), &split(words));
        assert_eq!(code, Some(0), "{words}\n{said}");
        said
    }
}

#[test]
fn a_vmdk_grows_and_qemu_img_reads_it() {
    let Some(bench) = Bench::new() else { return };
    let raw = File::create(bench.path("disk.raw")).unwrap();
    let data: Vec<u8> = (0..300_000_u32).map(|number| (number % 251) as u8).collect();
    // All of them cross the border of the first extent of 2 GiB.
    for (subformat, sizes) in [
        ("monolithicSparse", [100 * MIB, 2 * GIB + MIB]),
        ("monolithicFlat", [100 * MIB, 2 * GIB + MIB]),
        ("twoGbMaxExtentSparse", [2 * GIB - MIB, 2 * GIB + MIB]),
        ("twoGbMaxExtentFlat", [2 * GIB - MIB, 2 * GIB + 512]),
    ] {
        raw.set_len(0).unwrap();
        raw.set_len(sizes[0]).unwrap();
        raw.write_all_at(&data, sizes[0] - 300_000).unwrap();
        let name = format!("{subformat}.vmdk");
        bench.theirs(&format!("convert -f raw -O vmdk -o subformat={subformat} disk.raw {name}"));
        let size = sizes[1];
        assert_eq!(bench.done(&format!("resize {name} {size}")), "Image resized.\n");
        raw.set_len(size).unwrap();
        let info: Value =
            serde_json::from_str(&bench.theirs(&format!("info --output json {name}"))).unwrap();
        assert_eq!(info["virtual-size"], size, "{name}");
        bench.theirs(&format!("compare -f raw -F vmdk disk.raw {name}"));
        if subformat.ends_with("Sparse") {
            bench.theirs(&format!("check {name}"));
        }
        fs::remove_file(bench.path(&name)).unwrap();
    }
}

#[test]
fn only_what_a_vmdk_can_do_is_done() {
    let Some(bench) = Bench::on_disk() else { return };
    let reserved = |name: &str| fs::metadata(bench.path(name)).unwrap().blocks() * 512;
    bench.theirs("create -q -f vmdk s.vmdk 10M");
    bench.theirs("create -q -f vmdk -o subformat=monolithicFlat f.vmdk 10M");
    bench.theirs("create -q -f vmdk -o subformat=twoGbMaxExtentSparse t.vmdk 10M");
    bench.theirs("create -q -f vmdk -b s.vmdk -F vmdk child.vmdk");
    bench.theirs("create -q stream.raw 1M");
    bench.theirs("convert -O vmdk -o subformat=streamOptimized -f raw stream.raw stream.vmdk");
    bench.done("resize --preallocation=falloc f.vmdk 12M");
    assert!((2 * MIB..3 * MIB).contains(&reserved("f-flat.vmdk")));
    bench.done("resize --preallocation=full f.vmdk 13M");
    assert!((3 * MIB..4 * MIB).contains(&reserved("f-flat.vmdk")));
    // A file that has the name of a new extent is somebody else's.
    fs::write(bench.path("t-s002.vmdk"), "mine").unwrap();
    for (words, expected) in [
        ("resize s.vmdk 5M", "Use the --shrink option"),
        ("resize --shrink s.vmdk 5M", "cannot shrink"),
        ("resize --preallocation=falloc s.vmdk 12M", "reserved in flat extents"),
        ("resize --preallocation=metadata f.vmdk 14M", "Unsupported preallocation mode: metadata"),
        ("resize child.vmdk 12M", "is a snapshot"),
        ("resize stream.vmdk 12M", "stream-optimized"),
        ("resize t.vmdk 3G", "t-s002.vmdk"),
    ] {
        let (code, said) = bench.ours(words);
        assert_eq!(code, Some(1), "{words}\n{said}");
        assert!(said.contains(expected), "{words}\n{said}");
    }
    assert_eq!(fs::read(bench.path("t-s002.vmdk")).unwrap(), b"mine");
    for (name, size) in [("s", 10), ("f", 13), ("t", 10), ("child", 10), ("stream", 1)] {
        let info = bench.theirs(&format!("info {name}.vmdk"));
        assert!(info.contains(&format!("virtual size: {size} MiB")), "{info}");
    }
}

#[test]
fn options_that_no_image_can_have_cost_nobody_an_image() {
    let Some(bench) = Bench::new() else { return };
    let long = "x".repeat(200);
    let deep = format!("{long}/{long}/{long}/{long}/{long}/{long}");
    for words in [
        "raw 10M -o preallocation=foo",
        "raw 10M -o preallocation=metadata",
        "qcow2 10M -o cluster_size=3",
        "qcow2 10M -o refcount_bits=7",
        "qcow2 10M -o compat=0.10,lazy_refcounts=on",
        "qcow2 10M -o compression_type=lz4,nocow=on",
        "qcow2 7E",
        "qcow2 7E -o nocow=on",
        "qcow2 7E -o data_file=data",
        "qcow2 10M -o data_file=data,compat=0.10",
        &format!("qcow2 10M -u -F raw -b {deep}"),
        "vmdk 10M -o subformat=foo",
        "vmdk 10M -o adapter_type=foo",
        "vmdk 10M -o compat6=on,hwversion=4",
        "vmdk 9000T",
        "vmdk 9000T -o subformat=twoGbMaxExtentSparse",
        "vpc 10M -o subformat=foo",
        "vpc 3T",
        "vpc 3T -o azure=on,subformat=dynamic",
        "vhdx 65T",
        "vhdx 10M -o block_size=3M",
        "vhdx 10M -o subformat=foo",
    ] {
        let (format, rest) = words.split_once(' ').unwrap();
        for name in ["image", "data", "image-s001.vmdk"] {
            fs::write(bench.path(name), name).unwrap();
        }
        let (code, said) = bench.ours(&format!("create -f {format} image {rest}"));
        assert_eq!(code, Some(1), "{words}\n{said}");
        for name in ["image", "data", "image-s001.vmdk"] {
            assert_eq!(fs::read(bench.path(name)).unwrap(), name.as_bytes(), "{words}");
        }
        let (code, said) = bench.ours(&format!("create -f {format} new {rest}"));
        assert_eq!(code, Some(1), "{words}\n{said}");
        assert!(!bench.path("new").exists(), "{words}");
    }
    // Options that are right make the image, whatever was in its file.
    for (format, rest) in [
        ("raw", ""),
        ("qcow2", "-o nocow=on"),
        ("qcow2", "-o data_file=data,data_file_raw=on"),
        ("vmdk", ""),
        ("vmdk", "-o subformat=monolithicFlat"),
        ("vpc", ""),
        ("vpc", "-o subformat=fixed"),
        ("vhdx", ""),
    ] {
        for name in ["image", "data"] {
            fs::write(bench.path(name), vec![b'x'; 1 << 20]).unwrap();
        }
        bench.done(&format!("create -f {format} image 10M {rest}"));
        let info = bench.done(&format!("info -f {format} image"));
        assert!(info.contains("virtual size: 10 MiB"), "{format} {rest}\n{info}");
        bench.theirs("create -q zero 10M");
        bench.theirs(&format!("compare -f {format} -F raw image zero"));
        let len = if rest.contains("data_file") { 10 * MIB } else { MIB };
        assert_eq!(fs::metadata(bench.path("data")).unwrap().len(), len, "{format} {rest}");
    }
}

/// The disk in an archive is what the name of the archive means.
#[test]
fn the_only_disk_of_an_archive_goes_by_the_archives_name() {
    let Some(bench) = Bench::new() else { return };
    fs::write(bench.path("x.ovf"), "<xml/>").unwrap();
    fs::write(bench.path("raw"), vec![7; 2 << 20]).unwrap();
    bench.done("convert -f raw -O vmdk raw disk.vmdk");
    let tar = ["-cf", "x.ova", "x.ovf", "disk.vmdk"].map(str::to_owned);
    assert_eq!(bench.run(Path::new("tar"), &tar).0, Some(0));
    for name in ["x.ova", "tar:x.ova:member=disk.vmdk"] {
        let said = bench.done(&format!("info {name}"));
        assert!(said.contains("file format: vmdk\nvirtual size: 2 MiB"), "{name}: {said}");
        bench.done(&format!("map {name}"));
        bench.done(&format!("compare -F raw {name} raw"));
        bench.done(&format!("convert -O raw {name} copy"));
        assert!(fs::read(bench.path("copy")).unwrap() == vec![7; 2 << 20], "{name}");
    }
    let (code, said) = bench.ours("resize x.ova 4M");
    assert!(code == Some(1) && said.contains("read-only"), "{said}");
}
