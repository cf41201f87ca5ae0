// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `appliance bench`: where the time of a start goes, by a boot and from a saved machine.

use super::telling;
use crate::args::{BenchArgs, WarmStart};
use crate::disk::{self, Use};
use crate::failure::Failure;
use crate::{logging, places, signals, stdout};
use serde_json::{Value, json};
use std::fmt::Write;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tranship_appliance::{CancelToken, Guest, LaunchTimes, Settings, Start};
use tranship_block::Meter;

/// Size of the disk that is attached if none is named.
const DISK_SIZE: u64 = 64 << 20;

/// One start: the parts that it consists of, in order; they add up to the whole.
struct Run {
    start: Start,
    parts: Vec<(String, Duration)>,
    total: Duration,
    /// Saving the machine, which is one of the parts.
    save: Duration,
    shutdown: Duration,
}

/// What was measured.
struct Measured {
    backend: String,
    reason: String,
    cold: Vec<Run>,
    /// The start that saved the machine, if one was to.
    saving: Option<Run>,
    warm: Vec<Run>,
}

/// What is started.
struct Bench<'a> {
    settings: Settings,
    disks: Vec<PathBuf>,
    format: Option<&'static str>,
    cancel: &'a CancelToken,
}

/// Runs the command.
pub(super) fn run(options: &BenchArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    // What has to be built is built before anything is measured.
    places::boot(&telling())?;
    let settings = Settings { snapshots: None, ..places::settings(&options.machine) };
    let mut bench = Bench { settings, disks: options.disk.clone(), format: None, cancel: &cancel };
    let empty = tempfile::NamedTempFile::new()
        .and_then(|file| File::set_len(file.as_file(), DISK_SIZE).map(|()| file))
        .map_err(|error| Failure::io("making a disk", &error))?;
    if bench.disks.is_empty() {
        bench.disks.push(empty.path().to_owned());
        bench.format = Some("raw");
    }
    // The machine that commands restore stays as it is.
    let folder = tempfile::Builder::new()
        .prefix("bench-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .tempdir_in(places::appliance_cache()?)
        .map_err(|error| Failure::io("making a folder for saved machines", &error))?;
    let mut measured = bench.cold(options.runs)?;
    if options.machine.warm_start == WarmStart::Auto {
        bench.settings.snapshots = Some(folder.path().to_owned());
        bench.warm(options.runs, &mut measured)?;
    }
    if options.json {
        stdout::json(&as_json(&measured))?;
    } else {
        stdout::print(&as_text(&measured))?;
    }
    Ok(0)
}

impl Bench<'_> {
    fn cold(&self, runs: u32) -> Result<Measured, Failure> {
        let mut measured = Measured {
            backend: String::new(),
            reason: String::new(),
            cold: Vec::new(),
            saving: None,
            warm: Vec::new(),
        };
        for _ in 0..runs {
            let (run, backend, reason) = self.start()?;
            (measured.backend, measured.reason) = (backend, reason);
            measured.cold.push(run);
        }
        Ok(measured)
    }

    fn warm(&self, runs: u32, measured: &mut Measured) -> Result<(), Failure> {
        let (saving, _, _) = self.start()?;
        let saved = saving.start == Start::Saved;
        measured.saving = Some(saving);
        for _ in 0..if saved { runs } else { 0 } {
            let (run, _, _) = self.start()?;
            measured.warm.push(run);
        }
        Ok(())
    }

    fn start(&self) -> Result<(Run, String, String), Failure> {
        let mut guest = Guest::new(self.settings.clone()).with_cancel(self.cancel.clone());
        for path in &self.disks {
            guest.add_drive(disk::open(path, self.format, Use::Read, &Meter::default())?.drive)?;
        }
        let begun = Instant::now();
        let boot = places::boot(&|_| {})?;
        let check = begun.elapsed();
        guest.launch(&boot)?;
        let launched = begun.elapsed();
        guest.list_devices()?;
        let total = begun.elapsed();
        let (name, reason, times) = guest.launch_report()?;
        let mut parts = parts(check, launched, times);
        parts.push(("list of the disks".to_owned(), total.saturating_sub(launched)));
        let (start, save) = (times.start, times.save);
        let (name, reason) = (name.to_owned(), reason.to_owned());
        let begun = Instant::now();
        guest.shutdown()?;
        Ok((Run { start, parts, total, save, shutdown: begun.elapsed() }, name, reason))
    }
}

/// Splits a launch into its parts. Stages inside the machine are counted from the kernel's
/// first moment, so what came before them is what remains.
fn parts(check: Duration, launched: Duration, times: &LaunchTimes) -> Vec<(String, Duration)> {
    let LaunchTimes { start, choose, boot, save, plug, stages } = times;
    let sockets = launched.saturating_sub(check + *choose + *boot + *save + *plug);
    let mut parts = vec![
        ("image check".to_owned(), check),
        ("backend choice".to_owned(), *choose),
        ("sockets and disks".to_owned(), sockets),
    ];
    if *start == Start::Warm {
        // The stages are those of the boot that was saved.
        parts.push(("machine restored".to_owned(), *boot));
    } else {
        let inside = stages.last().map_or(Duration::ZERO, |(_, end)| *end);
        parts.push(("machine to kernel".to_owned(), boot.saturating_sub(inside)));
        let mut before = Duration::ZERO;
        for (name, end) in stages {
            parts.push((format!("in it: {name}"), end.saturating_sub(before)));
            before = *end;
        }
    }
    if !save.is_zero() {
        parts.push(("machine saved".to_owned(), *save));
    }
    if !plug.is_zero() {
        parts.push(("disks plugged in".to_owned(), *plug));
    }
    parts
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Smallest and middle value.
fn summary(mut values: Vec<Duration>) -> (Duration, Duration) {
    values.sort();
    let middle = values.get(values.len() / 2).copied().unwrap_or_default();
    (values.first().copied().unwrap_or_default(), middle)
}

/// Every row with its values of all runs.
fn rows(runs: &[Run]) -> Vec<(String, Vec<Duration>)> {
    let names = runs.first().map(|run| &run.parts).into_iter().flatten();
    let mut rows: Vec<(String, Vec<Duration>)> = names
        .map(|(name, _)| {
            let of = |run: &Run| {
                run.parts.iter().find(|(known, _)| known == name).map(|(_, time)| *time)
            };
            (name.clone(), runs.iter().filter_map(of).collect())
        })
        .collect();
    if !runs.is_empty() {
        rows.push(("start, in all".to_owned(), runs.iter().map(|run| run.total).collect()));
        rows.push(("shutdown".to_owned(), runs.iter().map(|run| run.shutdown).collect()));
    }
    rows
}

/// The rows of both in one order: those of the warm runs alone come before those that end it.
fn in_order<'a>(
    cold: &'a [(String, Vec<Duration>)],
    warm: &'a [(String, Vec<Duration>)],
) -> Vec<&'a str> {
    let mut names: Vec<&str> = cold.iter().map(|(name, _)| name.as_str()).collect();
    let mut at = 0;
    for (name, _) in warm {
        if let Some(found) = names.iter().position(|known| known == name) {
            at = found + 1;
            continue;
        }
        // What a restored machine has instead of a boot comes after the boot.
        let of_boot = |known: &&str| known.starts_with("machine") || known.starts_with("in it");
        while names.get(at).is_some_and(of_boot) {
            at += 1;
        }
        names.insert(at, name);
        at += 1;
    }
    names
}

fn as_text(measured: &Measured) -> String {
    let mut text = format!("backend: {}\nwhy: {}\n\n", measured.backend, measured.reason);
    let (cold, warm) = (rows(&measured.cold), rows(&measured.warm));
    let heads: &[&str] = if warm.is_empty() {
        &["min", "median"]
    } else {
        &["cold min", "median", "warm min", "median"]
    };
    let _ = write!(text, "{:<20}", "");
    for head in heads {
        let _ = write!(text, " {head:>10}");
    }
    text.push('\n');
    for name in in_order(&cold, &warm) {
        let mut line = format!("{name:<20}");
        let sides: &[_] = if warm.is_empty() { &[&cold] } else { &[&cold, &warm] };
        for side in sides {
            match side.iter().find(|(known, _)| known == name) {
                Some((_, values)) => {
                    let (least, middle) = summary(values.clone());
                    let (least, middle) = (milliseconds(least), milliseconds(middle));
                    let _ = write!(line, " {least:>7.1} ms {middle:>7.1} ms");
                }
                None => {
                    let _ = write!(line, " {:>10} {:>10}", "", "");
                }
            }
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    if let Some(run) = &measured.saving {
        let _ = match run.start {
            Start::Saved => {
                writeln!(text, "\nsaving the machine: {:.1} ms, once", milliseconds(run.save))
            }
            _ => writeln!(text, "\nthe machine was not saved; see why with -v"),
        };
    }
    let booted = measured.warm.iter().filter(|run| run.start != Start::Warm).count();
    if booted > 0 {
        let _ = writeln!(text, "{booted} of the warm starts booted after all; see why with -v");
    }
    text
}

fn rows_as_json(runs: &[Run]) -> Vec<Value> {
    let row = |(name, values): (String, Vec<Duration>)| {
        let all: Vec<f64> = values.iter().map(|value| milliseconds(*value)).collect();
        let (least, middle) = summary(values);
        json!({
            "name": name,
            "min_ms": milliseconds(least),
            "median_ms": milliseconds(middle),
            "all_ms": all,
        })
    };
    rows(runs).into_iter().map(row).collect()
}

fn as_json(measured: &Measured) -> Value {
    let starts = |runs: &[Run]| runs.iter().map(|run| run.start.name()).collect::<Vec<_>>();
    json!({
        "backend": measured.backend,
        "reason": measured.reason,
        "runs": measured.cold.len(),
        "rows": rows_as_json(&measured.cold),
        "save_ms": measured.saving.as_ref().filter(|run| run.start == Start::Saved)
            .map(|run| milliseconds(run.save)),
        "warm_starts": starts(&measured.warm),
        "warm_rows": rows_as_json(&measured.warm),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    fn times(start: Start) -> LaunchTimes {
        LaunchTimes {
            start,
            choose: ms(20),
            boot: ms(500),
            save: Duration::ZERO,
            plug: if start == Start::Warm { ms(10) } else { Duration::ZERO },
            stages: vec![("kernel".into(), ms(300)), ("ports".into(), ms(340))],
        }
    }

    #[test]
    fn the_parts_add_up_to_the_whole() {
        for (start, expected) in [
            (Start::Cold, vec!["machine to kernel", "in it: kernel", "in it: ports"]),
            (Start::Warm, vec!["machine restored", "disks plugged in"]),
        ] {
            let parts = parts(ms(5), ms(540), &times(start));
            let names: Vec<&str> = parts.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names[..3], ["image check", "backend choice", "sockets and disks"]);
            assert_eq!(names[3..], expected);
            assert_eq!(parts.iter().map(|(_, time)| *time).sum::<Duration>(), ms(540));
        }
    }

    fn run(start: Start, part: &str, time: u64) -> Run {
        Run {
            start,
            parts: vec![("a".into(), ms(1)), (part.into(), ms(time)), ("z".into(), ms(1))],
            total: ms(time),
            save: ms(7),
            shutdown: Duration::ZERO,
        }
    }

    #[test]
    fn tables_have_the_least_and_the_middle() {
        let cold = [30, 10, 20].map(|time| run(Start::Cold, "in it: b", time)).into();
        let mut measured = Measured {
            backend: "tcg".into(),
            reason: "as requested".into(),
            cold,
            saving: None,
            warm: Vec::new(),
        };
        let text = as_text(&measured);
        assert!(text.contains("in it: b                10.0 ms    20.0 ms\n"), "{text}");
        measured.saving = Some(run(Start::Saved, "in it: b", 9));
        measured.warm = vec![run(Start::Warm, "machine restored", 2)];
        let text = as_text(&measured);
        let empty = " ".repeat(22);
        for line in [
            "in it: b                10.0 ms    20.0 ms\n".to_owned(),
            format!("machine restored    {empty}     2.0 ms     2.0 ms\nz "),
            "start, in all           10.0 ms    20.0 ms     2.0 ms     2.0 ms\n".to_owned(),
            "saving the machine: 7.0 ms, once\n".to_owned(),
        ] {
            assert!(text.contains(&line), "{line}{text}");
        }
        assert!(!text.contains("after all"), "{text}");
        let json = as_json(&measured);
        assert_eq!(json["rows"][1]["min_ms"], 10.0);
        assert_eq!(json["rows"][3]["name"], "start, in all");
        assert_eq!((&json["save_ms"], &json["warm_starts"][0]), (&7.0.into(), &"warm".into()));
        assert_eq!(json["warm_rows"][1]["name"], "machine restored");
    }
}
