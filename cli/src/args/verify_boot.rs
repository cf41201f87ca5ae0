// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of `verify-boot`.

use super::{MachineReadable, Talk, values};
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;
use tranship_appliance::Preference;

/// Options of `verify-boot`.
#[derive(Debug, Args)]
pub(crate) struct VerifyBootArgs {
    /// libvirt XML of the converted guest; its disks are not changed
    pub(crate) xml: PathBuf,
    /// Time for the guest to come up, in seconds or with m in minutes
    #[arg(long, value_name = "TIME", value_parser = values::seconds, default_value = "10m")]
    pub(crate) within: Duration,
    /// Wait for this text on the serial console
    #[arg(long, value_name = "TEXT")]
    pub(crate) expect: Option<String>,
    /// Where what the serial console prints is saved [default: NAME-console.log beside the XML]
    #[arg(long, value_name = "FILE")]
    pub(crate) console_log: Option<PathBuf>,
    /// Where a picture of the guest's last screen is saved [default: NAME-screen.png beside the XML]
    #[arg(long, value_name = "FILE")]
    pub(crate) screenshot: Option<PathBuf>,
    /// What runs the guest: auto, kvm or tcg (emulation); it is always QEMU
    #[arg(long, value_name = "NAME", env = "TRANSHIP_BACKEND", value_parser = values::backend)]
    pub(crate) backend: Option<Preference>,
    /// Memory of the guest in MiB instead of what its XML says
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(64..))]
    pub(crate) memsize: Option<u32>,
    /// Print the result as JSON on standard output
    #[arg(long)]
    pub(crate) json: bool,
    /// Events as JSON lines to file:FILE, stream:stdout, stream:stderr or fd:N
    #[arg(long, value_name = "FORMAT", require_equals = true,
          value_parser = values::machine_readable)]
    pub(crate) machine_readable: Option<MachineReadable>,
    /// Print warnings and errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) talk: Talk,
}
