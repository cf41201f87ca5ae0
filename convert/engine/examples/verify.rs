// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Boots a guest: `verify XML SECONDS [EXPECTED-TEXT [CONSOLE-LOG [SCREENSHOT]]]`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tranship_convert::{CancelToken, Event, Reporter, VerifyOptions, verify_boot};

struct Standard;

impl Reporter for Standard {
    fn report(&self, event: &Event) {
        eprintln!("{:?} {}: {} {:?}", event.severity, event.name, event.message, event.details);
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(xml), Some(Ok(seconds))) =
        (arguments.next(), arguments.next().map(|text| text.parse()))
    else {
        eprintln!("verify XML SECONDS [EXPECTED-TEXT [CONSOLE-LOG [SCREENSHOT]]]");
        return ExitCode::from(2);
    };
    let mut optional = || arguments.next().filter(|text| !text.is_empty());
    let options = VerifyOptions {
        xml: PathBuf::from(xml),
        limit: Duration::from_secs(seconds),
        expect: optional(),
        console_log: optional().map(PathBuf::from),
        screenshot: optional().map(PathBuf::from),
        backend: tranship_appliance::Preference::Auto,
        memory_mib: None,
    };
    match verify_boot(&options, &Standard, &CancelToken::default()) {
        Ok(report) => {
            println!("{}", serde_json::to_string(&report).unwrap_or_default());
            if report.alive { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::from(2)
        }
    }
}
