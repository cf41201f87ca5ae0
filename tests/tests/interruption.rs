// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Conversions that are stopped or killed: nothing half done has a final name, nothing keeps
//! running, and the next run goes on to the same result.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};
use support::{APPLIANCE, Place, Running, guest, has_event, host, installed, journal, names};

/// Time in which a run that is asked to stop has to be gone.
const STOP: Duration = Duration::from_secs(10);

/// The arguments of a conversion with events.
fn words(place: &Place, source: &Path, format: &str) -> Vec<String> {
    let source = source.to_str().unwrap();
    let events = format!("--machine-readable=file:{}", place.text("events"));
    ["convert", source, "-os", &place.text("out"), "-of", format, &events].map(str::to_owned).into()
}

/// Starts a conversion; events of an earlier run are gone.
fn start(place: &Place, words: &[String]) -> Running {
    let _ = fs::remove_file(place.path("events"));
    place.start(place.tranship(words))
}

fn copied(place: &Place) -> Option<u64> {
    let journal = journal(&place.path("out/.guest.work/journal.json"))?;
    (journal["phase"] == "copying").then(|| journal["disks"][0]["copied"].as_u64().unwrap())
}

fn only_work_is_left(place: &Place) {
    assert_eq!(names(&place.path("out")), [".guest.work"]);
}

/// Waits until no process of this test is left.
#[track_caller]
fn nothing_runs(place: &Place) {
    let begun = Instant::now();
    loop {
        let processes = place.processes();
        if processes.is_empty() {
            return;
        }
        assert!(begun.elapsed() < STOP, "still running: {processes:?}");
        sleep(Duration::from_millis(50));
    }
}

/// The last event, which says how it ended.
fn end(place: &Place) -> Value {
    let text = fs::read_to_string(place.path("events")).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn signals_end_a_run_in_order() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    let words = words(&place, &fixture.join("guest.ova"), "raw");
    let events = place.path("events");

    let mut run = start(&place, &words);
    run.until("the appliance", APPLIANCE, || has_event(&events, "inspect"));
    run.signal(Signal::INT);
    run.wait(STOP).ended_with(130);
    assert_eq!(
        (&end(&place)["event"], &end(&place)["exit_code"]),
        (&"run.finished".into(), &130.into())
    );
    only_work_is_left(&place);
    nothing_runs(&place);
    assert!(place.left_behind().is_empty(), "{:?}", place.left_behind());

    // The copy takes less than a second and may be over before anybody has seen it.
    let caught = (0..5).any(|_| {
        let mut run = start(&place, &words);
        if run.reaches(APPLIANCE, || copied(&place).is_some()) {
            run.signal(Signal::TERM);
        }
        if run.wait(STOP).code == Some(143) {
            return true;
        }
        fs::remove_dir_all(place.path("out")).unwrap();
        false
    });
    assert!(caught, "no copy could be caught");
    assert_eq!(end(&place)["exit_code"], 143);
    only_work_is_left(&place);
    nothing_runs(&place);

    let run = start(&place, &words).wait(APPLIANCE).ended_with(0).saying("interrupted");
    assert!(!has_event(&events, "appliance.start"), "{}", run.stderr);
    assert!(has_event(&events, "run.resumed"));
    assert_eq!(names(&place.path("out")), [".guest.work", "guest-sda", "guest.xml"]);
}

#[test]
fn a_killed_appliance_leaves_no_machine() {
    let (Some(place), Some(fixture)) = (Place::new(), guest()) else { return };
    let words = words(&place, &fixture.join("guest.ova"), "raw");
    let events = place.path("events");
    let mut run = start(&place, &words);
    run.until("the appliance", APPLIANCE, || has_event(&events, "inspect"));
    let processes = place.processes();
    assert!(processes.iter().any(|name| name.starts_with("qemu")), "{processes:?}");
    run.signal(Signal::KILL);
    assert_eq!(run.wait(STOP).signal, Some(9));
    nothing_runs(&place);
    only_work_is_left(&place);
}

/// Kills the copy at its first checkpoint; then the result of the next run has to be that
/// of a copy that nobody disturbed.
fn killed_copy(format: &str) {
    let Some(fixture) = guest() else { return };
    if !installed("qemu-img") {
        return;
    }
    // The copy takes less than a second: it may be over before anybody has seen its first
    // checkpoint.
    let caught = (0..5).find_map(|_| {
        let place = Place::new()?;
        let words = words(&place, &fixture.join("guest.ova"), format);
        let mut run = start(&place, &words);
        let is_there = run.reaches(APPLIANCE, || copied(&place).is_some_and(|at| at > 0));
        is_there.then(|| run.signal(Signal::KILL));
        (run.wait(STOP).signal == Some(9)).then_some((place, words))
    });
    let (place, words) = caught.expect("a copy that can be caught");
    only_work_is_left(&place);

    // The same converted guest once more, with a copy that has not begun.
    let work = place.path("out/.guest.work");
    let kept = place.path("kept");
    fs::create_dir(&kept).unwrap();
    let sparse = |from: &Path, to: &Path| {
        host("cp", &["--sparse=always", from.to_str().unwrap(), to.to_str().unwrap()]);
    };
    sparse(&work.join("overlay-0.qcow2"), &kept.join("overlay-0.qcow2"));
    let mut early = journal(&work.join("journal.json")).unwrap();
    assert!(
        early["disks"][0]["copied"].as_u64().unwrap() < early["disks"][0]["size"].as_u64().unwrap()
    );
    early["disks"][0]["copied"] = 0.into();

    start(&place, &words).wait(APPLIANCE).ended_with(0).saying("interrupted");
    assert!(has_event(&place.path("events"), "run.resumed"));
    assert!(!has_event(&place.path("events"), "appliance.start"));
    assert_eq!(names(&place.path("out")), [".guest.work", "guest-sda", "guest.xml"]);
    let (resumed, undisturbed) = (place.path("resumed"), place.path("out/guest-sda"));
    fs::rename(&undisturbed, &resumed).unwrap();
    fs::remove_file(place.path("out/guest.xml")).unwrap();

    sparse(&kept.join("overlay-0.qcow2"), &work.join("overlay-0.qcow2"));
    fs::write(work.join("journal.json"), early.to_string()).unwrap();
    start(&place, &words).wait(APPLIANCE).ended_with(0).saying("interrupted");
    let (resumed, undisturbed) = (resumed.to_str().unwrap(), undisturbed.to_str().unwrap());
    host("qemu-img", &["compare", "-f", format, "-F", format, resumed, undisturbed]);
    if format == "qcow2" {
        // Nothing that the kill cut off from its references is left.
        let said = host("qemu-img", &["check", "-f", format, resumed]);
        assert!(said.contains("No errors were found"), "{said}");
    }
}

#[test]
fn a_killed_copy_to_raw_is_resumed() {
    killed_copy("raw");
}

#[test]
fn a_killed_copy_to_qcow2_is_resumed() {
    killed_copy("qcow2");
}
