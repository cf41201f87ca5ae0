// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tools of other hypervisors, and QEMU's guest agent.

use crate::Result;
use crate::facts::{Init, Packages};
use crate::reader::Reader;
use serde::Serialize;
use std::collections::BTreeSet;

/// Tools of one hypervisor that are in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HypervisorTool {
    /// Whose tools they are: `vmware`, `virtualbox`, `parallels`, `xen`, `hyper-v`.
    pub hypervisor: String,
    /// Their installed packages.
    pub packages: Vec<String>,
    /// systemd units that start them.
    pub units: Vec<String>,
    /// Scripts in `/etc/init.d` that start them.
    pub scripts: Vec<String>,
}

/// Whether QEMU's guest agent is in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AgentState {
    /// It is installed.
    Present,
    /// It is not.
    Absent,
}

/// How the tools of one hypervisor are recognised; `*` at the end of a name means any rest.
struct Known {
    hypervisor: &'static str,
    packages: &'static [&'static str],
    services: &'static [&'static str],
}

const KNOWN: &[Known] = &[
    Known {
        hypervisor: "vmware",
        packages: &["open-vm-tools*", "vmware-tools*", "VMwareTools", "kmod-vmware-tools*"],
        services: &[
            "open-vm-tools",
            "vmtoolsd",
            "vgauth",
            "vgauthd",
            "vmware-tools*",
            "run-vmblock*",
        ],
    },
    Known {
        hypervisor: "virtualbox",
        packages: &["virtualbox-guest-*"],
        services: &["vboxadd*", "vboxservice", "virtualbox-guest-utils"],
    },
    Known {
        hypervisor: "parallels",
        packages: &["parallels-tools*"],
        services: &["prltoolsd", "prl-x11"],
    },
    Known {
        hypervisor: "xen",
        packages: &["xe-guest-utilities*", "xen-guest-agent"],
        services: &["xe-linux-distribution", "xe-daemon", "xen-guest-agent"],
    },
    Known {
        hypervisor: "hyper-v",
        packages: &["hyperv-daemons", "linux-cloud-tools-*"],
        services: &[
            "hv-kvp-daemon",
            "hv-vss-daemon",
            "hv-fcopy-daemon",
            "hv-fcopy-uio-daemon",
            "hypervkvpd",
            "hypervvssd",
            "hypervfcopyd",
        ],
    },
];

/// Directories that hold systemd's units, the guest's own first.
pub(crate) const UNIT_DIRECTORIES: &[&str] =
    &["/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];

/// Finds the tools by their packages, units and scripts.
pub(crate) fn tools(
    reader: &Reader<'_>,
    init: Init,
    packages: &Packages,
) -> Result<Vec<HypervisorTool>> {
    let units = units(reader)?;
    // With systemd the scripts are compatibility copies of the units.
    let scripts = match init {
        Init::Systemd { .. } => Vec::new(),
        _ => reader.names("/etc/init.d")?,
    };
    let tools = KNOWN.iter().map(|known| HypervisorTool {
        hypervisor: known.hypervisor.to_owned(),
        packages: packages
            .list()
            .iter()
            .map(|package| package.name.clone())
            .filter(|name| matches_any(known.packages, name))
            .collect(),
        units: units
            .iter()
            .filter(|unit| {
                let name = unit.strip_suffix(".service").or_else(|| unit.strip_suffix(".mount"));
                name.is_some_and(|name| matches_any(known.services, name))
            })
            .cloned()
            .collect(),
        scripts: scripts.iter().filter(|name| matches_any(known.services, name)).cloned().collect(),
    });
    Ok(tools
        .filter(|tool| {
            !(tool.packages.is_empty() && tool.units.is_empty() && tool.scripts.is_empty())
        })
        .collect())
}

/// Names of all units, without duplicates, except those that are masked already.
fn units(reader: &Reader<'_>) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for directory in UNIT_DIRECTORIES {
        found.extend(reader.names(*directory)?);
    }
    let mut unmasked = BTreeSet::new();
    for unit in found {
        let known = unit.strip_suffix(".service").or_else(|| unit.strip_suffix(".mount"));
        if !known.is_some_and(|name| KNOWN.iter().any(|tool| matches_any(tool.services, name))) {
            continue;
        }
        if reader.link(format!("/etc/systemd/system/{unit}").as_str())?.as_deref()
            != Some("/dev/null")
        {
            unmasked.insert(unit);
        }
    }
    Ok(unmasked)
}

/// Looks for the agent's program and package.
pub(crate) fn agent(reader: &Reader<'_>, packages: &Packages) -> Result<AgentState> {
    let mut present = packages.find("qemu-guest-agent").is_some();
    for program in ["/usr/sbin/qemu-ga", "/usr/bin/qemu-ga", "/sbin/qemu-ga"] {
        present |= reader.has_file(program)?;
    }
    Ok(if present { AgentState::Present } else { AgentState::Absent })
}

fn matches_any(patterns: &[&str], name: &str) -> bool {
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == *pattern,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::FolderTree;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn masked_units_are_no_longer_tools() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["lib/systemd/system", "etc/systemd/system"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        for unit in ["open-vm-tools.service", "vgauth.service", "ssh.service"] {
            fs::write(dir.path().join("lib/systemd/system").join(unit), "").unwrap();
        }
        symlink("/dev/null", dir.path().join("etc/systemd/system/vgauth.service")).unwrap();
        let tree = FolderTree::new(dir.path());
        let init = Init::Systemd { version: None };
        let found = tools(&Reader::new(&tree), init, &Packages::None).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].units, ["open-vm-tools.service"]);
    }
}
