// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of `appliance`.

use super::{MachineArgs, Talk, values};
use clap::{Args, Subcommand};
use std::path::PathBuf;
use tranship_appliance::Preference;

/// Options of `appliance`.
#[derive(Debug, Args)]
pub(crate) struct ApplianceArgs {
    #[command(subcommand)]
    pub(crate) command: ApplianceCommand,
}

/// What is to be done with the appliance.
#[derive(Debug, Subcommand)]
pub(crate) enum ApplianceCommand {
    /// Say what can run the appliance here, and what to install for something better
    Probe(ProbeArgs),
    /// Build the appliance, or bring it up to date
    Build(BuildArgs),
    /// Boot and restore the appliance a few times and say where the time goes
    Bench(BenchArgs),
    /// Type commands to the appliance itself
    Shell(ShellArgs),
    /// Say which appliances are running
    List(ListArgs),
    /// Write the memory of a running appliance to a file, for crash or gdb
    Dump(DumpArgs),
    /// Write the appliance to a file, for a machine without packages
    Export(ExportArgs),
    /// Take an exported appliance into the cache
    Import(ImportArgs),
}

/// Options of `appliance probe`.
#[derive(Debug, Args)]
pub(crate) struct ProbeArgs {
    /// What is wished for: auto, kvm (our own monitor), qemu-kvm or tcg (emulation)
    #[arg(long, value_name = "NAME", env = "TRANSHIP_BACKEND", value_parser = values::backend)]
    pub(crate) backend: Option<Preference>,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

/// Options of `appliance build`.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// A kernel instead of the distribution's package, from now on until --refresh
    #[arg(long, value_name = "FILE", requires = "modules")]
    pub(crate) kernel: Option<PathBuf>,
    /// The folder with that kernel's modules, such as /lib/modules/6.1.0-40-amd64
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    /// Look for a newer kernel package
    #[arg(long, conflicts_with = "kernel")]
    pub(crate) refresh: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

/// Options of `appliance bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// How many times it is started
    #[arg(short, long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) runs: u32,
    /// A disk to attach for reading instead of an empty one. Can be repeated
    #[arg(long, value_name = "DISK")]
    pub(crate) disk: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

/// Options of `appliance shell`.
#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    /// A disk to attach for reading. Can be repeated
    #[arg(short, long = "add", value_name = "DISK")]
    pub(crate) add: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

/// Options of `appliance list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

/// Options of `appliance dump`.
#[derive(Debug, Args)]
pub(crate) struct DumpArgs {
    /// The process whose appliance is meant, if several are running
    #[arg(long, value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// The file to write, an ELF core file
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

/// Options of `appliance export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// The file to write
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

/// Options of `appliance import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The file to read
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) talk: Talk,
}
