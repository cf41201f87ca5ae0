// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one definition of every command and flag: parser, help, manual and completions.

mod absent;
mod appliance;
mod convert;
pub(crate) mod copy;
pub(crate) mod image;
mod metering;
pub(crate) mod nbd;
mod network;
pub(crate) mod serve;
mod shell;
mod values;
mod verify_boot;
mod words;

pub(crate) use appliance::ShellArgs as ApplianceShellArgs;
pub(crate) use appliance::{ApplianceArgs, ApplianceCommand, BenchArgs, BuildArgs, ProbeArgs};
pub(crate) use appliance::{DumpArgs, ExportArgs, ImportArgs, ListArgs};
pub(crate) use convert::ConvertArgs;
pub(crate) use copy::CopyArgs;
pub(crate) use image::ImageArgs;
pub(crate) use metering::MeteringArgs;
pub(crate) use nbd::NbdArgs;
pub(crate) use serve::ServeArgs;
pub(crate) use shell::{MountArgument, ShellArgs};
pub(crate) use verify_boot::VerifyBootArgs;

use crate::failure::Failure;
use crate::personality::Personality;
use crate::report::Channel;
use clap::error::{ContextKind, ContextValue, ErrorKind as ClapKind};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;
use tranship_appliance::Preference;

/// Brings guests of other hypervisors home to KVM.
#[derive(Debug, Parser)]
#[command(name = "tranship", version, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What the program is to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Convert a guest of another hypervisor to KVM
    Convert(Box<ConvertArgs>),
    /// Start a converted guest and see whether it comes up
    VerifyBoot(VerifyBootArgs),
    /// Look at and change what is on disks, with guestfish's commands
    Shell(Box<ShellArgs>),
    /// Look after the small virtual machine that opens the guests' disks
    Appliance(ApplianceArgs),
    /// Look at, make, check and copy disk images, with qemu-img's commands
    Image(Box<ImageArgs>),
    /// Give NBD clients access to disks of any format, with qemu-nbd's options
    Serve(Box<ServeArgs>),
    /// Ask NBD servers what they offer
    Nbd(NbdArgs),
    /// Copy between files, devices, images and NBD servers, with nbdcopy's options
    Copy(Box<CopyArgs>),
    /// Print a script that completes command lines
    Completions {
        /// The shell that it is for
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    Man {
        /// Folder for all pages; without it the main page goes to standard output
        #[arg(value_name = "DIR")]
        folder: Option<PathBuf>,
    },
}

/// How much is said about the work.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Talk {
    /// Log what is done to standard error
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Log every call as well
    #[arg(short = 'x', long)]
    pub(crate) trace: bool,
}

/// The appliance's virtual machine.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct MachineArgs {
    /// What runs the appliance: auto, kvm (our own monitor), qemu-kvm or tcg (emulation)
    #[arg(long, value_name = "NAME", env = "TRANSHIP_BACKEND", value_parser = values::backend)]
    pub(crate) backend: Option<Preference>,
    /// Memory of the appliance in MiB
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(256..=65536))]
    pub(crate) memsize: Option<u32>,
    /// Processors of the appliance
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) smp: Option<u32>,
    /// Take the appliance's memory from the huge pages that the host has set aside
    /// (vm.nr_hugepages). It then boots each time
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// Whether the appliance, once booted, is kept and restored ever after: auto or off
    #[arg(
        long,
        value_name = "WHEN",
        env = "TRANSHIP_WARM_START",
        default_value = "auto",
        hide_default_value = true
    )]
    pub(crate) warm_start: WarmStart,
}

impl MachineArgs {
    /// What the environment says, for commands without these options.
    pub(crate) fn from_environment() -> Result<Self, Failure> {
        let command = Self::augment_args(clap::Command::new("appliance"));
        command
            .try_get_matches_from(["appliance"])
            .and_then(|matches| Self::from_arg_matches(&matches))
            .map_err(|error| Failure::usage(error.to_string().trim()))
    }
}

/// Whether the appliance is restored instead of booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum WarmStart {
    /// Where it can be.
    #[default]
    Auto,
    /// It boots each time, and nothing is kept.
    Off,
}

/// Where machine-readable events go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MachineReadable {
    /// Given without a value: progress as `N/100` lines or, alone, the list of capabilities.
    Plain,
    /// One JSON object a line.
    Events(Channel),
}

/// What came of the words.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// A command to run.
    Command(Command),
    /// Help or the version, for standard output.
    Text(String),
}

/// The whole definition, for the generators.
pub(crate) fn definition() -> clap::Command {
    Cli::command()
        .mut_subcommand("convert", words::describe)
        .mut_subcommand("image", image::describe)
        .mut_subcommand("serve", serve::describe)
        .mut_subcommand("copy", copy::describe)
}

/// Parses the words of the command line, the program's name first.
pub(crate) fn parse(personality: Personality, words: Vec<OsString>) -> Result<Parsed, Failure> {
    let mut words = words.into_iter();
    let program = words.next();
    let rest: Vec<OsString> = words.collect();
    let (definition, rest) = match personality {
        Personality::VirtV2v => {
            let definition = link(words::describe(ConvertArgs::augment_args(named("virt-v2v"))));
            let rest = words::translate(rest, &definition)?;
            (definition, rest)
        }
        Personality::Guestfish => (link(ShellArgs::augment_args(named("guestfish"))), rest),
        Personality::QemuImg => return image::parse(rest),
        Personality::QemuNbd => return serve::parse(&rest),
        Personality::Nbdinfo => return nbd::parse(&rest),
        Personality::NbdCopy => return copy::parse(rest),
        Personality::Tranship | Personality::NotYet(_) => {
            let definition = definition();
            match rest.split_first() {
                Some((first, options)) if first == "convert" => {
                    let convert = definition
                        .find_subcommand("convert")
                        .expect("the definition has the subcommand that it was built with");
                    let mut all = vec![first.clone()];
                    all.extend(words::translate(options.to_vec(), convert)?);
                    (definition, all)
                }
                Some((first, options)) if first == "image" => {
                    let mut all = vec![first.clone()];
                    all.extend(image::translate(options.to_vec()));
                    (definition, all)
                }
                Some((first, options)) if first == "copy" => {
                    let mut all = vec![first.clone()];
                    all.extend(copy::translate(options.to_vec())?);
                    (definition, all)
                }
                _ => (definition, rest),
            }
        }
    };
    let name = program.unwrap_or_else(|| "tranship".into());
    // Their exit codes are those of the tools whose options they have, also for mistakes.
    let is_tool = rest.first().is_some_and(|first| {
        ["image", "serve", "nbd", "copy"].iter().any(|command| first == *command)
    });
    let wrong = |error: clap::Error| {
        let outcome = text_or_failure(&error);
        if is_tool { outcome.map_err(|failure| failure.exiting_with(1)) } else { outcome }
    };
    let matches = match definition.try_get_matches_from(std::iter::once(name).chain(rest)) {
        Ok(matches) => matches,
        Err(error) => return wrong(error),
    };
    let command = match personality {
        Personality::VirtV2v => {
            ConvertArgs::from_arg_matches(&matches).map(|args| Command::Convert(Box::new(args)))
        }
        Personality::Guestfish => {
            ShellArgs::with_drives(&matches).map(|args| Command::Shell(Box::new(args)))
        }
        Personality::Tranship
        | Personality::QemuImg
        | Personality::QemuNbd
        | Personality::Nbdinfo
        | Personality::NbdCopy
        | Personality::NotYet(_) => match matches.subcommand() {
            Some(("shell", options)) => {
                ShellArgs::with_drives(options).map(|args| Command::Shell(Box::new(args)))
            }
            Some(("image", options)) => {
                image::from_matches(options).map(|args| Command::Image(Box::new(args)))
            }
            _ => Cli::from_arg_matches(&matches).map(|cli| cli.command),
        },
    };
    command.map(Parsed::Command).or_else(wrong)
}

/// The formats that images can have, as the help lists them.
fn format_names() -> String {
    crate::image::format_names().join(" ")
}

fn named(name: &'static str) -> clap::Command {
    clap::Command::new(name).version(env!("CARGO_PKG_VERSION"))
}

/// Says in the help what stands behind a link's name.
fn link(definition: clap::Command) -> clap::Command {
    definition.about(concat!("tranship ", env!("CARGO_PKG_VERSION"), ", called by another name"))
}

/// Help and version are results; everything else is a mistake in the command line.
fn text_or_failure(error: &clap::Error) -> Result<Parsed, Failure> {
    let rendered = error.render().to_string();
    match error.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => return Ok(Parsed::Text(rendered)),
        ClapKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            return Err(Failure::usage("no command was given")
                .hint("see `tranship --help` for the commands"));
        }
        _ => {}
    }
    if let (ClapKind::ArgumentConflict, Some(argument)) = (error.kind(), used_twice(error)) {
        return Err(Failure::usage(format!("{argument} is used more than once")));
    }
    if let Some(failure) = secret(error) {
        return Err(failure);
    }
    let rendered = rendered.strip_prefix("error: ").unwrap_or(&rendered);
    let (message, rest) = rendered.split_once("\n\n").unwrap_or((rendered, ""));
    let message: Vec<&str> = message.split_whitespace().collect();
    let tips = rest.lines().filter_map(|line| line.trim().strip_prefix("tip: "));
    let failure = Failure::usage(message.join(" "));
    Err(tips.fold(failure, Failure::hint).hint("see --help for everything that can be given"))
}

/// A mistake in the value of `--key`, told without the value.
fn secret(error: &clap::Error) -> Option<Failure> {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let why = std::error::Error::source(error).filter(|_| argument.starts_with("--key "))?;
    Some(Failure::usage(format!("--key: {why}")))
}

/// The argument that conflicts with itself.
fn used_twice(error: &clap::Error) -> Option<String> {
    let name = |kind| match error.get(kind) {
        Some(ContextValue::String(name)) => Some(name.clone()),
        _ => None,
    };
    let invalid = name(ContextKind::InvalidArg)?;
    let same = name(ContextKind::PriorArg).is_some_and(|prior| prior == invalid);
    same.then(|| words::spelled(&invalid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(personality: Personality, words: &[&str]) -> String {
        let words = words.iter().map(OsString::from).collect();
        parse(personality, words).unwrap_err().render("p")
    }

    #[test]
    fn the_definition_is_sound() {
        definition().debug_assert();
    }

    #[test]
    fn options_that_are_given_twice_are_refused() {
        for (first, second, named) in [
            ("-of", "-of", "-of (--output-format)"),
            ("-os", "--output-storage", "-os (--output-storage)"),
            ("-i", "-i", "--input"),
        ] {
            let words = ["virt-v2v", first, "raw", second, "raw"];
            let text = failure(
                Personality::VirtV2v,
                &words.map(|w| if first == "-i" && w == "raw" { "ova" } else { w }),
            );
            assert_eq!(
                text.lines().next().unwrap(),
                format!("p: error: {named} is used more than once")
            );
        }
    }

    #[test]
    fn unknown_flags_and_commands_are_named() {
        assert!(
            failure(Personality::Tranship, &["tranship", "convert", "--nope"]).contains("'--nope'")
        );
        assert!(failure(Personality::Tranship, &["tranship", "batch"]).contains("'batch'"));
        assert!(failure(Personality::Tranship, &["tranship"]).contains("no command was given"));
    }

    #[test]
    fn help_and_version_are_results() {
        for words in [["tranship", "--help"], ["tranship", "-V"]] {
            let words = words.iter().map(OsString::from).collect();
            let parsed = parse(Personality::Tranship, words).unwrap();
            assert!(matches!(parsed, Parsed::Text(text) if !text.is_empty()));
        }
    }
}
