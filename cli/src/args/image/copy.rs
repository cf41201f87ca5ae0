// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of the commands that move what is in images.

use super::{FormatArgs, MeteringArgs, Naming, Reading};
use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;

/// Options of `convert`.
// Every flag is a switch of its own on the command line.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Format of the sources; without it they are looked at
    #[arg(
        short = 'f',
        long,
        value_name = "FMT",
        allow_hyphen_values = true,
        help_heading = "Source"
    )]
    pub(crate) source_format: Option<String>,
    /// Take the sources' names for options such as driver=qcow2,file.filename=NAME
    #[arg(long, visible_alias = "image-opts", help_heading = "Source")]
    pub(crate) source_image_opts: bool,
    /// The snapshot to copy: its name, or snapshot.id=ID, or snapshot.name=NAME
    #[arg(
        short = 'l',
        long,
        value_name = "SNAPSHOT",
        allow_hyphen_values = true,
        help_heading = "Source"
    )]
    pub(crate) source_snapshot: Option<String>,
    /// How sources are cached: none, writeback, unsafe, directsync or writethrough
    #[arg(
        short = 'T',
        long,
        value_name = "MODE",
        allow_hyphen_values = true,
        help_heading = "Source"
    )]
    pub(crate) source_cache: Option<String>,
    #[command(flatten)]
    pub(crate) reading: Reading,

    /// Format of the target [default: raw]
    #[arg(
        short = 'O',
        long,
        value_name = "FMT",
        allow_hyphen_values = true,
        help_heading = "Target"
    )]
    pub(crate) target_format: Option<String>,
    /// Take the target's name for options such as driver=qcow2,file.filename=NAME
    #[arg(long, help_heading = "Target")]
    pub(crate) target_image_opts: bool,
    /// What the target is made with, as for `create`. Can be repeated
    #[arg(
        short = 'o',
        long,
        value_name = "OPTIONS",
        allow_hyphen_values = true,
        help_heading = "Target"
    )]
    pub(crate) target_options: Vec<String>,
    /// How the target is cached: none, writeback, unsafe, directsync or writethrough
    #[arg(
        short = 't',
        long,
        value_name = "MODE",
        allow_hyphen_values = true,
        help_heading = "Target"
    )]
    pub(crate) target_cache: Option<String>,
    /// The image that the target is based on
    #[arg(
        short = 'B',
        long,
        value_name = "FILENAME",
        allow_hyphen_values = true,
        help_heading = "Target"
    )]
    pub(crate) backing: Option<String>,
    /// Format of the image that the target is based on
    #[arg(
        short = 'F',
        long,
        value_name = "FMT",
        allow_hyphen_values = true,
        help_heading = "Target"
    )]
    pub(crate) backing_format: Option<String>,
    /// Write into a target that exists
    #[arg(short = 'n', long, help_heading = "Target")]
    pub(crate) no_create: bool,
    /// The target that exists reads as zero everywhere
    #[arg(long, help_heading = "Target")]
    pub(crate) target_is_zero: bool,
    /// Compress what is written
    #[arg(short, long, help_heading = "Target")]
    pub(crate) compress: bool,
    /// Leave a hole for this many zeroes in a row [default: 4k]; 0 writes all of them
    #[arg(
        short = 'S',
        long,
        value_name = "SIZE",
        allow_hyphen_values = true,
        help_heading = "Target"
    )]
    pub(crate) sparse_size: Option<String>,
    /// Copy the persistent bitmaps as well
    #[arg(long, help_heading = "Target")]
    pub(crate) bitmaps: bool,
    /// Leave bitmaps out that cannot be trusted
    #[arg(long, help_heading = "Target")]
    pub(crate) skip_broken_bitmaps: bool,

    /// Pieces that are copied at the same time, 1 to 16
    #[arg(short = 'm', long, value_name = "N", allow_hyphen_values = true, help_heading = "Work")]
    pub(crate) parallel: Option<String>,
    /// Write pieces in any order, which is always done: for callers of qemu-img
    #[arg(short = 'W', long, help_heading = "Work")]
    pub(crate) oob_writes: bool,
    /// Let the system copy between files where it can
    #[arg(short = 'C', long, help_heading = "Work")]
    pub(crate) copy_range_offloading: bool,
    /// Write hashes of the disk's pieces to this file, for `verify`
    #[arg(long, value_name = "FILE", help_heading = "Work")]
    pub(crate) hash: Option<PathBuf>,
    /// Go on with a copy that was interrupted
    #[arg(long, help_heading = "Work")]
    pub(crate) resume: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print how far it is
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// What options refer to: secret,id=ID,data=TEXT or secret,id=ID,file=FILE. Can be repeated
    #[arg(long, value_name = "OBJDEF", allow_hyphen_values = true)]
    pub(crate) object: Vec<String>,
    /// Let the sources open what lies below this folder, or be based on the export with this
    /// URI. Can be repeated
    #[arg(long, value_name = "DIR|URI")]
    pub(crate) allow_path: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The sources, one behind the other, and the target
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// Options of `rebase`.
// Every flag is a switch of its own on the command line.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug, Args)]
pub(crate) struct RebaseArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// Open the images although others may write to them
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// How the image is cached: none, writeback, unsafe, directsync or writethrough
    #[arg(short = 't', long, value_name = "MODE", allow_hyphen_values = true)]
    pub(crate) cache: Option<String>,
    /// The image to base it on; an empty name for none
    #[arg(short, long, value_name = "FILENAME", allow_hyphen_values = true)]
    pub(crate) backing: Option<String>,
    /// Format of the image to base it on
    #[arg(short = 'F', long, value_name = "FMT", allow_hyphen_values = true)]
    pub(crate) backing_format: Option<String>,
    /// How the images below are cached: none, writeback, unsafe, directsync or writethrough
    #[arg(short = 'T', long, value_name = "MODE", allow_hyphen_values = true)]
    pub(crate) backing_cache: Option<String>,
    /// Change the name only; the new image has to hold what the old one held
    #[arg(short = 'u', long)]
    pub(crate) backing_unsafe: bool,
    /// Compress what is written
    #[arg(short, long)]
    pub(crate) compress: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print how far it is
    #[arg(short, long)]
    pub(crate) progress: bool,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// Options of `commit`.
#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// How the image is cached: none, writeback, unsafe, directsync or writethrough
    #[arg(short = 't', long, value_name = "MODE", allow_hyphen_values = true)]
    pub(crate) cache: Option<String>,
    /// The image of the chain to write into [default: the one that the image is based on]
    #[arg(short, long, value_name = "FILENAME", allow_hyphen_values = true)]
    pub(crate) base: Option<String>,
    /// Leave the image as it is instead of emptying it
    #[arg(short, long)]
    pub(crate) drop: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print how far it is
    #[arg(short, long)]
    pub(crate) progress: bool,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// Options of `dd`.
#[derive(Debug, Args)]
pub(crate) struct DdArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// Format of the target [default: raw]
    #[arg(short = 'O', long, value_name = "FMT", allow_hyphen_values = true)]
    pub(crate) output_format: Option<String>,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// if=SOURCE, of=TARGET, bs=BYTES [default: 512], count=BLOCKS, skip=BLOCKS
    #[arg(value_name = "OPERAND")]
    pub(crate) operands: Vec<OsString>,
}

/// Options of `bench`.
// Every flag is a switch of its own on the command line.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// Open the image although others may write to it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
    /// How the image is cached: none, writeback, unsafe, directsync or writethrough
    #[arg(short = 't', long, value_name = "MODE", allow_hyphen_values = true)]
    pub(crate) cache: Option<String>,
    /// Requests [default: 75000]
    #[arg(short, long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) count: Option<String>,
    /// Requests at the same time [default: 64]
    #[arg(short, long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) depth: Option<String>,
    /// Where the first request starts [default: 0]
    #[arg(short, long, value_name = "OFFSET", allow_hyphen_values = true)]
    pub(crate) offset: Option<String>,
    /// Bytes of a request [default: 4096]
    #[arg(short = 's', long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) buffer_size: Option<String>,
    /// Bytes from one request to the next [default: the size of a request]
    #[arg(short = 'S', long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) step_size: Option<String>,
    /// Write instead of reading
    #[arg(short, long)]
    pub(crate) write: bool,
    /// The byte that is written [default: 0]
    #[arg(long, value_name = "BYTE", allow_hyphen_values = true)]
    pub(crate) pattern: Option<String>,
    /// Flush after this many requests
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) flush_interval: Option<String>,
    /// Go on with requests while a flush is under way
    #[arg(long)]
    pub(crate) no_drain: bool,
    /// How the system is asked: threads, native or io_uring
    #[arg(short = 'i', long, value_name = "AIO", allow_hyphen_values = true)]
    pub(crate) aio: Option<String>,
    /// The same as --aio native
    #[arg(short, long)]
    pub(crate) native: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// Options of `compact`.
#[derive(Debug, Args)]
pub(crate) struct CompactArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// Give back what the guest's filesystems do not use as well
    #[arg(long)]
    pub(crate) trim: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print how far it is
    #[arg(short, long)]
    pub(crate) progress: bool,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}

/// Options of `verify`.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    #[command(flatten)]
    pub(crate) naming: Naming,
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// The file of hashes, such as `convert --hash` writes it
    #[arg(long, value_name = "FILE")]
    pub(crate) hash: Option<PathBuf>,
    /// Write the image's hashes to that file instead of comparing them
    #[arg(long)]
    pub(crate) write: bool,
    /// Print errors only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print how far it is
    #[arg(short, long)]
    pub(crate) progress: bool,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub(crate) names: Vec<OsString>,
}
