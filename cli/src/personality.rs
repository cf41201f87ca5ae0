// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which program this is taken for, by the name it was called by.

use crate::failure::Failure;
use std::ffi::OsString;
use std::path::Path;
use tranship_convert::ErrorKind;

/// Programs whose place this one will take, with the version that does not yet.
const NOT_YET: &[&str] = &[
    "guestmount",
    "nbdkit",
    "virt-cat",
    "virt-customize",
    "virt-df",
    "virt-edit",
    "virt-filesystems",
    "virt-inspector",
    "virt-ls",
    "virt-resize",
    "virt-sparsify",
    "virt-v2v-in-place",
    "virt-v2v-inspector",
    "virt-v2v-open",
];

/// The program that the caller thinks this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Personality {
    /// Itself, with subcommands.
    Tranship,
    /// `virt-v2v`: the options of `tranship convert`, messages on standard output.
    VirtV2v,
    /// `guestfish`: the options of `tranship shell`.
    Guestfish,
    /// `qemu-img`: the commands of `tranship image`, with its messages and exit codes.
    QemuImg,
    /// `qemu-nbd`: the options of `tranship serve`, with its messages and exit codes.
    QemuNbd,
    /// `nbdinfo`: the options of `tranship nbd info`, with its exit codes.
    Nbdinfo,
    /// `nbdcopy`: the options of `tranship copy`.
    NbdCopy,
    /// One of the programs that are not there yet.
    NotYet(&'static str),
}

impl Personality {
    /// By the program's name, the first word of the command line.
    pub(crate) fn of(first: Option<&OsString>) -> Self {
        let name = first.and_then(|word| Path::new(word).file_name()).unwrap_or_default();
        match name.to_str() {
            Some("virt-v2v") => Self::VirtV2v,
            Some("guestfish") => Self::Guestfish,
            Some("qemu-img") => Self::QemuImg,
            Some("qemu-nbd") => Self::QemuNbd,
            Some("nbdinfo") => Self::Nbdinfo,
            Some("nbdcopy") => Self::NbdCopy,
            Some(name) => NOT_YET
                .iter()
                .find(|known| **known == name)
                .map_or(Self::Tranship, |known| Self::NotYet(known)),
            None => Self::Tranship,
        }
    }

    /// The name in front of its messages.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::VirtV2v => "virt-v2v",
            Self::Guestfish => "guestfish",
            Self::QemuImg => "qemu-img",
            Self::QemuNbd => "qemu-nbd",
            Self::Nbdinfo => "nbdinfo",
            Self::NbdCopy => "nbdcopy",
            Self::Tranship | Self::NotYet(_) => "tranship",
        }
    }
}

/// The error of a name that is known, but has no command behind it.
pub(crate) fn not_yet(name: &str) -> Failure {
    Failure::new(
        ErrorKind::Usage,
        format!("tranship cannot be called as {name}: it is not there yet"),
    )
    .hint(
        "links named virt-v2v, guestfish, qemu-img, qemu-nbd, nbdinfo and nbdcopy work; \
         everything else is `tranship --help`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_part_of_the_path_decides() {
        for (word, expected) in [
            ("/usr/bin/virt-v2v", Personality::VirtV2v),
            ("guestfish", Personality::Guestfish),
            ("./qemu-img", Personality::QemuImg),
            ("/usr/bin/qemu-nbd", Personality::QemuNbd),
            ("nbdinfo", Personality::Nbdinfo),
            ("nbdkit", Personality::NotYet("nbdkit")),
            ("nbdcopy", Personality::NbdCopy),
            ("/opt/tranship", Personality::Tranship),
            ("renamed", Personality::Tranship),
        ] {
            assert_eq!(Personality::of(Some(&word.into())), expected, "{word}");
        }
        assert_eq!(Personality::of(None), Personality::Tranship);
    }
}
