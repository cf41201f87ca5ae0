// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of the commands that make and change images.

use super::{FormatArgs, Naming};
use clap::{ArgAction, ArgMatches, Args};
use std::ffi::OsString;

/// Options of `create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Format of the new image [default: raw]
    #[arg(short, long, value_name = "FMT", allow_hyphen_values = true)]
    pub(crate) format: Option<String>,
    /// What it is made with, as NAME=VALUE,NAME=VALUE; `-o help` lists them. Can be repeated
    #[arg(short, long, value_name = "OPTIONS", allow_hyphen_values = true)]
    pub(crate) options: Vec<String>,
    /// The image that the new one is based on
    #[arg(short, long, value_name = "FILENAME", allow_hyphen_values = true)]
    pub(crate) backing: Option<String>,
    /// Format of the image that the new one is based on
    #[arg(short = 'F', long, value_name = "FMT", allow_hyphen_values = true)]
    pub(crate) backing_format: Option<String>,
    /// Do not open the image that the new one is based on
    #[arg(short = 'u', long)]
    pub(crate) backing_unsafe: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// The new image, and the size of its disk
    #[arg(value_names = ["FILENAME", "SIZE"], num_args = 0..)]
    pub(crate) names: Vec<OsString>,
}

/// Options of `resize`.
#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// Allow a smaller size: what lies beyond it is lost
    #[arg(long)]
    pub(crate) shrink: bool,
    /// How new space is reserved: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", allow_hyphen_values = true)]
    pub(crate) preallocation: Option<String>,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image, and its new size; + and - in front change the size by that much
    #[arg(value_names = ["FILENAME", "SIZE"], num_args = 0..)]
    pub(crate) names: Vec<OsString>,
}

/// Options of `snapshot`.
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// Open the image although others may write to it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// List the snapshots, which is what happens without any of these
    #[arg(short, long, help_heading = "Operation")]
    pub(crate) list: bool,
    /// Make a snapshot of this name
    #[arg(
        short,
        long,
        value_name = "NAME",
        allow_hyphen_values = true,
        help_heading = "Operation"
    )]
    pub(crate) create: Option<String>,
    /// Give the disk the contents that it has in this snapshot
    #[arg(
        short,
        long,
        value_name = "NAME",
        allow_hyphen_values = true,
        help_heading = "Operation"
    )]
    pub(crate) apply: Option<String>,
    /// Delete this snapshot
    #[arg(
        short,
        long,
        value_name = "NAME",
        allow_hyphen_values = true,
        help_heading = "Operation"
    )]
    pub(crate) delete: Option<String>,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// What is done to a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BitmapAction {
    /// Make it.
    Add,
    /// Delete it.
    Remove,
    /// Make it empty.
    Clear,
    /// Let it record what is written from now on.
    Enable,
    /// Let it record nothing.
    Disable,
    /// Add what the bitmap of this name has.
    Merge(String),
}

/// Options of `bitmap`.
#[derive(Debug, Args)]
pub(crate) struct BitmapArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// Make the bitmap
    #[arg(long, num_args = 0, action = ArgAction::Append, default_missing_value = "add",
          help_heading = "Actions, in the order in which they are given")]
    add: Vec<String>,
    /// Delete the bitmap
    #[arg(long, num_args = 0, action = ArgAction::Append, default_missing_value = "remove",
          help_heading = "Actions, in the order in which they are given")]
    remove: Vec<String>,
    /// Make the bitmap empty
    #[arg(long, num_args = 0, action = ArgAction::Append, default_missing_value = "clear",
          help_heading = "Actions, in the order in which they are given")]
    clear: Vec<String>,
    /// Let the bitmap record what is written
    #[arg(long, num_args = 0, action = ArgAction::Append, default_missing_value = "enable",
          help_heading = "Actions, in the order in which they are given")]
    enable: Vec<String>,
    /// Let the bitmap record nothing
    #[arg(long, num_args = 0, action = ArgAction::Append, default_missing_value = "disable",
          help_heading = "Actions, in the order in which they are given")]
    disable: Vec<String>,
    /// Add what this bitmap has
    #[arg(
        long,
        value_name = "BITMAP",
        allow_hyphen_values = true,
        help_heading = "Actions, in the order in which they are given"
    )]
    merge: Vec<String>,
    /// Bytes that a bit of a new bitmap stands for
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) granularity: Option<String>,
    /// The image that --merge takes bitmaps from
    #[arg(short = 'b', long, value_name = "FILENAME", allow_hyphen_values = true)]
    pub(crate) source_file: Option<OsString>,
    /// Format of the image that --merge takes bitmaps from
    #[arg(short = 'F', long, value_name = "FMT", allow_hyphen_values = true)]
    pub(crate) source_format: Option<String>,
    /// The image and the bitmap
    #[arg(value_names = ["FILENAME", "BITMAP"], num_args = 0..)]
    pub(crate) names: Vec<OsString>,
    /// What is done, in the order of the words.
    #[arg(skip)]
    pub(crate) actions: Vec<BitmapAction>,
}

impl BitmapArgs {
    /// Reads the order of the actions from where the words stand.
    pub(super) fn order(&mut self, matches: &ArgMatches) {
        let simple = [
            ("add", BitmapAction::Add),
            ("remove", BitmapAction::Remove),
            ("clear", BitmapAction::Clear),
            ("enable", BitmapAction::Enable),
            ("disable", BitmapAction::Disable),
        ];
        let places = |name: &str| matches.indices_of(name).into_iter().flatten().collect();
        let mut found: Vec<(usize, BitmapAction)> = Vec::new();
        for (name, action) in simple {
            let places: Vec<usize> = places(name);
            found.extend(places.into_iter().map(|at| (at, action.clone())));
        }
        let merges: Vec<usize> = places("merge");
        let merges = merges.into_iter().zip(&self.merge);
        found.extend(merges.map(|(at, name)| (at, BitmapAction::Merge(name.clone()))));
        found.sort_by_key(|(at, _)| *at);
        self.actions = found.into_iter().map(|(_, action)| action).collect();
    }
}

/// Options of `amend`.
#[derive(Debug, Args)]
pub(crate) struct AmendArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// What is changed, as NAME=VALUE,NAME=VALUE; `-o help` lists them. Can be repeated
    #[arg(short, long, value_name = "OPTIONS", allow_hyphen_values = true)]
    pub(crate) options: Vec<String>,
    /// Nothing that can be changed needs it; scripts pass it for what qemu-img can do
    #[arg(long, hide = true)]
    force: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print how far it is
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// How the image is cached: none, writeback, unsafe, directsync or writethrough
    #[arg(short = 't', long, value_name = "MODE", allow_hyphen_values = true)]
    pub(crate) cache: Option<String>,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}
