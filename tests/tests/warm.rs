// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Saved machines, and disks that come and go.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};
use support::{APPLIANCE, Finished, Place, SHORT, host, installed};

/// A machine that was saved so long ago is seen to be behind if its clock was not set.
const BEHIND: Duration = Duration::from_secs(3);

/// Runs a command on a script with the cache of this place, and says how it went.
fn run(place: &Place, words: &[&str], script: &str) -> Finished {
    let input = place.path("script");
    fs::write(&input, script).unwrap();
    let mut command = place.tranship(words);
    command.env("APT_CONFIG", place.path("apt.conf")).env("TRANSHIP_CACHE", place.path("cache"));
    command.env("TRANSHIP_LOG", "tranship=debug").env_remove("TRANSHIP_WARM_START");
    command.stdin(Stdio::from(File::open(&input).unwrap()));
    place.start(command).wait(APPLIANCE).ended_with(0)
}

/// A place with a cache of its own, which has the appliance and no saved machine.
fn with_cache() -> Option<Place> {
    let place = Place::new()?;
    let file = place.text("appliance.export");
    place.run(&["appliance", "export", &file], APPLIANCE).ended_with(0);
    // No package is to be had, so that what is imported is used.
    fs::create_dir(place.path("lists")).unwrap();
    let settings = format!(
        "Dir::State::lists \"{}\"; Dir::Cache::pkgcache \"\"; Dir::Cache::srcpkgcache \"\";\n",
        place.text("lists")
    );
    fs::write(place.path("apt.conf"), settings).unwrap();
    run(&place, &["appliance", "import", &file], "");
    Some(place)
}

/// The one saved machine of this place.
fn saved(place: &Place) -> PathBuf {
    let warm = place.path("cache/appliance/warm");
    let found = support::names(&warm);
    assert_eq!(found.len(), 1, "{found:?}");
    warm.join(&found[0])
}

#[track_caller]
fn started(run: &Finished, how: &str) {
    let text = format!("start: {how},");
    assert!(run.stderr.contains(&text), "{text} is missing: {}", run.stderr);
}

/// A disk with ext4.
fn disk(place: &Place, name: &str, label: &str) -> String {
    File::create(place.path(name)).unwrap().set_len(16 << 20).unwrap();
    let path = place.text(name);
    host("mke2fs", &["-q", "-F", "-t", "ext4", "-L", label, &path]);
    path
}

/// When a file of the disk was made by the machine's clock.
fn machines_time(place: &Place, disk: &str, how: &str) -> SystemTime {
    let script = "run\nmount /dev/sda /\nwrite /new x\nstat /new | grep mtime:\nrm-f /new\n";
    let run = run(place, &["shell", "-a", disk], script);
    started(&run, how);
    let seconds = run.stdout.split_whitespace().last().unwrap().parse().unwrap();
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

#[test]
fn a_machine_is_saved_once_and_restored_ever_after() {
    if !installed("mke2fs") {
        return;
    }
    let Some(place) = with_cache() else { return };
    let script = "read a < /proc/sys/kernel/random/uuid; echo $a\n";
    let random = |how| {
        let run = run(&place, &["appliance", "shell"], script);
        started(&run, how);
        assert_eq!(run.stdout.trim().len(), 36, "{}", run.stdout);
        run.stdout
    };
    let first = random("Saved");
    let saved_at = Instant::now();
    let (second, third) = (random("Warm"), random("Warm"));
    assert!(first != second && second != third && first != third, "{first}{second}{third}");

    // Nothing is kept or restored if that is not wanted.
    let off = run(&place, &["appliance", "shell", "--warm-start", "off"], script);
    started(&off, "Cold");

    let disk = disk(&place, "disk.raw", "one");
    sleep(BEHIND.saturating_sub(saved_at.elapsed()));
    let second = Duration::from_secs(1);
    let before = SystemTime::now();
    let time = machines_time(&place, &disk, "Warm");
    assert!(time + second > before && time < SystemTime::now() + second, "{time:?} {before:?}");

    // What cannot be used is no more than a boot.
    let state = || saved(&place).join("state");
    let open = || File::options().write(true).open(state()).unwrap();
    let damages: [&dyn Fn(); 4] = [
        &|| open().set_len(1 << 20).unwrap(),
        &|| open().write_all_at(b"garbage", 0).unwrap(),
        &|| fs::set_permissions(state(), fs::Permissions::from_mode(0o644)).unwrap(),
        &|| fs::remove_file(state()).unwrap(),
    ];
    for damage in damages {
        damage();
        machines_time(&place, &disk, "Saved");
    }
    machines_time(&place, &disk, "Warm");
    assert!(support::names(&place.path("tmp")).is_empty());
}

#[test]
fn disks_come_and_go_while_the_machine_runs() {
    let Some(place) = Place::new() else { return };
    if !installed("mke2fs") || !installed("debugfs") {
        return;
    }
    let disks = ["one", "two", "three"].map(|name| disk(&place, name, name));
    let script = format!(
        "run\n\
         add-drive {two} format:raw\n\
         add-drive {three} format:raw readonly:true\n\
         list-devices\n\
         vfs-label /dev/sdb\n\
         vfs-label /dev/sdc\n\
         mount /dev/sdb /\n\
         write /hello two\n\
         -remove-drive /dev/sdb\n\
         umount /\n\
         remove-drive /dev/sdb\n\
         -remove-drive /dev/sdb\n\
         -remove-drive /dev/sdz\n\
         list-devices\n\
         mount /dev/sdc /\n\
         write /hello thrown-away\n\
         cat /hello\n\
         umount /\n\
         add-drive {two} format:raw\n\
         mount /dev/sdd /\n\
         cat /hello\n\
         umount /\n\
         mount /dev/sda /\n\
         write /hello one\n",
        two = disks[1],
        three = disks[2],
    );
    fs::write(place.path("script"), script).unwrap();
    let mut command = place.tranship(&["shell", "-a", &disks[0]]);
    command.stdin(Stdio::from(File::open(place.path("script")).unwrap()));
    let run = place.start(command).wait(APPLIANCE).ended_with(0);
    let expected =
        "/dev/sda\n/dev/sdb\n/dev/sdc\ntwo\nthree\n/dev/sda\n/dev/sdc\nthrown-away\ntwo\n";
    assert_eq!(run.stdout, expected, "{}", run.stderr);
    for said in ["/dev/sdb: Device or resource busy", "disk number 1", "/dev/sdz"] {
        assert!(run.stderr.contains(said), "{said}: {}", run.stderr);
    }
    let hello = |disk: &str| host("debugfs", &["-R", "cat /hello", disk]);
    assert_eq!([hello(&disks[0]), hello(&disks[1]), hello(&disks[2])], ["one", "two", ""]);
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());

    // Before the launch a disk that is taken away was never there.
    let script =
        format!("add-drive {two}\nremove-drive /dev/sda\nremove-drive /dev/sda\n", two = disks[1]);
    fs::write(place.path("script"), script).unwrap();
    let mut command = place.tranship(&["shell", "-a", &disks[0]]);
    command.stdin(Stdio::from(File::open(place.path("script")).unwrap()));
    place.start(command).wait(SHORT).ended_with(1).saying("there is no disk number 0");
}
