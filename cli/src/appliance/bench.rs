// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `appliance bench`: where the time of a start goes.

use super::telling;
use crate::args::BenchArgs;
use crate::failure::Failure;
use crate::{logging, places, signals, stdout};
use serde_json::{Value, json};
use std::fmt::Write;
use std::time::{Duration, Instant};
use tranship_appliance::{CancelToken, Guest, LaunchTimes};

/// One start: the parts that it consists of, in order; they add up to the whole.
struct Run {
    parts: Vec<(String, Duration)>,
    total: Duration,
    shutdown: Duration,
}

/// Runs the command.
pub(super) fn run(options: &BenchArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    // What has to be built is built before anything is measured.
    places::boot(&telling())?;
    let mut runs = Vec::new();
    let mut backend = (String::new(), String::new());
    for _ in 0..options.runs {
        let (run, name, reason) = measure(options, &cancel)?;
        backend = (name, reason);
        runs.push(run);
    }
    if options.json {
        stdout::json(&as_json(&backend, &runs))?;
    } else {
        stdout::print(&as_text(&backend, &runs))?;
    }
    Ok(0)
}

fn measure(options: &BenchArgs, cancel: &CancelToken) -> Result<(Run, String, String), Failure> {
    let begun = Instant::now();
    let boot = places::boot(&|_| {})?;
    let check = begun.elapsed();
    let mut guest = Guest::new(places::settings(&options.machine)).with_cancel(cancel.clone());
    guest.launch(&boot)?;
    let total = begun.elapsed();
    let (name, reason, times) = guest.launch_report()?;
    let parts = parts(check, total, times);
    let (name, reason) = (name.to_owned(), reason.to_owned());
    let begun = Instant::now();
    guest.shutdown()?;
    Ok((Run { parts, total, shutdown: begun.elapsed() }, name, reason))
}

/// Splits a start into its parts. Stages inside the machine are counted from the kernel's
/// first moment, so what came before them is what remains.
fn parts(check: Duration, total: Duration, times: &LaunchTimes) -> Vec<(String, Duration)> {
    let inside = times.stages.last().map_or(Duration::ZERO, |(_, end)| *end);
    let sockets = total.saturating_sub(check + times.choose + times.boot);
    let mut parts = vec![
        ("image check".to_owned(), check),
        ("backend choice".to_owned(), times.choose),
        ("sockets and disks".to_owned(), sockets),
        ("machine to kernel".to_owned(), times.boot.saturating_sub(inside)),
    ];
    let mut before = Duration::ZERO;
    for (name, end) in &times.stages {
        parts.push((format!("in it: {name}"), end.saturating_sub(before)));
        before = *end;
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
    rows.push(("start, in all".to_owned(), runs.iter().map(|run| run.total).collect()));
    rows.push(("shutdown".to_owned(), runs.iter().map(|run| run.shutdown).collect()));
    rows
}

fn as_text((name, reason): &(String, String), runs: &[Run]) -> String {
    let mut text = format!("backend: {name}\nwhy: {reason}\n\n");
    let median = "median";
    let _ = writeln!(text, "{:<20} {:>10} {median:>10}", "", "min");
    for (row, values) in rows(runs) {
        let (least, middle) = summary(values);
        let (least, middle) = (milliseconds(least), milliseconds(middle));
        let _ = writeln!(text, "{row:<20} {least:>7.1} ms {middle:>7.1} ms");
    }
    text
}

fn as_json((name, reason): &(String, String), runs: &[Run]) -> Value {
    let rows: Vec<Value> = rows(runs)
        .into_iter()
        .map(|(row, values)| {
            let all: Vec<f64> = values.iter().map(|value| milliseconds(*value)).collect();
            let (least, middle) = summary(values);
            json!({
                "name": row,
                "min_ms": milliseconds(least),
                "median_ms": milliseconds(middle),
                "all_ms": all,
            })
        })
        .collect();
    json!({ "backend": name, "reason": reason, "runs": runs.len(), "rows": rows })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times() -> LaunchTimes {
        let ms = Duration::from_millis;
        LaunchTimes {
            start: tranship_appliance::Start::Cold,
            save: ms(0),
            plug: ms(0),
            choose: ms(20),
            boot: ms(500),
            stages: vec![("kernel".into(), ms(300)), ("ports".into(), ms(340))],
        }
    }

    #[test]
    fn the_parts_add_up_to_the_whole() {
        let total = Duration::from_millis(540);
        let parts = parts(Duration::from_millis(5), total, &times());
        let names: Vec<&str> = parts.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "image check",
                "backend choice",
                "sockets and disks",
                "machine to kernel",
                "in it: kernel",
                "in it: ports"
            ]
        );
        assert_eq!(parts.iter().map(|(_, time)| *time).sum::<Duration>(), total);
    }

    #[test]
    fn tables_have_the_least_and_the_middle() {
        let run = |ms: u64| Run {
            parts: vec![("a".into(), Duration::from_millis(ms))],
            total: Duration::from_millis(ms),
            shutdown: Duration::ZERO,
        };
        let runs = [run(30), run(10), run(20)];
        let text = as_text(&("tcg".into(), "as requested".into()), &runs);
        assert!(text.contains("a                       10.0 ms    20.0 ms\n"), "{text}");
        let json = as_json(&("tcg".into(), String::new()), &runs);
        assert_eq!(json["rows"][0]["min_ms"], 10.0);
        assert_eq!(json["rows"][1]["name"], "start, in all");
    }
}
