// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of `copy`: nbdcopy's, and what it does not have.

use super::{MeteringArgs, Parsed};
use crate::failure::Failure;
use clap::{Args, FromArgMatches};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

/// Options of `copy`.
// Every flag is a switch of its own on the command line.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// Format of the source [default: raw, whatever is in it]
    #[arg(
        short = 'f',
        long,
        visible_alias = "format",
        value_name = "FMT",
        allow_hyphen_values = true,
        help_heading = "Formats"
    )]
    pub(crate) source_format: Option<String>,
    /// Format of the destination: a file becomes a new image [default: raw]
    #[arg(
        short = 'O',
        long,
        visible_alias = "destination-format",
        value_name = "FMT",
        allow_hyphen_values = true,
        help_heading = "Formats"
    )]
    pub(crate) target_format: Option<String>,

    /// What options of disks refer to: secret,id=ID,file=FILE or
    /// tls-creds-x509,id=ID,endpoint=client,dir=DIR. Can be repeated
    #[arg(long, value_name = "OBJDEF", allow_hyphen_values = true, help_heading = "Formats")]
    pub(crate) object: Vec<String>,

    /// Leave no holes in the destination
    #[arg(long, help_heading = "Zeroes")]
    pub(crate) allocated: bool,
    /// The destination reads as zero everywhere
    #[arg(long, visible_alias = "target-is-zero", help_heading = "Zeroes")]
    pub(crate) destination_is_zero: bool,
    /// Read everything, whatever the source says about holes
    #[arg(long, help_heading = "Zeroes")]
    pub(crate) no_extents: bool,
    /// Leave a hole for this many zeroes in a row [default: 4096]; 0 looks for none
    #[arg(
        short = 'S',
        long,
        value_name = "N",
        allow_hyphen_values = true,
        help_heading = "Zeroes"
    )]
    pub(crate) sparse: Option<String>,

    /// Connections to each server that allows several [default: 4]
    #[arg(short = 'C', long, value_name = "N", allow_hyphen_values = true, help_heading = "Load")]
    pub(crate) connections: Option<String>,
    /// Requests in flight on each connection [default: 64]
    #[arg(short = 'R', long, value_name = "N", allow_hyphen_values = true, help_heading = "Load")]
    pub(crate) requests: Option<String>,
    /// Pieces that are copied at the same time; 0 finds a good number
    #[arg(short = 'T', long, value_name = "N", allow_hyphen_values = true, help_heading = "Load")]
    pub(crate) threads: Option<String>,
    /// Bytes of a request [default: 256k with a server, else 1M]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, help_heading = "Load")]
    pub(crate) request_size: Option<String>,
    /// Bytes of all requests in flight on a connection [default: 16M]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, help_heading = "Load")]
    pub(crate) queue_size: Option<String>,
    /// One request at a time, from the first byte to the last
    #[arg(long, help_heading = "Load")]
    pub(crate) synchronous: bool,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,

    /// Wait until the destination's disk has everything; servers are always asked to
    #[arg(long, help_heading = "Safety")]
    pub(crate) flush: bool,
    /// Write hashes of the disk's pieces to this file, for `image verify`
    #[arg(long, value_name = "FILE", allow_hyphen_values = true, help_heading = "Safety")]
    pub(crate) hash: Option<PathBuf>,
    /// Go on with a copy that was interrupted
    #[arg(long, help_heading = "Safety")]
    pub(crate) resume: bool,
    /// Seconds for which a server that is gone is tried again
    #[arg(long, value_name = "SECONDS", value_parser = budget, help_heading = "Safety")]
    pub(crate) retry: Option<Duration>,

    /// Show how far it is; with a number, as lines such as 42/100 to this descriptor
    #[arg(
        short,
        long,
        value_name = "FD",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = ""
    )]
    pub(crate) progress: Option<String>,
    /// Print what was done to standard output, as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Tell what is done on standard error
    #[arg(short, long)]
    pub(crate) verbose: bool,

    /// What is copied, and where to: a file, a device, a URI of NBD, - for standard input or
    /// output, [ COMMAND ... ] for a server to be started, or null: for nowhere
    #[arg(value_name = "SOURCE DESTINATION")]
    pub(crate) names: Vec<OsString>,
}

/// A time, or 0 for none.
fn budget(text: &str) -> Result<Duration, String> {
    if text == "0" { Ok(Duration::ZERO) } else { super::values::seconds(text) }
}

/// Stands between the words of a command in brackets: no argument can have it.
const BETWEEN: u8 = 0;

/// How `copy` is parsed, besides its options.
pub(super) fn describe(definition: clap::Command) -> clap::Command {
    definition.infer_long_args(true).args_override_self(true)
}

/// Parses what follows the name `nbdcopy`.
pub(super) fn parse(rest: Vec<OsString>) -> Result<Parsed, Failure> {
    let name = "nbdcopy";
    let definition = super::link(describe(CopyArgs::augment_args(super::named(name))));
    let words = std::iter::once(OsString::from(name)).chain(translate(rest)?);
    let args = definition
        .try_get_matches_from(words)
        .and_then(|matches| CopyArgs::from_arg_matches(&matches));
    match args {
        Ok(args) => Ok(Parsed::Command(super::Command::Copy(Box::new(args)))),
        Err(error) => super::text_or_failure(&error).map_err(|failure| failure.exiting_with(1)),
    }
}

/// Makes one word of each command in brackets, whose own options are none of ours.
pub(super) fn translate(words: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let mut translated = Vec::with_capacity(words.len());
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        if word != "[" {
            translated.push(word);
            continue;
        }
        let mut whole = word.into_vec();
        loop {
            let Some(next) = words.next() else {
                let text = "'[' without ']': both are words of their own, as in [ nbdkit null ]";
                return Err(Failure::usage(text).exiting_with(1));
            };
            if next == "]" {
                break;
            }
            whole.push(BETWEEN);
            whole.extend(next.into_vec());
        }
        translated.push(OsString::from_vec(whole));
    }
    Ok(translated)
}

/// The words of a command that was in brackets; `None` for any other word.
pub(crate) fn bracketed(word: &OsStr) -> Option<Vec<OsString>> {
    let mut words = word.as_bytes().split(|byte| *byte == BETWEEN);
    let is_command = words.next() == Some(b"[");
    is_command.then(|| words.map(|word| OsStr::from_bytes(word).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;
    use crate::personality::Personality;

    fn parsed(words: &[&str]) -> Result<CopyArgs, Failure> {
        let words = words.iter().map(OsString::from).collect();
        match crate::args::parse(Personality::NbdCopy, words)? {
            Parsed::Command(Command::Copy(args)) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn commands_in_brackets_keep_their_own_options() {
        let args = parsed(&[
            "nbdcopy",
            "-p",
            "[",
            "nbdkit",
            "-r",
            "--filter=delay",
            "a b",
            "]",
            "--flush",
            "-",
        ])
        .unwrap();
        assert!(args.flush && args.progress.as_deref() == Some(""));
        let command = bracketed(&args.names[0]).unwrap();
        assert_eq!(command, ["nbdkit", "-r", "--filter=delay", "a b"]);
        assert_eq!(args.names[1], "-");
        for word in ["-", "[a", "a", "]"] {
            assert_eq!(bracketed(word.as_ref()), None, "{word}");
        }
        let args = parsed(&["nbdcopy", "--", "[", "]", "null:"]).unwrap();
        assert_eq!(bracketed(&args.names[0]), Some(Vec::new()));
    }

    #[test]
    fn options_are_nbdcopys() {
        let args = parsed(&[
            "nbdcopy",
            "-C8",
            "-T",
            "2",
            "-R",
            "16",
            "--request-size=4096",
            "-S",
            "0",
            "--alloc",
            "--target-is-zero",
            "--progress=3",
            "--synch",
            "a",
            "b",
        ])
        .unwrap();
        assert_eq!(args.connections.as_deref(), Some("8"));
        assert_eq!(args.progress.as_deref(), Some("3"));
        assert!(args.allocated && args.destination_is_zero && args.synchronous);
        assert_eq!(args.names, ["a", "b"]);
    }

    #[test]
    fn mistakes_end_with_the_code_of_nbdcopy() {
        for words in [&["nbdcopy", "--nope", "a", "b"][..], &["nbdcopy", "[", "nbdkit", "null:"]] {
            assert_eq!(parsed(words).unwrap_err().exit_code(), 1, "{words:?}");
        }
    }
}
