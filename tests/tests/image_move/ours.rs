// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What qemu-img has not: hashes, copies that go on after a kill, compaction.

mod metering;

use crate::{empty, split, support};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// A folder with a raw disk of 24 MiB, of which every MiB is different; two are zero.
struct Bench {
    program: PathBuf,
    folder: TempDir,
}

impl Bench {
    fn new() -> Option<Self> {
        let program = support::program()?;
        let folder = empty();
        let mut disk = Vec::new();
        for number in 0..24_u8 {
            let byte = if matches!(number, 5 | 17) { 0 } else { number + 1 };
            let mut piece = vec![byte; MIB];
            if byte != 0 {
                piece[0] = 255;
            }
            disk.extend(piece);
        }
        fs::write(folder.path().join("disk.raw"), disk).unwrap();
        Some(Self { program: program.canonicalize().unwrap(), folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("image")
            .args(split(words))
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// A sparse disk of 400 MiB: there is a place to go on from behind the first data.
    fn with_long_disk() -> Option<Self> {
        let bench = Self::new()?;
        let file = File::options().write(true).open(bench.path("disk.raw")).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&vec![3; 9 * MIB], 300 << 20).unwrap();
        file.set_len(400 << 20).unwrap();
        Some(bench)
    }

    /// Runs it to its end, which has to have this code; standard output.
    #[track_caller]
    fn run(&self, words: &str, code: i32) -> String {
        let Output { status, stdout, stderr } = self.command(words).output().unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        assert_eq!(status.code(), Some(code), "{words}\n{stdout}{stderr}");
        assert!(!stderr.contains("panicked"), "{words}\n{stderr}");
        stdout.into_owned()
    }

    /// What was counted into `s.json`.
    #[track_caller]
    fn told(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path("s.json")).unwrap()).unwrap()
    }

    fn start(&self, words: &str) -> Child {
        self.command(words).spawn().unwrap()
    }

    /// Whether a disk reads as the raw one.
    #[track_caller]
    fn assert_same(&self, name: &str) {
        assert_eq!(
            self.run(&format!("compare -f raw disk.raw {name}"), 0),
            "Images are identical.\n"
        );
    }
}

/// Waits until `holds`; `child` has to be running still.
#[track_caller]
fn wait_until(child: &mut Child, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(child.try_wait().unwrap().is_none(), "it ended early");
        assert!(begun.elapsed() < Duration::from_mins(1), "nothing happens");
        sleep(Duration::from_millis(10));
    }
}

fn kill(mut child: Child, signal: Signal) -> Option<i32> {
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
    child.wait().unwrap().code()
}

#[test]
fn hashes_find_what_has_changed() {
    let Some(bench) = Bench::new() else { return };
    bench.run("convert -f raw -O qcow2 --hash t.hash disk.raw t.q", 0);
    assert_eq!(bench.run("verify --hash t.hash t.q", 0), "Image matches its hashes: 24 chunks.\n");
    // The same disk in another format has the same hashes.
    bench.run("convert -f raw -O vhdx disk.raw t.vhdx", 0);
    bench.run("verify --hash t.hash t.vhdx", 0);
    bench.run("verify -q -f raw --hash t.hash disk.raw", 0);
    let file = File::options().write(true).open(bench.path("disk.raw")).unwrap();
    file.write_all_at(b"x", 7 * MIB as u64 + 9).unwrap();
    // Where there was nothing but zeroes, too.
    file.write_all_at(b"x", 17 * MIB as u64).unwrap();
    assert_eq!(
        bench.run("verify -f raw --hash t.hash disk.raw", 1),
        "Content mismatch at offset 7340032 (1048576 bytes)!\n\
         Content mismatch at offset 17825792 (1048576 bytes)!\n\
         2 of 24 chunks differ.\n"
    );
    assert_eq!(bench.run("verify -q -f raw --hash t.hash disk.raw", 1), "");
    bench.run("resize -q -f raw disk.raw +1M", 0);
    let said = bench.run("verify -f raw --hash t.hash disk.raw", 1);
    assert_eq!(said, "Image size mismatch: 26214400 bytes, expected 25165824!\n");
    bench.run("verify --hash nofile t.q", 2);
    bench.run("verify --hash t.hash nofile", 2);
    bench.run("verify t.q", 2);
    // Cut short, and no manifest at all.
    let text = fs::read(bench.path("t.hash")).unwrap();
    fs::write(bench.path("cut.hash"), &text[..text.len() / 2]).unwrap();
    bench.run("verify --hash cut.hash t.q", 2);
    bench.run("verify --hash t.q t.q", 2);
}

#[test]
fn a_manifest_can_be_made_of_an_image_that_exists() {
    let Some(bench) = Bench::new() else { return };
    bench.run("convert -f raw -O qcow2 --hash t.hash disk.raw t.q", 0);
    bench.run("verify --write --hash again.hash t.q", 0);
    let read = |name| fs::read_to_string(bench.path(name)).unwrap();
    assert_eq!(read("again.hash"), read("t.hash"));
    bench.run("verify --hash again.hash t.q", 0);
}

#[test]
fn a_killed_copy_leaves_no_image() {
    let Some(bench) = Bench::new() else { return };
    for (signal, words) in [
        (Signal::KILL, "convert -f raw -r 4M disk.raw t.img"),
        (Signal::TERM, "convert -f raw -O qcow2 -r 4M disk.raw t.img"),
        (Signal::INT, "convert -f raw -O vmdk -r 4M disk.raw t.img"),
        (Signal::TERM, "convert -f raw -c -O qcow2 -r 4M --hash t.hash disk.raw t.img"),
    ] {
        let mut child = bench.start(words);
        let part = bench.path(".t.img.tranship-part/t.img");
        wait_until(&mut child, || fs::metadata(&part).is_ok_and(|file| file.len() > 0));
        assert!(!bench.path("t.img").exists(), "{words}");
        let code = kill(child, signal);
        assert!(!bench.path("t.img").exists(), "{words}");
        if signal == Signal::KILL {
            fs::remove_dir_all(bench.path(".t.img.tranship-part")).unwrap();
        } else {
            assert_eq!(code, Some(128 + signal.as_raw()), "{words}");
            assert_eq!(support::names(bench.folder.path()), ["disk.raw"], "{words}");
        }
    }
    // What was there before stays until the end, and then goes.
    fs::write(bench.path("t.img"), "old").unwrap();
    let mut child = bench.start("convert -f raw -r 4M disk.raw t.img");
    wait_until(&mut child, || bench.path(".t.img.tranship-part").exists());
    kill(child, Signal::KILL);
    assert_eq!(fs::read(bench.path("t.img")).unwrap(), b"old");
    bench.run("convert -f raw disk.raw t.img", 0);
    assert_eq!(support::names(bench.folder.path()), ["disk.raw", "t.img"]);
    bench.assert_same("t.img -F raw");
}

#[test]
fn a_killed_copy_goes_on() {
    let Some(bench) = Bench::with_long_disk() else { return };
    for (format, options) in [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "-o cluster_size=4k"),
        ("qcow2", "--hash t.hash"),
        ("vhdx", ""),
        ("vmdk", ""),
        ("vpc", "-o force_size=on"),
    ] {
        let words = format!("convert -f raw --resume -O {format} {options} disk.raw t.img");
        let mut child = bench.start(&words.replace("convert", "convert -r 5M"));
        let state = bench.path(".t.img.tranship-part/.tranship-state");
        wait_until(&mut child, || state.exists());
        kill(child, Signal::KILL);
        assert!(!bench.path("t.img").exists());
        let state = fs::read_to_string(&state).unwrap();
        let done: u64 = serde_json::from_str::<Value>(&state).unwrap()["done"].as_u64().unwrap();
        assert!(done > 0 && done < 400 << 20, "{words}: {done}");
        bench.run(&words, 0);
        bench.assert_same(&format!("t.img -F {format}"));
        if options.contains("hash") {
            bench.run("verify --hash t.hash t.img", 0);
            fs::remove_file(bench.path("t.hash")).unwrap();
        }
        if matches!(format, "qcow2" | "vhdx" | "vmdk") {
            bench.run(&format!("check -f {format} t.img"), 0);
        }
        fs::remove_file(bench.path("t.img")).unwrap();
        assert_eq!(support::names(bench.folder.path()), ["disk.raw"], "{words}");
    }
}

#[test]
fn another_copy_does_not_go_on_with_the_first_one() {
    let Some(bench) = Bench::with_long_disk() else { return };
    let mut child = bench.start("convert -f raw --resume -r 5M disk.raw t.img");
    let state = bench.path(".t.img.tranship-part/.tranship-state");
    wait_until(&mut child, || state.exists());
    kill(child, Signal::KILL);
    // The source has changed since.
    let file = File::options().write(true).open(bench.path("disk.raw")).unwrap();
    file.write_all_at(b"changed", 100).unwrap();
    bench.run("convert -f raw --resume disk.raw t.img", 0);
    bench.assert_same("t.img -F raw");
}

#[test]
fn a_limit_is_kept() {
    let Some(bench) = Bench::new() else { return };
    let begun = Instant::now();
    bench.run("convert -f raw -r 20M disk.raw t.raw", 0);
    assert!(begun.elapsed() > Duration::from_millis(900), "{:?}", begun.elapsed());
    bench.run("create -q -f qcow2 -b disk.raw -F raw t.q", 0);
    bench.run("bench -w -c 10 -s 1M --pattern 3 t.q", 0);
    let begun = Instant::now();
    bench.run("commit -r 10M t.q", 0);
    assert!(begun.elapsed() > Duration::from_millis(800), "{:?}", begun.elapsed());
}

#[test]
fn a_killed_commit_has_changed_nothing_for_the_guest() {
    let Some(bench) = Bench::new() else { return };
    bench.run("create -q -f qcow2 -b disk.raw -F raw t.q", 0);
    bench.run("bench -w -c 20 -s 1M --pattern 3 t.q", 0);
    bench.run("convert t.q before.raw", 0);
    let first = fs::read(bench.path("disk.raw")).unwrap();
    let mut child = bench.start("commit -r 5M t.q");
    wait_until(&mut child, || fs::read(bench.path("disk.raw")).unwrap() != first);
    kill(child, Signal::KILL);
    assert_eq!(bench.run("compare -F raw t.q before.raw", 0), "Images are identical.\n");
    bench.run("commit t.q", 0);
    assert_eq!(bench.run("compare -F raw t.q before.raw", 0), "Images are identical.\n");
    assert_eq!(
        bench.run("compare -f raw -F raw disk.raw before.raw", 0),
        "Images are identical.\n"
    );
    bench.run("check t.q", 0);
    assert_eq!(bench.run("map --output json t.q", 0).matches("\"depth\": 0").count(), 0);
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn compact_gives_back_what_is_zero() {
    let Some(bench) = Bench::new() else { return };
    for (format, options) in [
        ("raw", "-S 0"),
        ("qcow2", "-S 0"),
        ("qcow2", "-S 0 -o extended_l2=on"),
        ("vpc", "-S 0 -o force_size=on"),
        ("vhdx", "-S 0 -o block_size=1M"),
    ] {
        bench.run(&format!("convert -f raw -O {format} {options} disk.raw t.img"), 0);
        let disk = bench.path("t.img");
        // More zeroes that have storage.
        bench.run(&format!("bench -w -f {format} -c 8 -s 1M -o 8M t.img"), 0);
        bench.run(&format!("convert -f {format} t.img before.raw"), 0);
        let before = allocated(&disk);
        let said = bench.run(&format!("compact -f {format} t.img"), 0);
        assert!(said.contains("disk size: ") && said.contains("file length: "), "{said}");
        let freed = before - allocated(&disk);
        assert!(freed >= 7 * MIB as u64, "{format} {options}: {before} - {freed}\n{said}");
        let same = bench.run(&format!("compare -f {format} t.img -F raw before.raw"), 0);
        assert_eq!(same, "Images are identical.\n");
        if matches!(format, "qcow2" | "vhdx") {
            bench.run(&format!("check -f {format} t.img"), 0);
        }
        assert_eq!(bench.run(&format!("compact -q -f {format} t.img"), 0), "");
        fs::remove_file(&disk).unwrap();
    }
    bench.run("convert -f raw -O vmdk disk.raw t.vmdk", 0);
    bench.run("compact t.vmdk", 1);
    bench.run("compact nofile", 1);
    bench.run("compact", 1);
}

#[test]
fn dd_copies_what_follows_the_skipped_blocks() {
    let Some(bench) = Bench::new() else { return };
    bench.run("dd -f raw if=disk.raw of=t.raw bs=1M skip=10 count=2", 0);
    let disk = fs::read(bench.path("disk.raw")).unwrap();
    assert!(fs::read(bench.path("t.raw")).unwrap() == disk[10 * MIB..12 * MIB]);
    // Nothing of it is left in place of an image that was there.
    bench.run("dd -f raw if=disk.raw of=disk.raw", 1);
    assert!(fs::read(bench.path("disk.raw")).unwrap() == disk);
}

#[test]
fn an_image_in_use_is_not_changed() {
    let Some(bench) = Bench::new() else { return };
    bench.run("create -q -f qcow2 -b disk.raw -F raw t.q", 0);
    bench.run("bench -w -c 10 t.q", 0);
    let mut child = bench.start("convert -r 10k -O raw t.q out.raw");
    wait_until(&mut child, || bench.path(".out.raw.tranship-part/out.raw").exists());
    for words in [
        "commit t.q",
        "rebase -b '' t.q",
        "rebase -u -b '' t.q",
        "compact t.q",
        "bench -w -c 1 t.q",
        "convert -n -f raw -O qcow2 disk.raw t.q",
    ] {
        let before = fs::read(bench.path("t.q")).unwrap();
        let output = bench.command(words).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words}\n{stderr}");
        assert!(stderr.contains("lock"), "{words}\n{stderr}");
        assert!(fs::read(bench.path("t.q")).unwrap() == before, "{words}");
    }
    kill(child, Signal::KILL);
}

#[test]
fn children_of_vhd_and_vhdx_are_made_filled_and_read() {
    let Some(bench) = Bench::new() else { return };
    for format in ["vpc", "vhdx"] {
        bench.run(&format!("convert -f raw -O {format} disk.raw base.{format}"), 0);
        bench.run(
            &format!("create -q -f {format} -b base.{format} -F {format} child.{format} 24M"),
            0,
        );
        let found = bench.run(&format!("compare -f raw disk.raw child.{format}"), 0);
        assert!(found.contains("identical"), "{found}");
        bench.run(
            &format!(
                "convert -O {format} -B base.{format} -F {format} child.{format} copy.{format}"
            ),
            0,
        );
        bench.run(&format!("compare copy.{format} child.{format}"), 0);
        fs::remove_file(bench.path(&format!("base.{format}"))).unwrap();
        bench.run(&format!("compare copy.{format} child.{format}"), 2);
    }
}

#[test]
fn a_vhd_for_azure_is_fixed_and_ends_at_a_whole_mib() {
    let Some(bench) = Bench::new() else { return };
    bench.run("create -q -f vpc -o azure=on small.vhd 3M", 0);
    assert_eq!(fs::metadata(bench.path("small.vhd")).unwrap().len(), (20 << 20) + 512);
    bench.run("create -q -f vpc -o azure=on odd.vhd 21000000", 0);
    assert_eq!(fs::metadata(bench.path("odd.vhd")).unwrap().len(), (21 << 20) + 512);
    bench.run("create -q -f vpc -o azure=on,subformat=dynamic bad.vhd 30M", 1);
}
