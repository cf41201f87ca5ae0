// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `appliance probe`: what can run the appliance here.

use crate::args::ProbeArgs;
use crate::failure::Failure;
use crate::{logging, places, stdout};
use serde_json::{Value, json};
use std::fmt::Write;
use tranship_appliance::{Choice, choose};
use tranship_convert::ErrorKind;

/// Runs the command: 0 if something can run it, 3 if nothing can.
pub(super) fn run(options: &ProbeArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let choice = choose(options.backend.unwrap_or_default(), places::monitor().as_deref());
    if options.json {
        stdout::json(&as_json(&choice))?;
    } else {
        stdout::print(&as_text(&choice))?;
    }
    Ok(if choice.backend.is_some() { 0 } else { ErrorKind::Blocked.exit_code() })
}

fn backend_name(choice: &Choice) -> Option<&'static str> {
    choice.backend.as_ref().map(|backend| backend.name())
}

fn as_text(choice: &Choice) -> String {
    let name = backend_name(choice).unwrap_or("none");
    let mut text = format!("backend: {name}\nwhy: {}\n", choice.reason);
    if !choice.remedy.is_empty() {
        let _ = writeln!(text, "hint: {}", choice.remedy);
    }
    text
}

fn as_json(choice: &Choice) -> Value {
    let kvm = choice.verdict.as_ref().map(|verdict| {
        let steps: Vec<Value> = verdict
            .steps
            .iter()
            .map(|(name, after)| json!({"step": name, "after_ms": after.as_secs_f64() * 1e3}))
            .collect();
        json!({
            "usable": verdict.usable,
            "reason": verdict.reason,
            "elapsed_ms": verdict.elapsed.as_secs_f64() * 1e3,
            "steps": steps,
        })
    });
    json!({
        "backend": backend_name(choice),
        "reason": choice.reason,
        "remedy": choice.remedy,
        "kvm": kvm,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_backend_there_is_a_hint() {
        let choice = Choice {
            backend: None,
            reason: "nothing is installed".into(),
            remedy: "install something".into(),
            verdict: None,
        };
        assert_eq!(
            as_text(&choice),
            "backend: none\nwhy: nothing is installed\nhint: install something\n"
        );
        assert_eq!(as_json(&choice)["backend"], Value::Null);
        assert_eq!(as_json(&choice)["remedy"], "install something");
    }
}
