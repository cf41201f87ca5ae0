// SPDX-License-Identifier: Apache-2.0 OR MIT
//! fio writes, gives back and reads what it has written, in several jobs at the same time.

use crate::bench::Bench;
use crate::support::{SHORT, host, installed};
use std::fs;

/// Jobs of which each has a part of the disk. What the first four have written is on the
/// disk afterwards; the others also give back what they have written.
const JOBS: &str = "
    rw=randwrite
    size=3M
    offset_increment=3M
    numjobs=4
    bsrange=4k-64k
[trimmed]
    rw=randtrimwrite
    offset=12M
    size=3M
    offset_increment=3M
    numjobs=4
    bsrange=4k-64k
[mixed]
    rw=randrw
    offset=24M
    size=4M
    bs=4k
    numjobs=1
[scattered]
    rw=randwrite
    offset=28M
    size=4M
    bsrange=512-8k
    bs_unaligned=1
    numjobs=1
";

fn job_file(engine: &str, jobs: &str) -> String {
    let global = [
        "thread=1",
        "group_reporting=1",
        "iodepth=16",
        "verify=crc32c",
        "verify_fatal=1",
        "verify_state_save=0",
        "fsync=32",
    ];
    let global = global.join("\n");
    format!("[global]\n{engine}\n{global}\n[kept]\n{jobs}")
}

#[test]
fn fio_finds_all_that_it_has_written() {
    let Some(bench) = Bench::new() else { return };
    if !installed("fio") {
        return;
    }
    fs::write(bench.path("jobs"), job_file("ioengine=nbd\nuri=${URI}", JOBS)).unwrap();
    let (kept, _) = JOBS.split_once("[trimmed]").unwrap();
    let again = format!("ioengine=psync\nfilename={}\nverify_only=1", bench.text("plain"));
    fs::write(bench.path("again"), job_file(&again, kept)).unwrap();
    for format in ["raw", "qcow2"] {
        for place in [["-U", "-"], ["-p", "0"]] {
            let disk = bench.text("disk");
            host("qemu-img", &["create", "-q", "-f", format, &disk, "32M"]);
            let script = format!("URI=\"$uri\" fio '{}'", bench.text("jobs"));
            let words = ["serve", "-f", format, "-e", "0", "--discard=unmap", "--run", &script];
            let words: Vec<&str> = words.into_iter().chain(place).chain([disk.as_str()]).collect();
            let ended = bench.place.run(&words, SHORT * 3).ended_with(0);
            assert!(ended.stdout.contains("err= 0"), "{}", ended.stdout);
            if format == "qcow2" {
                host("qemu-img", &["check", "-q", "-f", format, &disk]);
            }
            // Others see the same in the image.
            let plain = bench.text("plain");
            host("qemu-img", &["convert", "-f", format, "-O", "raw", &disk, &plain]);
            host("fio", &[&bench.text("again")]);
            fs::remove_file(&disk).unwrap();
        }
    }
}
