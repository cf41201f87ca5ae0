// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Gets the distribution's kernel package, as an ordinary user and without installing it.
//!
//! The host's own /boot is never read: its kernel is often unreadable for users (Ubuntu), and in a
//! container there is none. The package manager checks what it downloads against its signatures.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::deb;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::wanted::KERNEL_PACKAGES;
use crate::{Event, Progress};

/// What helps whenever no package can be had.
const BY_HAND: &str = "name a kernel with --kernel and its modules with --modules, or import an \
     exported appliance";
/// Bytes of the package manager's complaint that are repeated.
const COMPLAINT: usize = 2000;

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// Name and version, for the manifest.
    pub(crate) source: String,
    pub(crate) kernel: PathBuf,
    pub(crate) modules: PathBuf,
}

/// Downloads the best kernel package of this distribution and unpacks it below `work`, an existing
/// empty directory.
pub(crate) fn fetch(work: &Path, progress: &Progress<'_>) -> Result<Unpacked> {
    if find_program("apt-get").is_some() && find_program("apt-cache").is_some() {
        return fetch_apt(work, progress);
    }
    let manager = ["dnf", "yum", "zypper", "pacman", "apk"]
        .into_iter()
        .find(|name| find_program(name).is_some())
        .unwrap_or("no package manager");
    Err(Error::unsupported(format!(
        "kernel packages can be fetched with apt only; this host has {manager}"
    ))
    .remedy(BY_HAND))
}

fn fetch_apt(work: &Path, progress: &Progress<'_>) -> Result<Unpacked> {
    let candidates = candidates(&fs::read_to_string("/etc/os-release").unwrap_or_default());
    let Some((meta, packages)) =
        candidates.iter().find_map(|meta| Some((meta, resolve(&apt_show(meta)?, apt_show)?)))
    else {
        return Err(Error::new(
            ErrorKind::Download,
            format!("apt knows none of the kernel packages {}", candidates.join(", ")),
        )
        .remedy(format!("run `apt-get update` as root; or {BY_HAND}")));
    };
    let mut sources = Vec::new();
    let unpacked = work.join("unpacked");
    fs::create_dir(&unpacked).context("creating", &unpacked)?;
    for package in &packages {
        progress(Event::Downloading { package: package.clone() });
        let dir = work.join(package);
        fs::create_dir(&dir).context("creating", &dir)?;
        let run = Command::new("apt-get")
            .args(["-q", "download", package])
            .env("LC_ALL", "C")
            .current_dir(&dir)
            .output()
            .map_err(|e| Error::io("apt-get cannot be run", e))?;
        if !run.status.success() {
            let complaint = String::from_utf8_lossy(&run.stderr);
            let complaint: String = complaint.trim().chars().take(COMPLAINT).collect();
            return Err(Error::new(
                ErrorKind::Download,
                format!("apt-get download {package} failed: {complaint}"),
            )
            .remedy(format!("check the network and run `apt-get update` as root; or {BY_HAND}")));
        }
        let file = fs::read_dir(&dir)
            .context("listing", &dir)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|e| e == "deb"))
            .ok_or_else(|| {
                Error::new(ErrorKind::Download, format!("apt-get left no package for {package}"))
                    .in_file(&dir)
            })?;
        sources.push(file.file_stem().unwrap_or_default().to_string_lossy().into_owned());
        progress(Event::Extracting { package: package.clone() });
        deb::unpack(&file, &unpacked)?;
        fs::remove_file(&file).context("removing", &file)?;
    }
    let (kernel, modules) =
        deb::find_kernel(&unpacked).map_err(|e| e.remedy(format!("{meta} is odd; {BY_HAND}")))?;
    Ok(Unpacked { source: sources.join(" "), kernel, modules })
}

/// The metapackages to try. A derivative (`ID_LIKE`) uses those of its parent; the word order of
/// os-release decides.
fn candidates(os_release: &str) -> Vec<&'static str> {
    let value = |key: &str| {
        os_release
            .lines()
            .filter_map(|line| line.split_once('='))
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value.trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    let ids = format!("{} {}", value("ID"), value("ID_LIKE"));
    ids.split_whitespace()
        .find_map(|id| KERNEL_PACKAGES.iter().find(|(name, _)| *name == id))
        .map_or_else(
            || KERNEL_PACKAGES.iter().flat_map(|(_, list)| list.iter().copied()).collect(),
            |(_, list)| list.to_vec(),
        )
}

/// The package's record in apt's lists, or `None` if there is none.
fn apt_show(package: &str) -> Option<String> {
    let run = Command::new("apt-cache")
        .args(["show", "--no-all-versions", package])
        .env("LC_ALL", "C")
        .output()
        .ok()?;
    let text = String::from_utf8(run.stdout).ok()?;
    (run.status.success() && !text.is_empty()).then_some(text)
}

/// The packages with kernel and modules behind a metapackage: its versioned image, and on Ubuntu,
/// where the image holds no modules, those packages as well.
fn resolve(meta: &str, show: impl Fn(&str) -> Option<String>) -> Option<Vec<String>> {
    let image = depends(meta).find(|name| is_versioned(name, "linux-image-"))?;
    let record = show(&image)?;
    let mut packages = vec![image];
    for name in depends(&record).chain(depends(meta)) {
        let modules =
            is_versioned(&name, "linux-modules-") || is_versioned(&name, "linux-modules-extra-");
        if modules && !packages.contains(&name) && show(&name).is_some() {
            packages.push(name);
        }
    }
    Some(packages)
}

/// Names of the record's dependencies, alternatives included.
fn depends(record: &str) -> impl Iterator<Item = String> {
    record
        .lines()
        .filter_map(|line| line.strip_prefix("Depends:").or(line.strip_prefix("Pre-Depends:")))
        .flat_map(|list| list.split([',', '|']))
        .filter_map(|entry| entry.split_whitespace().next())
        .map(|name| name.split(':').next().unwrap_or_default().to_owned())
}

fn is_versioned(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(crate::vmlinux::is_release)
}

/// The program called `name` in the system's directories.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    crate::wanted::PROGRAM_DIRS
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distribution_decides_which_packages_are_tried() {
        let debian = candidates("NAME=\"Debian GNU/Linux\"\nID=debian\n");
        assert_eq!(debian, ["linux-image-amd64", "linux-image-cloud-amd64"]);
        let mint = candidates("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n");
        assert_eq!(mint[0], "linux-image-generic");
        assert_eq!(candidates("").len(), 4);
    }

    #[test]
    fn a_debian_metapackage_leads_to_one_package() {
        let meta =
            "Package: linux-image-amd64\nDepends: linux-image-6.1.0-56-amd64 (= 6.1.192-2)\n";
        let show = |name: &str| {
            (name == "linux-image-6.1.0-56-amd64")
                .then(|| "Depends: kmod, linux-base (>= 4.3~), initramfs-tools | dracut\n".into())
        };
        assert_eq!(resolve(meta, show).unwrap(), ["linux-image-6.1.0-56-amd64"]);
        assert_eq!(resolve(meta, |_| None), None);
    }

    #[test]
    fn an_ubuntu_metapackage_leads_to_image_and_modules() {
        let meta = "Depends: linux-image-6.8.0-31-generic, linux-modules-extra-6.8.0-31-generic, \
             linux-firmware, intel-microcode\n";
        let show = |name: &str| match name {
            "linux-image-6.8.0-31-generic" => {
                Some("Depends: kmod, linux-modules-6.8.0-31-generic\n".to_owned())
            }
            name if name.starts_with("linux-modules") => Some("Package: x\n".to_owned()),
            _ => None,
        };
        assert_eq!(
            resolve(meta, show).unwrap(),
            [
                "linux-image-6.8.0-31-generic",
                "linux-modules-6.8.0-31-generic",
                "linux-modules-extra-6.8.0-31-generic"
            ]
        );
    }
}
