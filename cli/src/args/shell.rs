// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of `shell`, which are guestfish's as far as they go.

use super::{MachineArgs, MeteringArgs, Talk, values};
use clap::{ArgAction, ArgMatches, Args, FromArgMatches};
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use tranship_convert::Key;

/// Options of `shell`.
#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    /// Commands with their arguments, separated by `:`; without any they come from standard
    /// input
    #[arg(value_name = "COMMAND")]
    pub(crate) words: Vec<OsString>,
    /// Add a disk, in a file or by the URI of an NBD server. Can be repeated
    #[arg(short, long, value_name = "FILE|URI")]
    add: Vec<PathBuf>,
    /// Format of the disks that follow; without a value they are looked at again
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true,
          default_missing_value = "", action = ArgAction::Append)]
    format: Vec<String>,
    /// Keep the disks as they are: changes are thrown away at the end
    #[arg(short, long = "ro", conflicts_with = "rw")]
    pub(crate) ro: bool,
    /// Write changes to the disks (the default)
    #[arg(short = 'w', long = "rw")]
    rw: bool,
    /// Find the operating system and mount all of it
    #[arg(short, long)]
    pub(crate) inspector: bool,
    // The brackets would be a link in a doc comment.
    #[arg(help = "Mount a device: DEV[:MOUNTPOINT[:OPTIONS[:TYPE]]]. Can be repeated")]
    #[arg(short, long, value_name = "MOUNT")]
    pub(crate) mount: Vec<MountArgument>,
    /// Key of an encrypted volume for -i: ID:key:SECRET or ID:file:FILE. Can be repeated
    #[arg(long, value_name = "KEY", value_parser = values::key, requires = "inspector")]
    pub(crate) key: Vec<Key>,
    /// Read commands from this file
    #[arg(short, long, value_name = "FILE", conflicts_with = "words")]
    pub(crate) file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    #[command(flatten)]
    pub(crate) metering: MeteringArgs,
    #[command(flatten)]
    pub(crate) talk: Talk,
    /// The disks in order, each with the format that was named before it.
    #[arg(skip)]
    pub(crate) drives: Vec<(PathBuf, Option<String>)>,
}

impl ShellArgs {
    /// Pairs every disk with the `--format` before it, which only the order tells.
    pub(super) fn with_drives(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut options = Self::from_arg_matches(matches)?;
        let places = |name: &str| -> Vec<usize> {
            matches.indices_of(name).map(Iterator::collect).unwrap_or_default()
        };
        let formats: Vec<(usize, &String)> =
            places("format").into_iter().zip(&options.format).collect();
        let disks = places("add");
        if let Some((last, _)) = formats.last()
            && disks.iter().all(|disk| disk < last)
        {
            return Err(clap::Error::raw(
                clap::error::ErrorKind::ArgumentConflict,
                "--format has to come before the -a that it is for\n\n",
            ));
        }
        options.drives = disks
            .into_iter()
            .zip(&options.add)
            .map(|(place, path)| {
                let format = formats.iter().rev().find(|(at, _)| *at < place);
                let format = format.map(|(_, format)| (*format).clone());
                (path.clone(), format.filter(|format| !format.is_empty()))
            })
            .collect();
        Ok(options)
    }
}

/// The value of `-m`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountArgument {
    /// The device.
    pub(crate) device: String,
    /// Where it is mounted.
    pub(crate) mountpoint: String,
    /// Options instead of the default ones.
    pub(crate) options: Option<String>,
    /// Filesystem type.
    pub(crate) fstype: Option<String>,
}

impl FromStr for MountArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.splitn(4, ':');
        let mut next = || parts.next().filter(|part| !part.is_empty()).map(ToOwned::to_owned);
        let device = next().ok_or("expected DEV[:MOUNTPOINT[:OPTIONS[:TYPE]]]")?;
        let mountpoint = next().unwrap_or_else(|| "/".to_owned());
        Ok(Self { device, mountpoint, options: next(), fstype: next() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, Parsed, parse};
    use crate::personality::Personality;

    fn parsed(words: &[&str]) -> Result<ShellArgs, String> {
        let words = words.iter().map(OsString::from).collect();
        match parse(Personality::Guestfish, words).map_err(|failure| failure.render("p"))? {
            Parsed::Command(Command::Shell(options)) => Ok(*options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_format_is_for_the_disks_after_it() {
        let options = parsed(&[
            "guestfish",
            "-a",
            "one",
            "--format=raw",
            "-a",
            "two",
            "-a",
            "three",
            "--format",
            "-a",
            "four",
        ])
        .unwrap();
        let raw = Some("raw".to_owned());
        assert_eq!(
            options.drives,
            [
                ("one".into(), None),
                ("two".into(), raw.clone()),
                ("three".into(), raw),
                ("four".into(), None)
            ]
        );
        let error = parsed(&["guestfish", "-a", "one", "--format=raw"]).unwrap_err();
        assert!(error.contains("--format has to come before"), "{error}");
    }

    #[test]
    fn options_may_come_between_commands_until_two_dashes() {
        let options = parsed(&["guestfish", "run", ":", "ls", "--ro", "/", "-a", "d"]).unwrap();
        assert_eq!(options.words, ["run", ":", "ls", "/"]);
        assert!(options.ro);
        let options = parsed(&["guestfish", "--", "-ls", "/", ":", "echo", "-a"]).unwrap();
        assert_eq!(options.words, ["-ls", "/", ":", "echo", "-a"]);
        assert!(parsed(&["guestfish", "--ro", "--rw"]).is_err());
    }

    #[test]
    fn mounts_have_up_to_four_parts() {
        let mount: MountArgument = "/dev/sda1".parse().unwrap();
        assert_eq!((mount.mountpoint.as_str(), mount.options), ("/", None));
        let mount: MountArgument = "/dev/sda2:/x:ro,noload:ext4".parse().unwrap();
        assert_eq!(mount.mountpoint, "/x");
        assert_eq!(mount.options.as_deref(), Some("ro,noload"));
        assert_eq!(mount.fstype.as_deref(), Some("ext4"));
        assert!(MountArgument::from_str("").is_err());
    }
}
