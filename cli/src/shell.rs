// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `tranship shell`, also known as guestfish: commands for what is on disks.

mod devices;
mod files;
mod inspect;
mod line;
mod mounts;
mod output;
mod programs;
mod script;
mod session;
mod structs;
mod table;
mod values;

use crate::args::ShellArgs;
use crate::failure::Failure;
use crate::image::metering::Metering;
use crate::personality::Personality;
use crate::{logging, signals, stdout};
use script::{Origin, Script};
use session::Shell;
use tranship_appliance::CancelToken;
use tranship_block::Meter;
use tranship_convert::ErrorKind;

/// How a command ended the way it was meant to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// The next command follows.
    Continue,
    /// No more commands are wanted.
    Quit,
}

type Outcome = Result<Flow, Failure>;

/// Runs the command: 0, or 1 as soon as a command fails.
pub(crate) fn run(personality: Personality, options: &ShellArgs) -> Result<u8, Failure> {
    logging::start(&options.talk);
    let metering = Metering::start(&options.metering)?;
    let outcome = work(personality, options, metering.meter());
    let told = metering.finish("shell");
    outcome.and_then(|status| told.map(|()| status))
}

fn work(personality: Personality, options: &ShellArgs, meter: &Meter) -> Result<u8, Failure> {
    let script = Script::of(options)?;
    let cancel = CancelToken::default();
    signals::cancel_on_signal(cancel.clone())?;
    let mut shell = Shell::new(personality, options, &cancel, meter);
    for (path, format) in &options.drives {
        shell.add(path, format.as_deref(), options.ro)?;
    }
    if options.inspector || !options.mount.is_empty() {
        shell.launch()?;
    }
    if options.inspector {
        inspect::mount_all(&mut shell)?;
    }
    for mount in &options.mount {
        mounts::from_option(&shell, mount, options.ro)?;
    }
    let status = follow(&mut shell, script)?;
    shell.end()?;
    Ok(status)
}

/// Runs the script's commands until one fails, or for ever at a prompt.
fn follow(shell: &mut Shell, mut script: Script) -> Result<u8, Failure> {
    if script.origin() == Origin::Prompt {
        stdout::print(
            "Type: 'help' for the commands, 'quit' to leave\nDisks are opened by 'run' first\n\n",
        )?;
    }
    loop {
        let outcome = match script.next(shell.program())? {
            None => return Ok(0),
            Some(line) => shell.line(line, &mut script),
        };
        match outcome {
            Ok(Flow::Continue) => {}
            Ok(Flow::Quit) => return Ok(0),
            // What was asked to stop stops, at a prompt as well.
            Err(failure) if failure.kind() == ErrorKind::Interrupted => return Err(failure),
            Err(failure) => {
                let place = script.place();
                stdout::complain(format!("{place}{}", failure.render(shell.prefix())).trim_end());
                if script.origin() != Origin::Prompt {
                    shell.end()?;
                    return Ok(1);
                }
            }
        }
    }
}
