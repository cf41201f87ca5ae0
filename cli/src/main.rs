// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Brings any guest home to KVM.
//!
//! This is the only crate that parses arguments, prints and exits. Which command runs is
//! decided by the first argument, or by the name of the link through which the program
//! was called.

mod appliance;
mod args;
mod convert;
mod copy;
mod disk;
mod engine;
mod failure;
mod generate;
mod image;
mod logging;
mod nbd;
mod personality;
mod places;
mod report;
mod serve;
mod shell;
mod signals;
mod source_text;
mod stdout;
mod tls;
mod verify_boot;

use args::Command;
use failure::Failure;
use personality::Personality;
use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

fn main() -> ExitCode {
    // The same file is /init of the appliance.
    if tranship_agent::is_appliance() {
        tranship_agent::run()
    }
    let words: Vec<OsString> = std::env::args_os().collect();
    // And it is the machine that the appliance runs in.
    if words.first().is_some_and(|name| name == tranship_appliance::MACHINE_NAME) {
        return machine(words.get(1).map(AsRef::as_ref));
    }
    let personality = Personality::of(words.first());
    match run(personality, words) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.print(personality);
            ExitCode::from(match (personality, failure.exit_code()) {
                (_, code @ (130 | 143)) => code,
                // guestfish knows no other.
                (Personality::Guestfish, _) => 1,
                (_, code) => code,
            })
        }
    }
}

/// Runs the appliance's machine; what it says last is kept with the machine's console.
fn machine(order: Option<&OsStr>) -> ExitCode {
    let (code, last) = match tranship_appliance::run_machine(order) {
        Ok(ending) => (ExitCode::SUCCESS, ending),
        Err(error) => {
            let causes = std::iter::successors(error.source(), |cause| Error::source(*cause));
            let said = causes.fold(error.to_string(), |said, cause| format!("{said}: {cause}"));
            (ExitCode::FAILURE, said)
        }
    };
    stdout::complain(&format!("{}: {last}", tranship_appliance::MACHINE_NAME));
    code
}

/// Runs what the words ask for; the exit code of whatever ended as it should.
fn run(personality: Personality, words: Vec<OsString>) -> Result<u8, Failure> {
    let command = match personality {
        Personality::NotYet(name) => return Err(personality::not_yet(name)),
        _ => match args::parse(personality, words)? {
            args::Parsed::Command(command) => command,
            args::Parsed::Text(text) => {
                stdout::print(&text)?;
                return Ok(0);
            }
        },
    };
    match command {
        Command::Convert(options) => convert::run(personality, &options),
        Command::VerifyBoot(options) => verify_boot::run(&options),
        Command::Shell(options) => shell::run(personality, &options),
        Command::Appliance(options) => appliance::run(&options),
        Command::Image(options) => image::run(personality, &options),
        Command::Serve(options) => serve::run(personality, &options),
        Command::Nbd(options) => nbd::run(personality, &options),
        Command::Copy(options) => copy::run(personality, &options),
        Command::Completions { shell } => generate::completions(shell),
        Command::Man { folder } => generate::man(folder.as_deref()),
    }
}
