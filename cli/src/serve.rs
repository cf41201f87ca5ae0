// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `serve`: disks of any format for any NBD client, with qemu-nbd's options and exit codes,
//! and nbdkit's way to run a command meanwhile.

mod activation;
mod authorization;
mod background;
mod command;
mod disk;
mod encryption;
mod guard;
mod list;
mod listening;
mod policy;
mod settings;
mod statistics;
mod watch;

use crate::args::{ServeArgs, Talk};
use crate::failure::Failure;
use crate::image::console::Console;
use crate::personality::Personality;
use crate::{logging, stdout};
use command::Running;
use disk::Opening;
use encryption::Encryption;
use listening::Serving;
use rustix::fs::FlockOperation;
use settings::Settings;
use statistics::Telling;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use tranship_block::Meter;
use watch::{Ended, Watch};

/// Does what the options ask for. The exit code of a failure is 1.
pub(crate) fn run(personality: Personality, args: &ServeArgs) -> Result<u8, Failure> {
    let outcome = if args.list { list::run(args) } else { serve(personality, args) };
    outcome.map_err(|failure| failure.exiting_with(1))
}

fn serve(personality: Personality, args: &ServeArgs) -> Result<u8, Failure> {
    if args.fork && !background::is_child() {
        return background::start(args);
    }
    // Before this program opens anything that could get these numbers.
    let inherited = activation::take()?;
    let settings = Settings::of(args, personality, !inherited.is_empty())?;
    let encryption = Encryption::of(args)?;
    logging::start(&Talk { verbose: args.verbose, trace: false });
    let telling = Telling::start(args.statistics.as_deref())?;
    let meter = Meter::new(settings.rate, args.statistics.is_some());
    let console = Console::new(personality);
    let opening = Opening { args, settings: &settings, meter: &meter, console };
    let exports =
        settings.disks.iter().map(|named| opening.open(named)).collect::<Result<Vec<_>, _>>()?;
    // From here on a signal ends the work in order.
    let mut watch = Watch::start()?;
    let serving = Serving::start(&settings, encryption, inherited, exports)?;
    let _number = args.pid_file.as_deref().map(write_number).transpose()?;
    announce(&serving)?;
    if args.fork {
        background::ready()?;
    }
    let command = match &args.run {
        Some(text) => Some(Running::start(text, &serving)?),
        None => None,
    };
    let is_persistent = args.persistent || command.is_some();
    let tell = |because: statistics::Because| telling.tell(&serving, &meter, because);
    let ended = watch.wait(&serving, is_persistent, command, &tell);
    let told = tell(statistics::Because::TheEnd);
    serving.stop()?;
    told?;
    match ended? {
        Ended::Served => Ok(0),
        Ended::Command(code) => Ok(code),
    }
}

/// Writes the number of this process to a file that stays, as qemu-nbd does. It is locked
/// until it is closed, so that it cannot become the file of another server meanwhile.
fn write_number(path: &Path) -> Result<File, Failure> {
    let failed = |what: &str, error: std::io::Error| {
        Failure::usage(format!("cannot create PID file: Cannot {what} pid file {}", path.display()))
            .because(&error)
    };
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| failed("open", error))?;
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| failed("lock", error.into()))?;
    file.set_len(0).map_err(|error| failed("truncate", error))?;
    writeln!(file, "{}", std::process::id()).map_err(|error| failed("write", error))?;
    Ok(file)
}

/// Says where clients connect, if they could not know.
fn announce(serving: &Serving) -> Result<(), Failure> {
    match serving.chosen_port() {
        Some(port) => stdout::print(&format!("{port}\n")),
        None => Ok(()),
    }
}
