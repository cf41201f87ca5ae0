// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `/proc` and KVM's counters say about a process with a machine in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Where KVM counts.
const DEBUGFS: &str = "/sys/kernel/debug";

/// Makes KVM's counters visible.
pub(crate) fn mount_debugfs() {
    if Path::new(DEBUGFS).join("kvm").is_dir() {
        return;
    }
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount(c"debugfs", DEBUGFS, c"debugfs", flags, None).unwrap();
}

/// KiB of all mappings that are not the guest's memory, by kind.
///
/// `Pss` shares the pages of the program's file between the processes that use them.
pub(crate) fn beside_guest(process: u32, memory: u64) -> Vec<(&'static str, u64)> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let kinds = ["Rss", "Pss", "Private_Clean", "Private_Dirty"];
    let mut sums = kinds.map(|kind| (kind, 0));
    let mut counts = false;
    for line in text.lines() {
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some((start, end)) = first.split_once('-') {
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            // No other mapping is nearly as large, apart from reserved addresses with nothing in.
            counts = number(end) - number(start) < memory / 4;
        } else if counts
            && let Some(kind) = first.strip_suffix(':')
            && let Some(sum) = sums.iter_mut().find(|(known, _)| *known == kind)
        {
            sum.1 += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    sums.to_vec()
}

/// Counters of a machine at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Counters(BTreeMap<String, i64>);

/// KVM's that are told.
const TOLD: [&str; 8] = [
    "exits",
    "irq_exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_injections",
    "host_state_reload",
    "insn_emulation",
];

impl Counters {
    /// The counters of the machine in this process.
    pub(crate) fn of(process: u32) -> Self {
        let mut all = BTreeMap::new();
        let prefix = format!("{process}-");
        let folder = fs::read_dir(Path::new(DEBUGFS).join("kvm"))
            .unwrap()
            .map(|entry| entry.unwrap())
            .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .unwrap_or_else(|| panic!("KVM knows no machine of process {process}"));
        for name in TOLD {
            if let Ok(text) = fs::read_to_string(folder.path().join(name)) {
                all.insert(name.to_owned(), text.trim().parse().unwrap());
            }
        }
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
        // The name before may have blanks; it ends with a parenthesis.
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let ticks = |number: usize| fields[number - 3].parse::<i64>().unwrap();
        // Time in the guest is part of the time in user space. Ticks are of 10 ms.
        all.insert("user ms".to_owned(), (ticks(14) - ticks(43)) * 10);
        all.insert("system ms".to_owned(), ticks(15) * 10);
        let mut switches = 0;
        for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
            let status =
                fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
            let line =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            switches += line.map_or(0, |text| text.trim().parse().unwrap());
        }
        all.insert("waits".to_owned(), switches);
        Self(all)
    }

    /// The difference, counter by counter.
    pub(crate) fn less(&self, other: &Self) -> Self {
        let value = |name: &String| other.0.get(name).copied().unwrap_or(0);
        Self(self.0.iter().map(|(name, count)| (name.clone(), count - value(name))).collect())
    }

    /// All of them by name.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, i64)> {
        self.0.iter().map(|(name, count)| (name.as_str(), *count))
    }
}
