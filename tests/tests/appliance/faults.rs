// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An appliance that runs can be found and asked for its memory; one whose kernel panics is told
//! apart from one that was asked to end.

use crate::support::{APPLIANCE, Finished, Place, Running, SHORT, host};
use serde_json::Value;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The appliance's own shell, which reads lines from a FIFO.
fn shell(place: &Place) -> (Running, File) {
    host("mkfifo", &[&place.text("lines")]);
    // Open for both, so that opening waits for nobody.
    let lines = File::options().read(true).write(true).open(place.path("lines")).unwrap();
    let mut command = place.tranship(&["appliance", "shell"]);
    command.stdin(lines.try_clone().unwrap());
    (place.start(command), lines)
}

fn list(place: &Place) -> Vec<Value> {
    let run = place.run(&["appliance", "list", "--json"], SHORT).ended_with(0);
    let said: Value = serde_json::from_str(&run.stdout).unwrap();
    said["appliances"].as_array().unwrap().clone()
}

/// A core file for its owner alone, with as much memory as the appliance has. QEMU leaves out
/// what the kernel says about itself.
fn check_core(path: &Path, backend: &str) {
    let facts = fs::metadata(path).unwrap();
    assert_eq!(facts.permissions().mode() & 0o777, 0o600);
    assert!(facts.len() > 512 << 20, "{} bytes", facts.len());
    let headers = host("readelf", &["--wide", "--file-header", "--notes", path.to_str().unwrap()]);
    let own = (backend == "kvm").then_some("VMCOREINFO");
    for expected in ["CORE (Core file)", "NT_PRSTATUS"].into_iter().chain(own) {
        assert!(headers.contains(expected), "{expected} is not in {headers}");
    }
}

fn dump(place: &Place, words: &[&str]) -> Finished {
    place.run(&[&["appliance", "dump"], words].concat(), APPLIANCE)
}

#[test]
fn a_running_appliance_is_found_and_its_panic_explained() {
    let Some(place) = Place::new() else { return };
    assert!(list(&place).is_empty());
    let said = dump(&place, &["core"]).ended_with(2).stderr;
    assert!(said.contains("no appliance is running"), "{said}");

    let (mut running, mut lines) = shell(&place);
    lines.write_all(b"echo it is up\n").unwrap();
    let pid = running.id();
    running.until("answer", APPLIANCE, || !list(&place).is_empty());
    let found = list(&place);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["pid"], pid);
    let backend = found[0]["backend"].as_str().unwrap();
    let command = found[0]["command"].as_str().unwrap();
    assert!(command.ends_with("appliance shell"), "{command}");

    let said = dump(&place, &["--pid", "1", "core"]).ended_with(2).stderr;
    assert!(said.contains("process 1 runs no appliance"), "{said}");
    let run = dump(&place, &["core"]);
    if run.code == Some(0) {
        check_core(&place.path("core"), backend);
        let said = dump(&place, &["core"]).stderr;
        assert!(said.contains("exists"), "{said}");
    } else {
        // Not every backend can.
        assert!(run.stderr.contains("cannot dump its memory"), "{}", run.stderr);
        assert!(!place.path("core").exists());
    }

    lines.write_all(b"echo c > /proc/sysrq-trigger\n").unwrap();
    let end = running.wait(APPLIANCE).ended_with(75);
    assert_eq!(end.stdout, "it is up\n");
    let said = &end.stderr;
    assert!(said.contains("the appliance's kernel panicked: sysrq triggered crash"), "{said}");
    if let Some((_, path)) = said.split_once("its memory is in ") {
        let path = Path::new(path.lines().next().unwrap());
        check_core(path, backend);
        fs::remove_file(path).unwrap();
    }
    assert!(list(&place).is_empty());
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());
}
