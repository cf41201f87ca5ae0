// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Measures our monitor beside QEMU where KVM works: `tests/bench/appliance/run.sh` runs this in a
//! nested machine, as root, with the same kernel, initramfs and tools for both.
//!
//! Usage: `appliance_bench starts RUNS | memory | requests`
//!
//! Standard output has one line of tab-separated values for each figure, with `bench` in front:
//! the console has other lines, too. `TRANSHIP_BIN` is the program.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "appliance_bench/ours.rs"]
mod ours;
#[path = "appliance_bench/process.rs"]
mod process;
#[path = "appliance_bench/qemu.rs"]
mod qemu;

use ours::Shell;
use process::Counters;
use qemu::{Files, Qemu};
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

/// Memory of the machines in MiB.
const MEMORY: u64 = 768;
/// Size of a disk in MiB.
const DISK: u64 = 64;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["starts", runs] => starts(runs.parse().unwrap()),
        ["memory"] => memory(),
        ["requests"] => requests(),
        _ => panic!("usage: appliance_bench starts RUNS | memory | requests"),
    }
}

fn say(values: &[&dyn std::fmt::Display]) {
    let values: Vec<String> = values.iter().map(ToString::to_string).collect();
    println!("bench\t{}", values.join("\t"));
}

/// Disks of random bytes, which are removed with the folder.
struct Disks(tempfile::TempDir, Vec<PathBuf>);

impl Disks {
    fn new(count: usize) -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let make = |number| {
            let path = folder.path().join(format!("disk{number}"));
            let mut random = std::io::Read::take(File::open("/dev/urandom").unwrap(), DISK << 20);
            std::io::copy(&mut random, &mut File::create(&path).unwrap()).unwrap();
            path
        };
        let first = make(0);
        // Nobody looks at what the others have.
        let others = (1..count).map(|number| {
            let path = folder.path().join(format!("disk{number}"));
            std::fs::hard_link(&first, &path).unwrap();
            path
        });
        let paths = std::iter::once(first.clone()).chain(others).collect();
        Self(folder, paths)
    }
}

/// From the start of the machine's process to the agent's first word, and from its start with a
/// saved machine to the first answer with the disk in place, in turns.
fn starts(runs: usize) {
    let files = Files::find();
    let disks = Disks::new(1);
    let saved = disks.0.path().join("saved");
    for run in 0..runs {
        for side in ["kvm", "qemu-kvm"] {
            let bench = ours::bench(side, &disks.1);
            for (kind, time) in bench {
                say(&[&"start", &side, &kind, &time]);
            }
        }
        let mut machine = Qemu::cold("microvm", &files, &disks.1);
        say(&[&"start", &"microvm", &"cold", &milliseconds(machine.took)]);
        if run == 0 {
            machine.save(&saved);
        }
        drop(machine);
        let machine = Qemu::warm("microvm", &files, &disks.1, &saved);
        say(&[&"start", &"microvm", &"warm", &milliseconds(machine.took)]);
        let machine = Qemu::cold("q35", &files, &disks.1);
        say(&[&"start", &"q35", &"cold", &milliseconds(machine.took)]);
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1e3)
}

/// A running machine of either side.
enum Running {
    Ours(Shell),
    Theirs(Box<Qemu>),
}

impl Running {
    fn start(side: &str, disks: &[PathBuf]) -> Self {
        match side {
            "kvm" | "qemu-kvm" => Self::Ours(Shell::start(side, disks)),
            kind => Self::Theirs(Box::new(Qemu::cold(kind, &Files::find(), disks))),
        }
    }

    fn process(&self) -> u32 {
        match self {
            Self::Ours(shell) => shell.machine(),
            Self::Theirs(qemu) => qemu.process(),
        }
    }

    /// What a line for the appliance's shell prints.
    fn run(&mut self, line: &str) -> String {
        match self {
            Self::Ours(shell) => shell.run(line),
            Self::Theirs(qemu) => qemu.run(line),
        }
    }

    /// The kernel's names of the disks.
    fn names(&mut self) -> Vec<String> {
        let line = "for b in /sys/block/vd*; do read s <$b/serial; \
                    case $s in tranship-[0-9]*) echo ${b##*/};; esac; done";
        self.run(line).lines().map(str::to_owned).collect()
    }
}

/// What the machine's process takes beside the guest's memory, after each disk was read.
fn memory() {
    let disks = Disks::new(16);
    for count in [1, 16] {
        for side in ["kvm", "microvm", "qemu-kvm"] {
            let mut machine = Running::start(side, &disks.1[..count]);
            let names = machine.names();
            assert_eq!(names.len(), count, "{side}: {names:?}");
            for name in names {
                machine.run(&format!("busybox dd if=/dev/{name} of=/dev/null bs=1M count=16"));
            }
            for (what, kibibytes) in process::beside_guest(machine.process(), MEMORY << 20) {
                say(&[&"memory", &side, &count, &what, &kibibytes]);
            }
        }
    }
}

/// What a boot and reads of one size cost, in exits of the guest and in what the process does.
fn requests() {
    process::mount_debugfs();
    let disks = Disks::new(1);
    for side in ["kvm", "microvm", "qemu-kvm"] {
        let mut machine = Running::start(side, &disks.1);
        let name = machine.names().remove(0);
        for (what, value) in Counters::of(machine.process()).all() {
            say(&[&"boot", &side, &what, &value]);
        }
        let read = |size: &str, count: u64| {
            format!(
                "busybox dd if=/dev/{name} of=/dev/null bs={size} count={count} iflag=direct \
                 2>/dev/null; busybox cat /sys/block/{name}/stat"
            )
        };
        for (size, count, mebibytes) in [("4k", 4096, 16), ("1M", 64, 64)] {
            // The second time the program's pages are there.
            machine.run(&read(size, 16));
            let process = machine.process();
            // What the program costs that reads nothing is not counted.
            let begun = Counters::of(process);
            let nothing = reads(&machine.run(&read(size, 0)));
            let between = Counters::of(process);
            let everything = reads(&machine.run(&read(size, count)));
            let after = Counters::of(process);
            let counters = after.less(&between).less(&between.less(&begun));
            let requests = everything - nothing;
            say(&[&"requests", &side, &size, &"requests", &requests]);
            say(&[&"requests", &side, &size, &"mebibytes", &mebibytes]);
            for (what, value) in counters.all() {
                say(&[&"requests", &side, &size, &what, &value]);
            }
        }
    }
}

/// Completed reads, the first number of a disk's statistics.
fn reads(stat: &str) -> u64 {
    stat.split_whitespace().next().unwrap().parse().unwrap()
}
