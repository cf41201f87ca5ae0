// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the machine below the appliance has to do whatever runs it: disks that come and go,
//! images of several formats, machines that are saved and restored, and what is left of one
//! that ends badly.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write as _};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};
use support::{
    APPLIANCE, Finished, Place, Running, SHORT, digest, host, installed, listens, names,
};

/// A disk of 32 MiB with an empty filesystem.
fn ext4(place: &Place, name: &str) -> String {
    let path = place.text(name);
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    host("mke2fs", &["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0", &path]);
    path
}

/// Runs `words` with this on its standard input.
fn fed(place: &Place, words: &[&str], input: &str) -> Finished {
    let path = place.path("input");
    fs::write(&path, input).unwrap();
    let mut command = place.tranship(words);
    command.stdin(Stdio::from(File::open(&path).unwrap()));
    let run = place.start(command).wait(APPLIANCE);
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
    run
}

/// Checks a filesystem from outside, and reads a file of it.
fn read_outside(disk: &str, file: &str) -> String {
    host("e2fsck", &["-f", "-n", disk]);
    host("debugfs", &["-R", &format!("cat {file}"), disk])
}

#[test]
fn disks_come_and_go_while_the_shell_runs() {
    let Some(place) = Place::new() else { return };
    if !installed("mke2fs") || !installed("debugfs") {
        return;
    }
    let disks = ["first", "second", "third"].map(|name| ext4(&place, name));
    let [first, second, third] = &disks;
    let script = format!(
        "run\n\
         mount /dev/sda /\n\
         write /kept one\n\
         add-drive {second}\n\
         list-devices\n\
         mkdir-p /mnt\n\
         mount /dev/sdb /mnt\n\
         write /mnt/note two\n\
         -remove-drive /dev/sdb\n\
         cat /mnt/note\n\
         umount /mnt\n\
         remove-drive /dev/sdb\n\
         list-devices\n\
         add-drive {third} readonly:true\n\
         add-drive {second}\n\
         list-devices\n\
         mount-ro /dev/sdd /mnt\n\
         cat /mnt/note\n\
         umount /mnt\n\
         -remove-drive /dev/sda\n\
         cat /kept\n"
    );
    let run = fed(&place, &["shell", "-a", first], &script).ended_with(0);
    let expected = "/dev/sda\n/dev/sdb\ntwo\n/dev/sda\n/dev/sda\n/dev/sdc\n/dev/sdd\ntwo\none\n";
    let printed: Vec<&str> = run.stdout.split_whitespace().collect();
    assert_eq!(printed, expected.split_whitespace().collect::<Vec<_>>(), "{}", run.stderr);
    // What is mounted stays.
    assert_eq!(run.stderr.matches("error: ").count(), 2, "{}", run.stderr);
    assert_eq!(read_outside(first, "/kept"), "one");
    assert_eq!(read_outside(second, "/note"), "two");
}

#[test]
fn images_of_every_kind_are_written_and_thrown_away() {
    let Some(place) = Place::new() else { return };
    if !installed("mke2fs") || !installed("debugfs") {
        return;
    }
    let raw = ext4(&place, "disk.raw");
    let text = |name: &str| place.text(name);
    let (base, top) = (text("base.qcow2"), text("top.qcow2"));
    let (vhdx, vmdk) = (text("disk.vhdx"), text("disk.vmdk"));
    let image = |words: &[&str]| {
        place.run(&[&["image"], words].concat(), SHORT).ended_with(0);
    };
    image(&["convert", "-f", "raw", "-O", "qcow2", &raw, &base]);
    // The name is taken from the image's folder, where a chain has to stay.
    image(&["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &top]);
    image(&["convert", "-f", "raw", "-O", "vhdx", &raw, &vhdx]);
    image(&["convert", "-f", "raw", "-O", "vmdk", &raw, &vmdk]);
    let content: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(place.path("content"), &content).unwrap();
    let below = digest(base.as_ref());

    let disks = [("a", "qcow2", &top), ("b", "vhdx", &vhdx), ("c", "vmdk", &vmdk)];
    let options = |ro: &'static str| -> Vec<&str> {
        let drives = disks.iter().flat_map(|(_, _, path)| ["-a", path.as_str()]);
        ["shell", ro].into_iter().chain(drives).collect()
    };
    let mut script = "run\n".to_owned();
    for (letter, kind, _) in disks {
        write!(
            script,
            "mount /dev/sd{letter} /\nupload {} /content\nwrite /kind {kind}\nsync\numount /\n",
            text("content")
        )
        .unwrap();
    }
    fed(&place, &options("--rw"), &script).ended_with(0);
    assert_eq!(digest(base.as_ref()), below, "the image below was written");
    let written = disks.map(|(_, _, path)| digest(path.as_ref()));

    let mut script = "run\n".to_owned();
    for (letter, kind, _) in disks {
        write!(
            script,
            "mount /dev/sd{letter} /\ncat /kind\ndownload /content {content}.{kind}\n\
             write /kind thrown-away\ncat /kind\nrm-f /content\nexists /content\numount /\n",
            content = text("content")
        )
        .unwrap();
    }
    let run = fed(&place, &options("--ro"), &script).ended_with(0);
    let printed: Vec<&str> = run.stdout.split_whitespace().collect();
    let expected: Vec<&str> =
        disks.iter().flat_map(|(_, kind, _)| [kind, "thrown-away", "false"]).collect();
    assert_eq!(printed, expected, "{}", run.stderr);
    for ((_, kind, path), written) in disks.into_iter().zip(written) {
        let back = fs::read(format!("{}.{kind}", text("content"))).unwrap();
        assert!(back == content, "{kind}: other bytes came back");
        assert_eq!(digest(path.as_ref()), written, "{kind}: --ro wrote to the image");
        // What others find in it.
        image(&["check", path]);
        let out = text(&format!("{kind}.raw"));
        image(&["convert", "-O", "raw", path, &out]);
        assert_eq!(read_outside(&out, "/kind"), kind);
    }
}

/// Our server with the bytes of `disk` for one client, with whom it ends; and the URI of its export.
fn served(place: &Place, disk: &str) -> (Running, String) {
    let socket = format!("{disk}.socket");
    let mut server = place.start(place.tranship(&["serve", "-f", "raw", "-k", &socket, disk]));
    server.until("a socket", SHORT, || listens(Path::new(&socket)));
    (server, format!("nbd+unix:///?socket={socket}"))
}

#[test]
fn disks_of_servers_and_those_that_are_counted_are_opened_where_the_guest_runs() {
    let Some(place) = Place::new() else { return };
    if !installed("mke2fs") || !installed("debugfs") {
        return;
    }
    let (far, near) = (ext4(&place, "far"), ext4(&place, "near"));
    let image = place.text("image");
    let words = ["image", "convert", "-f", "raw", "-O", "qcow2", &near, &image];
    place.run(&words, SHORT).ended_with(0);
    // An export cannot grow.
    File::options().write(true).open(&image).unwrap().set_len(64 << 20).unwrap();
    let servers = [&far, &image].map(|disk| served(&place, disk));
    let [(_, raw), (_, qcow2)] = &servers;
    let length = 800_000;
    fs::write(place.path("content"), vec![7; length]).unwrap();
    let script = format!(
        "mount /dev/sda /\n\
         !cat /proc/uptime\n\
         upload {} /content\n\
         sync\n\
         !cat /proc/uptime\n\
         write /kind raw\n\
         umount /\n\
         mount /dev/sdb /\n\
         write /kind qcow2\n\
         umount /\n\
         mount-ro /dev/sdc /\n\
         ls /\n\
         umount /\n",
        place.text("content")
    );
    let input = place.path("input");
    fs::write(&input, format!("run\n{script}")).unwrap();
    let told = place.text("told.json");
    let limits = ["--limit-rate", "1M", "--statistics", &told];
    let disks = ["shell", "-a", raw, "-a", qcow2, "-a", &near];
    let mut command = place.tranship(&[&disks[..], &limits].concat());
    command.stdin(File::open(&input).unwrap()).env("TRANSHIP_LOG", "tranship_appliance=debug");
    let run = place.start(command).wait(APPLIANCE).ended_with(0);
    let ours = run.stderr.contains("backend=\"kvm\"");
    let opened = run.stderr.matches("the monitor has opened the image").count();
    assert_eq!(opened, if ours { 3 } else { 0 }, "{}", run.stderr);

    // The rate is that of the disk, not of a network or a cache.
    let mut times = run.stdout.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
    let (begun, done) = (times.next().unwrap(), times.nth(1).unwrap());
    assert!(done - begun >= 0.6, "{length} bytes in {} s", done - begun);
    let told: Value = serde_json::from_str(&fs::read_to_string(&told).unwrap()).unwrap();
    let names = [raw, qcow2, &near];
    for (disk, name) in told["disks"].as_array().unwrap().iter().zip(names) {
        assert_eq!(disk["name"], name.as_str());
        let file = &disk["files"][0];
        assert_eq!(file["path"], name.as_str());
        for part in [disk, file] {
            // More than what was looked at to open it.
            assert!(part["reads"]["bytes"].as_u64().unwrap() > 16 << 10, "{told:#}");
            assert_eq!(part["reads"]["errors"], 0);
        }
        let written = disk["writes"]["bytes"].as_u64().unwrap();
        assert_eq!(written > 0, name != &near, "{told:#}");
        assert_eq!(written >= length as u64, name == raw, "{told:#}");
    }
    for (server, _) in servers {
        server.wait(SHORT).ended_with(0);
    }
    assert_eq!(read_outside(&far, "/kind"), "raw");
    let back = place.text("back");
    place.run(&["image", "convert", "-O", "raw", &image, &back], SHORT).ended_with(0);
    assert_eq!(read_outside(&back, "/kind"), "qcow2");
}

/// `appliance shell` that waits for more.
struct Shell {
    running: Running,
    input: Option<ChildStdin>,
    lines: usize,
}

impl Shell {
    fn start(place: &Place, words: &[&str]) -> Self {
        let mut command = place.tranship(&[&["appliance", "shell"], words].concat());
        let (input, far) = std::io::pipe().unwrap();
        command.stdin(input);
        let running = place.start(command);
        let input = Some(ChildStdin::from(std::os::fd::OwnedFd::from(far)));
        Self { running, input, lines: 0 }
    }

    /// What a line prints.
    fn run(&mut self, line: &str) -> String {
        self.lines += 1;
        let done = format!("-- line {} --", self.lines);
        let before = self.running.said().len();
        writeln!(self.input.as_ref().unwrap(), "{line}\necho '{done}'").unwrap();
        let end = format!("{done}\n");
        let said = self.running.stdout().to_owned();
        let ends = || fs::read_to_string(&said).unwrap().ends_with(&end);
        self.running.until("the end of a line", APPLIANCE, ends);
        let printed = self.running.said();
        printed[before..].strip_suffix(&end).unwrap().to_owned()
    }

    fn end(mut self) -> Finished {
        drop(self.input.take());
        self.running.wait(APPLIANCE)
    }
}

#[test]
fn a_disk_for_reading_refuses_writes_and_a_running_machine_is_dumped() {
    let Some(place) = Place::new() else { return };
    File::create(place.path("disk")).unwrap().set_len(16 << 20).unwrap();
    let disk = place.text("disk");
    let mut shell = Shell::start(&place, &["--add", &disk]);
    // The driver knows that the disk is read-only; a driver that does not care gets an error.
    let found = shell.run(
        "for b in /sys/block/vd*; do read s <$b/serial; \
         [ $s = tranship-0 ] && echo ${b##*/} && cat $b/ro; done",
    );
    let (name, read_only) = found.trim().split_once('\n').unwrap();
    assert_eq!(read_only, "1");
    let write = format!("dd if=/dev/urandom of=/dev/{name} bs=4096 count=4 oflag=direct");
    for setting in [":", &format!("blockdev --setrw /dev/{name}")] {
        let said = shell.run(&format!("{setting}; {write} 2>&1 || echo refused"));
        assert!(said.trim_end().ends_with("refused"), "{setting}: {said}");
    }
    assert!(fs::read(&disk).unwrap().iter().all(|byte| *byte == 0), "the disk was written");

    let list = place.run(&["appliance", "list", "--json"], SHORT).ended_with(0);
    let list: Value = serde_json::from_str(&list.stdout).unwrap();
    assert_eq!(list["appliances"][0]["pid"], shell.running.id(), "{list}");
    shell.run("echo before the dump >/run/before");
    let core = place.text("core");
    let pid = shell.running.id().to_string();
    place.run(&["appliance", "dump", "--pid", &pid, &core], APPLIANCE).ended_with(0);
    let again = place.run(&["appliance", "dump", "--pid", &pid, &core], SHORT);
    assert_ne!(again.code, Some(0), "the file has been replaced unasked");
    // It goes on afterwards.
    assert_eq!(shell.run("cat /run/before"), "before the dump\n");
    shell.end().ended_with(0);
    check_core(&core);
}

/// A core file as other programs see it. The kernel's note was found in the memory, so that is
/// in the file, too.
fn check_core(core: &str) {
    if installed("readelf") {
        let header = host("readelf", &["--file-header", "--wide", core]);
        assert!(header.contains("CORE (Core file)") && header.contains("X86-64"), "{header}");
        let segments = host("readelf", &["--segments", "--wide", core]);
        let loads: Vec<&str> =
            segments.lines().filter(|line| line.trim_start().starts_with("LOAD")).collect();
        let memory: u64 = loads
            .iter()
            .map(|line| line.split_whitespace().nth(5).unwrap().trim_start_matches("0x"))
            .map(|size| u64::from_str_radix(size, 16).unwrap())
            .sum();
        assert!(memory >= 500 << 20, "{segments}");
        let notes = host("readelf", &["--notes", "--wide", core]);
        for name in ["CORE", "VMCOREINFO"] {
            assert!(notes.contains(name), "{name}: {notes}");
        }
    }
    if installed("gdb") {
        let words =
            ["-nx", "-batch", "-ex", "info threads", "-ex", "info registers rip", "--core", core];
        let said = host("gdb", &words[..]);
        assert!(said.contains("rip "), "{said}");
    }
}

/// A cache with the same appliance in it and no machine that was saved.
fn cache(place: &Place) -> PathBuf {
    let told = place.run(&["appliance", "build", "--json"], APPLIANCE).ended_with(0);
    let told: Value = serde_json::from_str(&told.stdout).unwrap();
    let kernel = Path::new(told["files"][0]["path"].as_str().unwrap());
    let there = kernel.ancestors().nth(3).unwrap();
    let folder = place.path("cache");
    let here = folder.join("appliance");
    fs::create_dir_all(&here).unwrap();
    for path in [&folder, &here] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
    }
    for name in names(there) {
        let (from, to) = (there.join(&name), here.join(&name));
        if ["kernels", "initramfs", "tools"].contains(&name.as_str()) {
            symlink(from, to).unwrap();
        } else if from.is_file() && name != "lock" {
            fs::copy(from, to).unwrap();
        }
    }
    folder
}

/// One start of the appliance, and what was in it.
struct Visit {
    /// How the machine came up.
    start: String,
    /// Seconds between the guest's clock and ours.
    late: u64,
    random: String,
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Starts an appliance with these options for its shell, and this on its standard input: how the
/// machine came up, and what was printed.
fn start(place: &Place, cache: &Path, options: &[&str], lines: &str) -> (String, String) {
    let mut command = place.tranship(&[&["appliance", "shell"], options].concat());
    let input = place.path("input");
    fs::write(&input, lines).unwrap();
    command.stdin(Stdio::from(File::open(&input).unwrap())).env("TRANSHIP_CACHE", cache);
    command.env("TRANSHIP_LOG", "tranship_appliance=debug");
    let run = place.start(command).wait(APPLIANCE).ended_with(0);
    let (_, start) = run.stderr.split_once("times=LaunchTimes { start: ").unwrap();
    (start.split(',').next().unwrap().to_owned(), run.stdout)
}

/// Starts an appliance and looks at its clock and its random numbers.
fn visit(place: &Place, cache: &Path) -> Visit {
    let begun = seconds();
    let lines = "date +%s; cat /proc/sys/kernel/random/uuid\n";
    let (start, printed) = start(place, cache, &[], lines);
    let (clock, random) = printed.trim().split_once('\n').unwrap();
    let clock: u64 = clock.parse().unwrap();
    Visit {
        start,
        // It was read at some moment of the run.
        late: begun.saturating_sub(clock).max(clock.saturating_sub(seconds())),
        random: random.to_owned(),
    }
}

/// Starts an appliance with eight processors and has each of them do something; how it came up.
fn eight_processors(place: &Place, cache: &Path, options: &[&str]) -> String {
    // On which processor a program runs that may run on one alone is the 39th word of its status.
    let line = "grep -c ^processor /proc/cpuinfo; for number in 0 1 2 3 4 5 6 7; do \
                taskset -c $number awk '{print $39}' /proc/self/stat; done\n";
    let (start, printed) = start(place, cache, &[options, &["--smp", "8"]].concat(), line);
    let printed: Vec<&str> = printed.split_whitespace().collect();
    assert_eq!(printed, ["8", "0", "1", "2", "3", "4", "5", "6", "7"], "{start}");
    start
}

#[test]
fn eight_processors_boot() {
    let Some(place) = Place::new() else { return };
    eight_processors(&place, &cache(&place), &["--warm-start", "off"]);
}

#[test]
fn eight_processors_come_back() {
    let Some(place) = Place::new() else { return };
    let cache = cache(&place);
    for expected in ["Saved", "Warm"] {
        assert_eq!(eight_processors(&place, &cache, &[]), expected);
    }
}

/// The files of the one machine that is saved.
fn saved(cache: &Path) -> PathBuf {
    let folder = cache.join("appliance/warm");
    let names = names(&folder);
    assert_eq!(names.len(), 1, "{names:?}");
    folder.join(&names[0])
}

#[test]
fn a_saved_machine_comes_back_to_the_present_and_a_damaged_one_boots() {
    let Some(place) = Place::new() else { return };
    let cache = cache(&place);
    let visits = [(); 3].map(|()| visit(&place, &cache));
    let starts = visits.each_ref().map(|visit| visit.start.as_str());
    assert_eq!(starts, ["Saved", "Warm", "Warm"]);
    for visit in &visits {
        assert!(visit.late <= 2, "the guest's clock is {} s off", visit.late);
    }
    let [first, second, third] = visits.each_ref().map(|visit| visit.random.as_str());
    assert!(first != second && second != third && first != third, "{second}");

    let state = saved(&cache).join("state");
    let length = fs::metadata(&state).unwrap().len();
    let mut file = File::options().write(true).open(&state).unwrap();
    file.seek(SeekFrom::Start(length / 2)).unwrap();
    file.write_all(&[0x5a; 64]).unwrap();
    file.set_len(length - 100).unwrap();
    drop(file);
    // Nobody but the log says a word, and the machine is saved anew.
    let run = place.start({
        let mut command = place.tranship(&["appliance", "shell"]);
        command.env("TRANSHIP_CACHE", &cache);
        command
    });
    let run = run.wait(APPLIANCE).ended_with(0);
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", ""));
    assert_eq!(visit(&place, &cache).start, "Warm");
}

#[test]
fn a_panic_is_told_and_leaves_the_memory() {
    let Some(place) = Place::new() else { return };
    let cache = cache(&place);
    let input = place.path("input");
    fs::write(&input, "echo 1 >/proc/sys/kernel/sysrq\necho c >/proc/sysrq-trigger\n").unwrap();
    let mut command = place.tranship(&["appliance", "shell", "--warm-start", "off"]);
    command.stdin(Stdio::from(File::open(&input).unwrap())).env("TRANSHIP_CACHE", &cache);
    let run = place.start(command).wait(APPLIANCE);
    assert!(!matches!(run.code, Some(0) | None), "{run:?}");
    let run = run.saying("the appliance's kernel panicked: sysrq triggered crash");
    let dumps = cache.join("appliance/dumps");
    let kept = names(&dumps);
    assert_eq!(kept.len(), 1, "{kept:?}\n{}", run.stderr);
    let core = dumps.join(&kept[0]).display().to_string();
    assert!(run.stderr.contains(&core), "{}", run.stderr);
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
    check_core(&core);
}
