// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Events as JSON, one object a line: docs/events.md.

use super::counts_steps;
use crate::failure::Failure;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fmt;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tranship_convert::{Event, Severity};

/// Time between two events about the progress of one disk. The event that a disk is done
/// comes without delay, so that there are at most two a second.
const STEP: Duration = Duration::from_secs(1);

/// Writes events; the number of every line is one more than that of the line before.
pub(super) struct Events {
    state: Mutex<State>,
}

struct State {
    out: Box<dyn Write + Send>,
    seq: u64,
    guest: Option<String>,
    /// When progress was last written, by event and disk.
    written: HashMap<(&'static str, Option<usize>), (Instant, bool)>,
    finished: bool,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    pub(super) fn new(out: Box<dyn Write + Send>) -> Self {
        let (written, guest) = (HashMap::new(), None);
        Self { state: Mutex::new(State { out, seq: 0, guest, written, finished: false }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn report(&self, event: &Event) {
        let mut state = self.state();
        if state.finished || !state.is_due(event, Instant::now()) {
            return;
        }
        let kind = match event.severity {
            Severity::Message => "message",
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        let mut details = Map::new();
        for (key, value) in &event.details {
            if *key == "guest" {
                state.guest = Some(value.clone());
            } else {
                details.insert((*key).to_owned(), json!(value));
            }
        }
        let mut more = Map::new();
        if let Some(disk) = event.disk {
            more.insert("disk".to_owned(), json!(disk));
        }
        if let Some((done, total)) = event.progress {
            more.insert("done".to_owned(), json!(done));
            more.insert("total".to_owned(), json!(total));
        }
        if !details.is_empty() {
            more.insert("details".to_owned(), Value::Object(details));
        }
        state.write(kind, event.name, &event.message, more);
    }

    /// The last event.
    pub(super) fn finished(&self, failure: Option<&Failure>) {
        let mut state = self.state();
        let mut more = Map::new();
        let code = failure.map_or(0, Failure::exit_code);
        more.insert("exit_code".to_owned(), json!(code));
        if let Some(failure) = failure {
            let blockers: Vec<Value> = failure
                .blockers()
                .iter()
                .map(|(code, what, remedy)| json!({"code": code, "what": what, "remedy": remedy}))
                .collect();
            more.insert("causes".to_owned(), json!(failure.causes()));
            more.insert("hints".to_owned(), json!(failure.hints()));
            more.insert("blockers".to_owned(), json!(blockers));
        }
        let (kind, message) =
            failure.map_or(("message", "finished"), |failure| ("error", failure.message()));
        state.write(kind, "run.finished", message, more);
        state.finished = true;
    }
}

impl State {
    /// Whether an event is to be written, or is progress that comes too soon.
    fn is_due(&mut self, event: &Event, now: Instant) -> bool {
        let Some((done, total)) = event.progress.filter(|_| !counts_steps(event)) else {
            return true;
        };
        let complete = done >= total;
        let key = (event.name, event.disk);
        let due = self.written.get(&key).is_none_or(|(last, was_complete)| {
            (complete && !was_complete) || now.saturating_duration_since(*last) >= STEP
        });
        if due {
            self.written.insert(key, (now, complete));
        }
        due
    }

    fn write(&mut self, kind: &str, event: &str, message: &str, more: Map<String, Value>) {
        self.seq += 1;
        let mut object = Map::new();
        object.insert("v".to_owned(), json!(1));
        object.insert("seq".to_owned(), json!(self.seq));
        object.insert("timestamp".to_owned(), json!(format!("{:.3}", jiff::Timestamp::now())));
        object.insert("type".to_owned(), json!(kind));
        object.insert("event".to_owned(), json!(event));
        object.insert("message".to_owned(), json!(message));
        if let Some(guest) = &self.guest {
            object.insert("guest".to_owned(), json!(guest));
        }
        object.extend(more);
        let mut line = Value::Object(object).to_string();
        line.push('\n');
        // Nobody may be listening any more; the work goes on.
        let _ = self.out.write_all(line.as_bytes()).and_then(|()| self.out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tranship_convert::ErrorKind;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn written(report: impl Fn(&Events)) -> Vec<Value> {
        let kept = Kept::default();
        report(&Events::new(Box::new(kept.clone())));
        let bytes = kept.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn sample(events: &Events) {
        events.report(&Event::step("source.read", "Opening the source").with("guest", "web01"));
        events.report(&Event::warning("source.odd", "odd").with("file", "a.ovf"));
        events.report(&Event::step("copy.progress", "Copying disk 1/1").of_disk(0).at(1, 9));
        let failure = Failure::new(ErrorKind::Transient, "no space").hint("tidy up");
        events.finished(Some(&failure));
        events.report(&Event::info("late", "after the end"));
    }

    #[test]
    fn numbers_have_no_gaps_and_the_end_is_last() {
        let lines = written(sample);
        let numbers: Vec<u64> = lines.iter().map(|line| line["seq"].as_u64().unwrap()).collect();
        assert_eq!(numbers, [1, 2, 3, 4]);
        let last = lines.last().unwrap();
        assert_eq!(last["event"], "run.finished");
        assert_eq!((last["exit_code"].as_u64(), last["type"].as_str()), (Some(75), Some("error")));
        assert!(lines.iter().all(|line| line["guest"] == "web01"));
        assert_eq!(lines[1]["details"]["file"], "a.ovf");
    }

    #[test]
    fn progress_comes_at_most_twice_a_second_and_numbers_stay_whole() {
        let lines = written(|events| {
            for disk in 0..2 {
                for done in 0..=100 {
                    events.report(&Event::step("copy.progress", "x").of_disk(disk).at(done, 100));
                }
                events.report(&Event::step("copy.progress", "x").of_disk(disk).at(100, 100));
            }
        });
        // The first and the last of each disk; the loops take far less than a second.
        let seen: Vec<(u64, u64)> = lines
            .iter()
            .map(|line| (line["disk"].as_u64().unwrap(), line["done"].as_u64().unwrap()))
            .collect();
        assert_eq!(seen, [(0, 0), (0, 100), (1, 0), (1, 100)]);
        assert_eq!(lines.last().unwrap()["seq"], 4);
    }

    #[test]
    fn no_step_is_left_out() {
        let lines = written(|events| {
            for done in 1..=12 {
                events.report(&Event::step("convert.step", "edit").at(done, 12));
            }
        });
        assert_eq!(lines.len(), 12);
    }

    #[test]
    fn every_line_fits_the_schema() {
        let schema: Value =
            serde_json::from_str(include_str!("../../../docs/schema/events.schema.json")).unwrap();
        let lines = written(sample);
        assert_eq!(lines.len(), 4);
        for line in &lines {
            let mut wrong = Vec::new();
            check(&schema, line, "", &mut wrong);
            assert!(wrong.is_empty(), "{line}: {wrong:?}");
        }
        // The check can fail.
        for (key, value) in [("seq", json!(0)), ("type", json!("x")), ("timestamp", json!("now"))] {
            let mut bad = lines[0].clone();
            bad[key] = value;
            let mut wrong = Vec::new();
            check(&schema, &bad, "", &mut wrong);
            assert_eq!(wrong.len(), 1, "{key}: {wrong:?}");
        }
        let mut wrong = Vec::new();
        check(&schema, &json!({}), "", &mut wrong);
        assert_eq!(wrong.len(), 6, "{wrong:?}");
    }

    /// The part of JSON Schema that our schema uses; any other keyword is an error.
    fn check(schema: &Value, value: &Value, at: &str, wrong: &mut Vec<String>) {
        for (keyword, rule) in schema.as_object().unwrap() {
            let holds = match keyword.as_str() {
                "$schema" | "$id" | "title" | "description" | "properties" | "items" => true,
                "type" => match rule.as_str().unwrap() {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "integer" => value.is_i64() || value.is_u64(),
                    other => panic!("type {other}"),
                },
                "const" => value == rule,
                "enum" => rule.as_array().unwrap().contains(value),
                "minimum" => value.as_i64() >= rule.as_i64(),
                "maximum" => value.as_i64() <= rule.as_i64(),
                "format" => {
                    assert_eq!(rule, "date-time");
                    value.as_str().unwrap().parse::<jiff::Timestamp>().is_ok()
                }
                "required" => {
                    for name in rule.as_array().unwrap() {
                        if value.get(name.as_str().unwrap()).is_none() {
                            wrong.push(format!("{at}: {name} is missing"));
                        }
                    }
                    true
                }
                "additionalProperties" => match rule {
                    Value::Bool(allowed) => *allowed,
                    rule => {
                        for (name, inner) in value.as_object().unwrap() {
                            check(rule, inner, &format!("{at}/{name}"), wrong);
                        }
                        true
                    }
                },
                other => panic!("keyword {other}"),
            };
            if !holds {
                wrong.push(format!("{at}: {keyword} {rule}"));
            }
        }
        if let Some(rules) = schema.get("properties").and_then(Value::as_object) {
            for (name, rule) in rules {
                if let Some(inner) = value.get(name) {
                    check(rule, inner, &format!("{at}/{name}"), wrong);
                }
            }
        }
        if let (Some(rule), Some(items)) = (schema.get("items"), value.as_array()) {
            for item in items {
                check(rule, item, &format!("{at}[]"), wrong);
            }
        }
    }
}
