// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of `nbd info`, which are nbdinfo's, also by that name.

use super::image::getopt;
use super::{Command, Parsed};
use crate::failure::Failure;
use crate::personality::Personality;
use clap::error::ErrorKind as ClapKind;
use clap::{Args, FromArgMatches, Subcommand};
use std::ffi::OsString;

/// Options of `nbd`.
#[derive(Debug, Args)]
pub(crate) struct NbdArgs {
    /// What is to be done.
    #[command(subcommand)]
    pub(crate) command: NbdCommand,
}

/// What is to be done with a server.
#[derive(Debug, Subcommand)]
pub(crate) enum NbdCommand {
    /// Show what a server offers
    Info(InfoArgs),
}

/// Options of `nbd info`.
#[allow(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
#[derive(Debug, Default, Args)]
pub(crate) struct InfoArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Print the size in bytes, and nothing else
    #[arg(long, group = "what")]
    pub(crate) size: bool,
    /// Say by the exit code whether the export can do something: 0 yes, 2 no
    #[arg(long, visible_alias = "is", alias = "has", value_name = "FEATURE", group = "what")]
    pub(crate) can: Option<String>,
    /// Print what is allocated, or what else the metadata context CONTEXT tells
    #[arg(long, value_name = "CONTEXT", num_args = 0..=1, require_equals = true,
          default_missing_value = "base:allocation", group = "what")]
    pub(crate) map: Option<String>,
    /// With --map, print how much there is of each kind
    #[arg(long, requires = "map")]
    pub(crate) totals: bool,
    /// Show all exports of the server
    #[arg(short = 'L', long, group = "what")]
    pub(crate) list: bool,
    /// Say what seems to be in the export, also with --list
    #[arg(long)]
    pub(crate) content: bool,
    /// Do not look into the export
    #[arg(long, conflicts_with = "content")]
    pub(crate) no_content: bool,
    /// The server and its export: nbd://HOST/NAME, nbd+unix:///NAME?socket=PATH
    #[arg(value_name = "URI")]
    pub(crate) uris: Vec<OsString>,
}

/// The definition for the name `nbdinfo`.
fn as_nbdinfo(name: &'static str) -> clap::Command {
    let definition = super::link(InfoArgs::augment_args(super::named(name)));
    definition.infer_long_args(true).args_override_self(true)
}

/// Parses what follows the name `nbdinfo`.
pub(super) fn parse(rest: &[OsString]) -> Result<Parsed, Failure> {
    let name = Personality::Nbdinfo.program();
    let words = std::iter::once(OsString::from(name)).chain(rest.iter().cloned());
    let args = as_nbdinfo(name)
        .try_get_matches_from(words)
        .and_then(|matches| InfoArgs::from_arg_matches(&matches));
    match args {
        Ok(args) => Ok(Parsed::Command(Command::Nbd(NbdArgs { command: NbdCommand::Info(args) }))),
        Err(error) => match error.kind() {
            ClapKind::DisplayHelp | ClapKind::DisplayVersion => {
                Ok(Parsed::Text(error.render().to_string()))
            }
            _ => Err(Failure::usage(getopt::message(rest, &error)).exiting_with(1)),
        },
    }
}
