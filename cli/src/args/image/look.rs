// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of the commands that only look at images.

use super::{FormatArgs, MeteringArgs, Naming, OutputArgs, Reading};
use clap::Args;
use std::ffi::OsString;

/// Options of `info`.
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    #[command(flatten)]
    pub(crate) reading: Reading,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Show the images that it is based on as well
    #[arg(short, long)]
    pub(crate) backing_chain: bool,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// Options of `check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// Open the image although others may write to it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// What is mended: leaks (space that nobody uses is given back) or all
    #[arg(short, long, value_name = "WHAT", allow_hyphen_values = true)]
    pub(crate) repair: Option<String>,
    /// How the image is cached: none, writeback, unsafe, directsync or writethrough
    #[arg(short = 'T', long, value_name = "MODE", allow_hyphen_values = true)]
    pub(crate) cache: Option<String>,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// Options of `compare`.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// Format of the first image; without it the image is looked at
    #[arg(short = 'f', long, value_name = "FMT", allow_hyphen_values = true)]
    pub(crate) a_format: Option<String>,
    /// Format of the second image; without it the image is looked at
    #[arg(short = 'F', long, value_name = "FMT", allow_hyphen_values = true)]
    pub(crate) b_format: Option<String>,
    #[command(flatten)]
    pub(crate) naming: Naming,
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// Take images of different sizes for different, even if the rest is zero
    #[arg(short, long)]
    pub(crate) strict: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print how far it is
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// How the images are cached: none, writeback, unsafe, directsync or writethrough
    #[arg(short = 'T', long, value_name = "MODE", allow_hyphen_values = true)]
    pub(crate) cache: Option<String>,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The two images
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// Options of `map`.
#[derive(Debug, Args)]
pub(crate) struct MapArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    #[command(flatten)]
    pub(crate) reading: Reading,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Start at this byte of the disk
    #[arg(short, long, value_name = "OFFSET", allow_hyphen_values = true)]
    pub(crate) start_offset: Option<String>,
    /// Stop after this many bytes
    #[arg(short = 'l', long, value_name = "LENGTH", allow_hyphen_values = true)]
    pub(crate) max_length: Option<String>,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// Options of `measure`.
#[derive(Debug, Args)]
pub(crate) struct MeasureArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    #[command(flatten)]
    pub(crate) reading: Reading,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Format of the image that is to be made
    #[arg(short = 'O', long, value_name = "FMT", allow_hyphen_values = true)]
    pub(crate) target_format: Option<String>,
    /// What it is to be made with, as for `create`. Can be repeated
    #[arg(short = 'o', value_name = "OPTIONS", allow_hyphen_values = true)]
    pub(crate) options: Vec<String>,
    /// The snapshot to measure: its name, or snapshot.id=ID, or snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT", allow_hyphen_values = true)]
    pub(crate) snapshot: Option<String>,
    /// Measure for an empty disk of this size instead of for an image
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) size: Option<String>,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}
