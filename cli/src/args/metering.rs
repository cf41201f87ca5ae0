// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all commands have that read or write disks.

use clap::Args;
use std::path::PathBuf;

/// How hard disks are worked, and what is told about it.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct MeteringArgs {
    /// Read and write each disk at no more than this many bytes a second, such as 50M
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, help_heading = "Load")]
    pub(crate) limit_rate: Option<String>,
    /// Write what was asked of the disks, how often and how fast, to this file, as JSON; to
    /// standard error if it is -
    #[arg(long, value_name = "FILE", allow_hyphen_values = true, help_heading = "Load")]
    pub(crate) statistics: Option<PathBuf>,
}
