// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where UEFI firmware for QEMU is.

use crate::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

/// A firmware's program and the template of its variables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uefi {
    pub(crate) code: PathBuf,
    pub(crate) vars: PathBuf,
}

/// Pairs of program and variables without secure boot: Debian and Ubuntu, Fedora and RHEL,
/// SUSE, Arch.
const PLAIN: [(&str, &str); 6] = [
    ("usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd"),
    ("usr/share/edk2/ovmf/OVMF_CODE.fd", "usr/share/edk2/ovmf/OVMF_VARS.fd"),
    // Signed programs are all that RHEL has; without keys in the variables it checks nothing.
    ("usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("usr/share/qemu/ovmf-x86_64-code.bin", "usr/share/qemu/ovmf-x86_64-vars.bin"),
    ("usr/share/edk2/x64/OVMF_CODE.4m.fd", "usr/share/edk2/x64/OVMF_VARS.4m.fd"),
];

/// The same with secure boot and Microsoft's keys.
const SECURE: [(&str, &str); 4] = [
    ("usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
    ("usr/share/OVMF/OVMF_CODE.secboot.fd", "usr/share/OVMF/OVMF_VARS.ms.fd"),
    ("usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"),
    ("usr/share/qemu/ovmf-x86_64-smm-ms-code.bin", "usr/share/qemu/ovmf-x86_64-smm-ms-vars.bin"),
];

/// The firmware that is installed below `root`, which is `/`.
pub(crate) fn find(root: &Path, secure_boot: bool) -> Result<Uefi> {
    let pairs: &[(&str, &str)] = if secure_boot { &SECURE } else { &PLAIN };
    let places =
        pairs.iter().map(|(code, vars)| Uefi { code: root.join(code), vars: root.join(vars) });
    places.into_iter().find(|uefi| uefi.code.is_file() && uefi.vars.is_file()).ok_or_else(|| {
        let kind = if secure_boot { "with secure boot " } else { "" };
        Error::new(
            ErrorKind::Blocked,
            format!("the guest boots by UEFI, and no UEFI firmware {kind}for QEMU is installed"),
        )
        .with_remedy("install it: apt-get install ovmf, dnf install edk2-ovmf, or zypper install qemu-ovmf-x86_64")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pairs_are_found() {
        let root = tempfile::tempdir().unwrap();
        let error = find(root.path(), false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Blocked);
        assert!(error.remedy().unwrap().contains("apt-get install ovmf"));
        for (code, vars) in [PLAIN[2], SECURE[1]] {
            for name in [code, vars] {
                let path = root.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                let is_secure = code == SECURE[1].0;
                assert!(find(root.path(), is_secure).is_err());
                std::fs::write(path, "").unwrap();
            }
        }
        assert!(find(root.path(), false).unwrap().code.ends_with(PLAIN[2].0));
        assert!(find(root.path(), true).unwrap().vars.ends_with(SECURE[1].1));
    }
}
