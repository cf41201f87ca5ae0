// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `image`: what qemu-img does, with its texts, JSON and exit codes.
//!
//! A module is a command; what several of them need has modules of its own: [`sizes`],
//! lists of [`options`], [`secrets`], opening a [`source`], [`json`], and the [`console`].

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compact;
mod compare;
pub(crate) mod console;
mod convert;
pub(crate) mod create;
mod dd;
mod info;
mod json;
mod map;
mod measure;
pub(crate) mod metering;
pub(crate) mod options;
mod pieces;
mod rebase;
mod resize;
pub(crate) mod secrets;
pub(crate) mod sizes;
mod snapshot;
pub(crate) mod source;
mod verify;

use crate::args::image::ImageCommand;
use crate::args::{ImageArgs, MeteringArgs};
use crate::failure::Failure;
use crate::personality::Personality;
use console::Console;
use metering::Metering;
use tranship_formats::Format;

/// Does what the options ask for. Without another one, the exit code of a failure is 1.
pub(crate) fn run(personality: Personality, args: &ImageArgs) -> Result<u8, Failure> {
    let console = Console::new(personality);
    let (name, wanted) = args.command.metering().unzip();
    // Where 1 is a result, it cannot be a mistake in the options.
    let is_result = matches!(args.command, ImageCommand::Compare(_) | ImageCommand::Verify(_));
    let wrong = |failure: Failure| failure.exiting_with(if is_result { 2 } else { 1 });
    let metering = Metering::start(wanted.unwrap_or(&MeteringArgs::default())).map_err(wrong)?;
    let outcome = match &args.command {
        ImageCommand::Amend(args) => amend::run(args, console),
        ImageCommand::Bench(args) => bench::run(args, console, &metering),
        ImageCommand::Bitmap(args) => bitmap::run(args, console),
        ImageCommand::Check(args) => check::run(args, console, &metering),
        ImageCommand::Commit(args) => commit::run(args, console, &metering),
        ImageCommand::Compact(args) => compact::run(args, console, &metering),
        ImageCommand::Compare(args) => compare::run(args, console, &metering),
        ImageCommand::Convert(args) => convert::run(args, console, &metering),
        ImageCommand::Create(args) => create::run(args, console),
        ImageCommand::Dd(args) => dd::run(args, console, &metering),
        ImageCommand::Info(args) => info::run(args, console),
        ImageCommand::Map(args) => map::run(args, console, &metering),
        ImageCommand::Measure(args) => measure::run(args, console, &metering),
        ImageCommand::Rebase(args) => rebase::run(args, console, &metering),
        ImageCommand::Resize(args) => resize::run(args, console),
        ImageCommand::Snapshot(args) => snapshot::run(args, console),
        ImageCommand::Verify(args) => verify::run(args, console, &metering),
    };
    let told = metering.finish(name.unwrap_or_default()).map_err(wrong);
    outcome.map_err(|failure| failure.exiting_with(1)).and_then(|code| told.map(|()| code))
}

/// Names of the formats that can be opened, sorted.
pub(crate) fn format_names() -> Vec<&'static str> {
    let mut names: Vec<&str> = [
        Format::Raw,
        Format::Qcow2,
        Format::Vmdk,
        Format::Vpc,
        Format::Vhdx,
        Format::Vdi,
        Format::Qed,
        Format::Parallels,
        Format::Dmg,
        Format::Luks,
    ]
    .into_iter()
    .filter(|format| format.is_supported())
    .map(Format::name)
    .collect();
    names.sort_unstable();
    names
}
