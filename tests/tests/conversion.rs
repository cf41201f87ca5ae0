// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whole conversions of a guest as VMware hands it over, up to its first boot under KVM's
//! devices.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;
use support::{APPLIANCE, Place, SHORT, digest, guest, has_event, host, installed, names};

/// Where the fixture's only partition begins, in bytes.
const PARTITION: u64 = 1 << 20;

/// Time for a guest to boot without KVM, on a machine that does other things as well.
const BOOT: Duration = Duration::from_mins(10);

#[test]
fn an_ova_becomes_a_guest_that_boots() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    let ova = fixture.join("guest.ova");
    let before = digest(&ova);
    let (out, events) = (place.path("out"), place.path("events"));
    let channel = format!("--machine-readable=file:{}", events.display());
    let words = [
        "convert",
        "-i",
        "ova",
        ova.to_str().unwrap(),
        "-o",
        "local",
        "-os",
        out.to_str().unwrap(),
        "-of",
        "qcow2",
        &channel,
    ];
    place.run(&words, APPLIANCE).ended_with(0);

    assert_eq!(names(&out), [".guest.work", "guest-sda", "guest.xml"]);
    assert_eq!(names(&out.join(".guest.work")), ["journal.json", "lock"]);
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
    assert_eq!(digest(&ova), before, "the source has changed");
    let disk = out.join("guest-sda");
    if installed("qemu-img") {
        let said = host("qemu-img", &["check", "-f", "qcow2", disk.to_str().unwrap()]);
        assert!(said.contains("No errors were found"), "{said}");
    }
    the_definition_fits(&out.join("guest.xml"), &disk);
    the_events_are_whole(&events);

    let changed = || fs::metadata(&disk).unwrap().modified().unwrap();
    let first = changed();
    fs::remove_file(&events).unwrap();
    place.run(&words, SHORT).ended_with(0).saying("an earlier run has done all of this");
    assert!(has_event(&events, "run.finished") && !has_event(&events, "appliance.start"));
    assert_eq!(changed(), first);

    it_boots(&place, &out.join("guest.xml"));
    assert_eq!(changed(), first, "the boot test has changed the disk");
}

fn the_definition_fits(xml: &Path, disk: &Path) {
    let text = fs::read_to_string(xml).unwrap();
    let document = roxmltree::Document::parse(&text).unwrap();
    let all = |name: &'static str| document.descendants().filter(move |n| n.has_tag_name(name));
    let only = |name: &'static str| {
        let found: Vec<_> = all(name).collect();
        assert_eq!(found.len(), 1, "{name}: {text}");
        found[0]
    };
    assert_eq!(only("name").text(), Some("guest"));
    assert_eq!(only("vcpu").text(), Some("2"));
    let disks: Vec<_> =
        all("disk").filter(|disk| disk.attribute("device") == Some("disk")).collect();
    assert_eq!(disks.len(), 1, "{text}");
    let part = |name: &'static str| disks[0].children().find(|n| n.has_tag_name(name)).unwrap();
    assert_eq!(part("source").attribute("file"), disk.to_str());
    assert_eq!(part("driver").attribute("type"), Some("qcow2"));
    assert_eq!(part("target").attribute("bus"), Some("virtio"));
    assert_eq!(part("target").attribute("dev"), Some("vda"));
    assert_eq!(only("mac").attribute("address"), Some("00:50:56:01:02:03"));
    let interface = only("interface");
    let model = interface.children().find(|node| node.has_tag_name("model")).unwrap();
    assert_eq!(model.attribute("type"), Some("virtio"));
}

fn the_events_are_whole(path: &Path) {
    let text = fs::read_to_string(path).unwrap();
    let events: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    for (index, event) in events.iter().enumerate() {
        for key in ["v", "seq", "timestamp", "type", "event", "message"] {
            assert!(event.get(key).is_some(), "{key} is missing: {event}");
        }
        assert_eq!(event["seq"], index + 1, "{event}");
    }
    let named: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    for step in ["source.read", "appliance.start", "inspect", "convert", "copy", "metadata"] {
        assert!(named.contains(&step), "{step}: {named:?}");
    }
    assert_eq!(named.iter().filter(|name| **name == "run.finished").count(), 1);
    let last = events.last().unwrap();
    assert_eq!((&last["event"], &last["exit_code"]), (&"run.finished".into(), &0.into()));
    let copied = events.iter().rfind(|event| event["event"] == "copy.progress").unwrap();
    assert_eq!(copied["done"], copied["total"]);
}

fn it_boots(place: &Place, xml: &Path) {
    let (console, picture) = (place.path("console"), place.path("screen.png"));
    let seconds = BOOT.as_secs().to_string();
    let words = [
        "verify-boot",
        xml.to_str().unwrap(),
        "--expect",
        "GUEST-DONE",
        "--within",
        &seconds,
        "--console-log",
        console.to_str().unwrap(),
        "--screenshot",
        picture.to_str().unwrap(),
        "--json",
    ];
    let report = place.run(&words, BOOT + SHORT).ended_with(0);
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    assert_eq!(report["alive"], true, "{report}");
    let said = String::from_utf8_lossy(&fs::read(console).unwrap()).into_owned();
    for line in [
        "GUEST-UP fixture",
        "GUEST-ADDR ens192 00:50:56:01:02:03 10.0.2.77/24",
        "GUEST-ROOT /dev/vda1",
        "vmtoolsd=masked",
    ] {
        assert!(said.contains(line), "{line:?} is missing:\n{said}");
    }
    assert!(fs::read(picture).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
}

/// Converts to raw with more `words`, and sees whether the root filesystem is whole.
fn to_raw(place: &Place, source: &Path, words: &[&str]) {
    let mut all = vec!["convert", source.to_str().unwrap(), "-os"];
    let out = place.text("out");
    all.extend([out.as_str(), "-of", "raw", "-on", "moved"]);
    all.extend(words);
    let before: Vec<_> = names(source.parent().unwrap())
        .iter()
        .map(|name| fs::metadata(source.with_file_name(name)).unwrap().modified().unwrap())
        .collect();
    let run = place.run(&all, APPLIANCE).ended_with(0);
    assert_eq!(run.stdout.trim(), place.text("out/moved.xml"));
    let after: Vec<_> = names(source.parent().unwrap())
        .iter()
        .map(|name| fs::metadata(source.with_file_name(name)).unwrap().modified().unwrap())
        .collect();
    assert_eq!(before, after, "the source has changed");
    assert_eq!(names(&place.path("out")), [".moved.work", "moved-sda", "moved.xml"]);
    let disk = place.text("out/moved-sda");
    assert_eq!(fs::metadata(&disk).unwrap().len(), 2 << 30);
    if installed("e2fsck") {
        host("e2fsck", &["-f", "-n", &format!("{disk}?offset={PARTITION}")]);
    }
}

#[test]
fn a_vmx_becomes_a_raw_disk_without_device_names() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    to_raw(&place, &fixture.join("vmx/guest.vmx"), &["-i", "vmx"]);
    let disk = place.text("out/moved-sda");
    assert!(fs::metadata(&disk).unwrap().blocks() * 512 < 1 << 30, "the disk is not sparse");
    let words = ["shell", "--ro", "-a", &disk, "-i"].into_iter().chain([
        "cat",
        "/etc/fstab",
        ":",
        "inspect-get-hostname",
        "/dev/sda1",
        ":",
        "exists",
        "/boot/grub/grub.cfg",
    ]);
    let shell = place.run(&words.collect::<Vec<_>>(), APPLIANCE).ended_with(0);
    let root = shell.stdout.lines().find(|line| line.split_whitespace().nth(1) == Some("/"));
    let uuid = "UUID=0f1e2d3c-4b5a-4968-8776-655443322110 ";
    assert!(root.unwrap().starts_with(uuid), "{}", shell.stdout);
    assert!(!shell.stdout.contains("/dev/sd"), "{}", shell.stdout);
    assert!(shell.stdout.ends_with("fixture\ntrue\n"), "{}", shell.stdout);
}

#[test]
fn disks_in_two_files_are_converted_as_one() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    to_raw(&place, &fixture.join("split/guest.vmdk"), &["-i", "disk"]);
}

#[test]
fn a_flat_disk_is_converted_into_reserved_space() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    to_raw(&place, &fixture.join("flat/guest.vmdk"), &["-i", "disk", "-oa", "preallocated"]);
    let disk = fs::metadata(place.path("out/moved-sda")).unwrap();
    assert!(disk.blocks() * 512 >= disk.len(), "{} blocks", disk.blocks());
}

#[test]
fn a_dry_run_names_the_changes_and_leaves_nothing() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    let ova = fixture.join("guest.ova");
    let words =
        ["convert", "--dry-run", "--json", ova.to_str().unwrap(), "-os", &place.text("out")];
    let run = place.run(&words, APPLIANCE).ended_with(0);
    let plan: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&plan["name"], &plan["root"]), (&"guest".into(), &"/dev/sda1".into()));
    assert!(plan["operating_system"].as_str().unwrap().contains("Debian"), "{plan}");
    assert!(!plan["plan"]["steps"].as_array().unwrap().is_empty(), "{plan}");
    assert_eq!(plan["blockers"], serde_json::json!([]));
    assert!(names(&place.path("out")).is_empty());
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
}

/// Starts a server of `words` at `socket`, and gives the URI of its export.
fn remote(
    place: &Place,
    program: &str,
    words: &[&str],
    socket: &str,
) -> (support::Running, String) {
    let mut command = std::process::Command::new(program);
    command.args(words).env("LC_ALL", "C").stdin(std::process::Stdio::null());
    let path = place.path(socket);
    let mut server = place.start(command);
    server.until("a socket", SHORT, || std::os::unix::net::UnixStream::connect(&path).is_ok());
    (server, format!("nbd+unix:///?socket={}", path.display()))
}

#[test]
fn a_disk_on_a_server_is_inspected_and_converted_as_it_is() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    if !["nbdkit", "qemu-img"].iter().all(|program| installed(program)) {
        return;
    }
    let raw = fixture.join("guest.raw");
    let socket = place.text("far.sock");
    let words = ["-f", "-r", "-U", &socket, "file", raw.to_str().unwrap()];
    let (server, uri) = remote(&place, "nbdkit", &words, "far.sock");
    let words = ["shell", "--ro", "-a", &uri, "-i", "inspect-get-hostname", "/dev/sda1"];
    assert_eq!(place.run(&words, APPLIANCE).ended_with(0).stdout, "fixture\n");

    let words = ["convert", "-i", "disk", &uri, "-o", "local", "-os", &place.text("out")];
    let words = [&words[..], &["-of", "qcow2", "-on", "moved"]].concat();
    place.run(&words, APPLIANCE).ended_with(0);
    let again = place.run(&words, SHORT).ended_with(0);
    again.saying("an earlier run has done all of this");
    drop(server);
    let disk = place.text("out/moved-sda");
    host("qemu-img", &["check", "-q", "-f", "qcow2", &disk]);
    let plain = place.text("plain");
    host("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &disk, &plain]);
    if installed("e2fsck") {
        host("e2fsck", &["-f", "-n", &format!("{plain}?offset={PARTITION}")]);
    }
    the_guest_was_converted(&place, &disk);
}

fn the_guest_was_converted(place: &Place, disk: &str) {
    let words = ["shell", "--ro", "-a", disk, "-i", "cat", "/etc/fstab"];
    let shell = place.run(&words, APPLIANCE).ended_with(0);
    assert!(!shell.stdout.contains("/dev/sd"), "{}", shell.stdout);
}

#[test]
fn a_disk_on_a_server_is_changed_where_it_is() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    if !["qemu-nbd", "qemu-img"].iter().all(|program| installed(program)) {
        return;
    }
    let (raw, folder) = (fixture.join("guest.raw"), fixture.to_str().unwrap());
    let base = raw.to_str().unwrap();
    let ours = support::program().unwrap();
    let ours = ours.to_str().unwrap();
    for (program, options) in
        [("qemu-nbd", &[][..]), (ours, &["serve", "--allow-path", folder][..])]
    {
        let (disk, socket) = (place.text("disk"), place.text("far.sock"));
        host("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, &disk]);
        let words = ["-t", "-e", "4", "-f", "qcow2", "-k", &socket, &disk];
        let words = [options, &words].concat();
        let (server, uri) = remote(&place, program, &words, "far.sock");
        let run = |words: &[&str]| {
            let words = [&["shell", "--format=raw", "-a", &uri], words].concat();
            place.run(&words, APPLIANCE).ended_with(0).stdout
        };
        run(&["-m", "/dev/sda1", "write", "/etc/far", "changed"]);
        // What is only looked at stays as it is.
        let mounted = ["run", ":", "mount", "/dev/sda1", "/", ":", "write", "/etc/far", "no"];
        run(&[&["--ro"][..], &mounted].concat());
        assert_eq!(run(&["--ro", "-m", "/dev/sda1", "cat", "/etc/far"]), "changed\n");
        server.signal(rustix::process::Signal::TERM);
        server.wait(SHORT).ended_with(0);
        host("qemu-img", &["check", "-q", "-f", "qcow2", &disk]);
        if installed("e2fsck") {
            let plain = place.text("plain");
            host("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &disk, &plain]);
            host("e2fsck", &["-f", "-n", &format!("{plain}?offset={PARTITION}")]);
        }
    }
}
