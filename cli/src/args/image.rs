// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The commands of `image`, which are qemu-img's, also by name.
//!
//! Values stay text here: what they mean is decided where they are used, so that both names
//! of the program report a wrong one in qemu-img's words.

mod change;
mod copy;
pub(super) mod getopt;
mod look;

pub(crate) use change::{
    AmendArgs, BitmapAction, BitmapArgs, CreateArgs, ResizeArgs, SnapshotArgs,
};
pub(crate) use copy::VerifyArgs;
pub(crate) use copy::{BenchArgs, CommitArgs, CompactArgs, ConvertArgs, DdArgs, RebaseArgs};
pub(crate) use look::{CheckArgs, CompareArgs, InfoArgs, MapArgs, MeasureArgs};

use super::{Command, MeteringArgs, Parsed};
use crate::failure::Failure;
use crate::personality::Personality;
use clap::error::ErrorKind as ClapKind;
use clap::{Args, FromArgMatches, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// Options of `image`.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    /// What is to be done.
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

/// What is to be done with images.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Change what an image was created with
    Amend(AmendArgs),
    /// Measure how fast an image is read or written
    Bench(BenchArgs),
    /// Change the persistent bitmaps of an image
    Bitmap(BitmapArgs),
    /// Look for contradictions in an image, and mend them
    Check(CheckArgs),
    /// Write what an image holds into the image that it is based on
    Commit(CommitArgs),
    /// Give back the space that an image does not need
    Compact(CompactArgs),
    /// Compare what the guests of two images see
    Compare(CompareArgs),
    /// Copy images to a new one of any format
    Convert(Box<ConvertArgs>),
    /// Create an empty image
    Create(CreateArgs),
    /// Copy parts of an image, with dd's operands
    Dd(DdArgs),
    /// Show what an image is
    Info(InfoArgs),
    /// Show where an image keeps its data
    Map(MapArgs),
    /// Calculate how much space an image will take
    Measure(MeasureArgs),
    /// Base an image on another one
    Rebase(RebaseArgs),
    /// Make an image larger or smaller
    Resize(ResizeArgs),
    /// List, make, apply or delete the snapshots in an image
    Snapshot(SnapshotArgs),
    /// Compare an image with the hashes that were written when it was copied
    Verify(VerifyArgs),
}

impl ImageCommand {
    /// Its name, and what it is to tell about its disks; none if it moves no data.
    pub(crate) fn metering(&self) -> Option<(&'static str, &MeteringArgs)> {
        match self {
            Self::Bench(args) => Some(("bench", &args.metering)),
            Self::Check(args) => Some(("check", &args.metering)),
            Self::Commit(args) => Some(("commit", &args.metering)),
            Self::Compact(args) => Some(("compact", &args.metering)),
            Self::Compare(args) => Some(("compare", &args.metering)),
            Self::Convert(args) => Some(("convert", &args.metering)),
            Self::Dd(args) => Some(("dd", &args.metering)),
            Self::Map(args) => Some(("map", &args.metering)),
            Self::Measure(args) => Some(("measure", &args.metering)),
            Self::Rebase(args) => Some(("rebase", &args.metering)),
            Self::Verify(args) => Some(("verify", &args.metering)),
            Self::Amend(_)
            | Self::Bitmap(_)
            | Self::Create(_)
            | Self::Info(_)
            | Self::Resize(_)
            | Self::Snapshot(_) => None,
        }
    }
}

/// How images are named, for all images of a command.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Naming {
    /// Take FILENAME for options such as driver=qcow2,file.filename=NAME
    #[arg(long)]
    pub(crate) image_opts: bool,
    /// What options refer to: secret,id=ID,data=TEXT or secret,id=ID,file=FILE. Can be repeated
    #[arg(long, value_name = "OBJDEF", allow_hyphen_values = true)]
    pub(crate) object: Vec<String>,
    /// Let images open what lies below this folder: data files, extents, anything that is
    /// not simply a parent; or let them be based on the export with this URI. Can be repeated
    #[arg(long, value_name = "DIR|URI")]
    pub(crate) allow_path: Vec<PathBuf>,
}

/// How images are read.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct Reading {
    /// Open the image although others may write to it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// Read what is there of a damaged image, and zeroes for the rest
    #[arg(long)]
    pub(crate) salvage: bool,
}

/// The format of the only image.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct FormatArgs {
    /// Format of the image; without it the image is looked at
    #[arg(short, long, value_name = "FMT", allow_hyphen_values = true)]
    pub(crate) format: Option<String>,
}

/// How results are printed.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct OutputArgs {
    /// How the result is printed: human or json
    #[arg(long, value_name = "FORMAT", allow_hyphen_values = true)]
    pub(crate) output: Option<String>,
}

/// Gives `image` what all its commands have in common.
pub(super) fn describe(definition: clap::Command) -> clap::Command {
    // qemu-img has a short name for the rate where it has a rate.
    let with_rate = |command: clap::Command| {
        command.mut_arg("limit_rate", |rate| rate.short('r').visible_alias("rate"))
    };
    definition
        .mut_subcommand("convert", with_rate)
        .mut_subcommand("commit", with_rate)
        .infer_long_args(true)
        .args_override_self(true)
        .subcommand_required(true)
        .arg_required_else_help(true)
}

/// The definition for the name `qemu-img`.
fn as_qemu_img(name: &'static str) -> clap::Command {
    let definition = describe(ImageArgs::augment_args(super::named(name)));
    super::link(definition)
        .arg_required_else_help(false)
        // The second line of the version is what people read, the first what scripts read.
        .version(concat!("version 10.0.2 (tranship ", env!("CARGO_PKG_VERSION"), ")"))
        .after_help(format!("Supported image formats: {}", super::format_names()))
}

/// Parses what follows the name `qemu-img`.
pub(super) fn parse(rest: Vec<OsString>) -> Result<Parsed, Failure> {
    let name = Personality::QemuImg.program();
    let command = getopt::command(name, &rest).map_err(|failure| failure.exiting_with(1))?;
    let rest = getopt::translate(&command, rest);
    let words = std::iter::once(OsString::from(name)).chain(rest.iter().cloned());
    let args =
        as_qemu_img(name).try_get_matches_from(words).and_then(|matches| from_matches(&matches));
    match args {
        Ok(args) => Ok(Parsed::Command(Command::Image(Box::new(args)))),
        Err(error) => match error.kind() {
            ClapKind::DisplayHelp | ClapKind::DisplayVersion => {
                Ok(Parsed::Text(error.render().to_string()))
            }
            _ => Err(getopt::failure(name, &rest, &error).exiting_with(1)),
        },
    }
}

/// Replaces words of `tranship image` that getopt and clap see differently.
pub(super) fn translate(rest: Vec<OsString>) -> Vec<OsString> {
    let command = rest.first().and_then(|word| word.to_str()).unwrap_or_default().to_owned();
    getopt::translate(&command, rest)
}

/// The options with what the order of words says.
pub(super) fn from_matches(matches: &clap::ArgMatches) -> Result<ImageArgs, clap::Error> {
    let mut args = ImageArgs::from_arg_matches(matches)?;
    if let (ImageCommand::Bitmap(bitmap), Some((_, matches))) =
        (&mut args.command, matches.subcommand())
    {
        bitmap.order(matches);
    }
    Ok(args)
}
