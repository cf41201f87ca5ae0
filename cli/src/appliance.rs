// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `tranship appliance`: looks after the small machine that opens the guests' disks.

mod bench;
mod build;
mod probe;
mod running;
mod shell;
mod transfer;

use crate::args::{ApplianceArgs, ApplianceCommand};
use crate::failure::Failure;
use crate::{places, stdout};
use std::time::Instant;
use tranship_appliance_image::Event;

/// Runs the command.
pub(crate) fn run(options: &ApplianceArgs) -> Result<u8, Failure> {
    match &options.command {
        ApplianceCommand::Probe(options) => probe::run(options),
        ApplianceCommand::Build(options) => build::run(options),
        ApplianceCommand::Bench(options) => bench::run(options),
        ApplianceCommand::Shell(options) => shell::run(options),
        ApplianceCommand::List(options) => running::list(options),
        ApplianceCommand::Dump(options) => running::dump(options),
        ApplianceCommand::Export(options) => transfer::export(options),
        ApplianceCommand::Import(options) => transfer::import(options),
    }
}

/// Tells the steps of a build on standard error, with the time since the start.
pub(crate) fn telling() -> impl Fn(Event) {
    let begun = Instant::now();
    move |event| {
        if let Some(step) = places::build_step(&event) {
            stdout::complain(&format!("[{:6.1}] {step}", begun.elapsed().as_secs_f64()));
        }
    }
}
