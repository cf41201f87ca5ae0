// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The formats and their names.

use std::fmt;
use std::str::FromStr;
use tranship_block::Error;

/// A disk format; those that cannot be opened are known so that they can be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's format, versions 2 and 3.
    Qcow2,
    /// VMware's formats.
    Vmdk,
    /// Virtual PC and Hyper-V, `.vhd`.
    Vpc,
    /// Hyper-V, `.vhdx`.
    Vhdx,
    /// VirtualBox.
    Vdi,
    /// QEMU's former format.
    Qed,
    /// QEMU's first format.
    Qcow,
    /// Parallels and Virtuozzo.
    Parallels,
    /// Apple's disk images.
    Dmg,
    /// Linux disk encryption.
    Luks,
    /// Compressed loop images.
    Cloop,
    /// A raw disk in a gzip file.
    Gzip,
    /// A raw disk in an xz file.
    Xz,
    /// A raw disk in a zstd file.
    Zstd,
    /// A raw disk in a bzip2 file.
    Bzip2,
}

const NAMES: [(Format, &str); 16] = [
    (Format::Raw, "raw"),
    (Format::Qcow2, "qcow2"),
    (Format::Vmdk, "vmdk"),
    (Format::Vpc, "vpc"),
    (Format::Vhdx, "vhdx"),
    (Format::Vdi, "vdi"),
    (Format::Qed, "qed"),
    (Format::Qcow, "qcow"),
    (Format::Parallels, "parallels"),
    (Format::Dmg, "dmg"),
    (Format::Luks, "luks"),
    (Format::Cloop, "cloop"),
    (Format::Gzip, "gzip"),
    (Format::Xz, "xz"),
    (Format::Zstd, "zstd"),
    (Format::Bzip2, "bzip2"),
];

impl Format {
    /// The name that QEMU has for it.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(format, _)| *format == self).map_or("raw", |(_, name)| name)
    }

    /// Whether disks of this format can be opened.
    pub fn is_supported(self) -> bool {
        self != Self::Qcow
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    /// Takes QEMU's names, and `vhd` for `vpc`.
    fn from_str(name: &str) -> Result<Self, Error> {
        if name == "vhd" {
            return Ok(Self::Vpc);
        }
        NAMES.iter().find(|(_, known)| *known == name).map(|(format, _)| *format).ok_or_else(|| {
            let known: Vec<&str> = NAMES.iter().map(|(_, known)| *known).collect();
            Error::usage(format!("unknown disk format {name:?}, expected {}", known.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip() {
        for (format, name) in NAMES {
            assert_eq!(name.parse::<Format>().unwrap(), format);
            assert_eq!(format.to_string(), name);
        }
        assert_eq!("vhd".parse::<Format>().unwrap(), Format::Vpc);
        let error = "QCOW2".parse::<Format>().unwrap_err();
        assert!(error.message().starts_with("unknown disk format \"QCOW2\""), "{error}");
    }
}
