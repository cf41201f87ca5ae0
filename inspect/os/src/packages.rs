// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Installed packages, read from the package manager's own files.

use crate::Result;
use crate::facts::{Package, Packages};
use crate::reader::Reader;
use tranship_protocol::GuestPath;

/// Largest status file that is read; a desktop with 4,000 packages has 5 MiB.
const STATUS: u64 = 64 << 20;
/// Most packages that are kept.
const MAX_PACKAGES: usize = 100_000;

/// Reads dpkg's status file, or says which other database there is.
pub(crate) fn packages(reader: &Reader<'_>) -> Result<Packages> {
    if let Some(content) = reader.bytes(&GuestPath::of("/var/lib/dpkg/status"), STATUS)? {
        return Ok(Packages::Dpkg(dpkg_status(&String::from_utf8_lossy(&content))));
    }
    for (directory, format) in [
        ("/var/lib/rpm", "rpm"),
        ("/usr/lib/sysimage/rpm", "rpm"),
        ("/lib/apk/db", "apk"),
        ("/var/lib/pacman/local", "pacman"),
    ] {
        if reader.has_directory(directory)? {
            return Ok(Packages::NotRead { format: format.to_owned() });
        }
    }
    Ok(Packages::None)
}

/// The installed packages of a dpkg status file, sorted by name.
fn dpkg_status(text: &str) -> Vec<Package> {
    let mut packages: Vec<Package> =
        text.split("\n\n").filter_map(dpkg_paragraph).take(MAX_PACKAGES).collect();
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    packages
}

fn dpkg_paragraph(paragraph: &str) -> Option<Package> {
    let field = |key: &str| {
        paragraph.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::trim))
    };
    let installed = field("Status")?.split_whitespace().eq(["install", "ok", "installed"])
        || field("Status")?.split_whitespace().eq(["hold", "ok", "installed"]);
    installed.then_some(())?;
    Some(Package {
        name: field("Package")?.to_owned(),
        version: field("Version").unwrap_or_default().to_owned(),
        arch: field("Architecture").unwrap_or_default().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let text = "Package: open-vm-tools\nStatus: install ok installed\nVersion: 2:12\nArchitecture: amd64\n\
                    Description: x\n Package: not-a-field\n\n\
                    Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n\
                    Package: held\nStatus: hold ok installed\n\ngarbage\n";
        let names: Vec<_> = dpkg_status(text).into_iter().map(|p| (p.name, p.version)).collect();
        assert_eq!(
            names,
            [("held".to_owned(), String::new()), ("open-vm-tools".to_owned(), "2:12".to_owned())]
        );
    }
}
