// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `tranship convert`, also known as virt-v2v.

use crate::args::ConvertArgs;
use crate::failure::Failure;
use crate::image::metering::Metering;
use crate::personality::Personality;
use crate::report::{Reports, Wishes};
use crate::{engine, logging, signals, source_text, stdout};
use tranship_appliance::CancelToken;
use tranship_block::Meter;
use tranship_convert::{Event, Reporter, Request};

/// What tools that call virt-v2v ask for before they rely on it; only what is true.
const CAPABILITIES: &[&str] = &[
    "virt-v2v",
    "virt-v2v-2.0",
    "tranship",
    "colours-option",
    "mac-option",
    "input:disk",
    "input:ova",
    "input:vmx",
    "output:disk",
    "output:local",
    "convert:linux",
];

/// Runs the command.
pub(crate) fn run(personality: Personality, options: &ConvertArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    if options.asks_for_capabilities() {
        stdout::print(&(CAPABILITIES.join("\n") + "\n"))?;
        return Ok(0);
    }
    let reports = Reports::open(Wishes {
        personality,
        machine_readable: options.machine_readable.as_ref(),
        quiet: options.quiet,
        colors: options.colors,
        json: options.json,
    })?;
    let outcome = work(personality, options, &reports);
    reports.finish(outcome)
}

fn work(
    personality: Personality,
    options: &ConvertArgs,
    reports: &dyn Reporter,
) -> Result<(), Failure> {
    if options.print_source {
        let source = engine::read_source(&options.input(personality)?)?;
        for warning in &source.warnings {
            reports.report(&Event::warning("source.warning", warning));
        }
        return if options.json {
            stdout::json(&source)
        } else {
            stdout::print(&source_text::render(&source))
        };
    }
    let metering = Metering::start(&options.metering)?;
    let outcome = convert(personality, options, reports, metering.meter());
    let told = metering.finish("convert");
    outcome.and(told)
}

fn convert(
    personality: Personality,
    options: &ConvertArgs,
    reports: &dyn Reporter,
    meter: &Meter,
) -> Result<(), Failure> {
    let request = Request { meter: meter.clone(), ..options.request(personality)? };
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    if options.dry_run {
        let plan = engine::dry_run(&request, reports, &cancel)?;
        if options.json {
            stdout::json(&plan)?;
        } else {
            stdout::print(&plan.render())?;
        }
        if plan.blockers.is_empty() {
            return Ok(());
        }
        return Err(tranship_convert::Error::blocked(plan.blockers).into());
    }
    let report = engine::convert(&request, reports, &cancel).map_err(|error| {
        let failure = Failure::from(error);
        match (options.talk.verbose && options.talk.trace, failure.exit_code()) {
            // What went wrong inside shows in the log alone.
            (false, 1) => failure.hint("run it again with -v -x to see what was done"),
            _ => failure,
        }
    })?;
    if options.json {
        return stdout::json(&report);
    }
    match personality {
        // virt-v2v's last line says that it finished, and no more.
        Personality::VirtV2v => Ok(()),
        _ => stdout::print(&format!("{}\n", report.xml.display())),
    }
}
