// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The appliance through its shell: filesystems of several kinds, hostile links, errors,
//! and the life of its cache.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "appliance/faults.rs"]
mod faults;
mod support;

use serde_json::Value;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use support::{APPLIANCE, Finished, Place, SHORT, digest, host, installed};

/// Bytes of the large file that goes in and out.
const LARGE: usize = 8 << 20;

/// Bytes without pattern.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut bytes = Vec::with_capacity(count);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

/// An empty image file.
fn image(place: &Place, name: &str, megabytes: u64) -> String {
    File::create(place.path(name)).unwrap().set_len(megabytes << 20).unwrap();
    place.text(name)
}

/// An ext4 image with the files of a folder.
fn ext4(place: &Place, name: &str, tree: &Path, megabytes: u64) -> String {
    let path = image(place, name, megabytes);
    host("mke2fs", &["-q", "-F", "-t", "ext4", "-d", tree.to_str().unwrap(), &path]);
    path
}

/// Runs the shell with a script on its standard input.
fn shell(place: &Place, options: &[&str], script: &str) -> Finished {
    let input = place.path("script");
    fs::write(&input, script).unwrap();
    let words: Vec<&str> = ["shell"].iter().chain(options).copied().collect();
    let mut command = place.tranship(&words);
    command.stdin(Stdio::from(File::open(&input).unwrap()));
    let run = place.start(command).wait(APPLIANCE);
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
    run
}

#[test]
fn files_go_in_and_out_of_four_filesystems() {
    let Some(place) = Place::new() else { return };
    // Kind as listed, program that makes it, program that checks it.
    let kinds: [(&str, &[&str], &[&str]); 4] = [
        ("ext4", &["mke2fs", "-q", "-F", "-t", "ext4"], &["e2fsck", "-f", "-n"]),
        ("xfs", &["mkfs.xfs", "-q"], &["xfs_repair", "-n"]),
        ("btrfs", &["mkfs.btrfs", "-q"], &["btrfs", "check", "--readonly"]),
        ("vfat", &["mkfs.vfat"], &["fsck.vfat", "-n"]),
    ];
    let kinds: Vec<_> = kinds.into_iter().filter(|(_, make, _)| installed(make[0])).collect();
    let content = noise(LARGE);
    fs::write(place.path("large"), &content).unwrap();
    let mut options = Vec::new();
    let mut script = "run\nlist-filesystems\n".to_owned();
    let mut expected = String::new();
    for ((kind, make, _), letter) in kinds.iter().zip('a'..) {
        let path = image(&place, kind, if *kind == "xfs" { 320 } else { 128 });
        host(make[0], &[&make[1..], &[path.as_str()]].concat());
        options.extend(["-a".to_owned(), path]);
        writeln!(expected, "/dev/sd{letter}: {kind}").unwrap();
        write!(
            script,
            "mount /dev/sd{letter} /\n\
             mkdir-p /one/two\n\
             upload {large} /one/two/large\n\
             write /one/note \"{kind} \\\"quoted\\\"\\n\"\n\
             cat /one/note\n\
             download /one/two/large {large}.{kind}\n\
             stat /one/two/large | grep size\n\
             ls /one\n\
             exists /one/three\n\
             cp-a /one/note /one/copy\n\
             rm-f /one/note\n\
             is-file /one/note\n\
             umount /\n",
            large = place.text("large"),
        )
        .unwrap();
    }
    for (kind, _, _) in &kinds {
        let results = format!("\n\nsize: {LARGE}\nnote\ntwo\nfalse\nfalse");
        writeln!(expected, "{kind} \"quoted\"{results}").unwrap();
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let run = shell(&place, &options, &script).ended_with(0);
    assert_eq!(run.stdout, expected, "{}", run.stderr);
    for (kind, _, check) in &kinds {
        let back = place.path(&format!("large.{kind}"));
        assert!(fs::read(back).unwrap() == content, "{kind}: other bytes came back");
        if installed(check[0]) {
            host(check[0], &[&check[1..], &[place.text(kind).as_str()]].concat());
        }
    }
    // What another program finds in the image.
    if installed("debugfs") {
        let cat = host("debugfs", &["-R", "cat /one/copy", &place.text("ext4")]);
        assert_eq!(cat, "ext4 \"quoted\"\n");
        let out = place.text("dumped");
        host("debugfs", &["-R", &format!("dump /one/two/large {out}"), &place.text("ext4")]);
        assert!(fs::read(out).unwrap() == content, "the image has other bytes");
    }
}

#[test]
fn links_do_not_lead_out_and_read_only_disks_stay_as_they_are() {
    let Some(place) = Place::new() else { return };
    if !installed("mke2fs") {
        return;
    }
    let tree = place.path("tree");
    fs::create_dir_all(tree.join("deep/er")).unwrap();
    fs::write(tree.join("real"), "from the guest").unwrap();
    for (link, target) in [
        ("absolute", "/etc/passwd"),
        ("dots", "../../../../../../etc/passwd"),
        ("deep/er/dots", "../../../../../../../proc/self/environ"),
        ("process", "/proc/1/root"),
        ("self", "self"),
        ("folder", "/etc"),
        ("good", "/real"),
        ("above", "../../../real"),
    ] {
        symlink(target, tree.join(link)).unwrap();
    }
    let disk = ext4(&place, "links.raw", &tree, 16);
    let before = digest(disk.as_ref());
    let script = "\
        run\n\
        mount /dev/sda /\n\
        -cat /absolute\n\
        -cat /dots\n\
        -cat /deep/er/dots\n\
        -ls /process\n\
        -cat /self\n\
        -ls /folder\n\
        -cat /../../../../etc/passwd\n\
        -cat /deep/../../../etc/passwd\n\
        -upload -<<END /folder/escaped\nout\nEND\n\
        -download /absolute got\n\
        exists /absolute\n\
        is-symlink /absolute\n\
        readlink /absolute\n\
        cat /good\n\
        cat /above\n\
        write /new thrown-away\n\
        cat /new\n\
        ll /\n";
    let run = shell(&place, &["--ro", "-a", &disk], script).ended_with(0);
    let (listing, results): (Vec<&str>, Vec<&str>) =
        run.stdout.lines().partition(|line| line.contains(" 20") && line.contains(':'));
    assert_eq!(
        results,
        ["false", "true", "/etc/passwd", "from the guest", "from the guest", "thrown-away"],
        "{}",
        run.stderr
    );
    assert!(listing.iter().any(|line| line.ends_with("absolute -> /etc/passwd")), "{listing:?}");
    for name in ["absolute", "dots", "self", "folder"] {
        assert!(run.stderr.contains(&format!("/{name}")), "{name}: {}", run.stderr);
    }
    assert_eq!(run.stderr.matches("error: ").count(), 10, "{}", run.stderr);
    assert!(!run.stderr.contains("root:"), "{}", run.stderr);
    assert!(
        fs::read(place.path("got")).is_ok_and(|bytes| bytes.is_empty())
            || !place.path("got").exists()
    );
    assert_eq!(digest(disk.as_ref()), before, "the disk was opened for reading");
}

#[test]
fn failures_of_commands_end_the_script_with_1() {
    let Some(place) = Place::new() else { return };
    if !installed("mke2fs") {
        return;
    }
    fs::create_dir(place.path("tree")).unwrap();
    let disk = ext4(&place, "empty.raw", &place.path("tree"), 16);
    let options = ["-a", disk.as_str(), "-m", "/dev/sda"];
    let script = "echo one\n-cat /missing\nmount /dev/sdq /\necho not reached\n";
    let run = shell(&place, &options, script).ended_with(1).saying("/missing").saying("/dev/sdq");
    assert_eq!(run.stdout, "one\n");
    assert!(run.stderr.contains(":3: "), "the line's number is missing: {}", run.stderr);

    // These need no appliance.
    for (script, said) in [
        ("frobnicate\n", "frobnicate: unknown command"),
        ("ls\n", "incorrect number of arguments"),
        ("ls etc\n", "must start with a /"),
        ("mount sda1 /\n", "expecting a device name"),
        ("ls /\n", "run"),
    ] {
        let run = shell(&place, &["-a", &disk], script);
        assert_eq!(run.code, Some(1), "{script}: {}", run.stderr);
        assert!(run.stderr.contains(said), "{script}: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{script}: {}", run.stdout);
        assert!(run.elapsed < Duration::from_secs(5), "{script}: {:?}", run.elapsed);
    }
    let run = place.run(&["shell", "-a", "/nowhere/disk", "run"], SHORT);
    assert!(run.code != Some(0) && run.stderr.contains("/nowhere/disk"), "{run:?}");
}

#[test]
fn volumes_of_lvm_are_found() {
    let Some(place) = Place::new() else { return };
    let Some(samples) = std::env::var_os("TRANSHIP_SAMPLES") else {
        eprintln!("skipped: TRANSHIP_SAMPLES names no folder with dfvfs/lvm.raw.xz");
        return;
    };
    let packed = Path::new(&samples).join("dfvfs/lvm.raw.xz");
    if !packed.is_file() || !installed("xz") {
        eprintln!("skipped: {} or xz is missing", packed.display());
        return;
    }
    fs::copy(packed, place.path("lvm.raw.xz")).unwrap();
    host("xz", &["-d", &place.text("lvm.raw.xz")]);
    let disk = place.text("lvm.raw");
    let script = "run\nlvs\nlist-filesystems\nmount-ro /dev/test_volume_group/test_logical_volume1 /\nls /\n";
    let run = shell(&place, &["--ro", "-a", &disk], script).ended_with(0);
    for line in [
        "/dev/test_volume_group/test_logical_volume1",
        "/dev/test_volume_group/test_logical_volume1: ext2",
        "passwords.txt",
    ] {
        assert!(run.stdout.lines().any(|found| found == line), "{line}: {}", run.stdout);
    }
}

#[test]
fn what_runs_the_appliance_is_told_in_json() {
    let Some(place) = Place::new() else { return };
    let probe = place.run(&["appliance", "probe", "--json"], SHORT).ended_with(0);
    let probe: Value = serde_json::from_str(&probe.stdout).unwrap();
    assert!(probe["backend"].as_str().is_some_and(|name| !name.is_empty()), "{probe}");
    assert!(!probe["reason"].as_str().unwrap().is_empty(), "{probe}");

    // The first may have to build, the second has nothing to do.
    let words = ["appliance", "build", "--json"];
    let build = |run: Finished| -> Value { serde_json::from_str(&run.stdout).unwrap() };
    let first = build(place.run(&words, APPLIANCE).ended_with(0));
    let second = build(place.run(&words, SHORT).ended_with(0));
    assert_eq!(first["key"], second["key"]);
    assert!(second["elapsed_ms"].as_f64().unwrap() < 1000.0, "{second}");
    for file in second["files"].as_array().unwrap() {
        let path = Path::new(file["path"].as_str().unwrap());
        assert_eq!(fs::metadata(path).unwrap().len(), file["size"], "{file}");
    }

    let words = ["appliance", "bench", "--runs", "1", "--json"];
    let bench = place.run(&words, APPLIANCE).ended_with(0);
    let bench: Value = serde_json::from_str(&bench.stdout).unwrap();
    assert_eq!((&bench["backend"], &bench["runs"]), (&probe["backend"], &1.into()));
    let rows = bench["rows"].as_array().unwrap();
    let whole = rows.iter().find(|row| row["name"] == "start, in all").unwrap();
    assert!(whole["median_ms"].as_f64().unwrap() > 0.0, "{bench}");
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
}

#[test]
fn an_exported_appliance_starts_twice_at_once_where_no_package_can_be_had() {
    let Some(place) = Place::new() else { return };
    let file = place.text("appliance.export");
    place.run(&["appliance", "export", &file], APPLIANCE).ended_with(0);
    let again = place.run(&["appliance", "export", &file], SHORT);
    assert_ne!(again.code, Some(0), "the file has been replaced unasked");

    // A machine whose package manager, if it has one, knows no packages.
    fs::create_dir(place.path("lists")).unwrap();
    let settings = format!(
        "Dir::State::lists \"{}\"; Dir::Cache::pkgcache \"\"; Dir::Cache::srcpkgcache \"\";\n",
        place.text("lists")
    );
    fs::write(place.path("apt.conf"), settings).unwrap();
    let elsewhere = |words: &[&str]| {
        let mut command = place.tranship(words);
        command.env("APT_CONFIG", place.path("apt.conf")).env_remove("TRANSHIP_CACHE");
        command.env("XDG_CACHE_HOME", place.path("cache"));
        place.start(command)
    };
    let run = elsewhere(&["appliance", "build"]).wait(SHORT);
    assert_ne!(run.code, Some(0), "a kernel came from somewhere: {}", run.stdout);
    assert!(run.stderr.contains("hint: "), "{}", run.stderr);

    let import = elsewhere(&["appliance", "import", &file]).wait(SHORT).ended_with(0);
    assert!(import.stdout.starts_with("kernel "), "{}", import.stdout);
    // The agent's own archive is not in the cache: both have to make it.
    let words = ["appliance", "bench", "--runs", "1", "--warm-start", "off", "--json"];
    let both = [elsewhere(&words), elsewhere(&words)];
    for run in both {
        let run = run.wait(APPLIANCE).ended_with(0);
        let bench: Value = serde_json::from_str(&run.stdout).unwrap();
        assert_eq!(bench["runs"], 1, "{bench}");
    }
    let cache = place.path("cache/tranship/appliance");
    let temporary: Vec<OsString> = fs::read_dir(cache)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().starts_with("tmp-"))
        .collect();
    assert!(temporary.is_empty(), "{temporary:?}");

    let broken = fs::read(&file).unwrap();
    fs::write(place.path("broken"), &broken[..broken.len() / 2]).unwrap();
    elsewhere(&["appliance", "import", &place.text("broken")]).wait(SHORT).ended_with(4);
}
