// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `tranship verify-boot`: starts a converted guest and sees whether it comes up.

use crate::args::VerifyBootArgs;
use crate::engine::VerifyOptions;
use crate::failure::Failure;
use crate::personality::Personality;
use crate::report::{Reports, Wishes};
use crate::{engine, logging, signals, stdout};
use std::path::{Path, PathBuf};
use tranship_appliance::CancelToken;
use tranship_convert::{ErrorKind, Reporter};

/// Runs the command.
pub(crate) fn run(options: &VerifyBootArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let reports = Reports::open(Wishes {
        personality: Personality::Tranship,
        machine_readable: options.machine_readable.as_ref(),
        quiet: options.quiet,
        colors: false,
        json: options.json,
    })?;
    let outcome = work(options, &reports);
    reports.finish(outcome)
}

fn work(options: &VerifyBootArgs, reports: &dyn Reporter) -> Result<(), Failure> {
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let what = VerifyOptions {
        xml: options.xml.clone(),
        limit: options.within,
        expect: options.expect.clone(),
        console_log: Some(given_or_beside(
            options.console_log.as_ref(),
            &options.xml,
            "console.log",
        )),
        screenshot: Some(given_or_beside(options.screenshot.as_ref(), &options.xml, "screen.png")),
        backend: options.backend.unwrap_or_default(),
        memory_mib: options.memsize,
    };
    let report = engine::verify_boot(&what, reports, &cancel)?;
    if options.json {
        stdout::json(&report)?;
    } else {
        let state = if report.alive { "alive" } else { "not alive" };
        let seconds = report.elapsed.as_secs_f64();
        stdout::print(&format!("{state} after {seconds:.1} s: {}\n", report.sign))?;
    }
    if report.alive {
        return Ok(());
    }
    Err(Failure::new(ErrorKind::Conversion, format!("the guest did not come up: {}", report.sign))
        .hint("look at the console log and the screenshot, or give it more time with --within"))
}

/// The file that the user named, or `NAME-SUFFIX` beside `NAME.xml`.
fn given_or_beside(given: Option<&PathBuf>, xml: &Path, suffix: &str) -> PathBuf {
    given.cloned().unwrap_or_else(|| {
        let mut name = xml.file_stem().unwrap_or_default().to_os_string();
        name.push("-");
        name.push(suffix);
        xml.with_file_name(name)
    })
}
