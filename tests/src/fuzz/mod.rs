// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What fuzzing does with hostile bytes: one function for each format, which panics where a
//! format does not keep its promises.
//!
//! Each works in memory and has two users: a fuzz target of the same name, which is looked
//! after by a coverage-guided fuzzer, and the test `regressions`, which replays what the
//! fuzzer has found. [`Case`] is how a disk is written down for the fuzzer.
#![allow(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "panicking is how findings are told"
)]

mod allocation;
mod case;
mod changes;
mod disk;
mod image;
mod nbd;
mod packed;
mod qcow2;
mod readers;
mod seal;
mod subject;
mod tar;
mod vhdx;
mod vmdk;
mod vpc;

pub use allocation::Limited;
pub use case::{Case, Contents, Op};
pub use image::Image;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of the folders with its corpus and its findings.
    pub name: &'static str,
    /// Does everything to the input; panics if something is wrong.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "qcow2", run: qcow2::run },
    Target { name: "vhdx", run: vhdx::run },
    Target { name: "vmdk", run: vmdk::run },
    Target { name: "vpc", run: vpc::run },
    Target { name: "vdi", run: readers::vdi },
    Target { name: "qed", run: readers::qed },
    Target { name: "parallels", run: readers::parallels },
    Target { name: "dmg", run: readers::dmg },
    Target { name: "cloop", run: readers::cloop },
    Target { name: "luks", run: readers::luks },
    Target { name: "packed", run: packed::packed },
    Target { name: "tar", run: tar::tar },
    Target { name: "formats", run: packed::formats },
    Target { name: "nbd_server", run: nbd::server },
    Target { name: "nbd_client", run: nbd::client },
    Target { name: "vmm_disk", run: tranship_vmm::fuzzing::disk_requests },
    Target { name: "vmm_console", run: tranship_vmm::fuzzing::console_ports },
    Target { name: "vmm_board", run: tranship_vmm::fuzzing::board },
];

/// Runs the target called `name`.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("the target exists").run)(input);
}
